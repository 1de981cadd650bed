"""What a vector of singular values says: one function each, and the records they fill."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mlx_lora.registry import Table
from mlx_lora.types import Finding

if TYPE_CHECKING:
    from mlx_lora.spectral.dynamics import Look
    from mlx_lora.spectral.splines import SplineMetrics

DOMINATING, CRITICAL = 0.30, 0.50  # of the base's largest singular value
ILL_CONDITIONED = 1000.0
LOW_UTILIZATION = 0.25
STATUSES = (  # an adapter has the first that one of its modules has
    "non_finite", "trained", "magnitudes", "unjudged", "switched_off", "untrained",
)  # fmt: skip
LADDER = (4, 8, 16, 32, 64, 128)  # ranks we advise

# Every metric takes the R singular values, and is NaN for a zero update: nothing has no rank.
metrics: Table[Callable[[np.ndarray], float]] = Table("metric")


def shares(s_R: np.ndarray, power: int) -> np.ndarray:
    """Each singular value's part of Σ σ^power, NaN for a zero update."""
    top = s_R.max(initial=0.0)
    if not 0 < top < math.inf:
        return np.full(max(len(s_R), 1), math.nan)
    weights = (s_R / top) ** power  # divided first, so that no tiny spectrum underflows
    return weights / weights.sum()


def exp_entropy(p: np.ndarray) -> float:
    """How many equal parts would have the entropy of these."""
    p = p[p != 0]  # 0 · log 0 = 0
    return float(np.exp(-(p * np.log(p)).sum()))


@metrics.add
def effective_rank(s_R: np.ndarray) -> float:
    """exp of the entropy of σ/Σσ, in [1, R] directions (Roy & Vetterli 2007). Flat: R, one: 1.

    >>> round(effective_rank(np.array([3.0, 3.0, 3.0, 0.0])), 6)
    3.0
    """
    return exp_entropy(shares(s_R, 1))


@metrics.add
def energy_rank(s_R: np.ndarray) -> float:
    """exp of the entropy of σ²/Σσ², in [1, R] directions: small σ count less than for σ/Σσ.

    >>> s = np.array([4.0, 2.0, 1.0])
    >>> energy_rank(s) < effective_rank(s)
    True
    """
    return exp_entropy(shares(s_R, 2))


@metrics.add
def stable_rank(s_R: np.ndarray) -> float:
    """‖BA‖_F² / σ_max², in [1, R] directions (Rudelson & Vershynin 2007). Sees only the largest σ.

    >>> stable_rank(np.array([2.0, 1.0, 1.0]))
    1.5
    """
    return float(1 / shares(s_R, 2).max())


@metrics.add
def participation_ratio(s_R: np.ndarray) -> float:
    """(Σσ²)² / Σσ⁴, in [1, R] directions: the inverse of the chance that two draws of energy agree.

    >>> participation_ratio(np.array([1.0, 1.0, 0.0]))
    2.0
    """
    return float(1 / (shares(s_R, 2) ** 2).sum())


def directions_for(s_R: np.ndarray, share: float) -> float:
    """The fewest directions that hold `share` of the energy Σσ²."""
    held = np.cumsum(np.sort(shares(s_R, 2))[::-1])
    if np.isnan(held).any():
        return math.nan
    return int(np.searchsorted(held, share - 1e-12)) + 1  # the slack absorbs rounding of the sum


@metrics.add
def k90(s_R: np.ndarray) -> float:
    """The fewest directions that hold 90 % of the energy Σσ², in [1, R].

    >>> k90(np.array([3.0, 1.0]))  # 9 of 10
    1
    """
    return directions_for(s_R, 0.90)


@metrics.add
def k95(s_R: np.ndarray) -> float:
    """The fewest directions that hold 95 % of the energy Σσ², in [1, R].

    >>> k95(np.array([3.0, 1.0]))
    2
    """
    return directions_for(s_R, 0.95)


@metrics.add
def k99(s_R: np.ndarray) -> float:
    """The fewest directions that hold 99 % of the energy Σσ², in [1, R].

    >>> k99(np.array([9.0, 1.0, 0.1]))
    2
    """
    return directions_for(s_R, 0.99)


def kappa(s_R: np.ndarray, eps: float = 2.0**-23) -> tuple[float | None, str]:
    """Condition number σ_max/σ_min of a factor, in [1, ∞), and what the number is worth.

    Rounding entries to a precision of `eps` (2^-23 float32, 2^-10 float16, 2^-7 bfloat16) adds
    0.21·eps·‖s‖/√R to every σ (0.21: the rms of eps/√12 over mantissas), so a larger κ than σ_max
    over that cannot be seen, and the status is `at_least`. A factor without full rank, or zero, has
    no κ: None and `rank_deficient`. Otherwise `exact`.

    >>> kappa(np.array([2.0, 1.0]))
    (2.0, 'exact')
    >>> value, status = kappa(np.array([1.0, 1e-6]), eps=2.0**-7)
    >>> round(value), status
    (862, 'at_least')
    >>> kappa(np.array([1.0, 0.0]))
    (None, 'rank_deficient')
    """
    if not np.isfinite(s_R).all():
        return None, "non_finite"
    if not s_R.size or s_R[0] == 0 or s_R[-1] == 0:
        return None, "rank_deficient"
    seen = float(s_R[0] / s_R[-1])
    limit = float(s_R[0] * math.sqrt(len(s_R)) / (0.21 * eps * np.linalg.norm(s_R)))
    return (seen, "exact") if seen <= limit else (limit, "at_least")


def rank_for(effective: float) -> int | None:
    """The rank we advise: the smallest of 4, 8, 16 ... 128 that is >= 1.5 times the effective rank.

    None where 128 is less than that.

    >>> rank_for(2.1), rank_for(6.0), rank_for(500.0)
    (4, 16, None)
    """
    wanted = math.ceil(1.5 * effective)
    return next((rank for rank in LADDER if rank >= wanted), None)


@dataclass(frozen=True)
class LoRAAdapterMetrics:
    """One adapted matrix, BA alone unless the name says scaled. None: it has no such number."""

    # of STATUSES. untrained: BA = 0; switched_off: another BA, at scale 0; of DoRA with BA = 0
    # magnitudes: they are not the base's row norms, unjudged: without a base nobody knows
    status: str
    nominal_rank: int  # the R that was paid for
    alpha: float  # scale · nominal_rank, PEFT's lora_alpha
    effective_lr_scale: float  # scale: a step of B moves the weight by scale times it
    effective_rank_BA: float | None
    effective_rank_A: float | None
    effective_rank_B: float | None
    rank_utilization: float | None  # effective_rank_BA / nominal_rank
    kappa_A: float | None
    kappa_A_status: str  # see `kappa`
    kappa_B: float | None
    kappa_B_status: str
    sigma_max_BA: float | None
    frobenius_BA: float | None
    magnitude_change: float | None = None  # of DoRA, with a base: ‖m - n‖ / ‖n‖, n = its row norms
    scaled_relative_update: float | None = None  # ‖scale·BA‖_F / ‖W‖_F, with a base
    stable_rank: float | None = None
    energy_rank: float | None = None
    participation_ratio: float | None = None
    k90: int | None = None
    k95: int | None = None
    k99: int | None = None
    stable_rank_utilization: float | None = None  # stable_rank / nominal_rank
    energy_rank_utilization: float | None = None  # energy_rank / nominal_rank
    singular_values: Sequence[float] = ()  # of BA, descending

    @property
    def worst_kappa(self) -> float:
        """The larger κ of A and B: ∞ without full rank, 0 where the matrix is not trained."""
        if self.status != "trained":
            return 0.0
        return max(math.inf if k is None else k for k in (self.kappa_A, self.kappa_B))


@dataclass(frozen=True)
class Group:
    """Some modules together: those of a block, or of a kind."""

    modules: int
    effective_rank_mean: float | None  # over the trained ones, like the next
    rank_utilization_mean: float | None
    energy_share: float | None  # of the whole adapter's Σ‖scale·BA‖²_F
    scaled_dominance_mean: float | None
    scaled_dominance_max: float | None


@dataclass(frozen=True)
class LoRAStructuralMetrics:
    """The whole adapter against its base. Dominance = σ_max(BA)/σ_max(W); None without a base."""

    mean_dominance: float | None
    max_dominance: float | None
    per_layer_dominance: Mapping[str, float | None] | None  # by adapted module
    scaled_mean_dominance: float | None  # σ_max(scale·BA)/σ_max(W)
    scaled_max_dominance: float | None
    scaled_per_layer_dominance: Mapping[str, float | None] | None
    adapter_health: float | None  # sound share of the modules that are not untrained, see `health`
    is_dominating: bool | None  # scaled_max_dominance > 0.30
    is_ill_conditioned: bool | None  # a trained module has κ > 1000, or no full rank
    energy_top_tenth: float | None = None  # of Σ‖scale·BA‖²_F, the tenth of modules with most
    energy_concentration: float | None = None  # Σ share², Herfindahl: 1/modules to 1
    by_block: Mapping[str, "Group"] | None = None
    by_kind: Mapping[str, "Group"] | None = None
    # measured only when asked for, with a base
    directional_mean_dominance: float | None = None  # max over i of scale·σ_i / ‖W v_i‖
    directional_max_dominance: float | None = None
    directional_per_layer_dominance: Mapping[str, float | None] | None = None
    activation_mean_dominance: float | None = None  # E‖scale·BAx‖ / E‖Wx‖ over text
    activation_max_dominance: float | None = None
    activation_per_layer_dominance: Mapping[str, float | None] | None = None
    intruder_dimensions: int | None = None  # of all modules together, see `deep.intruders`
    per_layer_intruders: Mapping[str, int | None] | None = None


@dataclass(frozen=True)
class LoRADynamicsMetrics:
    """How the spectra moved during a run, see `dynamics.summed_up`."""

    step: int
    rank_utilization_trend: str | None  # "stable" | "increasing" | "collapsing"
    steps_to_saturation: int | None  # the step it settled at; None: not yet
    kappa_A_volatility: float | None
    kappa_B_volatility: float | None
    gradient_rank: float | None


@dataclass(frozen=True)
class LoRAReport:
    """Everything `spectrum` says. Its JSON keys are these field names but for `looks`."""

    adapters: Mapping[str, LoRAAdapterMetrics]
    structural: LoRAStructuralMetrics
    dynamics: LoRADynamicsMetrics | None = None
    alerts: Sequence[Finding] = ()
    suggested_rank: int | None = None
    looks: Sequence["Look"] = ()  # of the run, in order; not in the JSON
    splines: Mapping[str, "SplineMetrics"] = field(default_factory=dict)  # by module
    notices: Sequence[str] = ()  # in what the base is another form of the one it learned on

    @property
    def status(self) -> str:
        """The first of STATUSES that a module has, or a curve; without modules `untrained`."""
        found = {m.status for m in self.adapters.values()}
        found |= {"non_finite" for s in self.splines.values() if s.deviation is None}
        return next((s for s in STATUSES if s in found), "untrained")
