"""Adapters side by side, or the states of one run: ranks, sizes, and the angles between updates."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora import bases
from mlx_lora.adapter.mapped import widened
from mlx_lora.adapter.tensors import labels
from mlx_lora.cpu_threads import each
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.report.folder import stage_folders
from mlx_lora.runlog import write_all
from mlx_lora.ship.algebra import Decomposed, Thin, decomposed, overlap, principal_cosines, product
from mlx_lora.spectral.metrics import LoRAReport, k90
from mlx_lora.spectral.names import natural
from mlx_lora.spectral.read import adapter_folder, of_folder
from mlx_lora.spectral.report import LoRAAnalyzer, Tell
from mlx_lora.spectral.spectrum import Pair, finite

SCHEMA = 1
BLUR = 1e-7  # of the sizes of two updates: what rounding leaves of their difference
MOST = 12  # adapters of one comparison: the pairs grow with its square
Numbers = list[float | None]  # one of each adapter, in order; None: it has no such number


@dataclass(frozen=True)
class Between:
    """One module, or all of them, from adapter a to adapter b. None: a side has no update there."""

    module: str
    change: float | None  # ‖Δ_b - Δ_a‖_F, Δ = scale·BA
    change_share: float | None  # of Σ change² over the modules of both
    cosine: float | None  # ⟨Δ_a, Δ_b⟩ / (‖Δ_a‖ ‖Δ_b‖)
    overlap_inputs: float | None  # of the directions that hold 90 % of each side's energy
    overlap_outputs: float | None
    chance_inputs: float | None  # what random spaces of these sizes have
    chance_outputs: float | None
    angles_inputs: Sequence[float] = ()  # principal angles in degrees, smallest first
    angles_outputs: Sequence[float] = ()


@dataclass(frozen=True)
class PairOf:
    """Two of the adapters: together, and by module, the most changed first."""

    a: str
    b: str
    cosine: float | None
    change: float
    overlap_inputs: float | None  # mean over modules, like the next three
    overlap_outputs: float | None
    chance_inputs: float | None
    chance_outputs: float | None
    modules: Sequence[Between] = ()


@dataclass(frozen=True)
class Comparison:
    """What is common to several adapters, and what is not."""

    names: Sequence[str]
    folders: Sequence[Path]
    reports: Sequence[LoRAReport]
    modules: Mapping[str, Mapping[str, Numbers]]  # of all adapters, by number
    pairs: Sequence[PairOf]
    only: Mapping[str, Sequence[str]]  # module -> the adapters that have it, where not all do
    misfits: Mapping[str, Sequence[str]]  # module -> its sizes, where they differ
    notices: Sequence[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "adapters": [
                {"name": name, "folder": str(folder), **whole(report)}
                for name, folder, report in zip(self.names, self.folders, self.reports, strict=True)
            ],
            "modules": {name: dict(found) for name, found in self.modules.items()},
            "pairs": [asdict(pair) for pair in self.pairs],
            "only": [{"module": m, "adapters": list(names)} for m, names in self.only.items()],
            "misfits": [{"module": m, "sizes": list(said)} for m, said in self.misfits.items()],
            "notices": list(self.notices),
        }


def states(run: Path) -> list[Path]:
    """The adapters that a run kept: its start, its checkpoints, its best, its end.

    Of stages those of each, the run's end being that of the last.
    """
    from mlx_lora.rl import checkpoints  # loads mlx-lm

    found = [run / "adapters" / "initial"]
    for loop in stage_folders(run) or [run]:
        ends = [loop / "adapters" / "best", loop / "adapters"]
        found += [*checkpoints.every(loop / "checkpoints"), *ends]
    kept = [folder for folder in found if (folder / "adapter_config.json").is_file()]
    if len(kept) < 2:
        raise AdapterError(
            f"{run} keeps {len(kept)} state of its adapter, a comparison needs two",
            "Give the folder of a run, or other adapters with --compare.",
        )
    return kept


def compare(
    given: Sequence[Path],
    model: str | None = None,
    *,
    trust_remote_code: bool = False,
    tell: Tell = lambda what, done, total: None,
) -> Comparison:
    """Two adapters or more. With `model`, their base, also dominance.

    Modules of other sizes, and those that not all have, are named and left out. AdapterError where
    nothing is common.
    """
    if not 2 <= len(given) <= MOST:
        raise ConfigError(
            f"a comparison takes 2 to {MOST} adapters, got {len(given)}",
            "Name them: mlx-lora spectrum A --compare B C.",
        )
    folders = [adapter_folder(path) for path in given]
    read = [{pair.name: pair for pair in of_folder(folder)} for folder in folders]
    names = labels([path.absolute() for path in given])
    everything = sorted({name for one in read for name in one}, key=natural)
    there = {m: [n for n, one in zip(names, read, strict=True) if m in one] for m in everything}
    misfits = {
        m: [f"{i} to {o}" for i, o in sizes]
        for m in everything
        if len(sizes := sizes_of(m, read)) > 1
    }
    common = [m for m in everything if len(there[m]) == len(read) and m not in misfits]
    if not common:
        raise AdapterError(
            f"{' and '.join(names)} have no module in common",
            "Adapters of one architecture, on the same layers, can be compared.",
        )
    loaded = loaded_model(model, folders[0], trust_remote_code)
    reports = [LoRAAnalyzer(folder, loaded).analyze(tell=tell) for folder in folders]
    apart = [each(part, [one[m] for m in common]) for one in read]
    pairs = [
        between(names[i], names[j], common, apart[i], apart[j])
        for i, j in itertools.combinations(range(len(read)), 2)
    ]
    return Comparison(
        names,
        folders,
        reports,
        {m: by_module(m, reports) for m in common},
        pairs,
        {m: some for m, some in there.items() if len(some) < len(read)},
        misfits,
        [*strangers(names, folders), *told(names, reports)],
    )


def loaded_model(model: str | None, folder: Path, trust_remote_code: bool) -> Any:
    """The base, once for all adapters, quantized as the first of them recorded."""
    if model is None:
        return None
    from mlx_lora import models

    rebuild = bases.recorded(folder).get("quantization")
    return models.load(model, rebuild=rebuild, trust_remote_code=trust_remote_code)


def sizes_of(module: str, read: Sequence[Mapping[str, Pair]]) -> list[tuple[int, int]]:
    """The inputs and outputs that this module has, each once."""
    found = [one[module] for one in read if module in one]
    return list(dict.fromkeys((pair.a_IR.shape[0], pair.b_RO.shape[1]) for pair in found))


def told(names: Sequence[str], reports: Sequence[LoRAReport]) -> list[str]:
    """What each report says of the base."""
    return [
        f"{name}: {notice}"
        for name, report in zip(names, reports, strict=True)
        for notice in report.notices
    ]


def strangers(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """What keeps adapters from being of one base, in words."""
    about = [bases.recorded(folder) for folder in folders]
    said = []
    for (a, first), (b, other) in itertools.combinations(zip(names, about, strict=True), 2):
        kinds = [x.get("model_type") for x in (first, other)]
        sketches: list[Any] = [x.get("sketch") for x in (first, other)]
        if None not in kinds and kinds[0] != kinds[1]:
            said.append(f"{a} is for a {kinds[0]}, {b} for a {kinds[1]}")
        elif all(sketches) and not bases.same_base(*sketches):
            said.append(f"{a} and {b} were trained on other weights")
    return said


@dataclass(frozen=True)
class Part:
    """One module of one adapter: its update, and the directions that hold 90 % of its energy."""

    thin: Thin
    main: Decomposed
    square: float  # ‖Δ‖²


def part(pair: Pair) -> Part | None:
    """None where a factor is not finite. In float64."""
    if not (finite(pair.a_IR) and finite(pair.b_RO) and np.isfinite(pair.scale)):
        return None
    thin = Thin(widened(pair.a_IR), pair.scale * widened(pair.b_RO))
    d = decomposed(thin)
    kept = int(k90(d.s_K)) if len(d.s_K) else 0
    main = Decomposed(d.u_IK[:, :kept], d.s_K[:kept], d.v_OK[:, :kept])
    return Part(thin, main, float((d.s_K**2).sum()))


def between(
    a: str,
    b: str,
    modules: Sequence[str],
    first: Sequence[Part | None],
    other: Sequence[Part | None],
) -> PairOf:
    """Everything about two adapters, by module and together."""
    rows = [one_module(*row) for row in zip(modules, first, other, strict=True)]
    total = sum((row.change or 0.0) ** 2 for row in rows)
    shared = [
        Between(**{**asdict(row), "change_share": row.change**2 / total if total else 0.0})
        if row.change is not None
        else row
        for row in rows
    ]
    ordered = sorted(shared, key=lambda row: -(row.change or 0.0))
    known = [(x, y) for x, y in zip(first, other, strict=True) if x and y]
    size = np.sqrt(sum(x.square for x, _ in known) * sum(y.square for _, y in known))
    dot = sum(product(x.thin, y.thin) for x, y in known)
    means = {key: mean([getattr(row, key) for row in rows]) for key in SPACES}
    return PairOf(
        a, b, float(dot / size) if size else None, float(np.sqrt(total)), **means, modules=ordered
    )


SPACES = ("overlap_inputs", "overlap_outputs", "chance_inputs", "chance_outputs")


def one_module(module: str, a: Part | None, b: Part | None) -> Between:
    """Two updates of one weight. The change is exact to BLUR of their sizes, and 0 below."""
    if a is None or b is None:
        return Between(module, None, None, None, None, None, None, None)
    dot = product(a.thin, b.thin)
    squared, sizes = a.square + b.square - 2 * dot, a.square + b.square
    change = float(np.sqrt(squared)) if squared > BLUR**2 * sizes else 0.0
    if not (len(a.main.s_K) and len(b.main.s_K)):
        return Between(module, change, None, None, None, None, None, None)
    sides = ((a.main.u_IK, b.main.u_IK), (a.main.v_OK, b.main.v_OK))
    over_in, over_out = (overlap(x, y) for x, y in sides)
    chance_in, chance_out = (max(x.shape[1], y.shape[1]) / len(x) for x, y in sides)
    angles_in, angles_out = (np.degrees(np.arccos(principal_cosines(*s))).tolist() for s in sides)
    cosine = dot / float(np.sqrt(a.square * b.square))
    spaces = (over_in, over_out, chance_in, chance_out, angles_in, angles_out)
    return Between(module, change, None, cosine, *spaces)


def mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


KEYS: Mapping[str, Callable[[LoRAReport, str], float | None]] = {
    "nominal_rank": lambda report, m: report.adapters[m].nominal_rank,
    "effective_rank": lambda report, m: report.adapters[m].effective_rank_BA,
    "size": lambda report, m: sized(report, m, "frobenius_BA"),
    "sigma_max": lambda report, m: sized(report, m, "sigma_max_BA"),
    "dominance": lambda report, m: (report.structural.scaled_per_layer_dominance or {}).get(m),
}


def sized(report: LoRAReport, module: str, key: str) -> float | None:
    found = report.adapters[module]
    value = getattr(found, key)
    return None if value is None else abs(found.effective_lr_scale) * value


def by_module(module: str, reports: Sequence[LoRAReport]) -> dict[str, Numbers]:
    """The numbers of one module, a list over the adapters each."""
    return {key: [of(report, module) for report in reports] for key, of in KEYS.items()}


def whole(report: LoRAReport) -> dict[str, Any]:
    """One adapter in a few numbers, over all the modules it has."""
    found = report.adapters
    sizes = [sized(report, m, "frobenius_BA") or 0.0 for m in found]
    return {
        "status": report.status,
        "modules": len(found),
        "rank": max(m.nominal_rank for m in found.values()),
        "effective_rank": mean([m.effective_rank_BA for m in found.values()]),
        "rank_utilization": mean([m.rank_utilization for m in found.values()]),
        "size": float(np.linalg.norm(sizes)),
        "dominance": report.structural.scaled_max_dominance,
    }


def write(found: Comparison, folder: Path, *, picture: bool = True) -> None:
    """compare.json and compare.png, each whole or not there; RunError where that fails."""
    contents = {"compare.json": json.dumps(found.to_json(), indent=2, allow_nan=False).encode()}
    if picture:
        from mlx_lora.report.compare_plot import draw

        contents["compare.png"] = draw(found)
    write_all(contents, folder, "the comparison")
