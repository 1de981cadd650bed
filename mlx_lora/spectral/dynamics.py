"""How the spectra move while an adapter trains: a look every so many steps, and what it amounts to.

A look costs R×R matrices. Of an adapter with very many (experts), some are looked at.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt

from mlx_lora.adapter.mapped import widened
from mlx_lora.cpu_threads import each
from mlx_lora.registry import check_options
from mlx_lora.spectral.gram import spectra
from mlx_lora.spectral.metrics import LoRADynamicsMetrics, effective_rank, kappa
from mlx_lora.spectral.spectrum import Pair, finite, real

FILE = "spectra.jsonl"
MOST = 256  # pairs of a look
TRENDS = ("collapsing", "stable", "increasing")
Values = Mapping[str, float | None]  # by module; None: it has no such number


@dataclass(frozen=True)
class Look:
    """The adapter at one step. Its JSON keys are these field names."""

    step: int
    rank_utilization_mean: float | None  # over the modules that are trained
    effective_rank_BA: Values
    rank_utilization: Values
    kappa_A: Values
    kappa_B: Values
    sigma_max_BA: Values
    frobenius_BA: Values
    gradient_rank: Values

    @classmethod
    def from_line(cls, line: str) -> "Look":
        raw = json.loads(line)
        return cls(**{name: raw.get(name) for name in cls.__dataclass_fields__})


BY_MODULE = [f for f in Look.__dataclass_fields__ if f not in ("step", "rank_utilization_mean")]


def look(step: int, pairs: Sequence[Pair], gradients: Mapping[str, Any]) -> Look:
    """The adapter now. `gradients` are running means of them, by `module.factor`."""
    chosen = [pairs[i] for i in sorted({*np.linspace(0, len(pairs) - 1, MOST).astype(int)})]
    rows = each(lambda pair: glance(pair, gradients), chosen)
    found = {
        key: {p.name: row[key] for p, row in zip(chosen, rows, strict=True)} for key in rows[0]
    }
    used = [u for u in found["rank_utilization"].values() if u is not None]
    return Look(step, float(np.mean(used)) if used else None, **found)


def glance(pair: Pair, gradients: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of one module; all None where a factor is not finite."""
    if not (finite(pair.a_IR) and finite(pair.b_RO)):
        return dict.fromkeys(BY_MODULE)
    s_ba, s_a, s_b = spectra(pair.a_IR, pair.b_RO)
    effective = real(effective_rank(s_ba))
    values = (
        effective,
        None if effective is None else effective / pair.a_IR.shape[1],
        kappa(s_a, pair.eps)[0],
        kappa(s_b, pair.eps)[0],
        float(s_ba[0]),
        float(np.linalg.norm(s_ba)),
        gradient_rank(pair, *(gradients.get(f"{pair.name}.{f}") for f in ("lora_a", "lora_b"))),
    )
    return dict(zip(BY_MODULE, values, strict=True))


def gradient_rank(pair: Pair, grad_a: Any, grad_b: Any) -> float | None:
    """Effective rank of the step that the gradient asks of BA: that of grad_A·B + A·grad_B.

    At most 2R. None without a gradient, or where it is zero or not finite.
    """
    if grad_a is None or grad_b is None or np.ndim(grad_a) != 2:
        return None
    a, b, grad_a, grad_b = (
        m if m.dtype == np.float64 else widened(m)
        for m in (pair.a_IR, pair.b_RO, np.asarray(grad_a), np.asarray(grad_b))
    )
    if not (np.isfinite(grad_a).all() and np.isfinite(grad_b).all()):
        return None
    s_step, _, _ = spectra(np.hstack([grad_a, a]), np.vstack([b, grad_b]))
    return real(effective_rank(s_step))


def looks_in(folder: Path) -> list[Look]:
    """Those that a run left behind, of its last stage that has any; none where it is no run."""
    stages = sorted((folder / "stages").glob("[0-9]*"), key=lambda p: int(p.name.split("_")[0]))
    for place in (folder, *reversed(stages)):
        if (place / FILE).is_file():
            lines = (place / FILE).read_text(encoding="utf-8").splitlines()
            return [Look.from_line(line) for line in lines]
    return []


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `summed_up`, as YAML or the command line has them; ConfigError lists the wrong."""
    return check_options("dynamics", summed_up, given)


def summed_up(
    looks: Sequence[Look],
    *,
    window: Annotated[int, Ge(1)] = 5,
    change: Annotated[float, Gt(0)] = 0.05,
    settled: Annotated[int, Ge(0)] = 50,
) -> LoRADynamicsMetrics | None:
    """What the looks amount to; None where there are not two.

    `window` looks are compared with the `window` before, `change` is relative, `settled` in steps.
    """
    if len(looks) < 2:
        return None
    tail = looks[-window:]
    ranks = [r for r in looks[-1].gradient_rank.values() if r is not None]
    return LoRADynamicsMetrics(
        step=looks[-1].step,
        rank_utilization_trend=trend(looks, window=window, change=change),
        steps_to_saturation=saturation(looks, change=change, settled=settled),
        kappa_A_volatility=volatility([x.kappa_A for x in tail]),
        kappa_B_volatility=volatility([x.kappa_B for x in tail]),
        gradient_rank=float(np.mean(ranks)) if ranks else None,
    )


def trend(looks: Sequence[Look], *, window: int, change: float) -> str | None:
    """Mean utilization of the last `window` looks against the `window` before (or halves of fewer).

    `increasing` or `collapsing` where it moved by more than `change` of itself, else `stable`; None
    where nothing was trained.
    """
    values = [x.rank_utilization_mean for x in looks if x.rank_utilization_mean is not None]
    width = min(window, len(values) // 2)
    if not width:
        return None
    now, before = float(np.mean(values[-width:])), float(np.mean(values[-2 * width : -width]))
    moved = now / before - 1
    return TRENDS[1 + (moved > change) - (moved < -change)]


def saturation(looks: Sequence[Look], *, change: float, settled: int) -> int | None:
    """The step from which mean utilization stayed within `change` of what it is now.

    None before it has done so for `settled` steps.
    """
    known = [x for x in looks if x.rank_utilization_mean is not None]
    if not known:
        return None
    last = known[-1].rank_utilization_mean or 0.0
    moving = [
        i
        for i, x in enumerate(known)
        if abs((x.rank_utilization_mean or 0.0) - last) > change * last
    ]
    since = known[moving[-1] + 1 if moving else 0].step
    return since if known[-1].step - since >= settled else None


def volatility(kappas: Sequence[Values]) -> float | None:
    """Standard deviation of log10 κ of a module over the looks, mean over modules."""
    found = []
    for name in kappas[-1]:
        logs = [math.log10(k) for values in kappas if (k := values.get(name)) is not None]
        if len(logs) > 1:
            found.append(float(np.std(logs)))
    return float(np.mean(found)) if found else None
