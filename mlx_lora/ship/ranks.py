"""How many directions each module keeps: one rule a function, its thresholds are options."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lora.errors import AdapterError
from mlx_lora.registry import Table
from mlx_lora.spectral.metrics import directions_for, effective_rank

Ranks = dict[str, int]
Drift = Callable[[Mapping[str, int]], float]  # mean KL to the adapter as it was, nats a token


@dataclass(frozen=True)
class Spent:
    """What a module has: its singular values, descending (0: not used), and the rank it has."""

    name: str
    s_R: np.ndarray
    rank: int

    @property
    def used(self) -> int:
        """Directions that do anything; 1 where none does, because a factor has one row at least."""
        return max(1, int((self.s_R > 0).sum()))


# A rule may look at the KL of a choice, which costs a forward pass of the check's texts.
rules: Table[Callable[..., Ranks]] = Table("rule")


@rules.add
def energy(modules: Sequence[Spent], drift: Drift, *, share: float = 0.99) -> Ranks:
    """Each module keeps the fewest directions with 99 % of its energy Σσ²."""
    refuse(0 < share <= 1, f"share is above 0 and at most 1, got {share:g}")
    return {
        m.name: 1 if not m.s_R.any() else min(m.used, int(directions_for(m.s_R, share)))
        for m in modules
    }


@rules.add
def knee(modules: Sequence[Spent], drift: Drift) -> Ranks:
    """Each module keeps the directions up to the knee of its energy: where the curve bends most.

    The knee is the point of the cumulative share of Σσ² that is farthest above the straight line
    from nothing to everything.
    """
    found = {}
    for m in modules:
        held = np.cumsum(m.s_R**2)
        above = held / held[-1] - np.arange(1, len(held) + 1) / len(held) if held[-1] else [0.0]
        found[m.name] = int(np.argmax(above)) + 1
    return found


@rules.add
def effective(modules: Sequence[Spent], drift: Drift, *, times: float = 1.5) -> Ranks:
    """Each module keeps 1.5 times its effective rank (exp of the entropy of σ/Σσ), rounded up."""
    refuse(times > 0, f"times is above 0, got {times:g}")
    ranks = {m.name: effective_rank(m.s_R) for m in modules}
    return {
        m.name: 1 if math.isnan(ranks[m.name]) else min(m.used, math.ceil(times * ranks[m.name]))
        for m in modules
    }


@rules.add
def size(modules: Sequence[Spent], drift: Drift, *, share: float = 0.5) -> Ranks:
    """Every module keeps at most half of the adapter's rank: so the file has half of its size."""
    refuse(0 < share <= 1, f"share is above 0 and at most 1, got {share:g}")
    return at_most(modules, max(1, math.floor(share * max(m.rank for m in modules))))


@rules.add
def kl(modules: Sequence[Spent], drift: Drift, *, budget: float = 1e-3) -> Ranks:
    """The lowest rank for all whose KL to the adapter as it was stays under 0.001 nats a token.

    Found by halving the range of ranks, on the texts of the check.
    """
    refuse(budget > 0, f"budget is above 0, got {budget:g}")
    low, high = 0, max(m.used for m in modules)  # low is too little, high is enough
    while high - low > 1:
        middle = (low + high) // 2
        if drift(at_most(modules, middle)) <= budget:
            high = middle
        else:
            low = middle
    return at_most(modules, high)


def at_most(modules: Sequence[Spent], rank: int) -> Ranks:
    return {m.name: min(m.used, rank) for m in modules}


def refuse(sound: bool, problem: str) -> None:
    if not sound:
        raise AdapterError(problem)
