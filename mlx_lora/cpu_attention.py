"""Attention and its turns on the CPU fast path: small batched products, by NumPy (see cpu.py).

MLX's own takes three to eight times as long there. Only float32 without sinks goes this way, and
only inside the attention layers of a model that was accelerated; everything else is MLX's.
"""

from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.cpu_layers import LINEARS, SILENT, view
from mlx_lora.cpu_math import Angles, angles_of, attention_back, softmax, turned

KEPT = 1 << 24  # bytes of probabilities kept for the way back; more are made again
LEAST = np.finfo(np.float32).min  # of a masked score, as in MLX: a row without a key is uniform
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
inside: ContextVar[bool] = ContextVar("inside", default=False)  # an accelerated layer is computing
stock, stock_rope = mx.fast.scaled_dot_product_attention, mx.fast.rope


def attention(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
    """Stands in for mx.fast.scaled_dot_product_attention, with its arguments."""
    mask = options.get("mask")
    known = mask is None or mask == "causal" if not isinstance(mask, mx.array) else fits(mask, q)
    usual = inside.get() and known and options.keys() <= {"scale", "mask", "sinks", "stream"}
    if not usual or options.get("sinks") is not None or {q.dtype, k.dtype, v.dtype} != {mx.float32}:
        return stock(q, k, v, **options)
    return numpy_attention(q, k, v, options["scale"], mask)


def fits(mask: mx.array, q_BHTD: mx.array) -> bool:
    """Whether the mask's dtype and heads are of the usual kinds."""
    heads = mask.ndim < 4 or mask.shape[1] in (1, q_BHTD.shape[1])
    return heads and mask.dtype in (mx.bool_, mx.float32)


def numpy_attention(
    q_BHTD: mx.array, k_BGSD: mx.array, v_BGSD: mx.array, scale: float, mask: Any
) -> Any:
    """softmax(scale · q kᵀ + mask) v, differentiable in q, k and v. H heads share G keys."""
    kept: dict[str, np.ndarray] = {}

    def probabilities(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        p_BGNS = q @ k.swapaxes(-1, -2)
        p_BGNS *= scale
        add_mask(p_BGNS, mask, q_BHTD.shape)
        return softmax(p_BGNS)

    def grouped(x: mx.array) -> np.ndarray:
        """[B, H, T, D] as [B, G, H/G · T, D]: the queries of one key head are one matrix."""
        b, g = k_BGSD.shape[:2]
        return view(x).reshape(b, g, -1, x.shape[-1])

    @mx.custom_function
    @SILENT
    def product(q, k, v):
        p_BGNS = probabilities(grouped(q), view(k))
        if p_BGNS.nbytes <= KEPT:
            kept["p"] = p_BGNS
        return mx.array((p_BGNS @ view(v)).reshape(*q.shape[:-1], v.shape[-1]))

    @product.vjp
    @SILENT
    def product_vjp(primals, cotangent, output):
        q, k, v = primals
        q_BGND, k_BGSD, g_BGND = grouped(q), view(k), grouped(cotangent)
        p_BGNS = kept["p"] if "p" in kept else probabilities(q_BGND, k_BGSD)
        q_bar, *bars = attention_back(q_BGND, k_BGSD, view(v), p_BGNS, scale, g_BGND)
        return mx.array(q_bar.reshape(q.shape)), *map(mx.array, bars)

    return product(q_BHTD, k_BGSD, v_BGSD)


def add_mask(scores_BGNS: np.ndarray, mask: Any, shape: tuple[int, ...]) -> None:
    """Add the mask in place: None, "causal", or an array that broadcasts to [B, H, T, S]."""
    if mask is None:
        return
    b, h, t, _ = shape
    g, s = scores_BGNS.shape[1], scores_BGNS.shape[-1]
    added = causal(t, s) if isinstance(mask, str) else as_added(view(mask))
    lead = (1,) * (4 - added.ndim) + added.shape
    heads = (lead[1] // g, g) if lead[1] == h else (1, 1)
    scores_BGRTS = scores_BGNS.reshape(b, g, h // g, t, s)
    scores_BGRTS += added.reshape(lead[0], heads[1], heads[0], *lead[2:])


def as_added(mask: np.ndarray) -> np.ndarray:
    """A boolean mask as numbers to add; numbers as they are."""
    return np.where(mask, np.float32(0), LEAST) if mask.dtype == bool else mask


@lru_cache(maxsize=8)
def causal(t: int, s: int) -> np.ndarray:
    """The last of t queries sees all s keys, each one before it one key less."""
    return as_added(np.tril(np.ones((t, s), bool), s - t))


def rope(x: mx.array, dims: int, *rest: Any, **options: Any) -> mx.array:
    """Stands in for mx.fast.rope, with its arguments."""
    usual = inside.get() and not rest and x.ndim == 4 and x.dtype == mx.float32
    known = {"traditional", "base", "scale", "offset", "freqs"}
    if not usual or options.get("traditional") or not options.keys() <= known:
        return stock_rope(x, dims, *rest, **options)
    freqs, offset = options.get("freqs"), options["offset"]
    inverse = inverse_frequencies(dims, options["base"]) if freqs is None else 1 / view(freqs)
    starts = np.reshape(view(offset) if isinstance(offset, mx.array) else offset, (-1, 1))
    places = (starts + np.arange(x.shape[2])).astype(np.float32) * np.float32(options["scale"])
    return numpy_rope(x, angles_of(places[:, None], inverse, x.shape[-1]))


@lru_cache(maxsize=8)
def inverse_frequencies(dims: int, base: float) -> np.ndarray:
    step = np.float32(np.log(base) / (dims // 2))
    return np.exp(np.arange(0, -(dims // 2), -1, dtype=np.float32) * step)


def numpy_rope(x_BHTD: mx.array, angles: Angles) -> Any:
    """Each vector turned by its place's angles, differentiable in x."""

    @mx.custom_function
    @SILENT
    def product(x):
        return mx.array(turned(view(x), angles))

    @product.vjp
    @SILENT
    def product_vjp(primals, cotangent, output):
        return mx.array(turned(view(cotangent), angles, back=True))

    return product(x_BHTD)


@cache
def attention_twin(parent: type) -> type:
    """An attention layer's class that computes with `attention`."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        token = inside.set(True)
        try:
            return parent.__call__(self, *args, **options)
        finally:
            inside.reset(token)

    return type(f"Fast{parent.__name__}", (parent,), {"__call__": call, "_parent": parent})


def hasten_attention(module: Any) -> bool:
    """Make an attention layer fast; True where it is one that was not yet."""
    parts = all(isinstance(module.get(name), LINEARS) for name in PROJECTIONS)
    if not parts or hasattr(type(module), "_parent"):
        return False
    mx.fast.scaled_dot_product_attention = attention  # models look them up when they call them
    mx.fast.rope = rope
    module.__class__ = attention_twin(type(module))
    return True
