"""One experiment from config to report: check, measure, train, measure again, explain."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from rich.console import Console
from rich.markup import escape

from mlx_lora import cpu, models
from mlx_lora.adapter import attach as attaching
from mlx_lora.adapter import files
from mlx_lora.adapter.inits import label
from mlx_lora.check import gate
from mlx_lora.check.gate import fingerprint
from mlx_lora.check.probes import read
from mlx_lora.config import Experiment, check_names, resolved
from mlx_lora.config import load as load_config
from mlx_lora.conflicts import notices
from mlx_lora.errors import ConfigError, RunError
from mlx_lora.models import Loaded
from mlx_lora.progress import Watcher, watch
from mlx_lora.rl import checkpoints, grpo, monitor
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


def run(
    experiment: Experiment,
    run_dir: Path | None,
    console: Console,
    *,
    clock: Clock | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run it and return the summary that `demo --json` prints. Writes only into the run folder.

    `resume` goes on from the newest checkpoint in `run_dir`, to the same bits as an uninterrupted
    run on the same machine.
    """
    clock = clock or Clock()
    task = validated(experiment, console)
    log = reopened(experiment, run_dir) if resume else opened(experiment, run_dir)
    try:
        loaded, config, report = prepare(experiment, log, clock, console)
        summary = {"task": experiment.task.name, "check": report.to_json()}  # type: ignore[union-attr]
        summary |= learn(experiment, loaded, config, task, log, clock, console, resume=resume)
    except KeyboardInterrupt:
        saved = (log.folder / "adapters" / files.CONFIG).exists()
        kept = "adapters/ holds the last step" if saved else "before the first step"
        log.status("interrupted", f"stopped by Ctrl-C, {kept}")
        console.print(f"[yellow]Stopped[/], {kept}: {escape(str(log.folder))}")
        raise
    except BaseException as error:
        log.status("failed", f"{type(error).__name__}: {error}")
        raise
    breakdown(clock, log)
    summary |= {"run_dir": str(log.folder), "seconds": clock.report()["total"]}
    log.write_json("summary.json", summary)
    log.status("finished")
    return summary


def validated(e: Experiment, console: Console) -> Task:
    """The task, once every name and key of the experiment has been judged."""
    check_names(e)
    refuse_unused(e)
    assert e.task is not None, "the config requires a task for RL"
    refuse_occupied(e)
    for notice in notices(e):
        console.print(f"[yellow]Note:[/] {escape(notice)}.")
    return load_task(e.task.name, e.task.options)


def refuse_occupied(e: Experiment) -> None:
    """The second place for the adapter, and the adapter to start from, judged before any work."""
    if e.adapter_path and (Path(e.adapter_path) / files.CONFIG).exists():
        raise RunError(
            f"adapter_path {e.adapter_path} holds an adapter already",
            "Nothing was overwritten. Choose another folder, or move that one away.",
        )
    if e.adapter_path:
        try:
            Path(e.adapter_path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"adapter_path {e.adapter_path} cannot be made: {error}") from error
    if e.resume_adapter_file:
        files.read(files.folder_of(e.resume_adapter_file))


def opened(e: Experiment, run_dir: Path | None) -> RunLog:
    """A fresh run folder that says what it is about."""
    log = RunLog.create(run_dir, name=f"{e.method}_{e.task.name if e.task else e.model}")
    log.write_yaml("config.yaml", resolved(e))
    log.write_json("environment.json", environment(blas=cpu.mode()))
    return log


def reopened(e: Experiment, run_dir: Path | None) -> RunLog:
    """The folder of a stopped run, cut back to its newest checkpoint, if this is its experiment."""
    if run_dir is None:
        raise ConfigError("--resume needs --run-dir, the folder of the run to go on with")
    before = resolved(load_config(run_dir / "config.yaml"))
    changed = sorted(k for k, v in resolved(e).items() if v != before.get(k))
    if changed:
        raise ConfigError(
            f"{run_dir} was started with another {', '.join(changed)}",
            "Resume with the file it was started with, or start a new run.",
        )
    step = int(checkpoints.latest(run_dir / "checkpoints").name) - 1
    return RunLog.resume(run_dir, step=step)


# Keys that an experiment may hold and that GRPO does not act on yet: naming one is an error, so
# that no run looks as if it had obeyed.
UNUSED = (
    "grad_accumulation_steps", "grad_checkpoint", "report_to", "clear_cache_threshold",
    "train", "test", "trust_remote_code", "stages", "epochs", "fine_tune_type",
    "eval.every", "check.expect", "check.prompts",
    "check.enabled", "check.samples", "grpo.epochs", "lora_parameters.type",
    "lora_parameters.rank_pattern",
)  # fmt: skip


def refuse_unused(e: Experiment) -> None:
    """ConfigError that lists every key with a value that this version would silently ignore."""
    if e.method != "grpo":
        raise ConfigError(f"method {e.method} is not available yet", "Use `method: grpo`.")
    plain, default = resolved(e), resolved(Experiment(method="grpo", task={"name": "countdown"}))  # type: ignore[arg-type]

    def value(tree: Any, key: str) -> Any:
        for part in key.split("."):
            tree = tree.get(part) if isinstance(tree, dict) else None
        return tree

    ignored = [k for k in UNUSED if value(plain, k) != value(default, k)]
    if ignored:
        raise ConfigError(
            f"method grpo does not act on {', '.join(ignored)} yet",
            "Remove them, so that the run is what its file says.",
        )


def prepare(
    e: Experiment, log: RunLog, clock: Clock, console: Console
) -> tuple[Loaded, dict[str, Any], gate.Report]:
    """Load, quantize, attach, and check before a single step. Raises CheckFailed."""
    with clock.measure("load model"):
        quantize = e.quantize.model_dump() if e.quantize else None
        loaded = models.load(e.model, quantize=quantize)
    if loaded.quantized_here and not (log.folder / "base").exists():
        with clock.measure("save base"):
            models.save_base(loaded, log.folder / "base")
    with clock.measure("check"):
        began = time.perf_counter()
        probes = read(loaded)
        prints = fingerprint(loaded, probes)
        config, expect = attach(loaded, e)
        init = label(e.init.name, e.init.options) if expect == "same" else None
        report = gate.judge(loaded, probes, prints, expect, init, began, e.seed)
    log.write_json("check.json", report.to_json())
    console.print(verdict_line(report))
    if report.verdict == "fail":
        raise CheckFailed(report)
    files.save(loaded.model, config, log.folder / "adapters" / "initial")
    return loaded, config, report


def attach(loaded: Loaded, e: Experiment) -> tuple[dict[str, Any], str]:
    """Attach what the experiment asks for. Returns the adapter's config, and what to expect."""
    if e.resume_adapter_file is not None:
        folder = files.folder_of(e.resume_adapter_file)
        return files.load(loaded.model, folder) | {"base": models.identity(loaded)}, "healthy"
    lora = e.lora_parameters
    config = attaching.attach(
        loaded,
        rank=lora.rank,
        scale=lora.effective_scale,
        keys=lora.keys,
        num_layers=e.num_layers,
        init=e.init.name,
        init_options=e.init.options,
        seed=e.seed,
        dora=e.fine_tune_type == "dora",
        rows=attaching.calibration_rows(e),
    )
    return config | {"base": models.identity(loaded)}, "same"


def learn(
    e: Experiment,
    loaded: Loaded,
    config: Mapping[str, Any],
    task: Task,
    log: RunLog,
    clock: Clock,
    console: Console,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Accuracy before, training, accuracy after, spectra. The adapter is saved whatever happens."""
    measure = partial(evaluate, loaded, task, n=e.eval.n, max_tokens=e.rollout.max_tokens)
    before_file = log.folder / "eval_before.json"
    if not before_file.exists():
        with clock.measure("evaluate"):
            log.write_json(before_file.name, measure())
    before = models.read_json(before_file)
    console.print(f"Before: {accuracy_line(before)}")
    optimizer = optimizer_of(e)
    recorder = Recorder(e, log, clock)
    start = 0
    if resume:
        folder = checkpoints.latest(log.folder / "checkpoints")
        start = checkpoints.load(folder, loaded.model, optimizer)
        recorder.remember()
    keep = partial(checkpoints.save, log.folder / "checkpoints")
    try:
        with watch(console, escape(f"{e.method} on {e.model}"), e.iters) as watcher:
            recorder.watcher = watcher
            for step in grpo.train(loaded, task, e, optimizer, clock, recorder, start=start):
                if (step + 1) % e.save_every == 0:
                    with clock.measure("checkpoint", kind="step"):
                        keep(step + 1, loaded.model, optimizer, config)
    finally:
        folders = [log.folder / "adapters", *([Path(e.adapter_path)] if e.adapter_path else [])]
        for folder in folders:
            files.save(loaded.model, config, folder)
    with clock.measure("evaluate"):
        after = measure()
    console.print(f"After:  {accuracy_line(after)}")
    with clock.measure("spectrum"):
        report = LoRAAnalyzer(loaded.model, loaded.model).analyze()
        write(report, log.folder)
    found = Counter(alert.name for alert in report.alerts)
    return {
        **named(before, "before"),
        **named(after, "after"),
        "alerts": sorted(recorder.seen),
        "adapter_alerts": dict(found.most_common()),
    }


def optimizer_of(e: Experiment) -> optim.Optimizer:
    settings = dict(e.optimizer_config.get(e.optimizer, {}))
    return getattr(optim, OPTIMIZERS[e.optimizer])(learning_rate=e.learning_rate, **settings)


OPTIMIZERS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "sgd": "SGD",
    "adafactor": "Adafactor",
}


class Recorder:
    """Receives each step: metrics.jsonl, samples.jsonl, alerts.jsonl, and the live line."""

    def __init__(self, e: Experiment, log: RunLog, clock: Clock) -> None:
        self.e, self.log, self.clock = e, log, clock
        self.watcher: Watcher | None = None
        self.history: list[dict[str, float]] = []
        self.seen: set[str] = set()
        self.last = time.perf_counter()

    def remember(self) -> None:
        """Take up the history of a resumed run, so that alerts see what they would have seen."""
        for name, keep in (("metrics.jsonl", self.history.append), ("alerts.jsonl", self.saw)):
            path = self.log.folder / name
            for line in path.read_text().splitlines() if path.exists() else ():
                keep({k: v for k, v in json.loads(line).items() if v is not None})

    def saw(self, finding: Mapping[str, Any]) -> None:
        self.seen.add(finding["name"])

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
    return f"Check:  [{colour}]{report.verdict}[/]  {escape('; '.join(report.reasons))}"


def breakdown(clock: Clock, log: RunLog) -> None:
    """Where the time went, as JSON and a picture (whose own drawing is the last row)."""
    mx.synchronize()
    with clock.measure("plot"):
        plot(clock.report(), log.folder / "time_breakdown.png")
    log.write_json("time_breakdown.json", clock.report())
