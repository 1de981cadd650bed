"""How many directions of a gradient two halves of the data agree on. Pure NumPy, no model.

A gradient G [O, I] is only ever multiplied: GΩ and GᵀQ. Alternating the two finds the leading
directions of one half, σ_i u_i v_iᵀ; the other half's gradient G' then says what it does to them:

    left_i = cos(u_i, G' v_i)        right_i = cos(v_i, G'ᵀ u_i)

Both are far above zero where direction i is in both gradients. Where it is noise of its own half,
they are what cos(u_i, G' v_j), i ≠ j, are: pairs that do not belong together. These are the null.

With few texts noise hides directions that are there. How much the halves share is known all the
same, <G, G'> = mean of (GΩ)·(G'Ω), and σ_i u_iᵀG'v_i is what direction i holds of it: where the
directions found hold little, there are more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

OVERSAMPLE = 8  # columns of the sketch beyond the directions that are judged
NORMAL = 1.4826  # of normal numbers the standard deviation is this times the median of |x|
Z = 3.0  # standard deviations of the null that a direction has to exceed
HELD = 0.75  # of what the halves share, below which there is more than the directions found

Arrays = Mapping[str, np.ndarray]  # by module
Product = Callable[[int, Arrays], Mapping[str, np.ndarray]]  # (half, what to multiply with)


@dataclass(frozen=True)
class Leading:
    """The strongest directions of one half's gradient, σ descending."""

    u_OK: np.ndarray
    s_K: np.ndarray
    v_IK: np.ndarray


@dataclass(frozen=True)
class Crossed:
    """What the other half's gradient G' does to them."""

    cosines_KK: np.ndarray  # mean of cos(u_i, G'v_j) and cos(v_j, G'ᵀu_i)
    shared_K: np.ndarray  # σ_i · u_iᵀG'v_i: what direction i holds of <G, G'>


@dataclass(frozen=True)
class Agreement:
    """What two halves of the data say of one module's gradient, K directions of each."""

    cosines_2K: np.ndarray  # mean of left and right: half 0's directions in half 1, and back
    null_2: np.ndarray  # standard deviation of what pairs that do not belong together have
    norm: float  # ‖G‖_F of the halves, estimated
    common: float  # <G, G'> / ‖G‖‖G'‖, estimated: near 1 where the data leave no noise
    held: float  # share of <G, G'> that the agreeing directions hold, estimated; may exceed 1
    lever: float  # mean over Gaussian a of Σ_o |(G a)_o|: what a column of A lets a step of Adam do

    @property
    def threshold(self) -> float:
        return float(Z * self.null_2.mean())

    @property
    def agreeing(self) -> int:
        """Directions above the threshold: the mean of both halves, rounded down."""
        return int(above(self.cosines_2K, self.null_2).sum() // 2)

    @property
    def measured(self) -> int:
        return self.cosines_2K.shape[1]

    @property
    def open(self) -> str | None:
        """Why there may be more than the agreeing directions; None where they are about all."""
        if self.agreeing == self.measured:
            return "all_agree"
        return "too_few_texts" if self.held < HELD else None


def above(cosines_2K: np.ndarray, null_2: np.ndarray) -> np.ndarray:
    """Which directions are no noise."""
    return cosines_2K > Z * null_2[:, None]


def agreements(
    times: Product, back: Product, starts: Arrays, directions: int, alternations: int = 2
) -> dict[str, Agreement]:
    """Of every module. `times(half, Ω)` is GΩ [O, K], `back(half, Q)` is GᵀQ [I, K].

    `starts` are Gaussian Ω [I, K] with OVERSAMPLE columns more than the `directions` to judge.
    """
    sketches = [times(half, starts) for half in (0, 1)]
    judged = []
    for half in (0, 1):
        found = leading(half, times, back, sketches[half], alternations)
        gv = times(1 - half, {n: x.v_IK for n, x in found.items()})
        gu = back(1 - half, {n: x.u_OK for n, x in found.items()})
        judged.append({n: crossed(x, gv[n], gu[n]) for n, x in found.items()})
    return {
        name: summed_up([j[name] for j in judged], [y[name] for y in sketches], directions)
        for name in starts
    }


def leading(
    half: int, times: Product, back: Product, sketch: Arrays, alternations: int
) -> dict[str, Leading]:
    """By alternating the two products, beginning from GΩ."""
    found: dict[str, Leading] = {}
    for turn in range(alternations):
        y = times(half, {n: x.v_IK for n, x in found.items()}) if turn else sketch
        q = {n: np.linalg.qr(y_OK)[0] for n, y_OK in y.items()}
        for name, z_IK in back(half, q).items():
            v_IK, s_K, w_KK = np.linalg.svd(z_IK, full_matrices=False)
            found[name] = Leading(q[name] @ w_KK.T, s_K, v_IK)
    return found


def crossed(found: Leading, gv_OK: np.ndarray, gu_IK: np.ndarray) -> Crossed:
    """From the other half's products with V and U."""
    dots_KK = found.u_OK.T @ gv_OK
    left = dots_KK / positive(np.linalg.norm(gv_OK, axis=0))
    right = dots_KK / positive(np.linalg.norm(gu_IK, axis=0))[:, None]
    return Crossed((left + right) / 2, found.s_K * np.diag(dots_KK))


def positive(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.inf)


def summed_up(
    both: Sequence[Crossed], sketches: Sequence[np.ndarray], directions: int
) -> Agreement:
    """The record of a module, from what each half says and the sketches [O, K] of both."""
    first, second = sketches
    width = first.shape[1]
    norms = [np.linalg.norm(y) / np.sqrt(width) for y in sketches]  # E‖GΩ‖² = K‖G‖²
    inner = float((first * second).sum() / width)  # E<GΩ, G'Ω> = K<G, G'>
    product = float(norms[0] * norms[1])
    cosines_2K = np.stack([np.diag(c.cosines_KK)[:directions] for c in both])
    null_2 = np.array([null_of(c.cosines_KK) for c in both])
    shared_2K = np.stack([c.shared_K[:directions] for c in both])
    held = float(shared_2K[above(cosines_2K, null_2)].sum() / 2)
    return Agreement(
        cosines_2K=cosines_2K,
        null_2=null_2,
        norm=float(np.mean(norms)),
        common=inner / product if product else 0.0,
        held=held / inner if inner > 0 else 0.0,
        lever=float(np.mean([np.abs(y).sum(axis=0).mean() for y in sketches])),
    )


def null_of(cosines_KK: np.ndarray) -> float:
    """The standard deviation of the pairs that do not belong together, by their median."""
    apart = cosines_KK[~np.eye(len(cosines_KK), dtype=bool)]
    return float(NORMAL * np.median(np.abs(apart))) if apart.size else 0.0
