"""Less memory for more work: what a block computes is let go, and made again to go backward.

mlx-lm's `grad_checkpoint` changes a class for good, for all models that have it, and once more at
each call. Here the blocks of one model get a class of their own, and their old one back afterwards.
A block may write into its cache, as it does when prompts are shared: the cache's arrays are then
arguments and results of the block like any others.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import count, repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.cache import _BaseCache


def recomputed(
    module: nn.Module, work: Callable[..., Any], *arrays: mx.array, at_once: bool = True
) -> Any:
    """work(*arrays), differentiable in the arrays and the module, and nothing in between kept.

    `at_once` evaluates each such piece before the next begins, which bounds the memory however MLX
    orders the rest; mx.compile does not allow it.
    """
    kept, runs = module.trainable_parameters(), count()
    stream: Any = mx.random.state  # which dropout draws from
    drawn = mx.array(stream[0])

    def inner(parameters: Any, *arrays: mx.array) -> Any:
        again, now = next(runs) > 0, mx.array(stream[0])
        module.update(parameters)
        stream[0][:] = drawn
        try:
            return work(*arrays)
        finally:
            module.update(kept)
            if again:
                stream[0][:] = now

    return (cut_off if at_once else mx.checkpoint)(inner)(kept, *arrays)


def cut_off(work: Callable[..., Any]) -> Callable[..., Any]:
    """As mx.checkpoint, but done at once, on arrays that no trace holds on to.

    What is evaluated inside a trace stays until the trace ends, unless it is a copy.
    """

    @mx.custom_function
    def done(*given):
        return tree_map(untraced, work(*tree_map(untraced, given)))

    @done.vjp
    def done_vjp(primals, cotangents, outputs):
        names, arrays = zip(*tree_flatten(primals), strict=True)
        floats = [i for i, x in enumerate(arrays) if mx.issubdtype(x.dtype, mx.floating)]
        fixed = [untraced(x) for x in arrays]

        def flat(*moving: mx.array) -> list[mx.array]:
            all_ = list(fixed)
            for i, x in zip(floats, moving, strict=True):
                all_[i] = x
            given = tree_unflatten(list(zip(names, all_, strict=True)))
            return leaves(work(*given))

        bars = [untraced(x) for x in leaves(cotangents)]
        _, slopes = mx.vjp(flat, [fixed[i] for i in floats], bars)
        found = [mx.zeros_like(x) for x in fixed]
        for i, slope in zip(floats, slopes, strict=True):
            found[i] = untraced(slope)
        return tuple(tree_unflatten(list(zip(names, found, strict=True))))

    return done


def leaves(tree: Any) -> list[mx.array]:
    """The arrays of a tree."""
    flat: Any = tree_flatten(tree)
    return [x for _, x in flat]


def untraced(x: mx.array) -> mx.array:
    """A copy that no transformation follows. Evaluates."""
    plain = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
    return mx.array(np.array(plain)).view(x.dtype)


@contextlib.contextmanager
def recomputing(blocks: Sequence[Any], *, on: bool = True, at_once: bool = True) -> Iterator[None]:
    """Inside, each of these blocks is made again in the backward pass; outside it is as it was."""
    before = [(block, type(block)) for block in {id(b): b for b in blocks if on}.values()]
    for block, kind in before:
        block.__class__ = recomputing_twin(kind, at_once)
    try:
        yield
    finally:
        for block, kind in before:
            block.__class__ = kind


@cache
def recomputing_twin(parent: type, at_once: bool) -> type:
    """The class of a block that keeps what goes in and what comes out."""

    def call(self: Any, *given: Any, **named: Any) -> Any:
        asked = rebuilt((given, named), iter(arrays_of((given, named))))  # as it is now
        made: list[Any] = []  # the form of the results

        def work(*arrays: mx.array) -> list[mx.array]:
            given, named = rebuilt(asked, iter(arrays))
            found = parent.__call__(self, *given, **named)
            results = [found, [vars(c) for c in caches_of((given, named))]]
            made[:] = rebuilt(results, repeat(mx.array(0)))  # which holds on to no array
            return arrays_of(results)

        results = recomputed(self, work, *arrays_of(asked), at_once=at_once)
        found, states = rebuilt(made, iter(results))
        for c, state in zip(caches_of((given, named)), states, strict=True):
            vars(c).update(state)
        return found

    return type(f"Recomputing{parent.__name__}", (parent,), {"__call__": call})


def parts_of(x: Any) -> Sequence[Any]:
    """What a container or a cache consists of, in a fixed order."""
    if isinstance(x, _BaseCache):
        return list(vars(x).values())
    return list(x.values()) if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()


def arrays_of(x: Any) -> list[mx.array]:
    """Every array in it, however deep.

    >>> len(arrays_of(({"mask": mx.zeros(1), "cache": None}, [mx.zeros(2)])))
    2
    """
    if isinstance(x, mx.array):
        return [x]
    return [array for part in parts_of(x) for array in arrays_of(part)]


def caches_of(x: Any) -> list[Any]:
    """Every cache in it; one inside another is the other's affair."""
    if isinstance(x, _BaseCache):
        return [x]
    return [found for part in parts_of(x) for found in caches_of(part)]


def rebuilt(x: Any, arrays: Iterator[mx.array]) -> Any:
    """A copy with other arrays in the places of its own, in the order of `arrays_of`."""
    if isinstance(x, mx.array):
        return next(arrays)
    if isinstance(x, _BaseCache):
        other = copy.copy(x)
        vars(other).update({k: rebuilt(v, arrays) for k, v in vars(x).items()})
        return other
    if isinstance(x, dict):
        return {k: rebuilt(v, arrays) for k, v in x.items()}
    if isinstance(x, list | tuple):
        parts = [rebuilt(part, arrays) for part in x]
        return parts if isinstance(x, list) else tuple(parts)
    return x
