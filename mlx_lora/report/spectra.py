"""The part of the page on the adapter: ranks, singular values, dominance, how they moved."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mlx_lora.adapter.tensors import CONFIG
from mlx_lora.errors import UserError
from mlx_lora.report.chart import Line, chart
from mlx_lora.report.folder import Folder, Row, mapping, records, word
from mlx_lora.report.grid import grid
from mlx_lora.report.markup import Html, joined, number, shown, tag
from mlx_lora.report.missing import Missing
from mlx_lora.report.style import SHADES
from mlx_lora.report.training import pairs
from mlx_lora.spectral.metrics import (
    ILL_CONDITIONED,
    LOW_UTILIZATION,
    LoRAAdapterMetrics,
    LoRADynamicsMetrics,
    LoRAReport,
    LoRAStructuralMetrics,
)
from mlx_lora.spectral.names import kinds, natural, places
from mlx_lora.spectral.plots import BANDS, DECADES
from mlx_lora.spectral.read import adapter_folder
from mlx_lora.spectral.report import LoRAAnalyzer
from mlx_lora.spectral.show import summary
from mlx_lora.spectral.trajectories import PANELS, by_kind
from mlx_lora.types import Finding

LINES = 48  # of a panel; of more modules some are drawn, evenly chosen
LOOKS = 120  # of a long run, evenly chosen
LIMITS = {"rank_utilization": LOW_UTILIZATION, "kappa_B": ILL_CONDITIONED}


def of(run: Folder) -> tuple[LoRAReport | None, str]:
    """The spectrum of the folder's adapter, and where it is from or why there is none.

    As in spectrum.json; without that file it is measured now, on the adapter's files alone.
    """
    if found := run.one("spectrum.json"):
        try:
            return typed(found), "spectrum.json"
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"][:3]))
            return None, f"spectrum.json is not as this version writes it (at {where})"
    folder = newest(run)
    if folder is None:
        return None, "there is no spectrum.json and no adapter to measure"
    try:
        where = folder.relative_to(run.path)
        named = "these files" if where == Path() else f"{where}/"
        return LoRAAnalyzer(folder).analyze(), f"{named}, measured now"
    except UserError as error:
        return None, str(error)


def newest(run: Folder) -> Path | None:
    """What was written last, of adapters and newest checkpoints; None where there is neither."""
    places = [run.path, *(s.path for s in reversed(run.stages))]
    found = [adapter_folder(place) for place in places]
    if saved := [folder for place in places if (folder := place / "checkpoints").is_dir()]:
        from mlx_lora.rl import checkpoints  # loads mlx-lm

        found += [last for folder in saved for last in checkpoints.every(folder)[-1:]]
    there = [folder for folder in found if (folder / CONFIG).is_file()]
    return max(there, key=lambda folder: (folder / CONFIG).stat().st_mtime, default=None)


def typed(document: Row) -> LoRAReport:
    """spectrum.json as the report it was; ValidationError where it is none."""
    adapters = TypeAdapter(dict[str, LoRAAdapterMetrics]).validate_python(document.get("adapters"))
    structural = TypeAdapter(LoRAStructuralMetrics).validate_python(document.get("structural"))
    dynamics = TypeAdapter(LoRADynamicsMetrics | None).validate_python(document.get("dynamics"))
    rank = TypeAdapter(int | None).validate_python(document.get("suggested_rank"))
    found = [alert(row) for row in records(document.get("alerts"))]
    ordered = {name: adapters[name] for name in sorted(adapters, key=natural)}
    return LoRAReport(ordered, structural, dynamics, found, rank)


def alert(row: Row) -> Finding:
    return Finding(
        word(row.get("name")),
        word(row.get("module")),
        word(row.get("message")),
        word(row.get("action")),
    )


def ranks(report: LoRAReport | None, why: str) -> Html | Missing:
    """What was found in words, then effective rank by block and kind, then singular values."""
    if report is None or not report.adapters:
        return Missing(why)
    sentences = [line for line in summary(report) if not line.startswith("! ")]
    if report.suggested_rank and report.suggested_rank < max(
        m.nominal_rank for m in report.adapters.values()
    ):
        sentences.append("To cut it to what it uses: mlx-lora shrink ADAPTER --out SMALL")
    return joined(
        [tag("p", line) for line in sentences],
        tag("p", f"From {why}.", class_="quiet"),
        tag("h3", "Effective rank"),
        rank_table(report),
        tag("h3", "Singular values of the update"),
        tag("p", "A line a block, from blue (first) to orange (last).", class_="quiet"),
        tag("div", singular_values(report), class_="charts"),
    )


def rank_table(report: LoRAReport) -> Html:
    paid = "/".join(map(str, sorted({m.nominal_rank for m in report.adapters.values()})))

    def cell(names: list[str]) -> Html:
        some = [report.adapters[name] for name in names]
        if any(m.status == "non_finite" for m in some):
            return tag("td", "NaN", class_="b5")
        used = [m.effective_rank_BA for m in some if m.effective_rank_BA is not None]
        share = [m.rank_utilization for m in some if m.rank_utilization is not None]
        if not used or not share:
            return tag("td", "idle" if some else "")
        mean = min(max(sum(share) / len(share), 0.0), 1.0)
        low = " low" if mean < LOW_UTILIZATION else ""
        shade = f"u{min(int(mean * SHADES), SHADES - 1)}{low}"
        return tag("td", f"{sum(used) / len(used):.1f}", class_=shade)

    caption = f"Directions in use, of rank {paid}; framed: below {LOW_UTILIZATION:.0%} of it"
    return grid(report.adapters, cell, caption)


def singular_values(report: LoRAReport) -> list[Html]:
    """A panel a kind of module, all on the same axis."""
    where, found = places(report.adapters), defaultdict(list)
    for name, (_, kind) in where.items():
        m = report.adapters[name]
        values = [abs(m.effective_lr_scale) * s for s in m.singular_values]
        if values and values[0] > 0:
            found[kind].append([(i + 1.0, v) for i, v in enumerate(values)])
    every = [y for some in found.values() for points in some for _, y in points if y > 0]
    top = max(every, default=1.0)
    low = max(min(every, default=1.0) / 1.3, top / 10**DECADES)
    panels = []
    for kind in kinds(where):
        every = found[kind]
        some = chosen(every, LINES)
        shades = [SHADES * i // max(len(some), 1) for i in range(len(some))]
        lines = [
            Line("", [p for p in points if p[1] >= low], "line", f"t{shade}")
            for shade, points in zip(shades, some, strict=True)
        ]
        note = f"{len(some)} of {len(every)} modules" if len(some) < len(every) else ""
        axis: dict[str, Any] = {"x": "direction", "log": True, "floor": low, "ceiling": 1.3 * top}
        if drawn := chart(kind, lines, note=note, **axis):
            panels.append(drawn)
    return panels


def chosen(some: Sequence[Any], most: int) -> Sequence[Any]:
    """All, or `most` of them evenly spread."""
    if len(some) <= most:
        return some
    return [some[i] for i in np.linspace(0, len(some) - 1, most).astype(int)]


def dominance(report: LoRAReport | None, why: str) -> Html | Missing:
    """σ_max(scale·BA)/σ_max(W) by block and kind, on the bands that say what it means."""
    if report is None:
        return Missing(why)
    ratios = report.structural.scaled_per_layer_dominance
    if not ratios:
        return Missing("the base is not known: mlx-lora spectrum DIR --model MODEL --out DIR")

    def cell(names: list[str]) -> Html:
        values = [v for name in names if (v := ratios.get(name)) is not None]
        if not values:
            return tag("td", "–" if names else "")
        band = next(i for i, (edge, _, _) in enumerate(BANDS, start=1) if max(values) <= edge)
        return tag("td", f"{max(values):.2g}", class_=f"b{band}", title=BANDS[band - 1][2])

    edges = ", ".join(f"{word} up to {edge:g}" for edge, _, word in BANDS[:-1])
    note = f"The adapter's strongest direction over the base's: {edges}, {BANDS[-1][2]} above."
    return joined(
        tag("p", note, class_="quiet"), grid(report.adapters, cell, "σ_max(scale·BA) / σ_max(W)")
    )


def dynamics(run: Folder) -> Html | Missing:
    """How the spectra moved while training: medians over blocks, a line a kind of module."""
    parts = []
    for name, loop in run.loops:
        looks = [row for row in loop.rows("spectra.jsonl") if number(row.get("step")) is not None]
        if looks:
            drawn = tag("div", moved(looks), class_="charts")
            parts += [tag("h3", name) if name else None, drawn]
    if not parts:
        return Missing("the spectra were not watched (spectra.jsonl)")
    note = "Median over blocks, a line for each kind of module."
    return joined(tag("p", note, class_="quiet"), parts)


def moved(looks: Sequence[Row]) -> list[Html | None]:
    looks = chosen(looks, LOOKS)
    names = [str(n) for n in mapping(looks[-1].get("kappa_A"))]
    where = places(names)
    order = kinds(where)
    figures = []
    for key, title, log in PANELS:
        medians = [(row.get("step"), medians_of(row.get(key), where)) for row in looks]
        rows = [{"step": step, **found} for step, found in medians]
        lines = [Line(kind, pairs(rows, kind), "line", f"c{i % 8}") for i, kind in enumerate(order)]
        limit = (LIMITS[key], "alert") if key in LIMITS else None
        floor = None if log else 0.0
        figures.append(chart(title, lines, log=log, floor=floor, limit=limit))
    return figures


def medians_of(values: Any, where: Mapping[str, tuple[int | None, str]]) -> dict[str, float]:
    return by_kind({str(k): number(v) for k, v in mapping(values).items()}, where)


def totals(report: LoRAReport | None) -> Mapping[str, str]:
    """The adapter as a whole, for the head of the page."""
    if report is None or not report.adapters:
        return {}
    paid = sorted({m.nominal_rank for m in report.adapters.values()})
    return {"modules": shown(len(report.adapters)), "rank": ", ".join(map(str, paid))}
