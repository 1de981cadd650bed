"""One more token of each row through a block, as one piece of NumPy. No gradient flows.

q, k and v are one product, gate and up another, and the cache is written in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache

from mlx_lora.cpu_attention import as_added
from mlx_lora.cpu_block import Norm, Parts, Product
from mlx_lora.cpu_layers import SILENT, rows, view
from mlx_lora.cpu_math import Angles, Beside, angles_of, neighbours, normed, silu, turned
from mlx_lora.cpu_threads import slices, spread

# Rows that are worth a thread: fewer cost more in waiting for the interpreter than they gain, and
# what stands beside the products is of many small operations.
LEAST = 64


@dataclass(frozen=True)
class Several:
    """Products of one input, as one. The weight lies as BLAS is quickest with few rows."""

    weight_IO: np.ndarray
    bias_O: np.ndarray | None
    beside: Beside | None  # what is added


@dataclass(frozen=True)
class Stacked:
    """A block's numbers with products of one input as one."""

    parts: Parts
    head_norm: Norm | None  # of queries and keys together, weight [H + G, C]
    qkv: Several
    o: Several
    gate_up: Several
    down: Several


@dataclass(frozen=True)
class Room:
    """Keys and values [B, G, S, C] of a cache, and the same memory as NumPy sees it."""

    keys: mx.array
    values: mx.array
    keys_BGSC: np.ndarray
    values_BGSC: np.ndarray


rooms: "WeakKeyDictionary[Any, Room]" = WeakKeyDictionary()


def stacked(parts: Parts) -> Stacked:
    q, k, v, o = parts.attention
    gate, up, down = parts.mlp
    of_heads = zip(parts.head_norms, parts.heads, strict=False)
    weights = [np.tile(norm.weight_D, (count, 1)) for norm, count in of_heads]
    head_norm = Norm(np.concatenate(weights), parts.head_norms[0].eps) if weights else None
    return Stacked(parts, head_norm, joined(q, k, v), joined(o), joined(gate, up), joined(down))


def bytes_of(parts: Parts) -> int:
    """Of what `stacked` makes."""
    return sum(p.weight_OI.nbytes for p in (*parts.attention, *parts.mlp))


def joined(*products: Product) -> Several:
    weight_IO, bias_O = np.concatenate([p.weight_OI.T for p in products], axis=1), None
    if any(p.bias_O is not None for p in products):
        none = [np.zeros(len(p.weight_OI), np.float32) for p in products]
        pairs = zip(products, none, strict=True)
        bias_O = np.concatenate([zero if p.bias_O is None else p.bias_O for p, zero in pairs])
    return Several(np.ascontiguousarray(weight_IO), bias_O, beside_of(products))


def beside_of(products: Sequence[Product]) -> Beside | None:
    """What layers add to their products: made together where all do, else one by one."""
    layers = [p.more for p in products]
    if not any(layer is not None for layer in layers):
        return None
    if all(layer is not None for layer in layers):
        return layers[0].beside(*layers)
    places = neighbours(len(p.weight_OI) for p in products)
    some = [(at, m.beside(m)) for at, m in zip(places, layers, strict=True) if m is not None]

    def one_by_one(y_BO: np.ndarray, x_BI: np.ndarray, rows: slice) -> None:
        for where, beside in some:
            beside(y_BO[:, where], x_BI, rows)

    return one_by_one


def suits(mask: Any, layer_cache: Any) -> bool:
    """Whether the cache is in use, and the mask one of whole rows."""
    if layer_cache is None or layer_cache.keys is None:
        return False
    return mask is None or (isinstance(mask, mx.array) and mask.shape[-2] == 1 and mask.ndim != 3)


def step(s: Stacked, x_B1D: mx.array, mask: mx.array | None, layer_cache: Any) -> mx.array:
    """The block's output [B, 1, D] for one more token of each row, which enters the cache."""
    x_BD, room, here = rows(view(x_B1D)), roomy(layer_cache), count_of(layer_cache)
    places_B = np.broadcast_to(np.array(layer_cache.offset, np.int32), len(x_BD))
    seen = None if mask is None else view(mask)
    added = None if seen is None or (seen.dtype == bool and seen.all()) else as_added(seen)
    heads = sum(s.parts.heads), s.parts.units
    angles = angles_at(places_B.tobytes(), s.parts.speeds_U.tobytes(), heads)
    y_BD = np.empty_like(x_BD)

    def part(rows: slice) -> None:
        mine = added[rows] if added is not None and len(added) > 1 else added
        kept = room.keys_BGSC[rows, :, : here + 1], room.values_BGSC[rows, :, : here + 1]
        y_BD[rows] = some_rows(s, x_BD[rows], angles.of(rows), mine, kept, rows)

    spread(part, slices(len(x_BD), LEAST))
    advance(layer_cache)
    return mx.array(y_BD[:, None, :])


@SILENT
def some_rows(
    s: Stacked,
    x_BD: np.ndarray,
    angles: Angles,
    added: np.ndarray | None,
    kept: tuple[np.ndarray, np.ndarray],
    rows: slice,
) -> np.ndarray:
    """Some rows of a step; their keys and values [B, G, S, C] get what is last in them."""
    (keys_BGSC, values_BGSC), (first, second), (h, g) = kept, s.parts.norms, s.parts.heads
    b, middle = len(x_BD), len(s.parts.mlp[0].weight_OI)
    y_BHC = several(normed(x_BD, *first), s.qkv, rows).reshape(b, h + 2 * g, -1)
    qk_BHC = y_BHC[:, : h + g]
    qk_BHC = turned(normed(qk_BHC, *s.head_norm) if s.head_norm else qk_BHC, angles)
    keys_BGSC[:, :, -1], values_BGSC[:, :, -1] = qk_BHC[:, h:], y_BHC[:, h + g :]
    q_BGRC = qk_BHC[:, :h].reshape(b, g, h // g, -1)
    q_BGRC *= np.float32(s.parts.scale)
    p_BGRS = q_BGRC @ keys_BGSC.swapaxes(-1, -2)
    if added is not None:
        p_BGRS += added
    p_BGRS -= p_BGRS.max(axis=-1, keepdims=True)
    np.exp(p_BGRS, out=p_BGRS)
    seen_BGRC = p_BGRS @ values_BGSC
    seen_BGRC /= p_BGRS.sum(axis=-1, keepdims=True)
    x_BD = x_BD + several(seen_BGRC.reshape(b, -1), s.o, rows)
    y_BF = several(normed(x_BD, *second), s.gate_up, rows)
    gate_BF, up_BF = y_BF[:, :middle], y_BF[:, middle:]
    inner_BF = silu(gate_BF)
    inner_BF *= up_BF
    x_BD += several(inner_BF, s.down, rows)
    return x_BD


def several(x_BI: np.ndarray, products: Several, rows: slice) -> np.ndarray:
    y_BO = x_BI @ products.weight_IO
    if products.bias_O is not None:
        y_BO += products.bias_O
    if products.beside is not None:
        products.beside(y_BO, x_BI, rows)
    return y_BO


@lru_cache(maxsize=4)  # every layer of a step asks for the same
def angles_at(places: bytes, speeds: bytes, shape: tuple[int, int]) -> Angles:
    """Of each row's place, for so many heads of so many units: [B, heads, units]."""
    places_BH = np.repeat(np.frombuffer(places, np.int32)[:, None], shape[0], axis=1)
    return angles_of(places_BH, np.frombuffer(speeds, np.float32), shape[1])


def count_of(layer_cache: Any) -> int:
    """Tokens of each row in the cache, padding included."""
    return layer_cache._idx if isinstance(layer_cache, BatchKVCache) else layer_cache.offset


def roomy(layer_cache: Any) -> Room:
    """The cache's memory, with room for one more token.

    A cache is given memory of its own at its first step here, and when it is full; arrays that
    share it are slices of older tokens, which nothing writes to.
    """
    room, here = rooms.get(layer_cache), count_of(layer_cache)
    if room is None or room.keys is not layer_cache.keys or here == room.keys_BGSC.shape[2]:
        room = rooms[layer_cache] = enlarged(layer_cache, here)
        layer_cache.keys, layer_cache.values = room.keys, room.values
    return room


def advance(layer_cache: Any) -> None:
    """The cache has one more token."""
    if isinstance(layer_cache, BatchKVCache):
        layer_cache.offset = mx.array(view(layer_cache.offset) + np.int32(1))
        layer_cache._idx += 1
    else:
        layer_cache.offset += 1


def enlarged(layer_cache: Any, tokens: int) -> Room:
    """A copy of the cache's first tokens with room for `step` more."""
    copies: list[mx.array] = []
    for array in (layer_cache.keys, layer_cache.values):
        b, g, _, c = array.shape
        wide = np.zeros((b, g, tokens + layer_cache.step, c), np.float32)
        wide[:, :, :tokens] = view(array)[:, :, :tokens]
        copies.append(mx.array(wide))
    keys, values = copies
    return Room(keys, values, view(keys), view(values))
