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
from mlx_lora.adapter.spline_math import Curve, hinges, knots, middle, single, slopes
from mlx_lora.cpu_layers import FAST_LINEARS, dense, drops, view
from mlx_lora.cpu_math import Beside, Hinges, Kinks, neighbours

FEW = 1 << 13  # outputs of layers with one input that are bent quicker together than one by one


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


class Own(NamedTuple):
    """What a layer adds to its straightened product, in units of the update, scale · z."""

    a_IR: np.ndarray
    b_RO: np.ndarray  # times the scale
    kinks: Kinks


def own_of(layer: Any) -> Own:
    scale, slopes_P = np.float32(layer.scale), 1 + slopes(layer.curve) @ view(layer.spline)
    found = (slopes_P[0] + slopes_P[-1]) / 2, np.diff(slopes_P) / 2, scale * edges_of(layer)
    kinks = Kinks(*(np.asarray(x, np.float32) for x in found))
    return Own(view(layer.lora_a), scale * view(layer.lora_b), kinks)


def straightened(layer: Any, own: Own) -> mx.array:
    """The layer as one matrix [O, I] that has its curve as a line, of the `Kinks`' slope."""
    update_IO = (layer.scale * float(own.kinks.slope)) * (layer.lora_a @ layer.lora_b)
    return mx.contiguous(dense(layer.linear) + update_IO.T)


def beside(*layers: Any, shift: Beside | None = None) -> Beside:
    """What spline layers of one input add to their products with `straightened` matrices.

    `shift` is added inside of φ, times the scale.
    """
    owns: list[Own] = [m.__dict__["_own"] for m in layers]
    a_IQ = owns[0].a_IR if len(owns) == 1 else np.hstack([o.a_IR for o in owns])
    ranks, columns = (neighbours(o.b_RO.shape[axis] for o in owns) for axis in (0, 1))
    places = list(zip(ranks, columns, owns, strict=True))
    bends, few = any(o.kinks.weights.any() for o in owns), FEW if len(owns) > 1 else FEW // 8

    @cache
    def together() -> tuple[np.ndarray, Kinks]:
        """One product: what is outside of their own blocks of B is zero."""
        b_QO = np.zeros((ranks[-1].stop, columns[-1].stop), np.float32)
        for some, where, own in places:
            b_QO[some, where] = own.b_RO
        parts = [[o.kinks.slope, *o.kinks.weights, *o.kinks.edges] for o in owns]
        widths = [o.b_RO.shape[1] for o in owns]
        slope_O, *others = np.repeat(np.array(parts, np.float32).T, widths, axis=1)
        return b_QO, Kinks(slope_O, *np.split(np.array(others), 2))

    def added(y_NO: np.ndarray, x_NI: np.ndarray, rows: slice) -> None:
        shift_NO = None
        if shift:
            shift_NO = np.zeros_like(y_NO)
            shift(shift_NO, x_NI, rows)
            for _, where, own in places:
                y_NO[:, where] += shift_NO[:, where] * own.kinks.slope
        if not bends:
            return
        z_NQ = x_NI @ a_IQ
        if y_NO.size <= few and shift_NO is None:
            b_QO, kinks = together()
            return kinks.bend_few(y_NO, z_NQ @ b_QO)
        for some, where, own in places:
            z_NO = z_NQ[:, some] @ own.b_RO
            if shift_NO is not None:
                z_NO += shift_NO[:, where]
            own.kinks.bend(y_NO[:, where], z_NO)

    return added


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
            layer.__dict__["_own"] = own = own_of(layer)
            layer.__dict__["_merged"] = straightened(layer, own)
            if type(layer) is SplineLoRALinear:
                layer.__class__ = DecodingSpline
        mx.eval([layer.__dict__["_merged"] for layer in layers])
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            for kept in ("_merged", "_own", "_beside"):
                layer.__dict__.pop(kept, None)
            layer.__class__ = kind


def fits(layer: Any) -> bool:
    inner, on = layer.linear, float(np.array(layer.scale)) > 0
    plain = isinstance(inner, FAST_LINEARS) and dense(inner).dtype == mx.float32
    known = layer.lora_a.dtype == layer.lora_b.dtype == mx.float32 and suits(layer)
    return on and plain and known and not drops(layer)
