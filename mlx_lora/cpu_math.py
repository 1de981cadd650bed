"""The arithmetic of transformer blocks in NumPy, forward and back: pure functions of arrays.

Each has its gradient beside it. Temporaries are few and written in place: on a CPU a block spends
as much time on them as on its products.
"""

from dataclasses import dataclass

import numpy as np


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
