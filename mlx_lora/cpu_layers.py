"""Layers and functions of the CPU fast path (see cpu.py).

Each layer is its mlx-lm or MLX parent with another product; only float32 goes the fast way, other
dtypes fall back to the parent's own code. The functions exist because MLX's exponential takes 15 ns
an element on this path and NumPy's 1.3.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.lora import LoRALinear

from mlx_lora import cpu_math
from mlx_lora.cpu_math import lora_back, normed, normed_back, sigmoid
from mlx_lora.cpu_threads import slices, spread
from mlx_lora.models import dense_weight, in_dims
from mlx_lora.numerics import BELOW
from mlx_lora.recompute import untraced

WORTH = 1 << 22  # multiplications that are worth a thread
BLOCK = 32  # tokens of the vocabulary that are summed first
LARGE = 1 << 16  # elements that are worth one
MERGED_BYTES = 1 << 28  # of all merged matrices together
ACROSS_BYTES = 1 << 28  # of weights laid out for few rows while these decode
SILENT = np.errstate(all="ignore")  # a broken adapter may hold NaN: as silent as MLX is about it
LINEARS = (nn.Linear, nn.QuantizedLinear)


def view(x: mx.array) -> np.ndarray:
    """The array's memory as NumPy sees it. Evaluates; copies nothing when x is row-contiguous."""
    return np.array(x, copy=False)


def rows(x: np.ndarray) -> np.ndarray:
    """[..., I] as one matrix [N, I]: a single large product instead of many small ones."""
    return x.reshape(-1, x.shape[-1])


def dense(layer: Any) -> mx.array:
    """The weight [O, I] of a frozen layer; unpacked once, and kept outside its parameters."""
    if "scales" not in layer:
        return layer.weight
    if "_dense" not in layer.__dict__:  # no trace in progress may hold what made it
        layer.__dict__["_dense"] = untraced(dense_weight(layer))
    return layer.__dict__["_dense"]


def times(x_NI: np.ndarray, weight_IO: np.ndarray) -> np.ndarray:
    """x @ weight, the rows of a large product shared out over the cores."""
    y_NO = np.empty((len(x_NI), weight_IO.shape[1]), np.float32)

    @SILENT
    def part(rows: slice) -> None:
        np.matmul(x_NI[rows], weight_IO, out=y_NO[rows])

    spread(part, slices(len(x_NI), WORTH // max(1, weight_IO.size)))
    return y_NO


def numpy_matmul(x: mx.array, weight_OI: np.ndarray) -> Any:
    """x @ weight.T in NumPy, differentiable in x."""

    @mx.custom_function
    def product(x):
        return mx.array(times(rows(view(x)), weight_OI.T).reshape(*x.shape[:-1], -1))

    @product.vjp
    def product_vjp(primals, cotangent, output):
        return mx.array(times(rows(view(cotangent)), weight_OI).reshape(primals.shape))

    return product(x)


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts of the rows as one array."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def numpy_lora(
    x: mx.array, a_IR: mx.array, b_RO: mx.array, weight_OI: np.ndarray, scale: float
) -> Any:
    """x @ weight.T + scale · (x @ a) @ b in NumPy, differentiable in x, a and b."""
    kept: dict[str, np.ndarray] = {}

    @mx.custom_function
    @SILENT
    def product(x, a, b):
        x_NI = rows(view(x))
        kept["z"] = x_NI @ view(a)
        y_NO = times(x_NI, weight_OI.T)
        update_NO = kept["z"] @ view(b)
        update_NO *= scale
        y_NO += update_NO
        return mx.array(y_NO.reshape(*x.shape[:-1], -1))

    @product.vjp
    @SILENT
    def product_vjp(primals, cotangent, output):
        x, a, b = primals
        g_NO = rows(view(cotangent))
        g_NR, a_bar, b_bar = lora_back(g_NO, rows(view(x)), kept["z"], view(b), scale)
        x_bar = times(g_NO, weight_OI)
        x_bar += g_NR @ view(a).T
        return mx.array(x_bar.reshape(x.shape)), mx.array(a_bar), mx.array(b_bar)

    return product(x, a_IR, b_RO)


def exp(x: mx.array) -> mx.array:
    """Element-wise, not differentiable."""
    return mx.array(np.exp(view(x)))


@mx.custom_function
@SILENT
def log_softmax(x: mx.array) -> mx.array:
    """Over the last axis, differentiable."""
    y = view(x) - view(x).max(axis=-1, keepdims=True)
    y -= np.log(np.exp(y).sum(axis=-1, keepdims=True))
    return mx.array(y)


@log_softmax.vjp
@SILENT
def log_softmax_vjp(primals, cotangent, output):
    g = view(cotangent)
    return mx.array(g - np.exp(view(output)) * g.sum(axis=-1, keepdims=True))


@SILENT
def drawn(logits_BV: mx.array, uniform_B: mx.array) -> tuple[mx.array, mx.array]:
    """See numerics.drawn. The function is summed by blocks, of which one is looked into."""
    x_BV, (count, size) = view(logits_BV), logits_BV.shape
    wide, each = -(-size // BLOCK), np.arange(count)
    p_BV = np.zeros((count, wide * BLOCK), np.float32)
    highest_B1 = x_BV.max(axis=-1, keepdims=True)
    np.exp(np.subtract(x_BV, highest_B1, out=p_BV[:, :size]), out=p_BV[:, :size])
    p_BKC = p_BV.reshape(count, wide, BLOCK)
    cdf_BK = np.cumsum(p_BKC.sum(axis=-1), axis=-1)
    aim_B1 = view(uniform_B)[:, None] * cdf_BK[:, -1:] * np.float32(BELOW)
    block_B = np.count_nonzero(cdf_BK <= aim_B1, axis=-1)
    before_B1 = np.where(block_B > 0, cdf_BK[each, block_B - 1], 0)[:, None]
    inside_BC = before_B1 + np.cumsum(p_BKC[each, block_B], axis=-1)
    place_B = np.count_nonzero(inside_BC <= aim_B1, axis=-1)
    ids_B = block_B * BLOCK + np.minimum(place_B, last(p_BKC[each, block_B]))
    logps_B: Any = x_BV[each, ids_B] - highest_B1[:, 0] - np.log(cdf_BK[:, -1])
    return mx.array(ids_B.astype(np.uint32)), mx.array(logps_B)


def last(p_BC: np.ndarray) -> np.ndarray:
    """The last place [B] in each row where something is possible."""
    return p_BC.shape[1] - 1 - np.argmax(p_BC[:, ::-1] > 0, axis=-1)


def token_scores(logits_NV: mx.array, targets_N: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """See numerics.token_scores."""
    x_NV, all_N = view(logits_NV), view(targets_N)

    @SILENT
    def part(rows: slice) -> tuple[np.ndarray, ...]:
        return cpu_math.token_scores(x_NV[rows], all_N[rows], gradient=True)

    parts = spread(part, slices(len(x_NV), LARGE // x_NV.shape[1]))
    logps_N, entropy_N, slopes_NV = map(joined, zip(*parts, strict=True))
    return mx.array(logps_N), mx.array(entropy_N), mx.array(slopes_NV)


def rms_norm(x: mx.array, weight_D: mx.array, eps: float) -> Any:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, differentiable in x."""

    @mx.custom_function
    @SILENT
    def product(x):
        return mx.array(normed(view(x), view(weight_D), eps))

    @product.vjp
    @SILENT
    def product_vjp(primals, cotangent, output):
        return mx.array(normed_back(view(cotangent), view(primals), view(weight_D), eps))

    return product(x)


def swiglu(gate: mx.array, up: mx.array) -> Any:
    """gate · sigmoid(gate) · up, differentiable in both.

    The way back is left to MLX: what NumPy makes inside a trace stays until the trace ends.
    """
    kept: dict[str, mx.array] = {}

    @mx.custom_function
    @SILENT
    def product(gate, up):
        y = sigmoid(view(gate))
        kept["s"] = mx.array(y)
        y *= view(gate)
        y *= view(up)
        return mx.array(y)

    @product.vjp
    @SILENT
    def product_vjp(primals, cotangent, output):
        gate, up = primals
        scaled, s = cotangent * kept["s"], kept["s"]
        return scaled * up * (1 + gate * (1 - s)), scaled * gate

    return product(gate, up)


@cache
def swiglu_twin(parent: type) -> type:
    """A gated MLP's class with the fast activation."""

    def call(self: Any, x: mx.array) -> mx.array:
        if x.dtype != mx.float32:
            return parent.__call__(self, x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return type(f"Fast{parent.__name__}", (parent,), {"__call__": call, "_parent": parent})


def hasten_mlp(module: Any) -> bool:
    """Make a gated MLP fast if it is the usual kind: tried on an input, believed if it agrees."""
    parent = type(module)
    parts = all(isinstance(module.get(n), LINEARS) for n in ("gate_proj", "up_proj", "down_proj"))
    if not parts or hasattr(parent, "_parent"):
        return False
    gate = module.gate_proj
    x = mx.random.normal((1, 2, in_dims(gate)), key=mx.random.key(0))
    asked = (x, 1000 * x)  # of two sizes: some clamp what is large
    expected = [module(x) for x in asked]
    module.__class__ = swiglu_twin(parent)
    pairs = list(zip(map(module, asked), expected, strict=True))
    if all(
        mx.allclose(a, b, rtol=1e-4, atol=1e-5 * float(mx.abs(b).max())).item() for a, b in pairs
    ):
        return True
    module.__class__ = parent
    return False


class NumpyRMSNorm(nn.RMSNorm):
    def __call__(self, x):
        if x.dtype != mx.float32 or self.weight.dtype != mx.float32 or not frozen(self):
            return super().__call__(x)
        return rms_norm(x, self.weight, self.eps)


def frozen(layer: nn.Module) -> bool:
    """True where its weight gets no gradient."""
    return "weight" in layer._no_grad


def with_bias(layer: Any, y: mx.array) -> mx.array:
    return y + layer.bias if "bias" in layer else y


class NumpyLinear(nn.Linear):
    def __call__(self, x):
        if x.dtype != mx.float32 or self.weight.dtype != mx.float32 or not frozen(self):
            return super().__call__(x)
        return with_bias(self, numpy_matmul(x, for_few(self)))


class NumpyQuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x):
        if x.dtype != mx.float32:
            return super().__call__(x)
        return with_bias(self, numpy_matmul(x, for_few(self)))


class NumpyEmbedding(nn.Embedding):
    def as_linear(self, x):
        if x.dtype != mx.float32 or self.weight.dtype != mx.float32 or not frozen(self):
            return super().as_linear(x)
        return numpy_matmul(x, for_few(self))


class NumpyQuantizedEmbedding(nn.QuantizedEmbedding):
    def __call__(self, x):
        if "_dense" not in self.__dict__:
            return super().__call__(x)
        return mx.array(view(dense(self))[view(x)])

    def as_linear(self, x):
        if x.dtype != mx.float32:
            return super().as_linear(x)
        return numpy_matmul(x, for_few(self))


def for_few(layer: Any) -> np.ndarray:
    """The weight [O, I], while rows decode as it lies best for few of them."""
    weight_OI = dense(layer)
    if "_across" not in layer.__dict__ or weight_OI.dtype != mx.float32:
        return view(weight_OI)
    if layer.__dict__["_across"] is None:
        layer.__dict__["_across"] = np.ascontiguousarray(view(weight_OI).T).T
    return layer.__dict__["_across"]


@contextlib.contextmanager
def across(model: nn.Module) -> Iterator[None]:
    """Inside, layers outside hastened blocks copy their weight for few rows when they are asked.

    That is the head, and whatever goes its own way; as far as there is memory.
    """
    hastened = (b for b in model.modules() if "self_attn" in b and hasattr(type(b), "_parent"))
    inside = {id(m) for block in hastened for m in block.modules()}
    found: list[Any] = [m for m in model.modules() if type(m) in WEIGHTY and id(m) not in inside]
    sizes = accumulate(4 * m.weight.shape[0] * in_dims(m) for m in found)
    found = [m for m, size in zip(found, sizes, strict=True) if size <= ACROSS_BYTES]
    try:
        for layer in found:
            layer.__dict__["_across"] = None
        yield
    finally:
        for layer in found:
            layer.__dict__.pop("_across", None)


def merged_bytes(layers: Sequence[Any]) -> int:
    """Of the matrices that these LoRA layers would be merged into."""
    return sum(4 * m.lora_a.shape[0] * m.lora_b.shape[1] for m in layers)


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, accelerated LoRA layers multiply by one matrix, W + scale · (A B)ᵀ: for decoding.

    Without gradients. Only where the copies are small; they are gone afterwards.
    """
    layers: list[Any] = [m for _, m in model.named_modules() if isinstance(m, NumpyLoRALinear)]
    try:
        for layer in layers if merged_bytes(layers) <= MERGED_BYTES else ():
            inner = layer.linear
            apart = drops(layer) or float(np.array(layer.scale)) == 0
            if apart or not isinstance(inner, FAST_LINEARS):
                continue
            base_OI = dense(inner)
            if base_OI.dtype == layer.lora_a.dtype == layer.lora_b.dtype == mx.float32:
                update_IO = layer.scale * (layer.lora_a @ layer.lora_b)
                whole_OI = base_OI + update_IO.T
                few = "_across" in inner.__dict__  # it lies as the base alone does
                layer.__dict__["_merged"] = (
                    mx.contiguous(whole_OI.T).T if few else mx.contiguous(whole_OI)
                )
        mx.eval([layer.__dict__["_merged"] for layer in layers if "_merged" in layer.__dict__])
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_merged", None)


def drops(layer: Any) -> bool:
    """True where dropout is at work."""
    return layer.dropout.training and layer.dropout._p_1 < 1


class NumpyLoRALinear(LoRALinear):
    def __call__(self, x):
        if "_merged" in self.__dict__ and x.dtype == mx.float32:
            return with_bias(self.linear, numpy_matmul(x, view(self.__dict__["_merged"])))
        fast = isinstance(self.linear, (NumpyLinear, NumpyQuantizedLinear))
        if x.dtype != mx.float32 or drops(self) or not fast:
            return super().__call__(x)
        scale = float(np.array(self.scale))  # a Python number, or an array when scheduled
        weight_OI = view(dense(self.linear))
        if scale == 0:  # switched off: the base's own product, and no work for the branch
            return with_bias(self.linear, numpy_matmul(x, weight_OI))
        if not self.lora_a.dtype == self.lora_b.dtype == mx.float32:
            return super().__call__(x)
        y = numpy_lora(x, self.lora_a, self.lora_b, weight_OI, scale)
        return with_bias(self.linear, y)


WEIGHTY = (NumpyLinear, NumpyQuantizedLinear, NumpyEmbedding, NumpyQuantizedEmbedding)
FAST_LINEARS = (nn.Linear, NumpyQuantizedLinear)
TWINS: dict[type, type] = {
    nn.Linear: NumpyLinear,
    nn.Embedding: NumpyEmbedding,
    nn.QuantizedLinear: NumpyQuantizedLinear,
    nn.QuantizedEmbedding: NumpyQuantizedEmbedding,
    nn.RMSNorm: NumpyRMSNorm,
    LoRALinear: NumpyLoRALinear,
}
