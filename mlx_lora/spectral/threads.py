"""Many small decompositions at once: a thread a core, each with a BLAS that uses no others.

An OpenBLAS with threads of its own under a pool of threads spins: a second becomes a minute.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")
Found = TypeVar("Found")
NAMES = (
    "scipy_openblas_{}_num_threads64_",
    "openblas_{}_num_threads64_",
    "openblas_{}_num_threads",
)


def each(work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """`work` of every item, in order."""
    with one_thread_each(), ThreadPoolExecutor(min(len(items), os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Inside, NumPy's OpenBLAS does not share out its work. Nothing where it has another BLAS."""
    count = threads()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(count)


def threads() -> int:
    """What NumPy's OpenBLAS computes with; 1 where it has another BLAS."""
    found = control()
    return int(found[0]()) if found else 1


def set_threads(count: int) -> None:
    if found := control():
        found[1](count)


@cache
def control() -> tuple[Any, Any] | None:
    """OpenBLAS's own functions that get and set the number of threads, in NumPy's wheel."""
    folder = Path(np.__file__).parents[1] / "numpy.libs"
    for file in sorted(folder.glob("*openblas*")):
        library = ctypes.CDLL(str(file))
        for name in NAMES:
            if hasattr(library, name.format("set")):
                return tuple(getattr(library, name.format(verb)) for verb in ("get", "set"))
    return None
