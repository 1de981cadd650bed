"""The curve of a spline adapter: a piecewise-linear (or smooth) bend of one number, as arrays.

    φ(z) = z + (S(c z) - S(0)) / c      S interpolates d = v - k over the uniform knots k

c is the grid's input scale, v the curve's values at the knots. d is what is learned: at d = 0 the
curve is the identity to the bit, which interpolating v itself would round away. Beyond the ends the
outer pieces go on straight, unless the extrapolation is `clamp`: there z itself stops at the ends.

A piecewise-linear curve is known by its pieces: φ(z) = z + slope·z + offset of the piece that z is
in. Both are linear in d, and offset is exactly 0 in the piece of z = 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.blocks import MOST_SOFT
from mlx_lora.errors import AdapterError, near

METHODS = ("piecewise", "soft")
BEYOND = ("linear", "clamp")
SNAP = 1e-9  # of a step: a knot so near 0 is at 0


@dataclass(frozen=True)
class Curve:
    """What is fixed about the curves of an adapter. Its fields are keys of `lora_parameters`."""

    num_knots: int = 5
    k_min: float = -3.0
    k_max: float = 3.0
    interpolation_method: str = "piecewise"
    extrapolation: str = "linear"
    spline_reg_weight: float = 0.01

    @property
    def step(self) -> float:
        """Between two knots."""
        return (self.k_max - self.k_min) / (self.num_knots - 1)

    @property
    def reach(self) -> float:
        """The end of the grid that is further from 0."""
        return max(abs(self.k_min), abs(self.k_max))

    @property
    def straight(self) -> bool:
        """Made of straight pieces, the outer ones without end."""
        return self.interpolation_method == "piecewise" and self.extrapolation == "linear"


def curve_of(parameters: Mapping[str, Any]) -> Curve:
    """The curve that `lora_parameters` describe. AdapterError lists all that is wrong with it."""
    names = [f.name for f in fields(Curve)]
    curve = Curve(**{k: v for k, v in parameters.items() if k in names and v is not None})
    problems = []
    whole = isinstance(curve.num_knots, int) and not isinstance(curve.num_knots, bool)
    if not whole or curve.num_knots < 2:
        problems.append(f"num_knots is a whole number, 2 or more, got {curve.num_knots!r}")
    elif curve.num_knots > MOST_SOFT and curve.interpolation_method == "soft":
        problems.append(f"num_knots: a soft curve has at most {MOST_SOFT}, got {curve.num_knots}")
    numbers = {n: getattr(curve, n) for n in ("k_min", "k_max", "spline_reg_weight")}
    bad = [n for n, v in numbers.items() if not is_number(v)]
    problems += [f"{n} is a finite number, got {numbers[n]!r}" for n in bad]
    if not bad and curve.k_min >= curve.k_max:
        problems.append(f"k_min {curve.k_min:g} is not below k_max {curve.k_max:g}")
    if not bad and curve.spline_reg_weight < 0:
        problems.append(f"spline_reg_weight is 0 or more, got {curve.spline_reg_weight:g}")
    for name, known in (("interpolation_method", METHODS), ("extrapolation", BEYOND)):
        if (given := getattr(curve, name)) not in known:
            problems.append(f"there is no {name} {given!r}. {near(str(given), known)}".rstrip())
    if problems:
        raise AdapterError("\n".join(problems), "These are keys of lora_parameters.")
    return curve


def asked(parameters: Mapping[str, Any]) -> Curve | None:
    """The curve where `lora_parameters` are of type spline."""
    return curve_of(parameters) if parameters.get("type") == "spline" else None


def curve_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `lora_parameters` that makes layers spline layers; empty for other types."""
    curve = asked(parameters)
    return {"type": "spline", **asdict(curve)} if curve else {}


def is_number(value: Any) -> bool:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and math.isfinite(value)


@cache
def knots(curve: Curve) -> np.ndarray:
    """The grid [K] in float64, a knot at 0 exactly there."""
    found_K = np.linspace(curve.k_min, curve.k_max, curve.num_knots)
    found_K[np.abs(found_K) < SNAP * curve.step] = 0.0
    return found_K


def middle(curve: Curve) -> int:
    """The piece that z = 0 is in, the right one of two."""
    return int((knots(curve)[1:-1] <= 0).sum())


@cache
def slopes(curve: Curve) -> np.ndarray:
    """[K-1, K]: from d to what it adds to the slope of each piece."""
    eye = np.eye(curve.num_knots)
    return (eye[1:] - eye[:-1]) / curve.step


@cache
def offsets(curve: Curve) -> np.ndarray:
    """[K-1, K]: from d to the offset of each piece at input scale 1, 0 in the middle one."""
    turns = np.diff(slopes(curve), axis=0) * knots(curve)[1:-1, None]
    found = np.zeros_like(slopes(curve))
    m = middle(curve)
    for piece in range(m + 1, len(found)):
        found[piece] = found[piece - 1] - turns[piece - 1]
    for piece in range(m - 1, -1, -1):
        found[piece] = found[piece + 1] + turns[piece]
    return found


@cache
def constants(curve: Curve) -> tuple[mx.array, mx.array]:
    """`slopes` and `offsets` in float32."""
    return single(slopes(curve)), single(offsets(curve))


def single(x: np.ndarray) -> mx.array:
    """In float32, converted here: a trace in progress may not hold what makes it."""
    return mx.array(x.astype(np.float32))


def bent(z: mx.array, d_K: mx.array, input_scale: mx.array, curve: Curve) -> mx.array:
    """φ(z), element by element, in the type of z. Differentiable in z and d."""
    if curve.extrapolation == "clamp":
        z = mx.clip(z, *((end / input_scale).astype(z.dtype) for end in (curve.k_min, curve.k_max)))
    if curve.interpolation_method == "soft":
        return soft(z, d_K, input_scale, curve)
    slope_PK, offset_PK = constants(curve)
    return piecewise(z, slope_PK @ d_K, (offset_PK @ d_K) / input_scale, input_scale, curve)


def piecewise(
    z: mx.array, slope_P: mx.array, offset_P: mx.array, input_scale: mx.array, curve: Curve
) -> Any:
    """z + slope·z + offset of the piece of each z. No gradient flows to the input scale."""

    def pieces(z: mx.array, input_scale: mx.array) -> mx.array:
        place = mx.floor((z * input_scale - curve.k_min) / curve.step)
        place = mx.where(mx.isnan(place), 0, place)  # which no index may be
        return mx.clip(place, 0, curve.num_knots - 2).astype(mx.uint32)

    @mx.custom_function
    def product(z, slope_P, offset_P, input_scale):
        piece = pieces(z, input_scale)
        return (z + (slope_P[piece] * z + offset_P[piece])).astype(z.dtype)

    @product.vjp
    def product_vjp(primals, g, output):
        z, slope_P, _, input_scale = primals
        piece = pieces(z, input_scale)
        g = g.astype(mx.float32)
        gz = g * z
        inside = [piece == p for p in range(curve.num_knots - 1)]
        slope_bar = mx.stack([mx.where(i, gz, 0).sum() for i in inside])
        offset_bar = mx.stack([mx.where(i, g, 0).sum() for i in inside])
        z_bar = (g + g * slope_P[piece]).astype(z.dtype)
        return z_bar, slope_bar, offset_bar, mx.zeros_like(input_scale)

    return product(z, slope_P, offset_P, input_scale)


def soft(z: mx.array, d_K: mx.array, input_scale: mx.array, curve: Curve) -> mx.array:
    """z + (S(c z) - S(0)) / c with S a mean of d, weights exp(-((c z - k) / step)²), summing to 1.

    Beyond the ends S goes on straight, with the slope of the last piece.
    """
    shift = softened(input_scale * z, d_K, curve) - softened(mx.array(0.0), d_K, curve)
    return (z + shift / input_scale).astype(z.dtype)


def softened(u: mx.array, d_K: mx.array, curve: Curve) -> mx.array:
    """S(u). Over uniform knots all weights are powers of one exponential, times what cancels."""
    inside = mx.clip(u, curve.k_min, curve.k_max)
    t = mx.exp((inside - (curve.k_min + curve.k_max) / 2) * (2 / curve.step))
    shares = np.exp(-np.square(np.arange(curve.num_knots) - (curve.num_knots - 1) / 2)).tolist()
    upper, lower = polynomial(t, [d_K[i] * s for i, s in enumerate(shares)]), polynomial(t, shares)
    first, last = (d_K[1] - d_K[0]) / curve.step, (d_K[-1] - d_K[-2]) / curve.step
    below, above = mx.minimum(u - curve.k_min, 0), mx.maximum(u - curve.k_max, 0)
    return upper / lower + first * below + last * above


def polynomial(t: mx.array, coefficients: Sequence[Any]) -> Any:
    """c0 + c1 t + c2 t² + ..., by Horner's rule."""
    found = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        found = found * t + coefficient
    return found


@cache
def pulling(curve: Curve) -> np.ndarray:
    """[K, K]: from d to the gradient of mean(d²) + mean(second difference of d, squared)."""
    eye = np.eye(curve.num_knots)
    found = 2 * eye / curve.num_knots
    second = np.diff(eye, n=2, axis=0)
    return found + 2 * second.T @ second / len(second) if len(second) else found


def pull(d_K: mx.array, curve: Curve) -> mx.array:
    """The gradient [K] of the regulariser, with its weight."""
    return single(curve.spline_reg_weight * pulling(curve)) @ d_K


@cache
def hinges(curve: Curve) -> np.ndarray:
    """[K-1, K]: from d to the slope of the middle piece, and to the turn at each inner knot.

    φ(z) = z + w₀ z + Σ wᵢ max(z - eᵢ, 0) right of the middle, wᵢ min(z - eᵢ, 0) left of it. A turn
    left of the middle counts the other way round.
    """
    turns, m = np.diff(slopes(curve), axis=0), middle(curve)
    turns[:m] *= -1
    return np.concatenate([slopes(curve)[m : m + 1], turns])


def curve_at(z: np.ndarray, d_K: np.ndarray, input_scale: float, curve: Curve) -> np.ndarray:
    """φ in NumPy, for pictures: an array of any shape."""
    found = bent(mx.array(z, mx.float32), mx.array(d_K, mx.float32), mx.array(input_scale), curve)
    return np.array(found)
