"""The decode step of a transformer block as one piece of NumPy (see cpu.py).

A block of the usual kind is twenty small evaluations, each of which costs MLX's CPU backend up to a
tenth of a millisecond besides the work. Here it is one, with q, k and v in one product, gate and up
in another, and the cache written in place. Only inside `cpu.decoding`, where no gradient flows.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache

from mlx_lora.cpu_attention import PROJECTIONS, as_added, inverse_frequencies
from mlx_lora.cpu_layers import FAST_LINEARS, SILENT, dense, length, rows, sigmoid, view

FUSED_BYTES = 1 << 28  # of all fused matrices together
GATED = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
SIZES = ("n_heads", "n_kv_heads", "scale")
Weight = tuple[np.ndarray, np.ndarray | None]  # [O, I], and a bias [O]


@dataclass(frozen=True)
class Fused:
    """What a block computes with. Shapes: H query heads, G key heads, C units of a head."""

    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    norms: tuple[np.ndarray, np.ndarray]
    head_norms: tuple[np.ndarray, np.ndarray] | None  # of queries and keys
    eps: tuple[float, float, float]  # of the norms above; the heads' last
    heads: tuple[int, int]  # H, G
    scale: float  # of the scores
    turns: tuple[int, bytes]  # of rope: how many units turn, and how fast, float32 [units / 2]


@dataclass(frozen=True)
class Room:
    """Keys and values [B, G, S, C] of a cache, and the same memory as NumPy sees it."""

    keys: mx.array
    values: mx.array
    keys_BGSC: np.ndarray
    values_BGSC: np.ndarray


rooms: "WeakKeyDictionary[Any, Room]" = WeakKeyDictionary()


@SILENT
def fused_step(f: Fused, x_B1D: mx.array, mask: mx.array | None, layer_cache: Any) -> mx.array:
    """The block's output [B, 1, D] for one more token of each row, which enters the cache."""
    x_BD = rows(view(x_B1D))
    q_BGRC, k_BGC, v_BGC = heads_of(f, times(normed(x_BD, f.norms[0], f.eps[0]), f.qkv))
    q_BGRC, k_BGC = (turned(x, f.turns, places_of(layer_cache)) for x in (q_BGRC, k_BGC))
    keys_BGSC, values_BGSC = appended(layer_cache, k_BGC, v_BGC)
    p_BGRS = q_BGRC @ keys_BGSC.swapaxes(-1, -2)
    p_BGRS *= f.scale
    if mask is not None and not (seen := view(mask)).all():
        p_BGRS += as_added(seen)
    p_BGRS -= p_BGRS.max(axis=-1, keepdims=True)
    np.exp(p_BGRS, out=p_BGRS)
    p_BGRS /= p_BGRS.sum(axis=-1, keepdims=True)
    x_BD = x_BD + times((p_BGRS @ values_BGSC).reshape(len(x_BD), -1), f.o)
    y_BF = times(normed(x_BD, f.norms[1], f.eps[1]), f.gate_up)
    gate_BF, up_BF = np.split(y_BF, 2, axis=1)
    up_BF *= gate_BF * sigmoid(gate_BF)
    x_BD += times(up_BF, f.down)
    return mx.array(x_BD[:, None, :])


def times(x_BI: np.ndarray, weight: Weight) -> np.ndarray:
    y_BO = x_BI @ weight[0].T
    if weight[1] is not None:
        y_BO += weight[1]
    return y_BO


def normed(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMS norm over the last axis."""
    y_ND = rows(x) * length(rows(x), eps)[:, None]
    y_ND *= weight
    return y_ND.reshape(x.shape)


def heads_of(f: Fused, y_BO: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [B, G, H/G, C], keys and values [B, G, C] out of one product, normed."""
    (h, g), b = f.heads, len(y_BO)
    y_BHC = y_BO.reshape(b, h + 2 * g, -1)
    q_BHC, k_BGC, v_BGC = y_BHC[:, :h], y_BHC[:, h : h + g], y_BHC[:, h + g :]
    if f.head_norms:
        q_BHC, k_BGC = (
            normed(np.ascontiguousarray(x), w, f.eps[2])
            for x, w in zip((q_BHC, k_BGC), f.head_norms, strict=True)
        )
    return q_BHC.reshape(b, g, h // g, -1), k_BGC, v_BGC


def places_of(layer_cache: Any) -> bytes:
    """The place of each row's next token, int32 [B], or [1] where it is the same."""
    return np.array(layer_cache.offset, np.int32).tobytes()


def turned(x: np.ndarray, turns: tuple[int, bytes], places: bytes) -> np.ndarray:
    """Rope on [B, ..., C]: a row's vectors turned by the angles of its place."""
    half = turns[0] // 2
    cos, sin = (angle.reshape(-1, *(1,) * (x.ndim - 2), half) for angle in angles(places, turns[1]))
    y, a, b = np.empty_like(x), x[..., :half], x[..., half : 2 * half]
    np.subtract(a * cos, b * sin, out=y[..., :half])
    np.add(b * cos, a * sin, out=y[..., half : 2 * half])
    y[..., 2 * half :] = x[..., 2 * half :]
    return y


@lru_cache(maxsize=4)  # every layer of a step asks for the same
def angles(places: bytes, speeds: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [B, units / 2]."""
    places_B1 = np.frombuffer(places, np.int32).astype(np.float32)[:, None]
    angles_BU = places_B1 * np.frombuffer(speeds, np.float32)
    return np.cos(angles_BU), np.sin(angles_BU)


def appended(
    layer_cache: Any, k_BGC: np.ndarray, v_BGC: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [B, G, S, C] of all tokens, this one written in place behind the others.

    A cache is given memory of its own at its first step here, and when it is full; arrays that
    share it are slices of older tokens, which nothing writes to.
    """
    batch = isinstance(layer_cache, BatchKVCache)
    here = layer_cache._idx if batch else layer_cache.offset
    room = rooms.get(layer_cache)
    if room is None or room.keys is not layer_cache.keys or here == room.keys_BGSC.shape[2]:
        room = rooms[layer_cache] = enlarged(layer_cache, here)
        layer_cache.keys, layer_cache.values = room.keys, room.values
    room.keys_BGSC[:, :, here], room.values_BGSC[:, :, here] = k_BGC, v_BGC
    if batch:
        layer_cache.offset = mx.array(view(layer_cache.offset) + np.int32(1))
        layer_cache._idx = here + 1
    else:
        layer_cache.offset = here + 1
    return room.keys_BGSC[:, :, : here + 1], room.values_BGSC[:, :, : here + 1]


def enlarged(layer_cache: Any, tokens: int) -> Room:
    """A copy of the cache's first tokens with room for `step` more."""
    copies: list[mx.array] = []
    for array in (layer_cache.keys, layer_cache.values):
        b, g, _, c = array.shape
        wide = np.zeros((b, g, tokens + layer_cache.step, c), np.float32)
        wide[:, :, :tokens] = view(array)[:, :, :tokens]
        copies.append(mx.array(wide))
    return Room(*copies, *map(view, copies))


@cache
def block_twin(parent: type) -> type:
    """A block's class that takes the fused step where it has one and one token a row comes in."""

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        parts = self.__dict__.get("_fused")
        if parts is None or not suits(x, mask, cache):
            return parent.__call__(self, x, mask, cache)
        return fused_step(parts, x, mask, cache)

    return type(f"Fused{parent.__name__}", (parent,), {"__call__": call})


def suits(x: mx.array, mask: Any, layer_cache: Any) -> bool:
    """Whether the fused step may take this: float32, one token a row, an ordinary cache in use."""
    if x.shape[1] != 1 or x.dtype != mx.float32:
        return False
    if type(layer_cache) not in (KVCache, BatchKVCache) or layer_cache.keys is None:
        return False
    alone = mask is None or (isinstance(mask, mx.array) and mask.shape[-3:-1] in ((1, 1), (1,)))
    return alone and layer_cache.keys.dtype == layer_cache.values.dtype == mx.float32


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Inside, blocks of the usual kind take the fused step, if there is memory and it agrees.

    One block of each kind is tried on a few tokens.
    """
    blocks, spent = list(blocks_of(model)), 0
    believed: dict[Any, bool] = {}
    try:
        for block in blocks:
            parts = fused_of(block)
            if parts is None:
                continue
            spent += parts.qkv[0].nbytes + parts.gate_up[0].nbytes
            if spent > FUSED_BYTES:
                break
            kind = (type(block), parts.heads, parts.turns, parts.head_norms is None)
            if kind not in believed:
                believed[kind] = agrees(block, parts)
            if believed[kind]:
                block.__dict__["_fused"] = parts
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("_fused", None)


def blocks_of(model: nn.Module) -> Iterator[Any]:
    """Modules whose class has the fused step."""
    return (m for _, m in model.named_modules() if type(m).__name__.startswith("Fused"))


def hasten_block(module: Any) -> bool:
    """Prepare a block of the usual parts for the fused step; True where it is one."""
    attn, mlp = module.get("self_attn"), module.get("mlp")
    parts = (attn, PROJECTIONS), (mlp, GATED), (module, NORMS)
    if not all(part is not None and all(n in part for n in names) for part, names in parts):
        return False
    if type(module).__name__.startswith("Fused") or not type(mlp).__name__.startswith("Fast"):
        return False
    module.__class__ = block_twin(type(module))
    return True


def fused_of(block: Any) -> Fused | None:
    """The block's numbers as they are now; None where it is not of the usual kind."""
    attn, mlp = block.self_attn, block.mlp
    q, k, v, o = (weight_of(attn[name]) for name in PROJECTIONS)
    gate, up, down = (weight_of(mlp[name]) for name in GATED)
    norms = [norm_of(block[name]) for name in NORMS]
    head_norms = [norm_of(attn[name]) for name in HEAD_NORMS if name in attn]
    turns, sizes = turns_of(attn.get("rope")), [getattr(attn, n, None) for n in SIZES]
    parts = (q, k, v, o, gate, up, down, turns, *norms, *head_norms, *sizes)
    if any(part is None for part in parts) or len(head_norms) not in (0, 2):
        return None
    heads, groups, scale = sizes
    if len(k[0]) % groups or len(q[0]) * groups != len(k[0]) * heads:
        return None
    (first, eps), (second, _) = norms
    return Fused(
        qkv=stacked(q, k, v),
        o=o,
        gate_up=stacked(gate, up),
        down=down,
        norms=(first, second),
        head_norms=(head_norms[0][0], head_norms[1][0]) if head_norms else None,
        eps=(eps, norms[1][1], head_norms[0][1] if head_norms else eps),
        heads=(heads, groups),
        scale=scale,
        turns=turns,
    )


def weight_of(layer: Any) -> Weight | None:
    """What the layer multiplies by, an adapter merged into it; None where it is not one matrix."""
    inner = getattr(layer, "linear", layer)
    if inner is not layer:
        weight_OI = layer.__dict__.get("_merged")
    elif isinstance(layer, FAST_LINEARS):
        weight_OI = dense(layer) if "scales" in layer else layer.weight
    else:
        weight_OI = None
    if weight_OI is None or weight_OI.dtype != mx.float32:
        return None
    return view(weight_OI), view(inner.bias) if "bias" in inner else None


def norm_of(layer: Any) -> tuple[np.ndarray, float] | None:
    usual = isinstance(layer, nn.RMSNorm) and layer.weight.dtype == mx.float32
    return (view(layer.weight), layer.eps) if usual else None


def turns_of(rope: Any) -> tuple[int, bytes] | None:
    """How many units of a head rope turns and how fast; None for an unknown kind."""
    freqs = getattr(rope, "_freqs", None)
    if getattr(rope, "traditional", True):
        return None
    if freqs is not None:
        return 2 * len(freqs), (1 / view(freqs)).astype(np.float32).tobytes()
    if type(rope) is not nn.RoPE:
        return None
    return rope.dims, (inverse_frequencies(rope.dims, rope.base) * np.float32(rope.scale)).tobytes()


def stacked(*weights: Weight) -> Weight:
    """Several products of one input as one."""
    biases = [b if b is not None else np.zeros(len(w), np.float32) for w, b in weights]
    some = any(b is not None for _, b in weights)
    return np.concatenate([w for w, _ in weights]), np.concatenate(biases) if some else None


def agrees(block: Any, parts: Fused) -> bool:
    """Whether the fused step gives what the block gives, on rows of two lengths."""
    wide, units = parts.qkv[0].shape[1], len(parts.qkv[0]) // (parts.heads[0] + 2 * parts.heads[1])
    keys = iter(mx.random.split(mx.random.key(0), 4))
    x_B1D = mx.random.normal((2, 1, wide), key=next(keys))
    past = [mx.random.normal((2, parts.heads[1], 3, units), key=next(keys)) for _ in range(2)]
    outputs: list[mx.array] = []
    for step in (block.__call__, partial(fused_step, parts)):
        layer_cache = BatchKVCache([1, 0])
        layer_cache.update_and_fetch(*past)
        for _ in range(2):
            mask = layer_cache.make_mask(1)
            outputs += [step(x_B1D, mask, layer_cache)]
    return all(
        mx.allclose(a, b, rtol=1e-4, atol=1e-5).item()
        for a, b in zip(outputs[:2], outputs[2:], strict=True)
    )
