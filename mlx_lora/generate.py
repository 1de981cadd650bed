"""Batched decoding: many prompts, several completions each, one fixed width.

Each prompt is prefilled once, its cache forked to the group, and all rows decode together at a
fixed width. Sampled ids are kept as drawn, with the log-probability of the distribution that drew
them. A row's randomness depends on (seed, step, prompt index, member) alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache

from mlx_lora import cpu
from mlx_lora.adapter.dora import frozen_norms
from mlx_lora.errors import ModelError
from mlx_lora.models import Loaded, encode_prompt, eos_ids, new_cache, plain_cache, split_head
from mlx_lora.numerics import exp, log_softmax
from mlx_lora.types import Rollout

CHECK_EVERY = 8  # decode steps between looks at "is everybody done", which cost a sync on a GPU


def generate(
    loaded: Loaded,
    prompts: Sequence[str],
    *,
    group: int = 1,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    step: int = 0,
) -> list[list[Rollout]]:
    """`group` completions of each prompt. Temperature 0 is greedy (log-probabilities then at 1)."""
    prompts_ids = [encode_prompt(loaded.tokenizer, p) for p in prompts]
    uniform_BT = noise(seed, step, len(prompts), group, max_tokens)
    prompt_of_B = [p for p in range(len(prompts)) for _ in range(group)]
    eos = eos_ids(loaded.tokenizer)
    drawer = drawer_of(temperature, top_p, top_k)
    with frozen_norms(loaded.model):
        hidden_BD, cache = prefill(loaded.model, prompts_ids, prompt_of_B)
        ids_BT, logps_BT = decode(loaded.model, hidden_BD, cache, uniform_BT, drawer, eos)
    rows = [
        trim(loaded.tokenizer, prompts_ids[row // group], ids_BT[row], logps_BT[row], eos)
        for row in range(len(prompts) * group)
    ]
    return [rows[p * group : (p + 1) * group] for p in range(len(prompts))]


def noise(seed: int, step: int, prompts: int, group: int, width: int) -> mx.array:
    """One uniform number in [0, 1) per row and token, [B, T]. Rows have keys of their own."""
    keys = [member_key(seed, step, p, g) for p in range(prompts) for g in range(group)]
    return mx.vmap(lambda key: mx.random.uniform(shape=(width,), key=key))(mx.stack(keys))


def member_key(seed: int, step: int, prompt: int, member: int) -> mx.array:
    """A random key that is a function of its arguments on any machine."""
    digest = hashlib.blake2s(f"{seed}/{step}/{prompt}/{member}".encode(), digest_size=8).digest()
    return mx.random.key(int.from_bytes(digest, "big"))


def prefill(
    model: nn.Module, prompts: Sequence[Sequence[int]], prompt_of_B: Sequence[int]
) -> tuple[mx.array, list[Any]]:
    """Last hidden state [B, D] and a cache of B rows; row b continues prompts[prompt_of_B[b]].

    Each prompt is computed once; those of one length run together. Plain KV caches are forked by
    one gather, which gradients flow through; others by mlx-lm's own `merge`, prompt by prompt.
    """
    body, plain = split_head(model).body, plain_cache(model)
    buckets: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        buckets.setdefault(len(ids) if plain else index, []).append(index)
    hidden, caches = [], []
    for bucket in buckets.values():
        cache = new_cache(model)
        ids_BT = mx.array([list(prompts[i]) for i in bucket])
        hidden.append(body(ids_BT, cache=cache)[:, -1, :])
        caches.append(cache)
    order = [index for bucket in buckets.values() for index in bucket]
    place_of = {index: row for row, index in enumerate(order)}
    rows = [place_of[p] for p in prompt_of_B]
    layers = list(zip(*caches, strict=True))
    if plain:
        forked = [fork(layer, mx.array(rows)) for layer in layers]
    else:
        forked = [merged([c[i] for i in rows]) for c in layers]
    return mx.concatenate(hidden)[mx.array(rows)], forked


def merged(caches: Sequence[Any]) -> Any:
    """One cache of several rows from single ones, by mlx-lm's own `merge`."""
    kind = type(caches[0])
    if not hasattr(kind, "merge"):
        raise ModelError(
            f"mlx-lm's {kind.__name__} holds one row: this model cannot decode a batch",
            "It can be trained with method sft, and checked with one prompt.",
        )
    return kind.merge(caches)


def fork(buckets: Sequence[Any], row_of_B: mx.array) -> KVCache | BatchKVCache:
    """One cache of B rows from buckets of different lengths, left-padded, rows gathered by index.

    Prompts of a single length need no padding and keep the plain cache, which every model accepts.
    """
    width = max(c.offset for c in buckets)
    if len(buckets) == 1:
        plain = KVCache()
        plain.keys = buckets[0].keys[..., :width, :][row_of_B]
        plain.values = buckets[0].values[..., :width, :][row_of_B]
        plain.offset = width
        return plain
    padding = [width - c.offset for c in buckets for _ in range(c.keys.shape[0])]

    def stack(name: str) -> mx.array:
        parts = [getattr(c, name)[..., : c.offset, :] for c in buckets]
        pads = [[(0, 0), (0, 0), (width - c.offset, 0), (0, 0)] for c in buckets]
        return mx.concatenate([mx.pad(x, p) for x, p in zip(parts, pads, strict=True)])[row_of_B]

    cache = BatchKVCache(np.array(padding)[np.array(row_of_B)].tolist())
    cache.keys, cache.values = stack("keys"), stack("values")
    cache.offset = cache.offset + width
    cache._idx = width
    return cache


def drawer_of(
    temperature: float, top_p: float, top_k: int
) -> Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]:
    """(logits [B, V], uniforms [B]) -> drawn ids [B] and their log-probabilities [B], in nats."""

    def greedy(logits_BV: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        ids_B = mx.argmax(logits_BV, axis=-1)
        return ids_B, pick(log_softmax(logits_BV), ids_B)

    def inverse_cdf(logits_BV: mx.array, uniform_B: mx.array) -> tuple[mx.array, mx.array]:
        logps_BV = sampling_logps(logits_BV, temperature, top_p, top_k)
        cdf_BV = mx.cumsum(exp(logps_BV), axis=-1)
        # the last entry is 1 up to rounding; staying below it never lands on an impossible token
        aim_B1 = uniform_B[:, None] * cdf_BV[:, -1:] * (1 - 1e-6)
        ids_B = mx.sum(cdf_BV <= aim_B1, axis=-1)
        return ids_B, pick(logps_BV, ids_B)

    return greedy if temperature == 0 else inverse_cdf


def sampling_logps(
    logits_BV: mx.array, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> mx.array:
    """Log-probabilities of what is sampled: temperature, then top-k, then top-p."""
    logps_BV = log_softmax(logits_BV / temperature)
    if 0 < top_k < logits_BV.shape[-1]:
        floor_B1 = mx.sort(logps_BV, axis=-1)[:, -top_k][:, None]
        logps_BV = log_softmax(mx.where(logps_BV < floor_B1, -mx.inf, logps_BV))
    if top_p < 1:
        order = mx.argsort(-logps_BV, axis=-1)
        sorted_BV = mx.take_along_axis(exp(logps_BV), order, axis=-1)
        before_BV = mx.cumsum(sorted_BV, axis=-1) - sorted_BV
        out_BV = mx.put_along_axis(mx.zeros_like(before_BV), order, before_BV, axis=-1) >= top_p
        logps_BV = log_softmax(mx.where(out_BV, -mx.inf, logps_BV))
    return logps_BV


def pick(logps_BV: mx.array, ids_B: mx.array) -> mx.array:
    return mx.take_along_axis(logps_BV, ids_B[..., None], axis=-1)[..., 0]


def decode(
    model: nn.Module,
    hidden_BD: mx.array,
    cache: list[Any],
    uniform_BT: mx.array,
    drawer: Callable[[mx.array, mx.array], tuple[mx.array, mx.array]],
    eos: frozenset[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities [B, T] at a fixed width, until every row has ended."""
    rows, width = uniform_BT.shape
    every = 1 if cpu.active() else CHECK_EVERY
    split = split_head(model)
    done_B = np.zeros(rows, bool)
    ids: list[mx.array] = []
    logps: list[mx.array] = []
    for t in range(width):
        ids_B, logps_B = drawer(split.head(hidden_BD).astype(mx.float32), uniform_BT[:, t])
        ids.append(ids_B)
        logps.append(logps_B)
        mx.async_eval(ids_B, logps_B)
        if t % every == every - 1:
            done_B |= np.isin(np.stack([np.array(x) for x in ids[-every:]]), list(eos)).any(axis=0)
            if done_B.all():
                break
        if t + 1 < width:
            hidden_BD = split.body(ids_B[:, None], cache=cache)[:, -1, :]
    return np.array(mx.stack(ids, axis=1)), np.array(mx.stack(logps, axis=1))


def trim(
    tokenizer: Any,
    prompt: Sequence[int],
    ids_T: np.ndarray,
    logps_T: np.ndarray,
    eos: frozenset[int],
) -> Rollout:
    """Cut a row after its EOS, which stays: ending is a decision to learn."""
    ends = np.flatnonzero(np.isin(ids_T, list(eos)))
    length = int(ends[0]) + 1 if len(ends) else len(ids_T)
    ids = tuple(int(i) for i in ids_T[:length])
    text = tokenizer.decode(list(ids[: length - bool(len(ends))]))
    return Rollout(
        tuple(prompt), ids, tuple(float(x) for x in logps_T[:length]), text, bool(len(ends))
    )
