"""The arithmetic of transformer blocks in NumPy, forward and back: pure functions of arrays.

Each has its gradient beside it. Temporaries are few and written in place: on a CPU a block spends
as much time on them as on its products.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise

import numpy as np

# Adds to the first array what goes with the second, a product's input; and which rows these are.
Beside = Callable[[np.ndarray, np.ndarray, slice], None]

FAR = np.float32(np.inf)
CACHED = 1 << 15  # numbers of several arrays that a core's cache holds at once


@dataclass(frozen=True)
class Angles:
    """Of rope, for whole vectors of C units, those in the first half with the sine's opposite.

    Units that do not turn have cosine 1 and sine 0.
    """

    cos: np.ndarray  # [..., C]
    sin: np.ndarray
    half: int  # so many units turn with as many others

    def of(self, rows: slice) -> "Angles":
        """Those of some rows, where every row has its own."""
        return self if len(self.cos) == 1 else Angles(self.cos[rows], self.sin[rows], self.half)


def angles_of(places: np.ndarray, speeds_U: np.ndarray, units: int) -> Angles:
    """Of tokens at these places [...], for vectors of so many units: [..., units]."""
    turning = places.astype(np.float32)[..., None] * speeds_U
    half, shape = len(speeds_U), (*places.shape, units)
    cos, sin = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    np.cos(turning, out=cos[..., :half])
    cos[..., half : 2 * half] = cos[..., :half]
    np.sin(turning, out=sin[..., half : 2 * half])
    np.negative(sin[..., half : 2 * half], out=sin[..., :half])
    return Angles(cos, sin, half)


def turned(x: np.ndarray, angles: Angles, *, back: bool = False) -> np.ndarray:
    """Rope: each vector [..., C] turned by its angles; `back` by their opposite, the gradient."""
    half = angles.half
    beside = np.empty_like(x)
    beside[..., :half] = x[..., half : 2 * half]
    beside[..., half : 2 * half] = x[..., :half]
    beside[..., 2 * half :] = 0
    beside *= angles.sin
    y = x * angles.cos
    return np.subtract(y, beside, out=y) if back else np.add(y, beside, out=y)


def lengths(x: np.ndarray, eps: float) -> np.ndarray:
    """1 / the root mean square over the last axis."""
    squares = np.einsum("...d,...d->...", x, x)
    squares /= np.float32(x.shape[-1])
    squares += np.float32(eps)
    return 1 / np.sqrt(squares)


def normed(x: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    """RMS norm over the last axis."""
    y = x * lengths(x, eps)[..., None]
    y *= weight_D
    return y


def normed_back(y_bar: np.ndarray, x: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    g, r = y_bar * weight_D, lengths(x, eps)
    along = np.einsum("...d,...d->...", g, x)
    along *= r**3 / np.float32(x.shape[-1])
    g *= r[..., None]
    g -= x * along[..., None]
    return g


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis, in place."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def attention_back(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, p: np.ndarray, scale: float, bar: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of queries [..., N, C], keys and values [..., S, C]; p [..., N, S] of `softmax`."""
    v_bar = p.swapaxes(-1, -2) @ bar
    s = bar @ v.swapaxes(-1, -2)
    s -= np.einsum("...s,...s->...", s, p)[..., None]
    s *= p
    s *= np.float32(scale)
    return s @ k, s.swapaxes(-1, -2) @ q, v_bar


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    y = one_more(x)
    return np.divide(1, y, out=y)


def silu(x: np.ndarray) -> np.ndarray:
    """x · sigmoid(x)."""
    y = one_more(x)
    return np.divide(x, y, out=y)


def one_more(x: np.ndarray) -> np.ndarray:
    """1 + exp(-x): infinite far below zero, which is as exact as the rest."""
    y = np.negative(x)
    np.exp(y, out=y)
    y += 1
    return y


def token_scores(
    logits_NV: np.ndarray, targets_N: np.ndarray, *, gradient: bool
) -> tuple[np.ndarray, ...]:
    """Log-probabilities [N] of targets, entropies [N]; with `gradient` d logp / d logits [N, V].

    One exponential serves all three.
    """
    y_NV = logits_NV - logits_NV.max(axis=-1, keepdims=True)
    at, e_NV = (np.arange(len(targets_N)), targets_N), np.exp(y_NV)
    sum_N = e_NV.sum(axis=-1)
    logps_N = y_NV[at] - np.log(sum_N)
    entropy_N = np.log(sum_N) - np.einsum("nv,nv->n", e_NV, y_NV) / sum_N
    if not gradient:
        return logps_N, entropy_N
    del y_NV
    e_NV /= -sum_N[:, None]
    e_NV[at] += 1
    return logps_N, entropy_N, e_NV


def lora_back(
    g_NO: np.ndarray,
    x_NI: np.ndarray,
    z_NR: np.ndarray,
    b_RO: np.ndarray,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of z = x a, of a [I, R] and of b, where scale · z b is added to a product."""
    g_NR = g_NO @ b_RO.T
    g_NR *= np.float32(scale)
    b_bar = z_NR.T @ g_NO
    b_bar *= np.float32(scale)
    return g_NR, x_NI.T @ g_NR, b_bar


@dataclass(frozen=True)
class Hinges:
    """A spline's curve as `spline_math.hinges` says it."""

    weights: np.ndarray  # [P]
    edges: np.ndarray  # [P-1]
    middle: int  # so many hinges open to the left, the others to the right

    def summed(self, z: np.ndarray) -> np.ndarray:
        """φ(z), and a constant."""
        y, part = z * (1 + self.weights[0]), np.empty_like(z)
        for i, (weight, edge) in enumerate(zip(self.weights[1:], self.edges, strict=True)):
            ends = (-FAR, edge) if i < self.middle else (edge, FAR)
            np.clip(z, *ends, out=part)  # of one number, three times as quick as a maximum
            part *= weight
            y += part
        return y

    @cached_property
    def at_zero(self) -> np.ndarray:
        """That constant, to the bit: every number comes here by the same operations."""
        return self.summed(np.zeros(1, np.float32))


def curved(z_NO: np.ndarray, hinges: Hinges) -> np.ndarray:
    """A spline's φ(z), in place."""
    if not hinges.weights.any():
        return z_NO
    for some in cut(z_NO):
        np.subtract(hinges.summed(some), hinges.at_zero, out=some)
    return z_NO


@dataclass(frozen=True)
class Kinks:
    """A spline's curve as φ(z) = slope · z + Σ wᵢ (|z - eᵢ| - |eᵢ|), for where no gradient flows.

    The slope is the mean of both ends, w half of the turn at each edge. There may be one of each
    for every layer of a product: then slope is [O], and the others [P, O].
    """

    slope: np.ndarray
    weights: np.ndarray  # [P]
    edges: np.ndarray  # [P]

    def bend(self, y_NO: np.ndarray, z_NO: np.ndarray) -> None:
        """Add φ(z) - slope · z to y: the rest of a product that has the slope in its matrix."""
        for y, z in zip(cut(y_NO), cut(z_NO), strict=True):
            y += self.bent(z)

    def bent(self, z: np.ndarray) -> np.ndarray:
        first, *others = map(partial(kink, z), self.weights, self.edges)
        for other in others:
            first += other
        first -= self.at_zero
        return first

    def bend_few(self, y_NO: np.ndarray, z_NO: np.ndarray) -> None:
        """The same for few rows, all edges at once: fewer operations, which then are what costs."""
        bent_NO = kink(z_NO[:, None], self.weights, self.edges).sum(axis=1)
        bent_NO -= self.at_zero
        y_NO += bent_NO

    @cached_property
    def at_zero(self) -> np.ndarray:
        return np.add.accumulate(self.weights * np.abs(self.edges))[-1]


def kink(z: np.ndarray, weight: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """w |z - e|"""
    y = z - edge
    np.abs(y, out=y)
    y *= weight
    return y


def curved_back(
    g_NO: np.ndarray, z_NO: np.ndarray, hinges: Hinges
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of z and of the weights [P]."""
    weights_P = hinges.weights
    z_bar, weights_bar = np.empty_like(g_NO), np.zeros_like(weights_P)
    for out, g, z in zip(cut(z_bar), cut(g_NO), cut(z_NO), strict=True):
        slope = np.full_like(g, 1 + weights_P[0])
        weights_bar[0] += np.vdot(g, z)
        for i, weight in enumerate(weights_P[1:]):
            bend = hinge(z, hinges.edges[i], i < hinges.middle)
            weights_bar[i + 1] += np.vdot(g, bend)
            slope += weight * (bend != 0)
        np.multiply(g, slope, out=out)
    return z_bar, weights_bar


def hinge(z: np.ndarray, edge: np.float32, left: bool) -> np.ndarray:
    """How far z is beyond the edge, 0 on this side of it."""
    y = z - edge
    return np.clip(y, *((-FAR, 0) if left else (0, FAR)), out=y)


def neighbours(sizes: Iterable[int]) -> list[slice]:
    """Where parts of these sizes lie, one after the other.

    >>> neighbours([2, 3])
    [slice(0, 2, None), slice(2, 5, None)]
    """
    return [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))]


def cut(x_NO: np.ndarray) -> list[np.ndarray]:
    """The array in parts that stay in the cache while several functions pass over them."""
    if x_NO.size < 2 * CACHED:
        return [x_NO]
    return np.array_split(x_NO, min(len(x_NO), x_NO.size // CACHED))
