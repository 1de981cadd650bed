"""Machines that MLX does not run on, said clearly instead of by an import error."""

import platform
import sys

from mlx_lora.errors import PlatformError

PYTHON, MACOS = (3, 11), (14, 0)


def problem(
    system: str = sys.platform,
    machine: str | None = None,
    python: tuple[int, ...] = sys.version_info[:2],
    macos: str | None = None,
) -> PlatformError | None:
    """What is wrong with this machine, or None.

    >>> problem("darwin", "x86_64", (3, 12), "15.1").hint
    'Use a Mac with an M-series chip, or Linux.'
    """
    machine = machine or platform.machine()
    if python < PYTHON:
        return PlatformError(
            f"Python {'.'.join(map(str, python))} is too old",
            "mlx-lora needs Python 3.11 or newer.",
        )
    if system == "darwin" and machine == "x86_64":
        return PlatformError(
            "this is an Intel Mac (or an x86 Python under Rosetta), which MLX does not support",
            "Use a Mac with an M-series chip, or Linux.",
        )
    if system == "darwin":
        version = macos or platform.mac_ver()[0]
        if version and tuple(int(x) for x in version.split(".")[:2]) < MACOS:
            return PlatformError(f"macOS {version} is too old", "MLX needs macOS 14 or newer.")
    if system not in ("darwin", "linux"):
        return PlatformError(f"{system} is not supported", "mlx-lora runs on macOS and Linux.")
    return None
