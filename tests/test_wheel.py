"""The wheel is what a user gets: it installs, runs away from the repository, and has its data."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, code: int = 0) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An environment with nothing but the wheel, built offline; its dependencies are ours, by path.

    The path comes after its own packages, and .pth files in there are not read: the editable
    install that these tests run on cannot be what is found.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", ROOT, "-w", folder, "--no-deps", "--no-build-isolation", cwd=folder)
    (wheel,) = folder.glob("mlx_lora-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=folder)
    run(*pip, "--python", "env", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(ours)) + "\n", encoding="utf-8")
    return folder / "env" / "bin" / "python"


def test_it_is_the_wheel_that_runs(python, tmp_path):
    code = "import mlx_lora; print(mlx_lora.__file__)"
    package = Path(run(python, "-c", code, cwd=tmp_path).strip()).parent
    assert package.is_relative_to(python.parent.parent)
    assert list(package.glob("configs/*.yaml")), "no experiment files in the wheel"
    assert list(package.glob("assets/*/*.safetensors")), "no embedded model in the wheel"
    shipped = {p.relative_to(package) for p in package.rglob("*.py")}
    assert shipped == {p.relative_to(ROOT / "mlx_lora") for p in ROOT.glob("mlx_lora/**/*.py")}


def test_version(python, tmp_path):
    version = run(python, "-m", "mlx_lora", "--version", cwd=tmp_path)
    assert version == run(python.parent / "mlx-lora", "--version", cwd=tmp_path)
    assert version.split()[-1] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_check_demo(python, tmp_path):
    report = json.loads(run(python.parent / "mlx-lora", "check", "demo", "--json", cwd=tmp_path))
    assert report["verdict"] == "pass" and report["bitwise_identical"] is True
    assert not list(tmp_path.iterdir()), "a check leaves nothing behind"
