"""What every test shares: no network, no display, repeatable properties, and the real CLI."""

import contextlib
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    NO_COLOR="1",
)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two test workers share two cores

import pytest
from hypothesis import settings

import mlx_lora  # noqa: F401  before any test imports mlx.core, so that OpenBLAS can come first
from mlx_lora.cli import main

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def run_cli(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_cli("check", "demo")`: the command in its own process, in an empty folder or `cwd`."""
    empty = tmp_path_factory.mktemp("cwd")

    def run(*args: object, cwd: Path = empty, timeout: float = 300):
        command = [sys.executable, "-m", "mlx_lora", *map(str, args)]
        return subprocess.run(command, cwd=cwd, timeout=timeout, capture_output=True, text=True)

    return run


@pytest.fixture
def run_here(tmp_path_factory, monkeypatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same in this process: for commands that end before any work."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))

    def run(*args: object):
        command, out, err = ["mlx-lora", *map(str, args)], io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", command)
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else bool(end.code)
            except Exception:
                traceback.print_exc()  # as Python does at the end of a process
                code = 1
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    return run
