"""The spectral report of an adapter: as data, as JSON, and as pictures in a folder."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from mlx_lora.cpu_threads import each
from mlx_lora.errors import AdapterError, near
from mlx_lora.runlog import write_all
from mlx_lora.spectral import splines
from mlx_lora.spectral.alerts import find
from mlx_lora.spectral.dynamics import Look, looks_in, options_of, summed_up
from mlx_lora.spectral.metrics import LoRAReport, LoRAStructuralMetrics
from mlx_lora.spectral.names import natural, split_expert
from mlx_lora.spectral.read import adapter_folder, of_folder, of_model
from mlx_lora.spectral.spectrum import Pair, judged, measure
from mlx_lora.spectral.splines import SplineMetrics
from mlx_lora.spectral.structure import structure, suggested_rank

if TYPE_CHECKING:
    import mlx.nn as nn

    from mlx_lora.models import Loaded

Tell = Callable[[str, int, int], None]
SCHEMA = 1  # of to_json


class LoRAAnalyzer:
    """Looks at an adapter: a folder (of an adapter or a run), or a model with LoRA attached.

    `model`, a name for `models.load`, what that returned or its module, is the base it is compared
    with; an attached model brings its own. `run` is the folder of the run it comes from. The base
    is measured once, the adapter afresh in every `analyze()`.
    """

    def __init__(
        self,
        adapter: "str | Path | nn.Module",
        model: "str | nn.Module | Loaded | None" = None,
        *,
        run: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.adapter, self.run, self.trust_remote_code = adapter, run, trust_remote_code
        self.model: Any = adapter if model is None and not named(adapter) else model
        self._bases: dict[str, tuple[float, float]] = {}
        self._norms: dict[str, np.ndarray] = {}  # of the base's rows, under DoRA
        self.notices: list[str] = []  # of the base

    def analyze(
        self,
        *,
        alerts: Mapping[str, Mapping[str, Any]] | None = None,
        dynamics: Mapping[str, Any] | None = None,
        deep: bool = False,
        tell: Tell = lambda what, done, total: None,
    ) -> LoRAReport:
        """Every metric and finding. `alerts` are options by alert name, `dynamics` of `summed_up`.

        `deep` asks for what needs many products with the base or its reading of text: directional
        and activation-weighted dominance, intruders. `tell` hears (work, modules done, of so many).
        """
        found = sorted(self.read(), key=lambda pair: natural(pair.name))
        if self.model is not None:
            self.measure_bases(found, tell)
        adapters = {
            pair.name: judged(m, pair, self._norms[pair.name]) if pair.name in self._norms else m
            for pair, m in zip(found, each(measure, found), strict=True)
        }
        sigmas = None if self.model is None else {n: self._bases[n][0] for n in adapters}
        for name, m in adapters.items() if sigmas else ():
            frobenius = self._bases[name][1]
            if m.frobenius_BA is not None and frobenius:
                update = abs(m.effective_lr_scale) * m.frobenius_BA / frobenius
                adapters[name] = replace(m, scaled_relative_update=update)
        structural = structure(adapters, sigmas)
        if deep:
            trained = {name for name, m in adapters.items() if m.status == "trained"}
            structural = self.look_deeper(found, structural, trained, tell)
        looks = self.looks()
        report = LoRAReport(
            adapters,
            structural,
            summed_up(looks, **options_of(dynamics or {})),
            looks=looks,
            splines=self.splines(),
            notices=self.notices,
        )
        rank = None if report.status == "non_finite" else suggested_rank(adapters)
        report = replace(report, suggested_rank=rank)
        return replace(report, alerts=find(report, alerts))

    def get_rank_utilization(self) -> dict[str, float | None]:
        """Effective rank of BA over nominal rank, by module. None: untrained or not finite."""
        return {name: m.rank_utilization for name, m in self.analyze().adapters.items()}

    def suggest_rank(self) -> int | None:
        """See `suggested_rank`."""
        return suggested_rank(self.analyze().adapters)

    def looks(self) -> list[Look]:
        """What a run's monitor saw; nothing for an adapter's folder or a model without a run."""
        if self.run is None and named(self.adapter):
            return looks_in(Path(self.adapter).expanduser())
        return [] if self.run is None else looks_in(self.run)

    def read(self) -> list[Pair]:
        """The factors, from the folder or the model."""
        adapter = self.adapter
        return of_folder(adapter) if named(adapter) else of_model(adapter)

    def splines(self) -> dict[str, SplineMetrics]:
        """The curves of a spline adapter; none of others."""
        adapter = self.adapter
        return splines.of_folder(adapter) if named(adapter) else splines.of_model(adapter)

    def look_deeper(
        self, found: list[Pair], structural: LoRAStructuralMetrics, trained: set[str], tell: Tell
    ) -> LoRAStructuralMetrics:
        from mlx_lora.models import Loaded
        from mlx_lora.spectral import deep

        if not isinstance(self.model, Loaded):
            raise AdapterError(
                "a deep look reads text with the base model",
                "Name the model, or give what models.load() returned.",
            )
        told = partial(tell, "a deep look")
        return deep.look(found, self.model, structural, trained, tell=told)

    def measure_bases(self, found: list[Pair], tell: Tell) -> None:
        """σ_max, ‖W‖_F and DoRA's row norms under every module, once.

        AdapterError lists what does not fit.

        A folder's adapter is held against what it recorded of its base.
        """
        from mlx_lora import bases, models
        from mlx_lora.adapter.dora import row_norms
        from mlx_lora.adapter.inits import is_rebased
        from mlx_lora.spectral import base
        from mlx_lora.spectral.remembered import Sizes

        folder = adapter_folder(self.adapter) if named(self.adapter) else None
        recorded = bases.recorded(folder) if folder else {}
        if isinstance(self.model, str):
            self.model = models.load(
                self.model,
                rebuild=recorded.get("quantization"),
                trust_remote_code=self.trust_remote_code,
            )
        if folder and recorded and not self._bases:
            self.notices = bases.refuse_other(
                folder, recorded, self.model, rebased=is_rebased(bases.config_of(folder))
            )
        model = self.model.model if isinstance(self.model, models.Loaded) else self.model
        missing = [pair for pair in found if pair.name not in self._bases]
        layers = base.frozen_layers(model) if missing else {}
        problems = []
        for pair in missing:
            name, expert = split_expert(pair.name)
            layer, shape_OI = layers.get(name), (pair.b_RO.shape[1], pair.a_IR.shape[0])
            if layer is None:
                problems.append(f"  {name} is not in the model. {near(name, layers, 1)}"[:200])
            elif misfit := base.misfit(layer, shape_OI, expert):
                problems.append(f"  {pair.name}: {misfit}")
        if problems:
            more = [f"  ... and {len(problems) - 20} more"] if len(problems) > 20 else []
            raise AdapterError(
                f"{len(problems)} of {len(found)} modules do not fit the base model\n"
                + "\n".join([*problems[:20], *more]),
                "Was the adapter trained on another base? Without a base there is still a report.",
            )
        sizes = Sizes(model) if missing else None
        for done, pair in enumerate(missing):
            assert sizes is not None
            name, expert = split_expert(pair.name)
            self._bases[pair.name] = sizes.of(pair.name, base.matrix(layers[name], expert))
            if pair.m_O is not None and pair.m_O.size == layers[name].weight.shape[0]:
                self._norms[pair.name] = np.array(row_norms(layers[name]), np.float64)
            tell("the base's weights", done + 1, len(missing))
        if sizes:
            sizes.keep()


def named(adapter: Any) -> TypeGuard[str | Path]:
    """True for a folder, not for a model."""
    return isinstance(adapter, str | Path)


def to_json(report: LoRAReport) -> dict[str, Any]:
    """The report as plain data: status, adapters, structural, dynamics, alerts, notices ..."""
    document = {
        "schema": SCHEMA,
        "status": report.status,
        "adapters": {name: asdict(m) for name, m in report.adapters.items()},
        "structural": asdict(report.structural),
        "dynamics": None if report.dynamics is None else asdict(report.dynamics),
        "alerts": [
            {"name": f.name, "module": f.module, "message": f.message, "action": f.action}
            for f in report.alerts
        ],
        "suggested_rank": report.suggested_rank,
        "notices": list(report.notices),
        **(
            {"splines": {n: asdict(s) for n, s in report.splines.items()}} if report.splines else {}
        ),
    }
    return finite(document)


def finite(value: Any) -> Any:
    """The same data with null for NaN and infinity, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(report: LoRAReport, folder: Path, *, pictures: bool = True) -> list[Path]:
    """spectrum.json and the pictures, each whole or not there; RunError where that fails."""
    from mlx_lora.spectral import plots

    text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    contents = {"spectrum.json": text.encode(), **(plots.draw(report) if pictures else {})}
    return write_all(contents, Path(folder), "the report")
