"""Ways to merge the updates of several adapters at one layer. Each is a function in the table."""

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from mlx_lora.adapter.linalg import randomized_svd
from mlx_lora.registry import Table
from mlx_lora.ship.algebra import Decomposed, Thin, added, decomposed, outside, product, span

Share = Annotated[float, Field(gt=0, le=1)]
Way = Callable[..., tuple[Decomposed, float]]  # the merged update of a layer, and its ‖Δ‖²
methods: Table[Way] = Table("merge method")


@methods.add
def linear(parts: Sequence[Thin], weights: Sequence[float], most: int) -> tuple[Decomposed, float]:
    """The weighted sum of the updates, exactly (task arithmetic, arXiv 2212.04089)."""
    whole = added([part.times(w) for part, w in zip(parts, weights, strict=True)])
    return decomposed(whole), energy(whole)


@methods.add
def orthogonal(
    parts: Sequence[Thin], weights: Sequence[float], most: int
) -> tuple[Decomposed, float]:
    """The sum in which each adapter leaves alone what those before it read and write.

    From each update goes its part from the joint space that the earlier ones read to the joint
    space that they write: within those the merged update is the earlier adapters' own.
    """
    kept: list[Thin] = []
    seen: list[Decomposed] = []
    for part, weight in zip(parts, weights, strict=True):
        scaled = part.times(weight)
        own = decomposed(scaled)
        if seen:
            reads, writes = span([d.u_IK for d in seen]), span([d.v_OK for d in seen])
            scaled = outside(scaled, reads, writes)
        kept.append(scaled)
        seen.append(own)
    whole = added(kept)
    return decomposed(whole), energy(whole)


@methods.add
def ties(
    parts: Sequence[Thin], weights: Sequence[float], most: int, *, density: Share = 0.2
) -> tuple[Decomposed, float]:
    """TIES (Yadav et al. 2023): the largest `density` of each update, a vote on signs, their mean.

    Each update counts times its weight, in the vote and in the mean: weights that are all λ are the
    paper's λ. The result has full rank: of it the adapter holds the best part of its rank.
    """
    scaled = [part.times(weight) for part, weight in zip(parts, weights, strict=True)]
    dense = [trimmed((p.a_IK @ p.b_KO).astype(np.float32), density) for p in scaled]
    votes = np.sign(sum(dense))
    total = np.zeros_like(votes)
    voters = np.zeros_like(votes)
    for update in dense:
        agrees = (np.sign(update) == votes) & (update != 0)
        total += np.where(agrees, update, 0)
        voters += agrees
    merged_IO = np.divide(total, voters, out=total, where=voters != 0)
    u, s, v = randomized_svd(merged_IO, most, np.random.default_rng(0))
    return Decomposed(u, s, v), float(np.square(merged_IO, dtype=np.float64).sum())


def trimmed(update_IO: np.ndarray, density: float) -> np.ndarray:
    """The largest entries, as many as the share says, and zeros."""
    count = max(1, round(density * update_IO.size))
    sizes = np.abs(update_IO)
    least = np.partition(sizes, -count, axis=None)[-count]
    return np.where(sizes >= least, update_IO, 0)


def energy(thin: Thin) -> float:
    """‖Δ‖²."""
    return max(product(thin, thin), 0.0)
