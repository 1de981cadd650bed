"""The linear algebra of the inits, in NumPy: directions of inputs, low-rank parts of weights."""

import numpy as np

EXACT = 2048  # widths up to here: eigenvectors of the whole covariance


def principal(x_NI: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest singular values of x and their right singular vectors [I, count].

    From the smaller of the two Gram matrices, in float64. Fewer where x has fewer rows than that.
    """
    x = x_NI.astype(np.float64)
    if x.shape[0] < x.shape[1]:
        values, u = np.linalg.eigh(x @ x.T)
        s, u = np.sqrt(np.maximum(values[::-1][:count], 0)), u[:, ::-1][:, :count]
        keep = s > 1e-7 * s[0] if len(s) else s > 0
        return s[keep], x.T @ u[:, keep] / s[keep]
    values, v = np.linalg.eigh(x.T @ x)
    return np.sqrt(np.maximum(values[::-1][:count], 0)), v[:, ::-1][:, :count]


def least_used(x_NI: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Orthonormal directions [I, count] along which the rows of x are smallest.

    Exact up to a width of 2,048; beyond it, random directions without what lies in the span of the
    rows (at most half of the width).
    """
    width = x_NI.shape[1]
    if width <= EXACT:
        x = x_NI.astype(np.float64)
        _, v = np.linalg.eigh(x.T @ x)
        return v[:, :count]
    _, used_IK = principal(x_NI, width // 2)
    return complete(used_IK, count, rng)[:, used_IK.shape[1] :]


def complete(v_IK: np.ndarray, more: int, rng: np.random.Generator) -> np.ndarray:
    """Orthonormal columns with `more` random ones after them, orthogonal to all."""
    fresh = rng.standard_normal((v_IK.shape[0], more))
    for _ in range(2):  # once loses half the digits
        fresh -= v_IK @ (v_IK.T @ fresh)
        fresh, _ = np.linalg.qr(fresh)
    return np.concatenate([v_IK, fresh], axis=1)


def randomized_svd(
    w_OI: np.ndarray,
    rank: int,
    rng: np.random.Generator,
    *,
    oversample: int = 8,
    iterations: int = 2,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U [O, R], s [R], V [I, R] of the best rank-R part of a matrix, to about a percent.

    Source: Halko, Martinsson and Tropp, 2011 (randomized range finder with power iterations).
    """
    width = min(rank + oversample, *w_OI.shape)
    q, _ = np.linalg.qr(w_OI @ rng.standard_normal((w_OI.shape[1], width)).astype(w_OI.dtype))
    for _ in range(iterations):
        z, _ = np.linalg.qr(w_OI.T @ q)
        q, _ = np.linalg.qr(w_OI @ z)
    u, s, vt = np.linalg.svd(q.T @ w_OI, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank].T


def relative_error(x: np.ndarray, wanted: np.ndarray) -> float:
    """‖x‖_F / ‖wanted‖_F; 0 when both vanish.

    >>> relative_error(np.array([3.0, 4.0]), np.array([0.0, 50.0]))
    0.1
    """
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(x)) / size if size else 0.0
