"""Work split over the cores, each part with a BLAS of one thread.

A BLAS shares out only its products, of small ones not even these, and its threads spin while they
wait: on a busy machine that costs ten times what it gains. NumPy lets go of the interpreter in
every large operation, so that plain threads serve for all of the work.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from threadpoolctl import LibController, ThreadpoolController

Part = TypeVar("Part")
Found = TypeVar("Found")


@cache
def workers() -> int:
    """Threads that NumPy's BLAS was to use: OPENBLAS_NUM_THREADS, or the cores.

    From the first call on, that BLAS has one. The system's, which MLX calls, keeps its own.
    """
    count = max((library.num_threads or 1 for library in numpys_blas()), default=1)
    for library in numpys_blas():
        library.set_num_threads(1)
    return count


@cache
def numpys_blas() -> list[LibController]:
    """The BLAS in NumPy's own folders; none where it has another."""
    blas = ThreadpoolController().select(user_api="blas").lib_controllers
    site = Path(np.__file__).resolve().parents[1]
    own = site / "numpy", site / "numpy.libs"
    return [b for b in blas if any(Path(b.filepath).resolve().is_relative_to(x) for x in own)]


@cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers(), thread_name_prefix="mlx-lora")


def spread(work: Callable[[Part], Found], parts: Sequence[Part]) -> list[Found]:
    """`work` of every part, in order: one here, the others in threads."""
    if len(parts) == 1:
        return [work(parts[0])]
    others = [pool().submit(work, part) for part in parts[1:]]
    return [work(parts[0]), *(other.result() for other in others)]


def each(work: Callable[[Part], Found], items: Sequence[Part]) -> list[Found]:
    """`work` of every item, in order. BLAS gets its threads back: the fast path may be off."""
    with one_thread_each(), ThreadPoolExecutor(min(len(items), os.cpu_count() or 1)) as threads:
        return list(threads.map(work, items))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Inside, NumPy's BLAS does not share out its work."""
    before = [(library, library.num_threads) for library in numpys_blas()]
    for library, _ in before:
        library.set_num_threads(1)
    try:
        yield
    finally:
        for library, count in before:
            library.set_num_threads(count)


def slices(rows: int, least: int) -> list[slice]:
    """As many equal parts of some rows as there are workers, none of fewer than `least` rows.

    >>> slices(3, 4)
    [slice(0, 3, None)]
    """
    count = max(1, min(workers(), rows // max(1, least)))
    edges = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
