"""Prompt caches: prefilled once, forked to a group, thinned out and joined while rows decode.

A prompt cache is a list with one entry a layer. It is *plain* while all its rows have read equally
many tokens, and then any row of any kind of cache can be picked by index. Rows of different lengths
need mlx-lm's batch caches, which pad on the left; `company` says whether a model takes those.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
)

from mlx_lora.errors import ModelError
from mlx_lora.models import Split, new_cache, split_head

CHUNK = 512  # tokens of a prompt computed at once
AREA = 8192  # rows times tokens computed at once
GROWTH = 64  # tokens that a batch makes room for at once; mlx-lm's own 256 are for a single row
PROBES = ((1, 2, 3), (4, 5, 6, 7, 8), (9, 10, 11))  # token ids that every model has
AGREE = {mx.float32: 1e-3, mx.float16: 0.1, mx.bfloat16: 0.2}  # in standard deviations of logits
Layers = list[Any]
Sit = Callable[[Sequence[int]], None]  # hears which prompts the rows of the next forward are of


def nobody(prompts: Sequence[int]) -> None:
    """A Sit for rows that are all computed alike."""


@dataclass(frozen=True)
class Bucket:
    """Prompts of one length after prefill: last hidden states [N, D], a plain cache of N rows."""

    hidden_ND: mx.array
    layers: Layers


def prefill(
    model: nn.Module, prompts: Sequence[Sequence[int]], prompt_of_B: Sequence[int]
) -> tuple[mx.array, Layers]:
    """Last hidden state [B, D] and a cache of B rows; row b continues prompts[prompt_of_B[b]].

    Each prompt is computed once; those of one length run together. Gradients flow through.
    """
    places = prefilled(model, prompts)
    return forked([places[p] for p in prompt_of_B])


def prefilled(
    model: nn.Module, prompts: Sequence[Sequence[int]], sit: Sit = nobody
) -> list[tuple[Bucket, int]]:
    """For each prompt its bucket and its row there."""
    split = split_head(model)
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)
    found: dict[int, tuple[Bucket, int]] = {}
    for length, indexes in by_length.items():
        rows = max(1, AREA // min(length, CHUNK))
        for begin in range(0, len(indexes), rows):
            block = indexes[begin : begin + rows]
            sit(block)
            bucket = read(split, model, mx.array([list(prompts[i]) for i in block]))
            found |= {i: (bucket, row) for row, i in enumerate(block)}
    return [found[i] for i in range(len(prompts))]


def read(split: Split, model: nn.Module, ids_NL: mx.array) -> Bucket:
    """Feed prompts of one length to a fresh cache, a chunk at a time, to bound the memory.

    Where body and head do not part, the last token goes alone: what is not asked for is not
    computed, so that no other token of the prompt meets the vocabulary.
    """
    layers, length, begin = new_cache(model), ids_NL.shape[1], 0
    while length - begin > (1 if split.body is model else CHUNK):
        end = min(begin + CHUNK, length - 1)
        split.body(ids_NL[:, begin:end], cache=layers)
        mx.eval([layer.state for layer in layers if not layer.empty()])
        begin = end
    return Bucket(split.body(ids_NL[:, begin:], cache=layers)[:, -1, :], layers)


def forked(places: Sequence[tuple[Bucket, int]]) -> tuple[mx.array, Layers]:
    """Hidden states [B, D] and a cache of the rows at these places, each as often as asked for.

    Rows of one bucket keep the plain cache, which every model accepts.
    """
    buckets = list({id(bucket): bucket for bucket, _ in places}.values())
    starts = dict(zip(map(id, buckets), _starts(buckets), strict=True))
    row_of_B = mx.array([starts[id(bucket)] + row for bucket, row in places])
    hidden_ND = mx.concatenate([bucket.hidden_ND for bucket in buckets])
    layers = joined([bucket.layers for bucket in buckets], [len(b.hidden_ND) for b in buckets])
    return hidden_ND[row_of_B], picked(layers, row_of_B, len(hidden_ND))


def _starts(buckets: Sequence[Bucket]) -> list[int]:
    """The first row of each bucket when they follow each other."""
    sizes = [len(b.hidden_ND) for b in buckets]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def picked(layers: Layers, row_of_B: mx.array, rows: int) -> Layers:
    """The cache of these rows out of `rows`, some perhaps twice. The old one stays whole."""
    return [_picked(layer, row_of_B, rows) for layer in layers]


def _picked(layer: Any, row_of_B: mx.array, rows: int) -> Any:
    layer = lean(layer)
    if isinstance(layer, BatchKVCache):  # its own way also drops padding that all rows share
        layer.filter(row_of_B)
        return layer
    return each_array(layer, lambda x: x[row_of_B] if x.ndim and len(x) == rows else mx.array(x))


def lean(layer: Any) -> Any:
    """The same cache without the room ahead of its tokens, of which every copy is a waste."""
    kept: Any = copy.copy(layer)
    if isinstance(layer, KVCache | BatchKVCache) and not layer.empty():
        tokens = layer.size()
        kept.step = GROWTH
        kept.keys, kept.values = kept.keys[..., :tokens, :], kept.values[..., :tokens, :]
    return kept


def each_array(value: Any, function: Callable[[mx.array], mx.array]) -> Any:
    """The same structure of caches, lists and tuples with every array in it replaced."""
    if isinstance(value, mx.array):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(each_array(v, function) for v in value)
    if not hasattr(value, "__dict__"):
        return value
    value = copy.copy(value)
    for name, inside in vars(value).items():
        setattr(value, name, each_array(inside, function))
    return value


def joined(parts: Sequence[Layers], rows: Sequence[int]) -> Layers:
    """One cache of all rows of several, in order, left-padded where they read unequally much.

    Halves are joined first, so that a row is copied only log(parts) times.
    """
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    first, second = joined(parts[:half], rows[:half]), joined(parts[half:], rows[half:])
    counts = sum(rows[:half]), sum(rows[half:])
    return [_joined(a, b, *counts) for a, b in zip(first, second, strict=True)]


def _joined(a: Any, b: Any, rows_a: int, rows_b: int) -> Any:
    both = padded(a, rows_a)
    both.extend(padded(b, rows_b))
    return both


def padded(layer: Any, rows: int) -> Any:
    """A layer's cache in the form that takes rows of different lengths. ModelError if none does."""
    if isinstance(layer, CacheList):
        return CacheList(*(padded(part, rows) for part in layer.caches))
    layer = lean(layer)
    if isinstance(layer, BatchKVCache | BatchRotatingKVCache | ArraysCache):
        return layer
    if type(layer) is KVCache:
        wide: Any = BatchKVCache([0] * rows)
        wide.keys, wide.values, wide._idx = layer.keys, layer.values, layer.offset
    elif type(layer) is RotatingKVCache and not layer.keep:
        wide = BatchRotatingKVCache(layer.max_size, [0] * rows)
        size = layer.size()
        wide.keys = layer._temporal_order(layer.keys)[..., -size:, :]
        wide.values = layer._temporal_order(layer.values)[..., -size:, :]
        wide._idx = wide._offset = size
    else:
        raise ModelError(
            f"mlx-lm's {type(layer).__name__} takes no rows of different lengths",
            "Prompts of one length run together; others go one after the other.",
        )
    wide.offset = mx.array([layer.offset] * rows)
    return wide


Company = Literal["mixed", "equal", "none"]


def company(model: nn.Module) -> Company:
    """Which rows may decode together: `mixed`, any; `equal`, those of one prompt length; `none`.

    Some models take no left-padded batch, and some of those say nothing and are wrong, so it is
    tried on a few tokens against each row alone. The answer is remembered on the model.
    """
    if "_company" not in model.__dict__:
        same_length = [ids[:3] for ids in PROBES]
        mixes = agrees(model, PROBES)
        kept: Company = "mixed" if mixes else "equal" if agrees(model, same_length) else "none"
        model.__dict__["_company"] = kept
    return model.__dict__["_company"]


def agrees(model: nn.Module, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether rows that are forked, joined and thinned out give the logits they give alone."""
    try:
        together = probed(model, prompts)
        alone = mx.concatenate([probed(model, [prompt]) for prompt in prompts])
        limit = AGREE[alone.dtype]
        a_K, b_K = (np.array(x.astype(mx.float32)).ravel() for x in (together, alone))
        real_K = a_K != b_K  # equal ones may be minus infinity, of tokens that are never written
        finite_K = b_K[np.isfinite(b_K)]
        spread = np.std(finite_K) if finite_K.size else 0.0  # a broken model agrees on nothing
        return bool(np.all(np.abs(a_K[real_K] - b_K[real_K]) < limit * spread))
    except Exception:  # whatever a model says about a batch that it does not take
        return False


def probed(model: nn.Module, prompts: Sequence[Sequence[int]]) -> mx.array:
    """Logits [B, 4, V] after the prompts and three more tokens, read by a cache with a past.

    The rows are forked twice over, and thinned out again after a token, as rows that end are.
    """
    split, rows = split_head(model), len(prompts)
    hidden_BD, layers = prefill(model, prompts, [*range(rows), *range(rows)])
    logits = [split.head(hidden_BD)[:rows]]
    for token in PROBES[1][:3]:
        hidden_BD = split.body(mx.full((len(hidden_BD), 1), token), cache=layers)[:, -1, :]
        if len(hidden_BD) > rows:
            hidden_BD, layers = hidden_BD[:rows], picked(layers, mx.arange(rows), len(hidden_BD))
        logits.append(split.head(hidden_BD))
    return mx.stack(logits, axis=1)
