"""The most memory that work takes: MLX's count, and on the CPU's fast path NumPy's too."""

import contextlib
import ctypes
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from mlx_lora import cpu

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], int]]:
    """What it yields tells the peak so far, in bytes: of arrays that are there now, and of more.

    Where NumPy computes, the growth of the process stands for what MLX does not count.
    """
    mx.clear_cache()
    mx.reset_peak_memory()
    before, resident = mx.get_active_memory(), None
    if cpu.fast():
        give_back()
        resident = highest(reset=True)

    def peak() -> int:
        if resident is None:
            return mx.get_peak_memory()
        return max(mx.get_peak_memory(), before + (highest() or resident) - resident)

    yield peak


def give_back() -> None:
    """Return free memory to the system, so that its reuse counts as growth. Where glibc is."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def highest(*, reset: bool = False) -> int | None:
    """Bytes of memory that this process had at most since the last reset; None if unknown."""
    try:
        if reset:
            CLEAR.write_text("5")
        lines = STATUS.read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def counted(work: Callable[[], object]) -> int:
    """Bytes that work takes at most above what is there, by MLX's count and by NumPy's.

    Slower than `watched` and exact: an upper bound, as the two peaks need not coincide.
    """
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    try:
        work()
        return mx.get_peak_memory() - before + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
