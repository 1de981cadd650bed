"""Singular values of B·A without forming it: R×R triangles of A and of B, in float64.

A triangle comes from the Gram matrix where that loses nothing, and from a QR where it would.
"""

import numpy as np

from mlx_lora.adapter.mapped import widened

NOISE = 64 * np.finfo(np.float64).eps  # of QR and SVD, relative to ‖A‖·‖B‖: below it, σ is zero
SAFE = 1e4  # ‖L⁻¹‖²_F, which bounds κ² up to R, up to which a Gram matrix keeps 10 digits
ROWS, TALL = 4096, 1024  # of a factor at a time, for its Gram matrix and for a QR


def spectra(a_IR: np.ndarray, b_RO: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular values, descending, of B·A, of A and of B; exactly 0 below rounding noise.

    (A B)ᵀ has those of R_A R_Bᵀ, where A = Q_A R_A and Bᵀ = Q_B R_B: O((I + O)·R²).
    """
    r_a, r_b = triangle(a_IR), triangle(b_RO.T)
    s_a, s_b, s_ba = (np.linalg.svd(m, compute_uv=False) for m in (r_a, r_b, r_a @ r_b.T))
    s_ba[s_ba <= NOISE * s_a[0] * s_b[0]] = 0.0
    for s in (s_a, s_b):
        s[s <= NOISE * s[0]] = 0.0
    return s_ba, s_a, s_b


def triangle(x_NR: np.ndarray) -> np.ndarray:
    """R of x = Q R, up to the signs of its rows.

    From the Cholesky factor of the Gram matrix of x with its columns at unit length, whose
    relative error in every singular value of x is about ε·κ² (Demmel & Veselić 1992), unless κ²
    is above SAFE: then, and where a column is zero, from Householder QR.
    """
    rank = x_NR.shape[1]
    gram_RR = gram(x_NR)
    size_R = np.sqrt(np.diag(gram_RR))
    if size_R.max(initial=0.0) == 0 and not np.any(widened(x_NR)):
        return np.zeros((min(x_NR.shape), rank))
    if len(x_NR) >= rank and size_R.min() > 1e-150 and np.isfinite(gram_RR).all():
        try:
            low_RR = np.linalg.cholesky(gram_RR / np.outer(size_R, size_R))
        except np.linalg.LinAlgError:
            pass
        else:
            if np.square(np.linalg.inv(low_RR)).sum() <= SAFE:
                return low_RR.T * size_R
    return householder(x_NR)


def householder(x_NR: np.ndarray) -> np.ndarray:
    """R by QR of blocks of rows, and of their triangles together: half the time of one QR."""
    blocks = [
        np.linalg.qr(widened(x_NR[start : start + TALL]), mode="r")
        for start in range(0, len(x_NR), TALL)
    ]
    return np.asarray(blocks[0] if len(blocks) == 1 else np.linalg.qr(np.vstack(blocks), mode="r"))


def gram(x_NR: np.ndarray) -> np.ndarray:
    """xᵀx, some rows at a time."""
    if len(x_NR) <= ROWS:
        x = widened(x_NR)
        return x.T @ x
    total = np.zeros((x_NR.shape[1], x_NR.shape[1]))
    for start in range(0, len(x_NR), ROWS):
        x = widened(x_NR[start : start + ROWS])
        total += x.T @ x
    return total


def ba_singular_values(a_IR: np.ndarray, b_RO: np.ndarray) -> np.ndarray:
    """Singular values of B·A, descending, min(I, R, O) of them.

    >>> ba_singular_values(np.eye(3)[:, :2], np.diag([5.0, 2.0]))
    array([5., 2.])
    """
    return spectra(a_IR, b_RO)[0]
