"""Many tokens through a block, forward and backward, as one piece of NumPy.

Differentiable in the tokens, in the keys and values that the cache holds, and in the adapters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.cpu_attention import KEPT, add_mask
from mlx_lora.cpu_block import Parts, Product
from mlx_lora.cpu_layers import SILENT, joined, rows, view
from mlx_lora.cpu_math import (
    Angles,
    angles_of,
    attention_back,
    curved,
    curved_back,
    lora_back,
    normed,
    normed_back,
    sigmoid,
    softmax,
    turned,
)
from mlx_lora.cpu_threads import slices, spread

LEAST = 800  # tokens of a part that is worth a thread: with fewer, threads wait for the interpreter
MANY = 512  # tokens for which adapters are merged: it costs less than the branch beside
Grads = dict[int, list[np.ndarray]]  # of an adapter's a and b, by its place


def block(
    parts: Parts, x_BTD: mx.array, mask: Any, layer_cache: Any, *, gradient: bool = True
) -> mx.array:
    """The block's output [B, T, D]; the cache, if any, holds these tokens afterwards.

    Without `gradient` nothing is kept for the way back, which an unused one would hold on to.
    """
    offset = 0 if layer_cache is None else layer_cache.offset
    starts_B = np.reshape(np.array(offset, np.int32), -1)
    past = layer_cache.keys_and_values() if layer_cache is not None and layer_cache.size() else []
    adapters = [x for p in parts.adapted for x in p.learned]
    piece = one_piece(parts, mask, starts_B, gradient=gradient)
    y_BTD, keys, values = piece(x_BTD, *past, *adapters)
    if layer_cache is not None:
        layer_cache.update_and_fetch(keys, values)
    return y_BTD


def one_piece(parts: Parts, mask: Any, starts_B: np.ndarray, *, gradient: bool) -> Any:
    """(x, [past keys and values,] *adapters) -> output, keys and values [B, G, T, C] of x."""
    held: list[Held] = []
    count = sum(len(p.learned) for p in parts.adapted)

    def piece(x, *others):
        x_BTD, *past = map(view, (x, *others[: len(others) - count]))
        factors = iter(map(view, others[len(others) - count :]))
        learned = {id(p): tuple(next(factors) for _ in p.learned) for p in parts.adapted}
        places_BT1 = starts_B[:, None, None] + np.arange(x.shape[1])[:, None]
        whole = Held(parts, x.shape, learned, angles_of(places_BT1, parts.speeds_U, parts.units))
        if x.shape[0] * x.shape[1] >= MANY:
            straight = [p for p in parts.adapted if p.scale and p.bends is None]
            whole.merged = {id(p): merged(p, *learned[id(p)]) for p in straight}
        whole.mask = view(mask) if isinstance(mask, mx.array) else mask
        held[:] = [part_of(whole, part) for part in slices(len(x), -(-LEAST // x.shape[1]))]
        made = spread(lambda h: forward(h, x_BTD[h.rows], [p[h.rows] for p in past]), held)
        return tuple(mx.array(joined(ys)) for ys in zip(*made, strict=True))

    if not gradient:
        return piece
    taught: Any = mx.custom_function(piece)

    @taught.vjp
    def piece_vjp(primals, cotangents, outputs):
        bars = list(map(view, cotangents))
        made = spread(lambda h: backward(h, *(bar[h.rows] for bar in bars)), held)
        held.clear()
        found = list(zip(*made, strict=True))
        shared = len(found) - count  # from here on: adapters, which all rows share
        found = [*map(joined, found[:shared]), *map(sum, found[shared:])]
        return tuple(mx.array(bar.reshape(p.shape)) for bar, p in zip(found, primals, strict=True))

    return taught


def part_of(whole: "Held", rows: slice) -> "Held":
    """What some rows of a call need of it."""

    mask, (_, t, d) = whole.mask, whole.shape
    if isinstance(mask, np.ndarray) and mask.ndim == 4:
        mask = mask[rows] if len(mask) > 1 else mask
    shape, angles = (rows.stop - rows.start, t, d), whole.angles.of(rows)
    return Held(whole.parts, shape, whole.factors, angles, whole.merged, rows, mask)


@SILENT
def merged(p: Product, a_IR: np.ndarray, b_RO: np.ndarray) -> np.ndarray:
    """W + scale · (a b)ᵀ [O, I]: for many tokens the cheapest way to multiply by both."""
    weight_OI = (np.float32(p.scale) * b_RO.T) @ a_IR.T
    weight_OI += p.weight_OI
    return weight_OI


@dataclass
class Held:
    """What one call keeps for its way back. N = B · T tokens."""

    parts: Parts
    shape: tuple[int, ...]  # B, T, D
    factors: Mapping[int, tuple[np.ndarray, ...]]  # a [I, R], b [R, O] of each adapter, bends [P]
    angles: Angles  # [B or 1, T, 1, C]
    merged: Mapping[int, np.ndarray] = field(default_factory=dict)  # W + scale · (a b)ᵀ [O, I]
    rows: slice = field(default_factory=lambda: slice(None))  # of the call's rows
    mask: Any = None
    past: int = 0  # tokens of the cache
    of: dict[str, np.ndarray] = field(default_factory=dict)
    inner: dict[int, np.ndarray] = field(default_factory=dict)  # x a [N, R] of each adapter
    probabilities: np.ndarray | None = None


@SILENT
def forward(h: Held, x_BTD: np.ndarray, past: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    parts, keep, x_ND = h.parts, h.of, rows(x_BTD)
    q, k, v, o = parts.attention
    gate, up, down = parts.mlp
    keep["x"] = x_ND
    y_ND = normed(x_ND, *parts.norms[0])
    q_BTHC, k_BTGC, v_BTGC = (heads(h, times(h, y_ND, p)) for p in (q, k, v))
    if parts.head_norms:
        keep["q"], keep["k"] = q_BTHC, k_BTGC
        q_BTHC, k_BTGC = (
            normed(x, *n) for x, n in zip((q_BTHC, k_BTGC), parts.head_norms, strict=True)
        )
    keep["queries"] = grouped(h, turned(q_BTHC, h.angles))
    k_BGTC = np.ascontiguousarray(turned(k_BTGC, h.angles).swapaxes(1, 2))
    v_BGTC = np.ascontiguousarray(v_BTGC.swapaxes(1, 2))
    keep["keys"], keep["values"] = k_BGTC, v_BGTC
    if past:
        h.past = past[0].shape[2]
        keep["keys"] = np.concatenate([past[0], k_BGTC], axis=2)
        keep["values"] = np.concatenate([past[1], v_BGTC], axis=2)
    p_BGNS = probabilities(h)
    if p_BGNS.nbytes <= KEPT:
        h.probabilities = p_BGNS
    keep["seen"] = ungrouped(h, p_BGNS @ keep["values"])
    del p_BGNS
    middle_ND = x_ND + times(h, keep["seen"], o)
    keep["middle"] = middle_ND
    y_ND = normed(middle_ND, *parts.norms[1])
    keep["gate"], keep["up"] = times(h, y_ND, gate), times(h, y_ND, up)
    keep["sigmoid"] = sigmoid(keep["gate"])
    y_ND = times(h, activated(h), down)
    y_ND += middle_ND
    return y_ND.reshape(h.shape), k_BGTC, v_BGTC


@SILENT
def backward(
    h: Held, y_bar: np.ndarray, keys_bar: np.ndarray, values_bar: np.ndarray
) -> list[np.ndarray]:
    """Gradients of what the call was given, in its order."""
    parts, keep = h.parts, h.of
    q, k, v, o = parts.attention
    gate, up, down = parts.mlp
    grads: Grads = {}
    g_ND = rows(y_bar)
    inner_bar = back(h, grads, g_ND, activated(h), down)
    inner_bar *= keep["sigmoid"]
    up_bar = inner_bar * keep["gate"]
    slope = 1 - keep["sigmoid"]
    slope *= keep["gate"]
    slope += 1
    inner_bar *= keep["up"]
    inner_bar *= slope
    y_ND = normed(keep["middle"], *parts.norms[1])
    y_bar = back(h, grads, inner_bar, y_ND, gate)
    y_bar += back(h, grads, up_bar, y_ND, up)
    middle_bar = normed_back(y_bar, keep["middle"], *parts.norms[1])
    middle_bar += g_ND
    seen_bar = grouped(h, heads(h, back(h, grads, middle_bar, keep["seen"], o)))
    p_BGNS = h.probabilities if h.probabilities is not None else probabilities(h)
    q_BGNC, k_BGSC, v_BGSC = (keep[name] for name in ("queries", "keys", "values"))
    bars = attention_back(q_BGNC, k_BGSC, v_BGSC, p_BGNS, parts.scale, seen_bar)
    q_bar, k_bar, v_bar = bars
    past_bars = [k_bar[:, :, : h.past], v_bar[:, :, : h.past]] if h.past else []
    k_bar, v_bar = k_bar[:, :, h.past :] + keys_bar, v_bar[:, :, h.past :] + values_bar
    q_BTHC = turned(ungrouped_heads(h, q_bar), h.angles, back=True)
    k_BTGC = turned(k_bar.swapaxes(1, 2), h.angles, back=True)
    if parts.head_norms:
        q_BTHC = normed_back(q_BTHC, keep["q"], *parts.head_norms[0])
        k_BTGC = normed_back(k_BTGC, keep["k"], *parts.head_norms[1])
    y_ND = normed(keep["x"], *parts.norms[0])
    y_bar = back(h, grads, flat(q_BTHC), y_ND, q)
    y_bar += back(h, grads, flat(k_BTGC), y_ND, k)
    y_bar += back(h, grads, flat(v_bar.swapaxes(1, 2)), y_ND, v)
    x_bar = normed_back(y_bar, keep["x"], *parts.norms[0])
    x_bar += middle_bar
    adapters = [bar for p in parts.adapted for bar in grads[id(p)]]
    return [x_bar, *past_bars, *adapters]


def times(h: Held, x_NI: np.ndarray, p: Product) -> np.ndarray:
    y_NO = x_NI @ h.merged.get(id(p), p.weight_OI).T
    if p.bias_O is not None:
        y_NO += p.bias_O
    if p.a_IR is not None and p.scale and id(p) not in h.merged:
        a_IR, b_RO, *bends = h.factors[id(p)]
        z_NR = h.inner[id(p)] = x_NI @ a_IR
        update_NO = z_NR @ b_RO
        if p.bends:
            update_NO = curved(update_NO, p.bends.hinges(bends[0]))
        update_NO *= np.float32(p.scale)
        y_NO += update_NO
    if p.more is not None:
        p.more.beside(p.more)(y_NO, x_NI, h.rows)
    return y_NO


def back(h: Held, grads: Grads, g_NO: np.ndarray, x_NI: np.ndarray, p: Product) -> np.ndarray:
    """The gradient of the product's input; those of its adapter are put into `grads`."""
    x_bar = g_NO @ h.merged.get(id(p), p.weight_OI)
    if p.a_IR is None:
        return x_bar
    a_IR, b_RO, *bends = h.factors[id(p)]
    if not p.scale:
        grads[id(p)] = [np.zeros_like(x) for x in (a_IR, b_RO, *bends)]
        return x_bar
    z_NR, bends_bar = h.inner[id(p)] if id(p) in h.inner else x_NI @ a_IR, []
    if p.bends:
        z_NO = z_NR @ b_RO
        g_NO, bar = curved_back(g_NO, z_NO, p.bends.hinges(bends[0]))
        bends_bar = [np.float32(p.scale) * bar]
    g_NR, *pair_bar = lora_back(g_NO, x_NI, z_NR, b_RO, p.scale)
    grads[id(p)] = [*pair_bar, *bends_bar]
    if id(p) not in h.merged:
        x_bar += g_NR @ a_IR.T
    return x_bar


def activated(h: Held) -> np.ndarray:
    """What enters the last product [N, F]: gate · sigmoid(gate) · up."""
    y_NF = h.of["gate"] * h.of["sigmoid"]
    y_NF *= h.of["up"]
    return y_NF


def heads(h: Held, x_NO: np.ndarray) -> np.ndarray:
    """[N, O] as [B, T, heads, C]."""
    return x_NO.reshape(*h.shape[:2], -1, h.parts.units)


def flat(x_BTHC: np.ndarray) -> np.ndarray:
    """[B, T, heads, C] as [N, O]."""
    return x_BTHC.reshape(x_BTHC.shape[0] * x_BTHC.shape[1], -1)


def grouped(h: Held, x_BTHC: np.ndarray) -> np.ndarray:
    """[B, T, H, C] as [B, G, H/G · T, C]: the queries of one key head are one matrix."""
    b, t, _, c = x_BTHC.shape
    g = h.parts.heads[1]
    return x_BTHC.reshape(b, t, g, -1, c).transpose(0, 2, 3, 1, 4).reshape(b, g, -1, c)


def ungrouped_heads(h: Held, x_BGNC: np.ndarray) -> np.ndarray:
    """[B, G, H/G · T, C] as [B, T, H, C]."""
    b, g, _, c = x_BGNC.shape
    x_BTGRC = x_BGNC.reshape(b, g, -1, h.shape[1], c).transpose(0, 3, 1, 2, 4)
    return x_BTGRC.reshape(b, h.shape[1], -1, c)


def ungrouped(h: Held, x_BGNC: np.ndarray) -> np.ndarray:
    return flat(ungrouped_heads(h, x_BGNC))


def probabilities(h: Held) -> np.ndarray:
    """[B, G, H/G · T, S]"""
    b, t, _ = h.shape
    p_BGNS = h.of["queries"] @ h.of["keys"].swapaxes(-1, -2)
    p_BGNS *= np.float32(h.parts.scale)
    add_mask(p_BGNS, h.mask, (b, h.parts.heads[0], t, 0))
    return softmax(p_BGNS)
