"""Spline layers on the CPU fast path (see cpu.py): as hinges, in whole blocks, and while decoding.

Straight pieces are a sum of hinges at the inner knots, which NumPy passes over quicker than it
looks up pieces. Other curves go the way of their own class.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapter.spline import SplineLoRALinear, spline_layers
from mlx_lora.adapter.spline_math import Curve, hinges, knots, middle, single
from mlx_lora.cpu_layers import FAST_LINEARS, dense, drops, view
from mlx_lora.cpu_math import Beside, Hinges, bent_into


class Bends(NamedTuple):
    """A curve as hinges."""

    weights_P: mx.array
    edges: np.ndarray  # [P-1]
    middle: int

    def hinges(self, weights_P: np.ndarray) -> Hinges:
        return Hinges(weights_P, self.edges, self.middle)


@cache
def matrix(curve: Curve) -> mx.array:
    """From the curve's parameters to its hinges, float32."""
    return single(hinges(curve))


def suits(layer: Any) -> bool:
    """Whether the layer's curve is of straight pieces, in float32."""
    return layer.curve.straight and layer.spline.dtype == mx.float32


def bends_of(layer: Any) -> Bends:
    return Bends(matrix(layer.curve) @ layer.spline, edges_of(layer), middle(layer.curve))


def edges_of(layer: Any) -> np.ndarray:
    """Its inner knots, as numbers of B A x."""
    return (knots(layer.curve)[1:-1] / view(layer.spline_scale)).astype(np.float32)


def beside(*layers: Any, shift: Beside | None = None) -> Beside:
    """What spline layers of one input add to their products with `straightened` matrices.

    `shift` is added inside of φ, times the scale. The layers are one product: what is outside of
    their own blocks of B is zero. Everything is in units of the update, scale · z.
    """
    scales = [np.float32(float(m.scale)) for m in layers]
    ranks, widths = ([m[f].shape[1] for m in layers] for f in ("lora_a", "lora_b"))
    a_IQ = np.hstack([view(m.lora_a) for m in layers])
    b_QO, r, o = np.zeros((sum(ranks), sum(widths)), np.float32), 0, 0
    for layer, scale, rank, width in zip(layers, scales, ranks, widths, strict=True):
        b_QO[r : r + rank, o : o + width] = scale * view(layer.lora_b)
        r, o = r + rank, o + width
    curve = layers[0].curve  # which all of an adapter share
    weights_PL = hinges(curve).astype(np.float32) @ np.stack([view(m.spline) for m in layers], 1)
    edges_PL = np.stack([s * edges_of(m) for m, s in zip(layers, scales, strict=True)], axis=1)
    weights_PO, edges_PO = (np.repeat(x, widths, axis=1) for x in (weights_PL, edges_PL))
    bent, bends = Hinges(weights_PO, edges_PO, middle(curve)), bool(weights_PL[1:].any())

    def added(y_NO: np.ndarray, x_NI: np.ndarray, rows: slice) -> None:
        z_NO = (x_NI @ a_IQ) @ b_QO if bends else None
        if shift:
            shift_NO = np.zeros_like(y_NO)
            shift(shift_NO, x_NI, rows)
            z_NO = None if z_NO is None else z_NO + shift_NO
            y_NO += np.multiply(shift_NO, bent.slope, out=shift_NO)
        if z_NO is not None:
            bent_into(y_NO, z_NO, bent)

    return added


def straightened(layer: Any) -> mx.array:
    """The layer as one matrix [O, I] that has its curve as a line, of the slope around 0."""
    slope = 1 + hinges(layer.curve)[0] @ view(layer.spline)
    update_IO = (layer.scale * float(slope)) * (layer.lora_a @ layer.lora_b)
    return mx.contiguous(dense(layer.linear) + update_IO.T)


class DecodingSpline(SplineLoRALinear):
    """A spline layer of a block that decodes: what bends stands beside the stacked products."""

    @staticmethod
    def beside(first: Any, *others: Any) -> Beside:
        """`beside`, which is remembered of a layer alone: prompts ask for it again and again."""
        if others:
            return beside(first, *others)
        if "_beside" not in first.__dict__:
            first.__dict__["_beside"] = beside(first)
        return first.__dict__["_beside"]


@contextlib.contextmanager
def standing_beside(model: nn.Module) -> Iterator[None]:
    """Inside, spline layers stand beside the products of their blocks, as far as these know them.

    Without gradients. A population's layers have a `beside` of their own.
    """
    layers = [m for m in spline_layers(model).values() if fits(m)]
    kinds = [type(m) for m in layers]
    try:
        for layer in layers:
            layer.__dict__["_merged"] = straightened(layer)
            if type(layer) is SplineLoRALinear:
                layer.__class__ = DecodingSpline
        mx.eval([layer.__dict__["_merged"] for layer in layers])
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            for kept in ("_merged", "_beside"):
                layer.__dict__.pop(kept, None)
            layer.__class__ = kind


def fits(layer: Any) -> bool:
    inner, on = layer.linear, float(np.array(layer.scale)) != 0
    plain = isinstance(inner, FAST_LINEARS) and dense(inner).dtype == mx.float32
    known = layer.lora_a.dtype == layer.lora_b.dtype == mx.float32 and suits(layer)
    return on and plain and known and not drops(layer)
