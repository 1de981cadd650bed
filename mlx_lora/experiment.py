"""One experiment from config to report: check, measure, train, measure again, explain."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.markup import escape

from mlx_lora import cpu, distributed, models, stages, unsupported
from mlx_lora.adapter import files, warm
from mlx_lora.adapter.attach import remember_start
from mlx_lora.check import probes
from mlx_lora.config import Experiment, Stage, check_names, resolved
from mlx_lora.config import load as load_config
from mlx_lora.conflicts import notices
from mlx_lora.contest import Remembered
from mlx_lora.errors import ConfigError, RunError
from mlx_lora.models import Loaded
from mlx_lora.prepare import CheckFailed, Prepared, prepare
from mlx_lora.problems import readable
from mlx_lora.report import page
from mlx_lora.rl import checkpoints, es, grpo
from mlx_lora.rl.evaluate import examination, sentence
from mlx_lora.rl.prompts import refuse_unfit
from mlx_lora.runlog import STATUS, Clock, RunLog, environment, plot
from mlx_lora.sources import Sources, sources_of
from mlx_lora.spectral.report import LoRAAnalyzer, write
from mlx_lora.stages import Exam
from mlx_lora.tasks import load_task
from mlx_lora.testset import adapter_of, measured_alone
from mlx_lora.tracking import refuse_missing
from mlx_lora.types import Sample, Task

__all__ = ["CheckFailed", "run"]
HELD_OUT = "held_out.json"


def run(
    experiment: Experiment,
    run_dir: Path | None,
    console: Console,
    *,
    clock: Clock | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run it and return the summary that `demo --json` prints. Writes only into the run folder.

    `resume` goes on from the newest checkpoint in `run_dir`, else from the first step, to the same
    bits as an uninterrupted run on the same machine.
    """
    with distributed.own_folder(run_dir) as folder:
        return run_in(experiment, folder, console, clock or Clock(), resume=resume)


def run_in(
    experiment: Experiment, run_dir: Path | None, console: Console, clock: Clock, *, resume: bool
) -> dict[str, Any]:
    with clock.measure("data"):
        experiment = warm.adopted(experiment, console)
        tasks = validated(experiment, console)
    again = resume and distributed.leads()
    with clock.measure("run folder"):
        log = reopened(experiment, run_dir) if again else opened(experiment, run_dir)
        clock.carry(log)
    try:
        if experiment.first.train:
            summary = prepared_and_learned(experiment, tasks, log, clock, console)
        else:
            summary = measured_alone(experiment.first, clock, console)
    except BaseException as error:
        state, detail = stages.ended(log, error)
        log.status(state, detail)
        clock.save()
        if state == "interrupted":
            console.print(f"[yellow]Stopped[/], {detail}: {escape(str(log.folder))}")
            console.print(f"What it came to: mlx-lora report {escape(str(log.folder))}")
        raise
    return closed(summary, log, clock, console)


def prepared_and_learned(
    experiment: Experiment,
    tasks: Sequence[Task | None],
    log: RunLog,
    clock: Clock,
    console: Console,
) -> dict[str, Any]:
    """What the summary of a run that trains says."""
    prepared = prepare(experiment, log, clock, console)
    with clock.measure("data"):
        for e, task in zip(experiment.loops, tasks, strict=True):
            if task:
                refuse_unfit(prepared.loaded, asked(e, task), e.rollout.max_tokens)
        remember_held_out(experiment, tasks, log)
    summary = {"task": task_name(experiment), "check": prepared.report.to_json()}
    return summary | learn(experiment, prepared, tasks, log, clock, console)


def closed(summary: dict[str, Any], log: RunLog, clock: Clock, console: Console) -> dict[str, Any]:
    """The summary, written as the last thing of a run, and the page that explains it."""
    breakdown(clock, log)
    summary |= {"run_dir": str(log.folder), "seconds": clock.report()["total"]}
    log.write_json(stages.SUMMARY, summary)
    log.status("finished")
    if distributed.leads():
        explain(log.folder, console)
    return summary


def explain(folder: Path, console: Console) -> None:
    """Write the page. Whatever goes wrong is told: the run is finished, and stays so."""
    try:
        page.write(page.of(folder), folder / page.FILE)
    except Exception as error:
        why = escape(f"{type(error).__name__}: {error}")
        console.print(f"[yellow]Note:[/] {page.FILE} was not written, {why}")
        console.print(f"Once that is mended: mlx-lora report {escape(str(folder))}")


def validated(experiment: Experiment, console: Console) -> list[Task | None]:
    """The task of each loop, once every name and key of the experiment has been judged."""
    check_names(experiment)
    unsupported.refuse(experiment)
    for e in experiment.loops:
        refuse_missing(e)
    refuse_alone(experiment)
    prompts = experiment.first.check.prompts
    probes.foresee(Path(prompts) if prompts else None)
    if distributed.leads():
        refuse_occupied(experiment.first)
    for e in experiment.loops:
        if e.method == "sft" and not e.rejection_sampling:
            refuse_patience(e, sources_of(e))
    tasks = [load_task(e.task.name, e.task.options) if e.task else None for e in experiment.loops]
    for e, task in zip(experiment.loops, tasks, strict=True):
        if task and e.method == "es":
            es.refuse_shortage(task, e)
    told = dict.fromkeys(task.notice for task in tasks if task and task.notice)
    for notice in (*notices(experiment), *told):
        console.print(f"[yellow]Note:[/] {escape(notice)}.")
    return tasks


def asked(e: Stage, task: Task) -> list[Sample]:
    """The problems that a stage will sample, if any, and those it is measured on."""
    train: Sequence[Sample] = ()
    if e.rejection_sampling:
        train = task.load("train", e.rejection_sampling.problems, e.seed)
    elif e.method == "es":
        train = es.problems(task, e)
    elif e.method == "grpo":
        train = grpo.problems(task, grpo.drawn(e), e.seed)
    return [*train, *task.load("test", e.eval.n, 0)]


def remember_held_out(experiment: Experiment, tasks: Sequence[Task | None], log: RunLog) -> None:
    """Which problems accuracy is measured on, in held_out.json. RunError where they have changed.

    Those that method es looks at while it trains are the first of them.
    """
    pairs = [(e, task) for e, task in zip(experiment.loops, tasks, strict=True) if task]
    if not pairs:
        return
    e, task = pairs[-1]
    some = e.es.test_samples if e.method == "es" and e.eval.every else e.eval.n
    ids = [identity(sample) for sample in task.load("test", max(e.eval.n, some), 0)]
    some = min(some, len(ids))
    found = {"task": task.name, "n": len(ids), "while_training": some, "ids": ids}
    file = log.folder / HELD_OUT
    if file.exists() and models.read_json(file) != found:
        raise RunError(
            f"the held-out problems of {log.folder} were others when the run began",
            f"Its numbers could not be compared: put the data back that {HELD_OUT} names.",
        )
    log.write_json(HELD_OUT, found)


def identity(sample: Sample) -> str:
    """A problem by its place in a file and its prompt.

    >>> identity(Sample("2 + 2?", {}, "4", "rows.jsonl:7"))
    'rows.jsonl:7 b11fec90'
    """
    digest = hashlib.blake2s(readable(sample.prompt).encode(), digest_size=4).hexdigest()
    return f"{sample.place} {digest}".strip()


def refuse_alone(experiment: Experiment) -> None:
    """What only one machine can run."""
    alone = {
        "an experiment with stages": bool(experiment.stages),
        "rejection_sampling": any(e.rejection_sampling for e in experiment.loops),
    }
    if distributed.size() > 1 and (what := [name for name, here in alone.items() if here]):
        raise ConfigError(
            f"{' and '.join(what)} runs on one machine, {distributed.size()} were started",
            "Start it without mlx.launch. A single loop of sft, grpo or es runs on several.",
        )


def refuse_patience(e: Stage, sources: Sources) -> None:
    """Waiting for a better validation where nothing is validated."""
    if not e.eval.patience or e.eval.every or ("valid" in sources and e.val_batches):
        return
    why = "the data has no valid.jsonl" if e.val_batches else "val_batches is 0"
    raise ConfigError(
        f"eval.patience counts validations, and {why}",
        "Let it validate, or leave eval.patience out.",
    )


def refuse_occupied(e: Stage) -> None:
    """The second place for the adapter, and the adapter to start from, judged before any work."""
    if not e.train:
        if adapter := adapter_of(e):
            files.read(adapter)
        return
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


def task_name(experiment: Experiment) -> str | None:
    """Of the task that accuracy is measured on: the last one named."""
    return next((e.task.name for e in reversed(experiment.loops) if e.task), None)


def opened(experiment: Experiment, run_dir: Path | None) -> RunLog:
    """A fresh run folder that says what it is about."""
    methods = "_".join(e.method for e in experiment.loops)
    about = task_name(experiment) or experiment.first.model
    log = RunLog.create(run_dir, name=f"{methods}_{about}")
    log.write_yaml("config.yaml", resolved(experiment))
    log.write_json("environment.json", environment(blas=cpu.mode()))
    return log


def reopened(experiment: Experiment, run_dir: Path | None) -> RunLog:
    """The folder of a stopped run, cut back to its newest checkpoint, if this is its experiment."""
    if run_dir is None:
        raise ConfigError("--resume needs --run-dir, the folder of the run to go on with")
    if not (run_dir / "config.yaml").is_file():
        raise RunError(
            f"there is no run in {run_dir} to resume: it has no config.yaml",
            "Name its folder with --run-dir, or start a new run without --resume.",
        )
    if (run_dir / STATUS).is_file() and models.read_json(run_dir / STATUS)["state"] == "finished":
        raise RunError(f"the run in {run_dir} is finished: there is nothing to resume")
    before = resolved(load_config(run_dir / "config.yaml"))
    changed = sorted(k for k, v in resolved(experiment).items() if v != before.get(k))
    if changed:
        raise ConfigError(
            f"{run_dir} was started with another {', '.join(changed)}",
            "Resume with the file it was started with, or start a new run.",
        )
    if experiment.stages:
        log = RunLog(run_dir)
        log.status("running")
        return log
    return RunLog.resume(run_dir, step=checkpoints.steps_done(run_dir / "checkpoints") - 1)


def learn(
    experiment: Experiment,
    prepared: Prepared,
    tasks: Sequence[Task | None],
    log: RunLog,
    clock: Clock,
    console: Console,
) -> dict[str, Any]:
    """Accuracy before, every stage, accuracy after, spectra."""
    model = prepared.loaded.model
    measure = evaluation(prepared.loaded, experiment, tasks)

    def look(when: str, *, keep: bool = True) -> dict[str, Any]:
        return measured(when, measure, log, clock, console, keep=keep)

    before = look("before")
    if experiment.stages:
        results, after = stages.in_turn(
            experiment, prepared, tasks, look, before, log, clock, console
        )
        more: dict[str, Any] = {"stages": results}
    else:
        (e,) = experiment.loops
        if e.is_rl and e.resume_adapter_file:
            remember_start(model)
        more = stages.train(
            e, prepared, tasks[0], log, clock, console, stages.copies(e, log), measure
        )
        results = [more]
        after = look("after", keep=False)
        stages.picture(log.folder, before, after, clock)
        more = {k: v for k, v in more.items() if k not in ("steps", "alerts")}
    with clock.measure("spectrum"):
        analyzer = LoRAAnalyzer(model, model, run=log.folder)
        asked = experiment.last.monitor
        report = analyzer.analyze(alerts=asked.alerts, dynamics=asked.dynamics)
        write(report, log.folder)
    found = Counter(alert.name for alert in report.alerts)
    return {
        **named(before, "before"),
        **named(after, "after"),
        "alerts": sorted({alert for result in results for alert in result["alerts"]}),
        "adapter_alerts": dict(found.most_common()),
        **more,
    }


def evaluation(loaded: Loaded, experiment: Experiment, tasks: Sequence[Task | None]) -> Exam | None:
    """What measures accuracy on the last task named; None where there is no task."""
    pairs = [(e, task) for e, task in zip(experiment.loops, tasks, strict=True) if task]
    if not pairs:
        return None
    e, task = pairs[-1]
    return Remembered(examination(loaded, task, e), loaded.model)


def measured(
    when: str,
    measure: Exam | None,
    log: RunLog,
    clock: Clock,
    console: Console,
    *,
    keep: bool = True,
) -> dict[str, Any]:
    """An evaluation, made now unless a stopped run left its file behind. Empty without a task."""
    if measure is None:
        return {}
    file = log.folder / f"eval_{when}.json"
    found = distributed.agreed(models.read_json(file) if file.exists() else None)
    if found is None:
        with clock.measure("evaluate"):
            found = measure()
        if keep:
            log.write_json(file.name, found)
    console.print(f"{when.capitalize().replace('_', ' ', 1)}: {sentence(found)}")
    return found


def named(result: Mapping[str, Any], when: str) -> dict[str, Any]:
    if not result:
        return {}
    return {k.replace("accuracy", f"accuracy_{when}", 1): result[k] for k in stages.ACCURACY} | {
        f"reward_mean_{when}": result["reward_mean"],
        f"kl_to_base_{when}": result.get("kl_to_base"),
        f"reasons_{when}": result["reasons"],
    }


def breakdown(clock: Clock, log: RunLog) -> None:
    """Where the time went, as JSON and a picture (whose own drawing is the last row)."""
    mx.synchronize()
    with clock.measure("plot"):
        plot(clock.report(), log.folder / "time_breakdown.png")
    clock.save()
