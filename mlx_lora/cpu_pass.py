"""Many tokens through a block, forward and backward, as one piece of NumPy.

Differentiable in the tokens, in the keys and values that the cache holds, and in the adapters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.cpu_attention import add_mask
from mlx_lora.cpu_block import Norm, Parts, Product, normed
from mlx_lora.cpu_layers import SILENT, joined, length, rows, sigmoid, view
from mlx_lora.cpu_threads import slices, spread

KEPT = 1 << 24  # bytes of probabilities kept for the way back; more are made again
LEAST = 256  # tokens of a part that is worth a thread
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
    adapters = [x for p in parts.adapted for x in (p.a_IR, p.b_RO)]
    piece = one_piece(parts, mask, starts_B, gradient=gradient)
    y_BTD, keys, values = piece(x_BTD, *past, *adapters)
    if layer_cache is not None:
        layer_cache.update_and_fetch(keys, values)
    return y_BTD


def one_piece(parts: Parts, mask: Any, starts_B: np.ndarray, *, gradient: bool) -> Any:
    """(x, [past keys and values,] *adapters) -> output, keys and values [B, G, T, C] of x."""
    held: list[Held] = []
    count = 2 * len(parts.adapted)

    def piece(x, *others):
        x_BTD, *past = map(view, (x, *others[: len(others) - count]))
        factors = iter(map(view, others[len(others) - count :]))
        pairs = {id(p): (next(factors), next(factors)) for p in parts.adapted}
        whole = Held(parts, x.shape, pairs)
        if x.shape[0] * x.shape[1] >= MANY:
            whole.merged = {id(p): merged(p, *pairs[id(p)]) for p in parts.adapted if p.scale}
        whole.mask = view(mask) if isinstance(mask, mx.array) else mask
        whole.angles = turning(parts, starts_B, x.shape[1])
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

    def mine(x: Any) -> Any:
        return x[rows] if x.shape[0] > 1 else x

    mask, (_, t, d) = whole.mask, whole.shape
    if isinstance(mask, np.ndarray) and mask.ndim == 4:
        mask = mine(mask)
    cos, sin = map(mine, whole.angles)
    shape = rows.stop - rows.start, t, d
    return Held(whole.parts, shape, whole.factors, whole.merged, rows, mask, (cos, sin))


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
    factors: Mapping[int, tuple[np.ndarray, np.ndarray]]  # a [I, R] and b [R, O] of each adapter
    merged: Mapping[int, np.ndarray] = field(default_factory=dict)  # W + scale · (a b)ᵀ [O, I]
    rows: slice = field(default_factory=lambda: slice(None))  # of the call's rows
    mask: Any = None
    angles: tuple[np.ndarray, ...] = ()  # cosines and sines [B or 1, T, 1, units / 2]
    past: int = 0  # tokens of the cache
    of: dict[str, np.ndarray] = field(default_factory=dict)
    inner: dict[int, np.ndarray] = field(default_factory=dict)  # x a [N, R] of each adapter
    probabilities: np.ndarray | None = None


def turning(parts: Parts, starts_B: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    speeds_U = np.frombuffer(parts.turns[1], np.float32)
    places_BT = (starts_B[:, None] + np.arange(tokens)).astype(np.float32)
    angles = places_BT[:, :, None, None] * speeds_U
    return np.cos(angles), np.sin(angles)


@SILENT
def forward(h: Held, x_BTD: np.ndarray, past: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    parts, keep, x_ND = h.parts, h.of, rows(x_BTD)
    q, k, v, o = parts.attention
    gate, up, down = parts.mlp
    keep["x"] = x_ND
    y_ND = normed(x_ND, parts.norms[0])
    q_BTHC, k_BTGC, v_BTGC = (heads(h, times(h, y_ND, p)) for p in (q, k, v))
    if parts.head_norms:
        keep["q"], keep["k"] = q_BTHC, k_BTGC
        q_BTHC, k_BTGC = (
            normed(x, n) for x, n in zip((q_BTHC, k_BTGC), parts.head_norms, strict=True)
        )
    keep["queries"] = grouped(h, turned(h, q_BTHC))
    k_BGTC = np.ascontiguousarray(turned(h, k_BTGC).swapaxes(1, 2))
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
    y_ND = normed(middle_ND, parts.norms[1])
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
    y_ND = normed(keep["middle"], parts.norms[1])
    y_bar = back(h, grads, inner_bar, y_ND, gate)
    y_bar += back(h, grads, up_bar, y_ND, up)
    middle_bar = normed_back(y_bar, keep["middle"], parts.norms[1])
    middle_bar += g_ND
    seen_bar = grouped(h, heads(h, back(h, grads, middle_bar, keep["seen"], o)))
    q_bar, k_bar, v_bar = attention_back(h, seen_bar)
    past_bars = [k_bar[:, :, : h.past], v_bar[:, :, : h.past]] if h.past else []
    k_bar, v_bar = k_bar[:, :, h.past :] + keys_bar, v_bar[:, :, h.past :] + values_bar
    q_BTHC, k_BTGC = turned_back(h, ungrouped_heads(h, q_bar)), turned_back(h, k_bar.swapaxes(1, 2))
    if parts.head_norms:
        q_BTHC = normed_back(q_BTHC, keep["q"], parts.head_norms[0])
        k_BTGC = normed_back(k_BTGC, keep["k"], parts.head_norms[1])
    y_ND = normed(keep["x"], parts.norms[0])
    y_bar = back(h, grads, flat(q_BTHC), y_ND, q)
    y_bar += back(h, grads, flat(k_BTGC), y_ND, k)
    y_bar += back(h, grads, flat(v_bar.swapaxes(1, 2)), y_ND, v)
    x_bar = normed_back(y_bar, keep["x"], parts.norms[0])
    x_bar += middle_bar
    adapters = [bar for p in parts.adapted for bar in grads[id(p)]]
    return [x_bar, *past_bars, *adapters]


def times(h: Held, x_NI: np.ndarray, p: Product) -> np.ndarray:
    y_NO = x_NI @ h.merged.get(id(p), p.weight_OI).T
    if p.bias_O is not None:
        y_NO += p.bias_O
    if p.a_IR is not None and p.scale and id(p) not in h.merged:
        a_IR, b_RO = h.factors[id(p)]
        z_NR = h.inner[id(p)] = x_NI @ a_IR
        update_NO = z_NR @ b_RO
        update_NO *= np.float32(p.scale)
        y_NO += update_NO
    if p.more is not None:
        y_NO += p.more.beside(p.more)(x_NI, h.rows)
    return y_NO


def back(h: Held, grads: Grads, g_NO: np.ndarray, x_NI: np.ndarray, p: Product) -> np.ndarray:
    """The gradient of the product's input; those of its adapter are put into `grads`."""
    x_bar = g_NO @ h.merged.get(id(p), p.weight_OI)
    if p.a_IR is None:
        return x_bar
    a_IR, b_RO = h.factors[id(p)]
    if not p.scale:
        grads[id(p)] = [np.zeros_like(x) for x in (a_IR, b_RO)]
        return x_bar
    g_NR = g_NO @ b_RO.T
    g_NR *= np.float32(p.scale)
    if id(p) not in h.merged:
        x_bar += g_NR @ a_IR.T
    z_NR = h.inner[id(p)] if id(p) in h.inner else x_NI @ a_IR
    b_bar = z_NR.T @ g_NO
    b_bar *= np.float32(p.scale)
    grads[id(p)] = [x_NI.T @ g_NR, b_bar]
    return x_bar


def normed_back(y_bar: np.ndarray, x: np.ndarray, norm: Norm) -> np.ndarray:
    x_ND, g_ND = rows(x), rows(y_bar) * norm.weight_D
    r_N = length(x_ND, norm.eps)
    along_N = np.einsum("nd,nd->n", g_ND, x_ND) * r_N**3 / np.float32(x_ND.shape[1])
    g_ND *= r_N[:, None]
    g_ND -= x_ND * along_N[:, None]
    return g_ND.reshape(x.shape)


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


def turned(h: Held, x_BTHC: np.ndarray, sign: int = 1) -> np.ndarray:
    """Rope: every vector turned by the angles of its place."""
    (cos, sin), half = h.angles, h.parts.turns[0] // 2
    y, a, b = np.empty_like(x_BTHC), x_BTHC[..., :half], x_BTHC[..., half : 2 * half]
    np.multiply(a, cos, out=y[..., :half])
    np.multiply(b, cos, out=y[..., half : 2 * half])
    sin = sin if sign == 1 else -sin
    y[..., :half] -= b * sin
    y[..., half : 2 * half] += a * sin
    y[..., 2 * half :] = x_BTHC[..., 2 * half :]
    return y


def turned_back(h: Held, y_bar: np.ndarray) -> np.ndarray:
    return turned(h, y_bar, -1)


def probabilities(h: Held) -> np.ndarray:
    """[B, G, H/G · T, S]"""
    b, t, _ = h.shape
    p_BGNS = h.of["queries"] @ h.of["keys"].swapaxes(-1, -2)
    p_BGNS *= np.float32(h.parts.scale)
    add_mask(p_BGNS, h.mask, (b, h.parts.heads[0], t, 0))
    p_BGNS -= p_BGNS.max(axis=-1, keepdims=True)
    np.exp(p_BGNS, out=p_BGNS)
    p_BGNS /= p_BGNS.sum(axis=-1, keepdims=True)
    return p_BGNS


def attention_back(h: Held, g_BGNC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of queries, keys and values."""
    p_BGNS = h.probabilities if h.probabilities is not None else probabilities(h)
    v_bar = p_BGNS.swapaxes(-1, -2) @ g_BGNC
    s_BGNS = g_BGNC @ h.of["values"].swapaxes(-1, -2)
    s_BGNS -= np.einsum("bgns,bgns->bgn", s_BGNS, p_BGNS)[..., None]
    s_BGNS *= p_BGNS
    s_BGNS *= np.float32(h.parts.scale)
    return s_BGNS @ h.of["keys"], s_BGNS.swapaxes(-1, -2) @ h.of["queries"], v_bar
