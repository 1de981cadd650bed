"""One experiment from config to report: check, measure, train, measure again, explain."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from rich.console import Console

from mlx_lora import cpu, models
from mlx_lora.adapter import attach as attaching
from mlx_lora.adapter import files
from mlx_lora.check import gate
from mlx_lora.check.metrics import fingerprint
from mlx_lora.check.probes import Probes, read
from mlx_lora.config import Experiment, check_names, resolved
from mlx_lora.errors import ConfigError
from mlx_lora.models import Loaded
from mlx_lora.progress import Watcher, watch
from mlx_lora.rl import grpo, monitor
from mlx_lora.rl.evaluate import evaluate
from mlx_lora.runlog import Clock, RunLog, environment, plot
from mlx_lora.spectral.report import LoRAAnalyzer, write
from mlx_lora.tasks import load_task
from mlx_lora.types import Group, Task

SAMPLES_KEPT = 4  # completions written to samples.jsonl every `monitor.every` steps


class CheckFailed(Exception):
    """The corruption check failed, so no RL step was paid for. Carries the report."""

    def __init__(self, report: gate.Report) -> None:
        super().__init__("; ".join(report.reasons))
        self.report = report


def run(experiment: Experiment, run_dir: Path | None, console: Console) -> dict[str, Any]:
    """Run it and return the summary that `demo --json` prints. Writes only into the run folder."""
    begin, clock = time.perf_counter(), Clock()
    check_names(experiment)
    if experiment.method != "grpo":
        raise ConfigError(f"method {experiment.method} is not available yet", "Use `method: grpo`.")
    assert experiment.task is not None, "config requires a task for grpo"
    task = load_task(experiment.task.name, experiment.task.options)
    log = RunLog.create(run_dir, name=f"{experiment.method}_{experiment.task.name}")
    log.write_yaml("config.yaml", resolved(experiment))
    log.write_json("environment.json", environment(blas=cpu.mode()))
    log.status("running")
    try:
        loaded, config, report = prepare(experiment, log, clock, console)
        summary = {"task": experiment.task.name, "check": report.to_json()}
        summary |= learn(experiment, loaded, config, task, log, clock, console)
    except KeyboardInterrupt:
        log.status("interrupted", "stopped by Ctrl-C; adapters/ holds the last step")
        console.print(f"[yellow]Stopped.[/] The adapter so far is in {log.folder / 'adapters'}")
        raise
    except BaseException as error:
        log.status("failed", f"{type(error).__name__}: {error}")
        raise
    with clock.measure("report"):
        breakdown(clock, log)
    summary |= {"run_dir": str(log.folder), "seconds": round(time.perf_counter() - begin, 2)}
    log.write_json("summary.json", summary)
    log.status("finished")
    return summary


def prepare(
    e: Experiment, log: RunLog, clock: Clock, console: Console
) -> tuple[Loaded, dict[str, Any], gate.Report]:
    """Load, quantize, attach, and check before a single step. Raises CheckFailed."""
    with clock.measure("load model"):
        quantize = e.quantize.model_dump() if e.quantize else None
        loaded = models.load(e.model, quantize=quantize)
    if loaded.quantized_here:
        with clock.measure("save base"):
            models.save_base(loaded, log.folder / "base")
    with clock.measure("check"):
        began = time.perf_counter()
        probes = read(loaded)
        prints = fingerprint(loaded, probes)
        config = attach(loaded, e)
        report = gate.judge(loaded, probes, prints, "same", e.init.name, began, e.seed)
    log.write_json("check.json", report.to_json())
    console.print(verdict_line(report))
    if report.verdict == "fail":
        raise CheckFailed(report)
    files.save(loaded.model, config, log.folder / "adapters" / "initial")
    return loaded, config, report


def attach(loaded: Loaded, e: Experiment) -> dict[str, Any]:
    """Attach what the experiment asks for, RL's rule of no dropout included."""
    lora = e.lora_parameters
    config = attaching.attach(
        loaded.model,
        rank=lora.rank,
        scale=lora.effective_scale,
        keys=lora.keys,
        num_layers=e.num_layers,
        init=e.init.name,
        init_options=e.init.options,
        seed=e.seed,
    )
    return config | {"base": models.identity(loaded)}


def learn(
    e: Experiment,
    loaded: Loaded,
    config: Mapping[str, Any],
    task: Task,
    log: RunLog,
    clock: Clock,
    console: Console,
) -> dict[str, Any]:
    """Accuracy before, training, accuracy after, spectra. The adapter is saved whatever happens."""
    measure = partial(evaluate, loaded, task, n=e.eval.n, max_tokens=e.rollout.max_tokens)
    with clock.measure("evaluate"):
        before = measure()
    console.print(f"Before: {accuracy_line(before)}")
    optimizer = getattr(optim, OPTIMIZERS[e.optimizer])(learning_rate=e.learning_rate)
    recorder = Recorder(e, log, clock)
    try:
        with watch(console, f"{e.method} on {e.model}", e.iters) as watcher:
            recorder.watcher = watcher
            grpo.train(loaded, task, e, optimizer, clock, recorder)
    finally:
        files.save(loaded.model, config, log.folder / "adapters")
    with clock.measure("evaluate"):
        after = measure()
    console.print(f"After:  {accuracy_line(after)}")
    with clock.measure("spectrum"):
        report = LoRAAnalyzer(loaded.model, loaded.model).analyze()
        write(report, log.folder)
    return named(before, "before") | named(after, "after") | {"alerts": sorted(recorder.seen)}


OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "adafactor": "Adafactor"}


class Recorder:
    """Receives each step: metrics.jsonl, samples.jsonl, alerts.jsonl, and the live line."""

    def __init__(self, e: Experiment, log: RunLog, clock: Clock) -> None:
        self.e, self.log, self.clock = e, log, clock
        self.watcher: Watcher | None = None
        self.history: list[dict[str, float]] = []
        self.seen: set[str] = set()
        self.last = time.perf_counter()

    def __call__(self, step: int, metrics: dict[str, float], groups: Sequence[Group]) -> None:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        metrics |= {"seconds": seconds, "tokens_per_second": metrics["tokens_sampled"] / seconds}
        self.history.append(metrics)
        with self.clock.measure("log", kind="step"):
            self.log.metric(step, metrics)
            if step % self.e.monitor.every == 0:
                for record in shown(step, groups):
                    self.log.append("samples.jsonl", record)
            for finding in monitor.fresh(self.history, self.seen):
                self.log.append("alerts.jsonl", {"step": step, **asdict(finding)})
                if self.watcher:
                    self.watcher.console.print(
                        f"[yellow]step {step}: {finding.message}.[/] {finding.action}"
                    )
        if self.watcher:
            self.watcher.update(step, metrics)


def shown(step: int, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One completion each of the first groups, with what it earned."""
    return [
        {
            "step": step,
            "prompt": g.sample.prompt,
            "completion": g.rollouts[0].text,
            "reward": g.rewards[0].value,
            "reason": g.rewards[0].reason,
        }
        for g in groups[:SAMPLES_KEPT]
    ]


def named(result: Mapping[str, Any], when: str) -> dict[str, Any]:
    keys = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_sampled")
    return {k.replace("accuracy", f"accuracy_{when}", 1): result[k] for k in keys} | {
        f"reasons_{when}": result["reasons"]
    }


def accuracy_line(result: Mapping[str, Any]) -> str:
    return (
        f"accuracy {result['accuracy']:.1%} of {result['n']} held-out problems "
        f"({result['accuracy_low']:.1%} to {result['accuracy_high']:.1%}), "
        f"sampled {result['accuracy_sampled']:.1%}"
    )


def verdict_line(report: gate.Report) -> str:
    colour = {"pass": "green", "warn": "yellow", "fail": "red"}[report.verdict]
    return f"Check:  [{colour}]{report.verdict}[/]  {'; '.join(report.reasons)}"


def breakdown(clock: Clock, log: RunLog) -> None:
    """Where the time went, as JSON and a picture."""
    mx.synchronize()
    report = clock.report()
    log.write_json("time_breakdown.json", report)
    plot(report, log.folder / "time_breakdown.png")
