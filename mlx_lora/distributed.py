"""Several machines, one run: what replicas tell each other. Alone, every function is a no-op.

`mlx.launch` starts one process a machine. All of them take the same steps: each samples its part of
the prompts, everybody hears all rollouts, each computes the gradient of its part of the rows, and
the sum of the gradients moves all replicas alike. Rank 0 writes.
"""

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlx_lora.errors import RunError, UserError

T = TypeVar("T")


@functools.cache
def group() -> mx.distributed.Group:
    """All processes of this run; a group of one where it was not launched as several."""
    return mx.distributed.init()


def rank() -> int:
    return group().rank()


def size() -> int:
    return group().size()


def leads() -> bool:
    """True in the process that writes files and speaks."""
    return rank() == 0


@contextlib.contextmanager
def own_folder(folder: Path | None) -> Iterator[Path | None]:
    """The folder to write in: the leader's as given, of the others one that vanishes."""
    if leads():
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / "run"


def agreed(thing: T) -> T:
    """What rank 0 says: plain JSON data. Decisions that a rounding could tip are made once."""
    return everybody(thing)[0]


def mine(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of a sequence: as equal as can be, in order, and together everything."""
    edges = [len(items) * r // size() for r in range(size() + 1)]
    return items[edges[rank()] : edges[rank() + 1]]


def everybody(thing: Any) -> list[Any]:
    """What each rank says, in rank order: plain JSON data."""
    if size() == 1:
        return [thing]
    own = np.frombuffer(json.dumps(thing).encode(), np.uint8)
    lengths = np.array(gathered(mx.array([own.size], mx.int64)))
    wide = np.zeros(int(lengths.max()), np.uint8)
    wide[: own.size] = own
    rows = np.array(gathered(mx.array(wide))).reshape(size(), -1)
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)]


def gathered(array: mx.array) -> mx.array:
    found = mx.distributed.all_gather(array, group=group())
    mx.eval(found)
    return found


def everything(part: Callable[[], Sequence[Any]]) -> list[Any]:
    """The parts of all ranks as one list.

    A UserError on one rank is raised on all: the others would wait forever for it.
    """
    if size() == 1:
        return list(part())
    problem, own = None, []
    try:
        own = list(part())
    except UserError as error:
        problem = [error.kind, str(error), error.hint]
    said = everybody({"problem": problem, "part": own})
    for number, word in enumerate(said):
        if word["problem"]:
            kind, message, hint = word["problem"]
            raise RunError(f"rank {number}: {kind}: {message}", hint)
    return [item for word in said for item in word["part"]]


def summed(tree: Any) -> Any:
    """The sum over all ranks of a tree of float arrays, in one message."""
    if size() == 1:
        return tree
    flat: Any = sorted(tree_flatten(tree), key=itemgetter(0))  # ranks may differ in its order
    joined = mx.concatenate([x.reshape(-1).astype(mx.float32) for _, x in flat])
    total = mx.distributed.all_sum(joined, group=group())
    mx.eval(total)
    parts, start = {}, 0
    for name, x in flat:
        parts[name] = total[start : start + x.size].reshape(x.shape).astype(x.dtype)
        start += x.size
    return tree_map_with_path(lambda name, _: parts[name], tree)


def from_first(tree: Any) -> Any:
    """Rank 0's values of a tree of arrays that all ranks have in the same shape."""
    if size() == 1:
        return tree
    return summed(tree_map(lambda x: x if leads() else mx.zeros_like(x), tree))


def refuse_difference(what: str, tree: Any) -> None:
    """RunError unless all ranks hold the same bits."""
    if size() == 1:
        return
    hasher = hashlib.blake2b(digest_size=16)
    flat: Any = tree_flatten(tree)
    for name, x in sorted(flat):
        hasher.update(name.encode())
        hasher.update(np.array(mx.contiguous(x).view(mx.uint8)).tobytes())
    prints = everybody(hasher.hexdigest())
    if len(set(prints)) > 1:
        odd = [r for r, p in enumerate(prints) if p != prints[0]]
        raise RunError(
            f"{what} on rank {', '.join(map(str, odd))} is not that of rank 0",
            "All machines need the same files, versions and kind of device.",
        )
