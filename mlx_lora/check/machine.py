"""What logits may depend on beside the files: versions, device, and the BLAS that multiplies."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora import cpu
from mlx_lora.runlog import environment

SYMBOLS = ("openblas_get_{}", "openblas_get_{}64_", "scipy_openblas_get_{}64_")


def machine() -> dict[str, Any]:
    """What `environment.json` holds, with the device, its processor, and the OpenBLAS in use."""
    mode = cpu.mode()
    return environment(blas=mode) | {
        "device": str(mx.default_device()),
        "processor": mx.device_info().get("device_name"),
        "openblas": openblas(mode),
    }


def openblas(mode: str) -> str | None:
    """Version, kernels and threads of the OpenBLAS that this CPU path multiplies with.

    Products differ in their last bits between any of these. None where it is not OpenBLAS.
    """
    return next((text for library in libraries(mode) if (text := described(library))), None)


def libraries(mode: str) -> Iterator[ctypes.CDLL]:
    """The system's OpenBLAS, or the one in NumPy's wheel. Opened already, so that this is quick."""
    wheel = Path(np.__file__).parents[1] / "numpy.libs"
    names = {"openblas": cpu.LIBRARIES, "numpy": sorted(wheel.glob("*openblas*"))}.get(mode, ())
    for name in names:
        try:
            yield ctypes.CDLL(str(name))
        except OSError:
            continue


def described(library: ctypes.CDLL) -> str | None:
    """For example "OpenBLAS 0.3.21 DYNAMIC_ARCH Cooperlake MAX_THREADS=64, 2 threads"."""
    for symbol in SYMBOLS:
        config = getattr(library, symbol.format("config"), None)
        threads = getattr(library, symbol.format("num_threads"), None)
        if config and threads:
            config.restype = ctypes.c_char_p
            return f"{' '.join(config().decode().split())}, {threads()} threads"
    return None
