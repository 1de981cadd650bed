"""What the README shows works."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pass ")


def test_every_local_link_and_command_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and not [x for x in links if not (ROOT / x).exists()]
    helped = subprocess.run(
        [sys.executable, "-m", "mlx_lora", "--help"], capture_output=True, text=True
    ).stdout
    commands = set(re.findall(r"mlx-lora (\w+)", README))
    assert commands and not {c for c in commands if c not in helped}
    assert "@@" not in README, "a figure is missing"
