"""Before the first step: load, quantize, attach, and check that nothing is corrupted."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mlx_lora import bases, distributed, models
from mlx_lora.adapter import attach as attaching
from mlx_lora.adapter import files, population, spline, warm
from mlx_lora.adapter.inits import REBASING, is_rebased, label
from mlx_lora.adapter.population import remember_sizes
from mlx_lora.adapter.spline_math import asked as asked_curve
from mlx_lora.adapter.weights import analyse
from mlx_lora.blocks import Check
from mlx_lora.check import certificate, gate
from mlx_lora.check.gate import fingerprint
from mlx_lora.check.probes import Probes, read
from mlx_lora.errors import RunError
from mlx_lora.models import Loaded
from mlx_lora.runlog import Clock, RunLog
from mlx_lora.schema import Experiment, Stage
from mlx_lora.spectral import weight_map

CHECK = "check.json"


class CheckFailed(Exception):
    """The corruption check failed, so no RL step was paid for. Carries the report."""

    def __init__(self, report: gate.Report) -> None:
        super().__init__("; ".join(report.reasons))
        self.report = report


@dataclass(frozen=True)
class Prepared:
    """A model with its adapter, and the base's fingerprint, which later checks compare with."""

    loaded: Loaded
    config: dict[str, Any]  # of the adapter
    probes: Probes
    prints: Sequence[str]
    report: gate.Report
    seed: int
    asked: Check  # what the experiment says of checks


def load(e: Stage, adapter: Path | None = None) -> Loaded:
    """An experiment's model, quantized as it says, or else as the base of an adapter was."""
    quantize = e.quantize.model_dump() if e.quantize else None
    rebuild = bases.recorded(adapter).get("quantization") if adapter else None
    trust = e.trust_remote_code
    return models.load(e.model, quantize=quantize, rebuild=rebuild, trust_remote_code=trust)


def prepare(experiment: Experiment, log: RunLog, clock: Clock, console: Console) -> Prepared:
    """Load, quantize, attach, and check before a single step. Raises CheckFailed."""
    e = experiment.first
    with clock.measure("load model"):
        started = files.folder_of(e.resume_adapter_file) if e.resume_adapter_file else None
        loaded = load(e, started)
        for notice in () if e.quantize else bases.rebuilt(loaded, started):
            console.print(f"[yellow]Note:[/] {escape(notice)}.")
        refuse_other_bases(loaded)
    with clock.measure("check"):
        began = time.perf_counter()
        asked = e.check
        path = Path(asked.prompts) if asked.prompts else None
        probes = read(loaded, path, samples=asked.samples)
        prints = fingerprint(loaded, probes)
        with clock.measure("attach"):
            config, expect, about = attach(loaded, experiment, console)
            if e.lora_parameters.calibrate and not e.resume_adapter_file:
                texts = [ids for ids, _ in probes.texts]
                spline.calibrate(loaded.model, texts, e.lora_parameters.calibrate)
        if cost := spline.overhead(loaded.model):
            console.print(f"Splines: {cost}")
        init = label(e.init.name, e.init.options) if expect == "same" else None
        report = gate.judge(
            loaded,
            probes,
            prints,
            asked.expect or expect,
            init,
            began,
            e.seed,
            limits=asked.limits,
            about=about,
            rebased=is_rebased(config),
        )
    judged(report, log, console, stop=asked.on_fail == "stop")
    if any(loop.method == "es" for loop in experiment.loops):
        with clock.measure("weight analysis"):
            weigh(loaded, log, console)
    rebased = e.init.name in REBASING and not e.resume_adapter_file
    base = log.folder / "base"
    if (loaded.quantized_here or rebased) and distributed.leads() and not base.exists():
        with clock.measure("save base"):
            models.save_base(loaded, base)
    if rebased:
        attaching.forget_base(loaded.model)
        with attaching.switched_off(loaded.model):
            prints = fingerprint(loaded, probes)
    initial = log.folder / "adapters" / "initial"
    with clock.measure("save adapter"):
        files.save(loaded.model, config, initial)
        if expect == "same":
            certificate.write(loaded, report, initial)
    return Prepared(loaded, config, probes, prints, report, e.seed, asked)


def weigh(loaded: Loaded, log: RunLog, console: Console) -> None:
    """weights.json and its picture, and a sentence where outliers stick out."""
    stats = analyse(loaded.model)
    weight_map.write(stats, log.folder)
    remember_sizes(loaded.model, {name: s.rms_robust for name, s in stats.items()})
    if outlying := weight_map.outlying(stats):
        worst = stats[outlying[0]]
        console.print(
            f"[yellow]Note:[/] {len(outlying)} of {len(stats)} matrices have weights far above "
            f"their size, {escape(outlying[0])} up to {worst.peak:.0f} times; perturbations are "
            "relative to the size without them (weights.json)."
        )


def refuse_other_bases(loaded: Loaded) -> None:
    """RunError unless all machines have loaded the same weights at the same quantization."""
    if distributed.size() == 1:
        return
    first, *others = distributed.everybody(bases.identity(loaded))
    for number, other in enumerate(others, start=1):
        alike = bases.same_base(first["sketch"], other["sketch"])
        if not alike or first["quantization"] != other["quantization"]:
            raise RunError(
                f"rank {number} has loaded another model than rank 0",
                "All machines need the same model files and the same experiment file.",
            )


def attach(
    loaded: Loaded, experiment: Experiment, console: Console | None = None
) -> tuple[dict[str, Any], str, dict[str, Any] | None]:
    """Attach what the experiment asks for.

    Returns the adapter's config, what to expect, and what an adapter from disk records of its base.
    """
    e = experiment.first
    evolves = any(loop.method == "es" for loop in experiment.loops)
    dropout = max(loop.dropout for loop in experiment.loops)
    if e.resume_adapter_file is not None:
        config, fresh = warm.attach(loaded, e, dropout)
        if fresh and console:
            console.print(f"[yellow]Note:[/] {warm.of_new(fresh, loaded.model)}.")
        if evolves:
            population.refuse_unfit(loaded.model)
        return config | {"base": bases.identity(loaded)}, "healthy", config.get("base")
    lora = e.lora_parameters
    config = attaching.attach(
        loaded,
        rank=lora.rank,
        scale=lora.effective_scale,
        keys=lora.keys,
        num_layers=e.num_layers,
        init=e.init.name,
        init_options=e.init.options,
        dropout=dropout,
        seed=e.seed,
        dora=e.fine_tune_type == "dora",
        rows=attaching.calibration_rows(e),
        rank_pattern=lora.rank_pattern,
        curve=asked_curve(lora.model_dump()),
    )
    loaded.model.eval()  # new layers drop inputs until they are told not to
    if e.method == "es":
        population.grow(loaded.model, e.es.init_scale)
    if evolves:
        population.refuse_unfit(loaded.model)
    return config | {"base": bases.identity(loaded)}, "same", None


def check_again(prepared: Prepared, log: RunLog, clock: Clock, console: Console) -> gate.Report:
    """Is the trained adapter healthy, against the base? Raises CheckFailed."""
    with clock.measure("check"):
        began = time.perf_counter()
        p = prepared
        report = gate.judge(
            p.loaded, p.probes, p.prints, "healthy", None, began, p.seed, limits=p.asked.limits
        )
    judged(report, log, console, stop=p.asked.on_fail == "stop")
    return report


def judged(report: gate.Report, log: RunLog, console: Console, *, stop: bool = True) -> None:
    """Write and say what the check found. Raises CheckFailed unless the experiment goes on."""
    log.write_json(CHECK, report.to_json())
    console.print(verdict_line(report))
    if "fail" in distributed.everybody(report.verdict) and stop:
        raise CheckFailed(report)


def verdict_line(report: gate.Report) -> str:
    colour = {"pass": "green", "warn": "yellow", "fail": "red"}[report.verdict]
    return f"Check:  [{colour}]{report.verdict}[/]  {escape('; '.join(report.reasons))}"
