"""What every test shares: no network, no display, repeatable properties, and the real CLI."""

import os
import subprocess
import sys
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
