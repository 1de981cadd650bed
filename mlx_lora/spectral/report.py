"""The spectral report of an adapter: as data, as JSON, as a table, and as pictures in a folder."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_lora import models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.errors import AdapterError, RunError, near
from mlx_lora.runlog import atomically
from mlx_lora.spectral import base, plots
from mlx_lora.spectral.alerts import find
from mlx_lora.spectral.metrics import CRITICAL, DOMINATING, LOW_UTILIZATION, LoRAReport
from mlx_lora.spectral.spectrum import Pair, kinds, measure, natural, pairs, places, split_expert
from mlx_lora.spectral.structure import finding, structure, suggested_rank

if TYPE_CHECKING:
    from rich.console import RenderableType


class LoRAAnalyzer:
    """Looks at an adapter: a folder (of an adapter or a run), or a model with LoRA attached.

    `model`, a module or a name for `models.load`, is the base it is compared with; an attached
    model brings its own. The base is measured once, the adapter afresh in every `analyze()`.
    """

    def __init__(
        self, adapter: str | Path | nn.Module, model: str | nn.Module | None = None
    ) -> None:
        self.adapter = adapter
        if isinstance(adapter, nn.Module) and model is None:
            model = adapter
        self.model = models.load(model).model if isinstance(model, str) else model
        self._bases: dict[str, tuple[float, float]] = {}

    def analyze(self, *, alerts: Mapping[str, Mapping[str, Any]] | None = None) -> LoRAReport:
        """Every metric and finding. `alerts` are options by alert name."""
        found = sorted(self.read(), key=lambda pair: natural(pair.name))
        if self.model is not None:
            self.measure_bases(found)
        adapters = {pair.name: measure(pair) for pair in found}
        sigmas = None if self.model is None else {n: self._bases[n][0] for n in adapters}
        for name, m in adapters.items() if sigmas else ():
            frobenius = self._bases[name][1]
            if m.frobenius_BA is not None and frobenius:
                update = abs(m.effective_lr_scale) * m.frobenius_BA / frobenius
                adapters[name] = replace(m, scaled_relative_update=update)
        report = LoRAReport(
            adapters, structure(adapters, sigmas), suggested_rank=suggested_rank(adapters)
        )
        return replace(report, alerts=find(report, alerts))

    def get_rank_utilization(self) -> dict[str, float | None]:
        """Effective rank of BA over nominal rank, by module. None: untrained or not finite."""
        return {name: m.rank_utilization for name, m in self.analyze().adapters.items()}

    def suggest_rank(self) -> int | None:
        """See `suggested_rank`."""
        return suggested_rank(self.analyze().adapters)

    def read(self) -> list[Pair]:
        """The factors, from the folder or the model."""
        if isinstance(self.adapter, nn.Module):
            layers = lora_layers(self.adapter)
            if not layers:
                raise AdapterError(
                    "this model has no LoRA layers", "Attach or load an adapter first."
                )
            tensors = {f"{n}.{f}": m[f] for n, m in layers.items() for f in ("lora_a", "lora_b")}
            return list(pairs(tensors, {n: float(m.scale) for n, m in layers.items()}))
        folder = Path(self.adapter).expanduser()
        if not (folder / files.CONFIG).is_file() and (folder / "adapters" / files.CONFIG).is_file():
            folder = folder / "adapters"  # a run folder
        config, tensors = files.read(folder)
        return list(pairs(tensors, float(config["lora_parameters"]["scale"])))

    def measure_bases(self, found: list[Pair]) -> None:
        """σ_max and ‖W‖_F under every module, once. AdapterError lists what does not fit."""
        assert self.model is not None
        missing = [pair for pair in found if pair.name not in self._bases]
        layers = base.frozen_layers(self.model) if missing else {}
        problems = []
        for pair in missing:
            name, expert = split_expert(pair.name)
            layer, shape_OI = layers.get(name), (pair.b_RO.shape[1], pair.a_IR.shape[0])
            if layer is None:
                problems.append(f"  {name} is not in the model. {near(name, layers, 1)}"[:200])
            elif misfit := base.misfit(layer, shape_OI, expert):
                problems.append(f"  {pair.name}: {misfit}")
            elif not problems:
                weight = base.matrix(layer, expert)
                self._bases[pair.name] = base.sigma_max(weight), base.frobenius(weight)
        if problems:
            raise AdapterError(
                f"{len(problems)} of {len(found)} modules do not fit the base model\n"
                + "\n".join(problems[:20]),
                "Was the adapter trained on another base? Without a base there is still a report.",
            )


def to_json(report: LoRAReport) -> dict[str, Any]:
    """The report as plain data: adapters, structural, dynamics, alerts, suggested_rank."""
    document = {
        "adapters": {name: asdict(m) for name, m in report.adapters.items()},
        "structural": asdict(report.structural),
        "dynamics": None if report.dynamics is None else asdict(report.dynamics),
        "alerts": [
            {"name": f.name, "module": f.module, "message": f.message, "action": f.action}
            for f in report.alerts
        ],
        "suggested_rank": report.suggested_rank,
    }
    return finite(document)


def finite(value: Any) -> Any:
    """The same data with null for NaN and infinity, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(report: LoRAReport, folder: Path) -> list[Path]:
    """spectrum.json and the pictures, each whole or not there; RunError where that fails."""
    folder = Path(folder)
    text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    contents = {"spectrum.json": text.encode(), **plots.draw(report)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            with atomically(folder / name) as part:
                part.write_bytes(data)
    except OSError as error:
        raise RunError(f"cannot write the report to {folder}: {error}") from error
    return [folder / name for name in contents]


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
    """What the table amounts to: the ranks used, the rank to take, each alert with its count."""
    lines = [f"The adapter {finding(report)}."]
    if report.suggested_rank is not None:
        paid = max(m.nominal_rank for m in report.adapters.values())
        more = f"A module uses nearly all of its rank: try rank {report.suggested_rank}."
        enough = f"Rank {report.suggested_rank} holds what every module uses."
        lines.append(more if report.suggested_rank > paid else enough)
    worst = report.structural.scaled_max_dominance
    if report.structural.scaled_per_layer_dominance is None:
        lines.append("Dominance is not known without the base model.")
    elif worst:
        lines.append(f"Dominance at scale is at most {worst:.2g} of the base.")
    by_name = defaultdict(list)
    for alert in report.alerts:
        by_name[alert.name].append(alert)
    for name, some in by_name.items():
        where = f"{some[0].module}: " if some[0].module else ""
        more = f" (and {len(some) - 1} more)" if len(some) > 1 else ""
        lines.append(f"! {name}: {where}{some[0].message}{more}")
    return lines
