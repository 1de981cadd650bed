"""The adapter as a whole: against its base, its health, and the rank it would need."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lora.spectral.metrics import (
    DOMINATING,
    ILL_CONDITIONED,
    STATUSES,
    Group,
    LoRAAdapterMetrics,
    LoRAReport,
    LoRAStructuralMetrics,
    rank_for,
)
from mlx_lora.spectral.names import kinds, natural, places

SATURATED = 0.90  # utilisation above which more rank may be of use


def structure(
    adapters: Mapping[str, LoRAAdapterMetrics], sigmas: Mapping[str, float] | None
) -> LoRAStructuralMetrics:
    """The adapter as a whole. `sigmas` is σ_max(W) by module, None without a base.

    Means and maxima of dominance are over the modules that are trained.
    """
    judged = {n: m for n, m in adapters.items() if m.status == "trained"}
    ill = any(m.worst_kappa > ILL_CONDITIONED for m in judged.values()) if judged else None
    if sigmas is None:
        absent = dict.fromkeys(LoRAStructuralMetrics.__dataclass_fields__)
        known = {"adapter_health": health(adapters, {}), "is_ill_conditioned": ill}
        return LoRAStructuralMetrics(**{**absent, **known, **shared_out(adapters, {})})
    plain = {n: ratio(m.sigma_max_BA, sigmas[n]) for n, m in adapters.items()}
    scaled = {
        n: None if d is None else abs(adapters[n].effective_lr_scale) * d for n, d in plain.items()
    }
    loud, at_scale = ({n: values[n] for n in judged} for values in (plain, scaled))
    worst = greatest(at_scale)
    return LoRAStructuralMetrics(
        mean_dominance=mean(loud),
        max_dominance=greatest(loud),
        per_layer_dominance=plain,
        scaled_mean_dominance=mean(at_scale),
        scaled_max_dominance=worst,
        scaled_per_layer_dominance=scaled,
        adapter_health=health(adapters, scaled),
        is_dominating=None if worst is None else worst > DOMINATING,
        is_ill_conditioned=ill,
        **shared_out(adapters, scaled),
    )


def shared_out(
    adapters: Mapping[str, LoRAAdapterMetrics], scaled: Mapping[str, float | None]
) -> dict[str, Any]:
    """Where the update's energy lies, and the means of each block and of each kind of module."""
    energy = {n: (m.effective_lr_scale * (m.frobenius_BA or 0.0)) ** 2 for n, m in adapters.items()}
    total = sum(energy.values())
    share = {n: e / total for n, e in energy.items()} if total > 0 else {}
    strongest = sorted(share.values(), reverse=True)[: math.ceil(len(share) / 10)]
    where = places(adapters)
    blocks, of_kind = defaultdict(list), defaultdict(list)
    for name, (block, kind) in where.items():
        blocks["none" if block is None else str(block)].append(name)
        of_kind[kind].append(name)
    return {
        "energy_top_tenth": sum(strongest) if share else None,
        "energy_concentration": sum(s * s for s in share.values()) if share else None,
        "by_block": {
            b: group(blocks[b], adapters, share, scaled) for b in sorted(blocks, key=natural)
        },
        "by_kind": {k: group(of_kind[k], adapters, share, scaled) for k in kinds(where)},
    }


def group(
    names: Sequence[str],
    adapters: Mapping[str, LoRAAdapterMetrics],
    share: Mapping[str, float],
    scaled: Mapping[str, float | None],
) -> Group:
    trained = [n for n in names if adapters[n].status == "trained"]
    loudness = {n: scaled.get(n) for n in trained}
    return Group(
        modules=len(names),
        effective_rank_mean=mean({n: adapters[n].effective_rank_BA for n in trained}),
        rank_utilization_mean=mean({n: adapters[n].rank_utilization for n in trained}),
        energy_share=sum(share[n] for n in names) if share else None,
        scaled_dominance_mean=mean(loudness),
        scaled_dominance_max=greatest(loudness),
    )


def health(
    adapters: Mapping[str, LoRAAdapterMetrics], scaled: Mapping[str, float | None]
) -> float | None:
    """Share of sound modules among those that act, in [0, 1]; None where none does.

    Sound: finite, κ of A and B <= 1000, scaled dominance <= 0.30. Without a base nothing is known
    of dominance, and the share is of the other two alone.
    """
    judged = {n: m for n, m in adapters.items() if m.status in ("trained", "non_finite")}
    if not judged:
        return None
    sound = [
        m.status == "trained"
        and m.worst_kappa <= ILL_CONDITIONED
        and (scaled.get(n) or 0.0) <= DOMINATING
        for n, m in judged.items()
    ]
    return sum(sound) / len(sound)


def suggested_rank(adapters: Mapping[str, LoRAAdapterMetrics]) -> int | None:
    """The rank that would hold every module: `rank_for` the largest effective rank of BA.

    More than the present rank only where a module uses 90 % of it. None where nothing is trained or
    a module is not finite: such an adapter says nothing of rank. Nor where 128 is not enough.
    """
    trained = [m for m in adapters.values() if m.status == "trained"]
    if not trained or any(m.status == "non_finite" for m in adapters.values()):
        return None
    wanted = rank_for(max(m.effective_rank_BA or 0.0 for m in trained))
    if wanted is None or any((m.rank_utilization or 0.0) >= SATURATED for m in trained):
        return wanted
    return min(wanted, max(m.nominal_rank for m in trained))


def ratio(value: float | None, to: float) -> float | None:
    return None if value is None or not to else value / to


def known(values: Mapping[str, float | None]) -> list[float]:
    return [v for v in values.values() if v is not None]


def mean(values: Mapping[str, float | None]) -> float | None:
    return sum(known(values)) / len(known(values)) if known(values) else None


def greatest(values: Mapping[str, float | None]) -> float | None:
    return max(known(values), default=None)


def finding(report: LoRAReport) -> str:
    """What the adapter does with its rank; reads on from "The adapter …"."""
    adapters = report.adapters.values()
    count = {s: sum(m.status == s for m in adapters) for s in reversed(STATUSES)}
    others = [f"{n} {s.replace('_', '-')}" for s, n in count.items() if n and s != "trained"]
    if not count["trained"]:
        if count["non_finite"]:
            return f"is broken: {' and '.join(others)} of {len(adapters)} modules"
        idle = f"BA = 0 in all {len(adapters)} modules"
        if moved := count["magnitudes"]:
            return f"has {idle}, and trained magnitudes of DoRA in {moved}"
        if count["unjudged"]:
            return f"has {idle}, and magnitudes of DoRA that only its base can judge"
        if count["switched_off"]:
            return "is switched off: its scale is 0"
        return f"is untrained: {idle}"
    used = [m for m in adapters if m.status == "trained" and m.effective_rank_BA is not None]
    if not used:
        return f"has no known effective rank in any of {len(adapters)} modules"
    average = sum(m.effective_rank_BA or 0.0 for m in used) / len(used)
    paid = sum(m.nominal_rank for m in used) / len(used)
    text = f"uses {average:.1f} of {paid:.3g} ranks on average"
    return text + (f" ({' and '.join(others)} of {len(adapters)} modules)" if others else "")
