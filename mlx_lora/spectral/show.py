"""The spectral report on a terminal: a table of blocks and kinds of module, and sentences."""

from collections import defaultdict
from typing import TYPE_CHECKING

from mlx_lora.spectral.metrics import (
    CRITICAL,
    DOMINATING,
    LOW_UTILIZATION,
    LoRADynamicsMetrics,
    LoRAReport,
    LoRAStructuralMetrics,
)
from mlx_lora.spectral.names import kinds, places
from mlx_lora.spectral.splines import headline
from mlx_lora.spectral.structure import finding

if TYPE_CHECKING:
    from rich.console import RenderableType


def table(report: LoRAReport) -> "RenderableType":
    """For the terminal: effective rank of BA and scaled dominance, blocks × kinds of module."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    where = places(report.adapters)
    columns, cells = kinds(where), defaultdict(list)
    for name, (layer, kind) in where.items():
        cells[layer, kind].append(name)
    ranks = sorted({m.nominal_rank for m in report.adapters.values()})
    title = f"effective rank, of {'/'.join(map(str, ranks))}"
    base_known = bool(report.structural.scaled_per_layer_dominance)
    title += " · dominance at scale" if base_known else ""
    grid = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    grid.add_column("block", justify="right", min_width=5)
    for kind in columns:
        short = kind.removesuffix("_proj")
        grid.add_column(short, justify="right", overflow="fold", min_width=7 if base_known else 4)
    for layer in sorted({layer for layer, _ in where.values()}, key=lambda i: (i is None, i)):
        row = [cell(report, cells[layer, kind]) for kind in columns]
        grid.add_row("–" if layer is None else str(layer), *row)
    return Group(grid, Text("\n".join(summary(report))))


def cell(report: LoRAReport, names: list[str]) -> str:
    """Mean effective rank and largest dominance of some modules (one, or a block's experts)."""
    if not names:
        return ""
    found = [report.adapters[n] for n in names]
    if any(m.status == "non_finite" for m in found):
        return "[bold red]NaN[/]"
    ranks = [m.effective_rank_BA for m in found if m.effective_rank_BA is not None]
    if not ranks:
        return "[dim]–[/]"
    low = any((m.rank_utilization or 1) < LOW_UTILIZATION for m in found)
    text = f"{sum(ranks) / len(ranks):.1f}"
    text = f"[yellow]{text}[/]" if low else text
    known = report.structural.scaled_per_layer_dominance or {}
    worst = max((d for n in names if (d := known.get(n)) is not None), default=None)
    if worst is None:
        return text
    colour = "red" if worst > CRITICAL else "yellow" if worst > DOMINATING else "dim"
    short = f"{worst:.2f}".lstrip("0") if worst < 10 else f"{worst:.0f}"
    return f"{text} [{colour}]{short}[/]"


def summary(report: LoRAReport) -> list[str]:
    """What the table amounts to: ranks used, the rank to take, each alert and what to do."""
    lines = [f"The adapter {finding(report)}."]
    lines += [said] if (said := rank_to_take(report)) else []
    worst = report.structural.scaled_max_dominance
    if report.structural.scaled_per_layer_dominance is None:
        lines.append("Dominance is not known without the base: give --model.")
    elif worst:
        lines.append(f"Dominance at scale is at most {worst:.2g} of the base.")
    lines += [*lengths(report), *deeper(report.structural), *moved(report.dynamics)]
    lines += [f"{headline(report.splines)}."] if report.splines else []
    lines += [f"Note: {notice}." for notice in report.notices]
    by_name = defaultdict(list)
    for alert in report.alerts:
        by_name[alert.name].append(alert)
    for name, some in by_name.items():
        where = f"{some[0].module}: " if some[0].module else ""
        more = f" (and {len(some) - 1} more)" if len(some) > 1 else ""
        lines += [f"! {name}: {where}{some[0].message}{more}", f"  {some[0].action}"]
    return lines


def rank_to_take(report: LoRAReport) -> str:
    """More where a module is full, else what is enough; empty where no rank is suggested."""
    if report.suggested_rank is None:
        return ""
    paid = max(m.nominal_rank for m in report.adapters.values())
    if report.suggested_rank > paid:
        more = f"try rank {report.suggested_rank} if it learns too little"
        return f"A module uses nearly all of its rank: {more}."
    return f"Rank {report.suggested_rank} holds what every module uses."


def lengths(report: LoRAReport) -> list[str]:
    """How far DoRA's magnitudes went; nothing without a base, or of other adapters."""
    known = [c for m in report.adapters.values() if (c := m.magnitude_change) is not None]
    return [f"DoRA's magnitudes moved by at most {max(known):.2g} of the base's."] if known else []


def deeper(s: LoRAStructuralMetrics) -> list[str]:
    """What a deep look found; nothing where there was none."""
    if s.intruder_dimensions is None:
        return []
    loudest, text = s.directional_max_dominance, s.activation_max_dominance
    said = [] if loudest is None else [f"at most {loudest:.2g} in a direction of its own"]
    said += [] if text is None else [f"{text:.2g} on text"]
    dominance = f"Dominance is {' and '.join(said)}. " if said else ""
    count = s.intruder_dimensions
    return [f"{dominance}{count or 'No'} intruder dimension{'' if count == 1 else 's'}."]


def moved(d: LoRADynamicsMetrics | None) -> list[str]:
    """How the spectra moved over the run; nothing where none was watched."""
    if d is None or d.rank_utilization_trend is None:
        return []
    settled = d.steps_to_saturation
    when = "has not settled" if settled is None else f"settled at step {settled}"
    rank = "" if d.gradient_rank is None else f"; the gradient's rank is {d.gradient_rank:.1f}"
    return [f"Up to step {d.step} its use of rank is {d.rank_utilization_trend}, {when}{rank}."]
