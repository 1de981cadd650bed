"""Updates as products A B of thin factors, in NumPy: never the whole matrix of a layer."""

from dataclasses import dataclass

import numpy as np

TINY = 1e-6  # of the largest singular value: below, a direction is rounding


@dataclass(frozen=True)
class Thin:
    """An update ΔᵀIO = A B by its factors, the scale inside B."""

    a_IK: np.ndarray
    b_KO: np.ndarray

    def times(self, factor: float) -> "Thin":
        return Thin(self.a_IK, factor * self.b_KO)


@dataclass(frozen=True)
class Decomposed:
    """The same as U s Vᵀ, without directions that are rounding."""

    u_IK: np.ndarray  # what it reads
    s_K: np.ndarray
    v_OK: np.ndarray  # what it writes


def added(parts: list[Thin]) -> Thin:
    """Their sum, exactly, at the sum of their ranks."""
    return Thin(
        np.concatenate([p.a_IK for p in parts], axis=1),
        np.concatenate([p.b_KO for p in parts], axis=0),
    )


def decomposed(thin: Thin) -> Decomposed:
    """By QR of both factors and the SVD of a K×K matrix, in float64."""
    q_a, r_a = np.linalg.qr(thin.a_IK.astype(np.float64))
    q_b, r_b = np.linalg.qr(thin.b_KO.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_a @ r_b.T)
    size = min(u.shape[0], vt.shape[0])
    keep = s[:size] > TINY * max(float(s[0]), 1e-300)
    return Decomposed((q_a @ u[:, :size])[:, keep], s[:size][keep], (q_b @ vt[:size].T)[:, keep])


def rebuilt(parts: Decomposed, rank: int | None) -> tuple[Thin, float]:
    """Factors of at most this rank that share the singular values, and how much of ‖Δ‖² they hold.

    An update of nothing becomes one direction of zeros.
    """
    kept = len(parts.s_K) if rank is None else min(rank, len(parts.s_K))
    if kept == 0:
        return Thin(np.zeros((len(parts.u_IK), 1)), np.zeros((1, len(parts.v_OK)))), 1.0
    root = np.sqrt(parts.s_K[:kept])
    share = float((parts.s_K[:kept] ** 2).sum() / (parts.s_K**2).sum())
    return Thin(parts.u_IK[:, :kept] * root, (parts.v_OK[:, :kept] * root).T), share


def product(a: Thin, b: Thin) -> float:
    """⟨Δ_a, Δ_b⟩, the sum over all entries."""
    return float(((a.a_IK.T @ b.a_IK) * (a.b_KO @ b.b_KO.T)).sum())


def overlap(x_NK: np.ndarray, y_NL: np.ndarray) -> float:
    """Mean squared cosine of the principal angles of two spaces given by orthonormal columns.

    0: apart, 1: the smaller lies in the other. 0 where one has no directions.

    >>> x, y = np.eye(4)[:, :2], np.eye(4)[:, 1:3]
    >>> overlap(x, y), overlap(x, x)
    (0.5, 1.0)
    """
    cosines = principal_cosines(x_NK, y_NL)
    return float(np.mean(cosines**2)) if len(cosines) else 0.0


def principal_cosines(x_NK: np.ndarray, y_NL: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles of two spaces, largest first (Björck and Golub, 1973)."""
    if not x_NK.shape[1] or not y_NL.shape[1]:
        return np.zeros(0)
    return np.clip(np.linalg.svd(x_NK.T @ y_NL, compute_uv=False), 0, 1)


def span(spaces: list[np.ndarray]) -> np.ndarray:
    """Orthonormal columns of all these spaces together."""
    u, s, _ = np.linalg.svd(np.concatenate(spaces, axis=1), full_matrices=False)
    return u[:, s > TINY]


def outside(thin: Thin, reads_IK: np.ndarray, writes_OK: np.ndarray) -> Thin:
    """The update less what it reads from the one space and writes to the other."""
    a_shared = reads_IK @ (reads_IK.T @ thin.a_IK)
    b_shared = (thin.b_KO @ writes_OK) @ writes_OK.T
    return added([thin, Thin(a_shared, -b_shared)])
