"""Transformer blocks of the usual kind, as the CPU fast path sees them (see cpu.py).

Such a block is some twenty evaluations, each of which costs MLX's CPU backend up to a tenth of a
millisecond besides the work. It is one here: `cpu_step` for one more token of each row while
decoding, `cpu_pass` for many tokens, with a gradient. Whatever is not of the usual kind, in parts
or in what it is called with, goes the way of its own class.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache

from mlx_lora.adapter.spline import SplineLoRALinear
from mlx_lora.cpu_attention import PROJECTIONS, inverse_frequencies
from mlx_lora.cpu_layers import TWINS, NumpyRMSNorm, dense, drops, frozen, view
from mlx_lora.cpu_spline import Bends, bends_of
from mlx_lora.cpu_spline import suits as suits_curve

STACKED_BYTES = 1 << 28  # of all stacked matrices together
GATED = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
SIZES = ("n_heads", "n_kv_heads", "scale")
CACHES = (KVCache, BatchKVCache)


@dataclass(frozen=True)
class Product:
    """A linear layer: weight [O, I], bias [O], and what an adapter adds, scale · (x a) b.

    `more` is the layer where it adds something that is each row's own: its class's `beside` makes,
    of layers with one input, a function of what goes in [N, I] and which rows of the batch that is.
    No gradient flows through it.
    """

    weight_OI: np.ndarray
    bias_O: np.ndarray | None
    a_IR: mx.array | None = None
    b_RO: mx.array | None = None
    scale: float = 0.0
    more: Any = None
    bends: Bends | None = None  # of a spline: what is added is scale · φ((x a) b)

    @property
    def learned(self) -> list[mx.array]:
        """What of it gets a gradient."""
        pair = [x for x in (self.a_IR, self.b_RO) if x is not None]
        return [*pair, self.bends.weights_P] if self.bends else pair


class Norm(NamedTuple):
    weight_D: np.ndarray
    eps: float


@dataclass(frozen=True)
class Parts:
    """What a block computes with. H query heads share G key heads of C units."""

    attention: tuple[Product, ...]  # q, k, v, o
    mlp: tuple[Product, ...]  # gate, up, down
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, ...]  # of queries and keys, or none
    heads: tuple[int, int]  # H, G
    scale: float  # of the scores
    speeds_U: np.ndarray  # of rope: how fast so many units turn with as many others

    @property
    def adapted(self) -> list[Product]:
        return [p for p in (*self.attention, *self.mlp) if p.a_IR is not None]

    @property
    def units(self) -> int:
        return len(self.attention[1].weight_OI) // self.heads[1]


def parts_of(block: Any) -> Parts | None:
    """The block's numbers as they are now; None where it is not of the usual kind."""
    attn, mlp = block.self_attn, block.mlp
    attention: list[Any] = [product_of(attn[name]) for name in PROJECTIONS]
    gated: list[Any] = [product_of(mlp[name]) for name in GATED]
    norms: list[Any] = [norm_of(block[name]) for name in NORMS]
    head_norms: list[Any] = [norm_of(attn[name]) for name in HEAD_NORMS if name in attn]
    sizes: list[Any] = [getattr(attn, name, None) for name in SIZES]
    speeds_U: Any = speeds_of(attn.get("rope"))
    known = (*attention, *gated, *norms, *head_norms, *sizes, speeds_U)
    if any(part is None for part in known) or len(head_norms) not in (0, 2):
        return None
    if len({norm.eps for norm in head_norms}) > 1:
        return None
    q, k, v = (len(p.weight_OI) for p in attention[:3])
    heads, groups, scale = sizes
    if k % groups or q * groups != k * heads or v != k or attention[3].weight_OI.shape[1] != q:
        return None
    return Parts(
        tuple(attention),
        tuple(gated),
        (norms[0], norms[1]),
        tuple(head_norms),
        (heads, groups),
        scale,
        speeds_U,
    )


def product_of(layer: Any) -> Product | None:
    """A linear layer's numbers, the merged ones where an adapter is merged in."""
    inner = getattr(layer, "linear", layer)
    more = layer if hasattr(type(layer), "beside") else None
    kind = type(layer) if more is None else type(layer).__base__
    if kind not in fast_kinds() or type(inner) not in fast_kinds() or drops_some(layer):
        return None
    merged = layer.__dict__.get("_merged")
    weight_OI = merged if merged is not None else dense(inner)
    if not frozen(inner) or weight_OI.dtype != mx.float32:
        return None
    bias_O = view(inner.bias) if "bias" in inner else None
    if inner is layer or merged is not None:
        return Product(view(weight_OI), bias_O, more=more)
    if more is not None:  # it stands beside what is merged
        return None
    a_IR, b_RO, scale = layer.lora_a, layer.lora_b, float(np.array(layer.scale))
    if not a_IR.dtype == b_RO.dtype == mx.float32:
        return None
    curved = kind is SplineLoRALinear
    if curved and not suits_curve(layer):
        return None
    return Product(
        view(weight_OI), bias_O, a_IR, b_RO, scale, bends=bends_of(layer) if curved else None
    )


@cache
def fast_kinds() -> frozenset[type]:
    """The very classes whose products are known: what is derived from them may do more."""
    return frozenset((*TWINS.values(), SplineLoRALinear))


def drops_some(layer: Any) -> bool:
    return "lora_a" in layer and drops(layer)


def norm_of(layer: Any) -> Norm | None:
    usual = type(layer) is NumpyRMSNorm and frozen(layer) and layer.weight.dtype == mx.float32
    return Norm(view(layer.weight), layer.eps) if usual else None


def speeds_of(rope: Any) -> np.ndarray | None:
    """How fast rope turns the units [U] of a head, each with another; None for an unknown kind."""
    if getattr(rope, "traditional", True):
        return None
    freqs = getattr(rope, "_freqs", None)
    if freqs is not None:
        return (1 / view(freqs)).astype(np.float32)
    if type(rope) is not nn.RoPE:
        return None
    return inverse_frequencies(rope.dims, rope.base) * np.float32(rope.scale)


@cache
def block_twin(parent: type) -> type:
    """A block's class that goes the quick way where it can."""

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        from mlx_lora import cpu_pass, cpu_step

        if not suits(x, mask, cache):
            return parent.__call__(self, x, mask, cache)
        stacked = self.__dict__.get("_stacked")
        if stacked is not None and x.shape[1] == 1 and cpu_step.suits(mask, cache):
            return cpu_step.step(stacked, x, mask, cache)
        parts = parts_of(self)
        if parts is None:
            return parent.__call__(self, x, mask, cache)
        return cpu_pass.block(parts, x, mask, cache, gradient=stacked is None)

    return type(f"Fast{parent.__name__}", (parent,), {"__call__": call, "_parent": parent})


def suits(x: mx.array, mask: Any, layer_cache: Any) -> bool:
    """Whether what a block is called with is of the usual kind."""
    if x.dtype != mx.float32 or x.ndim != 3:
        return False
    if isinstance(mask, mx.array):
        if mask.dtype not in (mx.bool_, mx.float32) or (mask.ndim == 4 and mask.shape[1] != 1):
            return False
    elif mask is not None and mask != "causal":
        return False
    if layer_cache is None:
        return True
    if type(layer_cache) not in CACHES:
        return False
    kept = layer_cache.keys, layer_cache.values
    return all(k is None or k.dtype == mx.float32 for k in kept)


def hasten_blocks(model: nn.Module) -> None:
    """Give the blocks of the usual kind the quick way, if the first of each kind agrees on it."""
    believed: dict[Any, bool] = {}
    for _, block in model.named_modules():
        attn, mlp = block.get("self_attn"), block.get("mlp")
        named = (attn, PROJECTIONS), (mlp, GATED), (block, NORMS)
        if not all(part and all(n in part for n in names) for part, names in named):
            continue
        parts = parts_of(block) if not hasattr(type(block), "_parent") else None
        if parts is None or not hasattr(type(mlp), "_parent"):
            continue
        shape = parts.heads, parts.speeds_U.tobytes(), len(parts.head_norms)
        kind = type(block), type(attn), type(mlp), *shape
        if kind not in believed:
            believed[kind] = agrees(block, parts)
        if believed[kind]:
            block.__class__ = block_twin(type(block))


def agrees(block: Any, parts: Parts) -> bool:
    """Whether the quick way gives what the block gives: many tokens, then one more, two lengths."""
    width = parts.attention[0].weight_OI.shape[1]
    x_BTD = mx.random.normal((2, 4, width), key=mx.random.key(0))
    try:
        own, quick = (outputs(block, parts, x_BTD, quick=quick) for quick in (False, True))
        pairs = list(zip(own, quick, strict=True))
        return all(mx.allclose(a, b, rtol=1e-4, atol=1e-5).item() for a, b in pairs)
    except Exception:  # it is called in another way than we know: it goes its own
        return False


def outputs(block: Any, parts: Parts, x_BTD: mx.array, *, quick: bool) -> list[mx.array]:
    """Of all tokens but the last, read at once, and of the last."""
    from mlx_lora import cpu_pass, cpu_step

    read = partial(cpu_pass.block, parts) if quick else block
    step = partial(cpu_step.step, cpu_step.stacked(parts)) if quick else block
    layer_cache, count = BatchKVCache([1, 0]), x_BTD.shape[1] - 1
    many = read(x_BTD[:, :count], layer_cache.make_mask(count), layer_cache)
    one = step(x_BTD[:, count:], layer_cache.make_mask(1), layer_cache)
    return [many[:, 1:], one]  # the first token of the first row is padding


@contextlib.contextmanager
def stacked(model: nn.Module) -> Iterator[None]:
    """Inside, hastened blocks have the matrices for decoding, as far as there is memory."""
    from mlx_lora import cpu_step

    blocks = [
        m for _, m in model.named_modules() if hasattr(type(m), "_parent") and "self_attn" in m
    ]
    spent = 0
    try:
        for block in blocks:
            parts = parts_of(block)
            if parts is None or parts.adapted:
                continue
            spent += cpu_step.bytes_of(parts)
            if spent > STACKED_BYTES:
                break
            block.__dict__["_stacked"] = cpu_step.stacked(parts)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("_stacked", None)
