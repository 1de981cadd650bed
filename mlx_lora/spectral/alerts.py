"""What is wrong with an adapter, in words: one function per finding, its thresholds are options."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlx_lora.registry import Table
from mlx_lora.spectral.metrics import (
    CRITICAL,
    DOMINATING,
    ILL_CONDITIONED,
    LOW_UTILIZATION,
    LoRAAdapterMetrics,
    LoRAReport,
    rank_for,
)
from mlx_lora.spectral.splines import LEAST, MOST, STRAIGHT, SplineMetrics
from mlx_lora.types import Finding

alerts: Table[Callable[..., list[Finding]]] = Table("alert")


def find(
    report: LoRAReport, options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Finding]:
    """Every finding of every alert. `options` are keyword arguments by alert name."""
    given = options or {}
    for name in given:
        alerts[name]  # raises UnknownNameError with the near names
    return [f for name in alerts for f in alerts.bind(name, given.get(name, {}))(report)]


def trained(report: LoRAReport) -> Iterator[tuple[str, LoRAAdapterMetrics]]:
    return ((name, m) for name, m in report.adapters.items() if m.status == "trained")


def dominances(report: LoRAReport) -> Iterator[tuple[str, float]]:
    """Scaled dominance of every trained module, the largest first; nothing without a base."""
    known = report.structural.scaled_per_layer_dominance or {}
    found = [(name, value) for name, _ in trained(report) if (value := known.get(name)) is not None]
    yield from sorted(found, key=lambda pair: -pair[1])


@alerts.add
def non_finite(report: LoRAReport) -> list[Finding]:
    """A factor or a curve holds NaN or infinity: the adapter is broken."""
    action = "Go back to the last good checkpoint, and lower the learning rate or clip gradients."
    return [
        Finding("non_finite", name, "a factor holds NaN or infinity", action, "fail")
        for name, m in report.adapters.items()
        if m.status == "non_finite"
    ] + [
        Finding("non_finite", name, "its curve holds NaN, infinity, or no grid", action, "fail")
        for name, s in report.splines.items()
        if s.deviation is None
    ]


@alerts.add
def untrained(report: LoRAReport) -> list[Finding]:
    """BA is exactly zero: the module changes nothing. One finding where all are so."""
    idle = [name for name, m in report.adapters.items() if m.status == "untrained"]
    if len(idle) == len(report.adapters) > 0:
        message = f"BA is zero in all {len(idle)} modules: the adapter changes nothing"
        return [Finding("untrained", "", message, "Train it, or check that gradients reach it.")]
    action = "Check that gradients reach it, or leave it out of the adapter's keys."
    return [Finding("untrained", name, "BA is zero: it changes nothing", action) for name in idle]


@alerts.add
def switched_off(report: LoRAReport) -> list[Finding]:
    """The scale is 0 where BA is not: the module changes nothing. One finding for all."""
    off = [name for name, m in report.adapters.items() if m.status == "switched_off"]
    if not off:
        return []
    message = f"the scale is 0 in {len(off)} of {len(report.adapters)} modules: they change nothing"
    action = "Give it a scale above 0; a scale schedule that starts at 0 saves this at first."
    return [Finding("switched_off", "", message, action)]


@alerts.add
def effective_rank_low(report: LoRAReport, *, threshold: float = LOW_UTILIZATION) -> list[Finding]:
    """The effective rank of BA is below a quarter of the nominal rank: rank is paid for in vain."""
    return [
        Finding(
            "effective_rank_low",
            name,
            f"uses {m.effective_rank_BA:.1f} of rank {m.nominal_rank} "
            f"({m.rank_utilization:.0%}, below {threshold:.0%})",
            f"Rank {rank_for(m.effective_rank_BA) or math.ceil(1.5 * m.effective_rank_BA)} "
            "would hold it, unless longer training fills it.",
        )
        for name, m in trained(report)
        if m.effective_rank_BA is not None
        and m.rank_utilization is not None
        and m.rank_utilization < threshold
    ]


@alerts.add
def ill_conditioned(report: LoRAReport, *, threshold: float = ILL_CONDITIONED) -> list[Finding]:
    """κ of A or B is above 1000 or not defined: some directions no longer learn."""
    found = []
    for name, m in trained(report):
        factors = (("A", m.kappa_A, m.kappa_A_status), ("B", m.kappa_B, m.kappa_B_status))
        parts = [
            f"{factor} has not the full rank {m.nominal_rank}"
            if value is None
            else f"κ({factor}) is {'at least ' if status == 'at_least' else ''}{value:.3g}"
            for factor, value, status in factors
            if value is None or value > threshold
        ]
        if parts:
            message = f"{' and '.join(parts)} (healthy: up to {threshold:g})"
            action = "Lower the rank or the learning rate, or start from an orthogonal A."
            found.append(Finding("ill_conditioned", name, message, action))
    return found


@alerts.add
def scale_mismatch(report: LoRAReport, *, low: float = 1e-4, high: float = 1.0) -> list[Finding]:
    """σ_max(scale·BA) is above the base's σ_max, or below 1e-4 of it: the scale does not fit."""
    found = []
    for name, ratio in dominances(report):
        scale = report.adapters[name].effective_lr_scale
        message = f"σ_max(scale·BA) is {ratio:.3g} of the base's, at scale {scale:g}"
        if ratio > high:
            action = f"Lower the scale below {scale / ratio:.2g}: the update drowns the base."
            found.append(Finding("scale_mismatch", name, f"{message} (above {high:g})", action))
        elif ratio < low:
            action = "Raise the scale or the learning rate: the update is lost in rounding."
            found.append(Finding("scale_mismatch", name, f"{message} (below {low:g})", action))
    return found


@alerts.add
def dominance_warning(
    report: LoRAReport, *, threshold: float = DOMINATING, critical: float = CRITICAL
) -> list[Finding]:
    """σ_max(scale·BA) is above 0.30 of the base's σ_max, and not yet critical."""
    action = (
        "No fault where held-out problems and plain text are as good as before: `mlx-lora check` "
        "reads plain text. Else a lower learning rate or scale keeps the base in charge."
    )
    return [
        Finding("dominance_warning", name, dominating(d, threshold), action)
        for name, d in dominances(report)
        if threshold < d <= critical
    ]


@alerts.add
def dominance_critical(report: LoRAReport, *, threshold: float = CRITICAL) -> list[Finding]:
    """σ_max(scale·BA) is above 0.50 of the base's σ_max: the adapter overrides the base."""
    action = (
        "Run `mlx-lora check` on it. Where it fails, go back to an earlier checkpoint, or lower "
        "the scale or the learning rate."
    )
    return [
        Finding("dominance_critical", name, dominating(d, threshold), action)
        for name, d in dominances(report)
        if d > threshold
    ]


def dominating(dominance: float, threshold: float) -> str:
    """
    >>> dominating(0.4, 0.3)
    "the update's largest singular value is 0.4 of the base's (above 0.3)"
    """
    size = f"{dominance:.3g} of the base's (above {threshold:g})"
    return f"the update's largest singular value is {size}"


def curves(report: LoRAReport) -> Iterator[tuple[str, SplineMetrics]]:
    """Finite curves of a spline adapter."""
    return ((name, s) for name, s in report.splines.items() if s.deviation is not None)


@alerts.add
def spline_deviation(report: LoRAReport, *, threshold: float = MOST) -> list[Finding]:
    """A curve's values are further than 1 from their knots on average: far from any identity."""
    action = "Raise spline_reg_weight or lower the learning rate; check that outputs are healthy."
    return [
        Finding(
            "spline_deviation", n, f"deviates by {s.deviation:.2g} (up to {threshold:g})", action
        )
        for n, s in curves(report)
        if s.deviation is not None and s.deviation > threshold
    ]


@alerts.add
def spline_folded(report: LoRAReport, *, threshold: float = 0.0) -> list[Finding]:
    """A piece of a curve does not rise: a larger B A x gives a smaller update."""
    action = "Raise spline_reg_weight, or use fewer knots."
    return [
        Finding("spline_folded", n, f"a piece has the slope {s.least_slope:.2g}", action)
        for n, s in curves(report)
        if s.least_slope is not None and s.least_slope <= threshold
    ]


@alerts.add
def spline_unused(
    report: LoRAReport, *, deviation: float = LEAST, slope_variance: float = STRAIGHT
) -> list[Finding]:
    """All curves of a trained adapter are nearly straight: it is plain LoRA, at a higher cost."""
    known = [s for _, s in curves(report)]
    bent = [
        s for s in known
        if (s.deviation or 0) >= deviation or (s.slope_variance or 0) >= slope_variance
    ]  # fmt: skip
    if not known or bent or report.status != "trained":
        return []
    message = f"none of {len(known)} curves deviates by {deviation:g} or more"
    return [Finding("spline_unused", "", message, "Train longer, or use type lora: it is quicker.")]


@alerts.add
def collapsed_early(
    report: LoRAReport, *, drop: float = 0.5, within: int = 100, warmup: int = 10
) -> list[Finding]:
    """Effective rank fell by more than half from its running maximum, early in the training.

    Judged at looks later than step `warmup` and up to `within` steps after it; the maximum is of
    the looks from step `warmup` on.
    """
    looks = [x for x in report.looks if warmup <= x.step <= warmup + within]
    action = "Lower the learning rate or the scale; a warm-up of the learning rate helps too."
    found, best = [], {}
    for look in looks:
        for name, rank in look.effective_rank_BA.items():
            top, at = best.get(name, (0.0, 0))
            if rank is None or name in {f.module for f in found}:
                continue
            if rank < (1 - drop) * top:
                message = (
                    f"effective rank fell from {top:.1f} at step {at} to {rank:.1f} at step "
                    f"{look.step} (by more than {drop:.0%})"
                )
                found.append(Finding("collapsed_early", name, message, action))
            elif rank > top:
                best[name] = rank, look.step
    return found


@alerts.add
def saturated(report: LoRAReport, *, steps: int = 100, change: float = 0.01) -> list[Finding]:
    """Neither effective rank nor size of any module moved by more than 1 % in the last 100 steps.

    Looked at from the first look of that span on; of every module, |value / its last value - 1|.
    """
    if not report.looks:
        return []
    last = report.looks[-1]
    span = [x for x in report.looks if x.step >= last.step - steps]
    if len(span) < 2 or last.step - span[0].step < steps:
        return []
    moved, judged = 0.0, 0
    for key in ("effective_rank_BA", "frobenius_BA"):
        for name, now in getattr(last, key).items():
            values = [getattr(x, key).get(name) for x in span]
            if now and None not in values:
                moved = max(moved, *(abs(v / now - 1) for v in values))
                judged += 1
    if not judged or moved > change:
        return []
    message = (
        f"no module's effective rank or size moved by more than {moved:.1%} in {steps} steps "
        f"(up to step {last.step})"
    )
    action = "Nothing more is learned: stop here, or raise the learning rate."
    return [Finding("saturated", "", message, action)]
