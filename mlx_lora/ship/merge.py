"""`mlx-lora merge`: one adapter from several on one base, and how far they are in the way."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora import bases
from mlx_lora.adapter import files
from mlx_lora.adapter.tensors import labels
from mlx_lora.check.gate import Report, check
from mlx_lora.errors import AdapterError, ConfigError, few
from mlx_lora.models import Loaded
from mlx_lora.runlog import RunLog, atomically, refuse_occupied
from mlx_lora.ship import proof
from mlx_lora.ship.algebra import Thin, decomposed, overlap, product, rebuilt
from mlx_lora.ship.export import whole
from mlx_lora.ship.methods import Way, methods
from mlx_lora.ship.plots import overlap_plot
from mlx_lora.ship.trained import (
    Trained,
    base_name,
    load_base,
    rank_of,
    read,
    refuse_other_base,
    sizes_of,
)

MERGED, PICTURE = "merge.json", "merge.png"


@dataclass(frozen=True)
class Merged:
    """What was merged, how much of it the rank holds, and how the adapters lie to each other."""

    folder: Path | None  # None: the check failed, nothing was written
    base: str
    method: str
    names: list[str]
    weights: list[float]
    ranks: Mapping[str, int]
    kept: float  # of ‖merged update‖², what the rank holds
    pairs: list[dict[str, Any]]
    notices: list[str]
    report: Report | None = None  # base against merged

    def to_json(self) -> dict[str, Any]:
        return {
            "out": None if self.folder is None else str(self.folder),
            "base": self.base,
            "method": self.method,
            "adapters": self.names,
            "weights": self.weights,
            "modules": len(self.ranks),
            "rank": max(self.ranks.values()),
            "kept": self.kept,
            "pairs": self.pairs,
            "notices": self.notices,
            "check": proof.summary(self.report) if self.report else None,
        }


class Unsound(Exception):
    """The check failed the merged adapter, so nothing was left behind. Carries the rest."""

    def __init__(self, found: Merged) -> None:
        super().__init__("; ".join(found.report.reasons if found.report else []))
        self.found = found


def merge(
    adapters: Sequence[Path],
    out: Path,
    *,
    model: str | None = None,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    options: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Write one adapter that does what several do, each times its weight.

    Unless told: the mean in linear, 1 each in the others.

    Exact where `rank` is not given, up to rounding; ties, of full rank, then gets the sum of their
    ranks. `model` is their base, if not the one that they recorded. AdapterError lists everything
    that keeps them apart; Unsound is raised, leaving nothing behind, where the check fails.
    """
    way = methods.bind(method, options or {})
    refuse_occupied(out)
    even = 1 / max(len(adapters), 1) if method == "linear" else 1.0
    weights = list(weights) if weights else [even] * len(adapters)
    if len(weights) != len(adapters) or len(adapters) < 2:
        raise ConfigError(
            f"{len(adapters)} adapters and {len(weights)} weights",
            "Name two adapters or more, and a weight for each or none.",
        )
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights are finite numbers, got {', '.join(map(str, weights))}")
    trained = [read(path) for path in adapters]
    notices = refuse_strangers(trained)
    name, loaded, more = opened(trained, model, trust_remote_code)
    names = labels([t.folder for t in trained])
    factors, ranks, kept = blended(trained, way, weights, rank)
    pairs = [compared(names[i], names[j], trained[i], trained[j]) for i, j in pairs_of(trained)]
    found = Merged(out, name, method, names, weights, ranks, kept, pairs, [*notices, *more])
    with whole(out) as folder:
        files.write(config_of(trained, found, loaded), factors, folder)
        found = proven(found, loaded, folder)
        write_figures(found, folder)
    return found


def opened(trained: Sequence[Trained], model: str | None, trust: bool) -> tuple[str, Loaded, list]:
    """The name of the adapters' base, the base, and what to know of it."""
    first = next((t for t in trained if t.about_base.get("model")), trained[0])
    name = base_name(first, model)
    loaded, notices = load_base(first, name, trust_remote_code=trust)
    for other in trained:
        notices += refuse_other_base(other, loaded)
    return name, loaded, list(dict.fromkeys(notices))


def proven(merged: Merged, loaded: Loaded, folder: Path) -> Merged:
    """The merged adapter with its check, base against merged, which lies beside it."""
    found = replace(merged, report=(report := check(loaded, adapter=folder)))
    if report.exit_code:
        raise Unsound(replace(found, folder=None))
    proof.write(report, folder)
    return found


def blended(
    trained: Sequence[Trained], way: Way, weights: Sequence[float], rank: int | None
) -> tuple[dict[str, mx.array], dict[str, int], float]:
    """The merged factors, their ranks by module, and the share of ‖merged update‖² they hold."""
    modules = sorted({name for t in trained for name in t.modules})
    factors, ranks, held, total = {}, {}, 0.0, 0.0
    for module in modules:
        there = [(t, w) for t, w in zip(trained, weights, strict=True) if module in t.modules]
        parts = [thin_of(t, module) for t, _ in there]
        most = rank or sum(p.a_IK.shape[1] for p in parts)
        found, energy = way(parts, [w for _, w in there], most)
        thin, _ = rebuilt(found, most)
        factors[f"{module}.lora_a"] = mx.array(thin.a_IK.astype(np.float32))
        factors[f"{module}.lora_b"] = mx.array(thin.b_KO.astype(np.float32))
        ranks[module] = thin.a_IK.shape[1]
        held, total = held + product(thin, thin), total + energy
    return factors, ranks, min(held / total, 1.0) if total else 1.0


def refuse_strangers(trained: Sequence[Trained]) -> list[str]:
    """AdapterError that lists why these are not adapters of one base; else what to know."""
    problems, notices = [], []
    for t in trained:
        if t.magnitudes_O:
            problems.append(f"{t.folder} is a DoRA adapter: its update is no product of factors")
        if t.experts:
            problems.append(f"{t.folder} adapts stacked experts, whose factors are not merged yet")
        if t.broken:
            problems.append(f"{t.folder}: NaN or infinity in {few(t.broken)}")
    first, *others = trained
    for other in others:
        problems += apart(first, other)
        forms = [t.about_base.get("quantization", "unknown") for t in (first, other)]
        if "unknown" not in forms and forms[0] != forms[1]:
            said = " and ".join(bases.form(form) for form in forms)
            notices.append(f"{first.folder} and {other.folder} learned on {said} weights")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise AdapterError(f"these adapters cannot be merged:\n{lines}")
    return notices


def apart(a: Trained, b: Trained) -> list[str]:
    """Why two adapters are not of one base: kind, weights, sizes of layers."""
    lines = []
    kinds = [t.about_base.get("model_type") for t in (a, b)]
    if None not in kinds and kinds[0] != kinds[1]:
        lines.append(f"{a.folder} is for a {kinds[0]}, {b.folder} for a {kinds[1]}")
    sketches: list[Any] = [t.about_base.get("sketch") for t in (a, b)]
    known_same = bool(sketches[0]) and sketches[0] == sketches[1]
    if all(sketches) and not bases.same_base(*sketches):
        lines.append(f"{a.folder} and {b.folder} were trained on other weights")
    elif own_base(a) != own_base(b) or (a.rebased and not known_same):
        names = [(t.config.get("init") or {}).get("name", "none") for t in (a, b)]
        lines.append(
            f"{a.folder} and {b.folder}: an init gave one of them a base of its own, and they are "
            f"not known to be on the same ({names[0]} at rank {a.rank}, {names[1]} at {b.rank})"
        )
    for name in sorted(a.modules.keys() & b.modules.keys()):
        x, y = sizes_of(a.modules[name]), sizes_of(b.modules[name])
        if x != y:
            said = f"{x[0]} to {x[1]} in {a.folder}, {y[0]} to {y[1]} in {b.folder}"
            lines.append(f"{name} is {said}")
    return lines


def own_base(trained: Trained) -> Mapping[str, Any] | None:
    """What the base depends on that an init wrote; None where it is the original."""
    if not trained.rebased:
        return None
    ranks = {name: rank_of(factors) for name, factors in trained.modules.items()}
    return {**trained.config["init"], "measured": None, "ranks": ranks}


def thin_of(trained: Trained, module: str) -> Thin:
    factors = trained.modules[module]
    a_IR, b_RO = (np.array(f.astype(mx.float32)) for f in (factors.lora_a_IR, factors.lora_b_RO))
    return Thin(a_IR, trained.scale * b_RO)


def pairs_of(trained: Sequence[Trained]) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(len(trained)), 2))


def compared(name_a: str, name_b: str, a: Trained, b: Trained) -> dict[str, Any]:
    """How two adapters lie to each other: the cosine of their updates, their spaces by layer."""
    layers, dot, square_a, square_b = [], 0.0, 0.0, 0.0
    for module in sorted(a.modules.keys() & b.modules.keys()):
        x, y = thin_of(a, module), thin_of(b, module)
        p, q = decomposed(x), decomposed(y)
        layers.append(
            {
                "module": module,
                "overlap_inputs": overlap(p.u_IK, q.u_IK),
                "overlap_outputs": overlap(p.v_OK, q.v_OK),
            }
        )
        dot += product(x, y)
        square_a, square_b = square_a + product(x, x), square_b + product(y, y)
    size = (square_a * square_b) ** 0.5
    means = {
        side: float(np.mean([layer[side] for layer in layers])) if layers else 0.0
        for side in ("overlap_inputs", "overlap_outputs")
    }
    return {"a": name_a, "b": name_b, "cosine": dot / size if size else 0.0, **means} | {
        "layers": layers
    }


def config_of(trained: Sequence[Trained], merged: Merged, loaded: Loaded) -> dict[str, Any]:
    """adapter_config.json of the merged adapter: modules that one of them lacks stay at B = 0."""
    keys = sorted({re.sub(r"^.*?\blayers\.\d+\.", "", module) for module in merged.ranks})
    rank = max(merged.ranks.values())
    return {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
        "partial": True,
        "merged": {
            "method": merged.method,
            "adapters": [str(t.folder) for t in trained],
            "weights": merged.weights,
        },
        **({"init": trained[0].config["init"]} if trained[0].rebased else {}),
        "base": {**bases.identity(loaded), **trained[0].about_base},
    }


def write_figures(merged: Merged, folder: Path) -> None:
    RunLog(folder).write_json(MERGED, merged.to_json())
    with atomically(folder / PICTURE) as part:
        part.write_bytes(overlap_plot(merged.pairs))
