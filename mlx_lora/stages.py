"""Stages: each from the adapter as it stands to the adapter it leaves behind, with checkpoints."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from rich.console import Console
from rich.markup import escape

from mlx_lora import curves, distributed, models, sft
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import remember_start
from mlx_lora.adapter.schedules import scale_of, set_scale
from mlx_lora.config import resolved
from mlx_lora.contest import BEST, Contest
from mlx_lora.data import Text
from mlx_lora.guard import Guard, Unhealthy, plain_texts
from mlx_lora.lessons import lasting, lessons
from mlx_lora.models import Loaded
from mlx_lora.optimizers import optimizer_of
from mlx_lora.prepare import CHECK, Prepared, check_again
from mlx_lora.progress import watch
from mlx_lora.recorder import Recorder
from mlx_lora.report.answers import Share, gained
from mlx_lora.rl import checkpoints, es, grpo
from mlx_lora.rl.checkpoints import Snapshot
from mlx_lora.rl.evaluate import examination
from mlx_lora.rl.forgetting import looking
from mlx_lora.runlog import STATUS, Clock, RunLog, State
from mlx_lora.schema import Experiment, Stage
from mlx_lora.tracking import tracked
from mlx_lora.types import Task

CHECKPOINTS = "checkpoints"
ADAPTERS, SUMMARY = "adapters", "summary.json"
Exam = Callable[[], dict[str, Any]]
ACCURACY = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_sampled")


def in_turn(
    experiment: Experiment,
    prepared: Prepared,
    tasks: Sequence[Task | None],
    look: Callable[[str], dict[str, Any]],
    before: dict[str, Any],
    log: RunLog,
    clock: Clock,
    console: Console,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every stage in a folder of its own, each from the adapter of the one before.

    `look` evaluates under a name, as was done `before`. Returns what the summary says of each, and
    the last evaluation.
    """
    results: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    accuracy = before
    for index, (e, task) in enumerate(zip(experiment.loops, tasks, strict=True)):
        name = f"{index + 1}_{e.method}"
        place = stage_log(log.folder / "stages" / name)
        console.print(f"[bold]Stage {index + 1} of {len(tasks)}[/]: {e.method}")
        if place is None:
            folder = log.folder / "stages" / name
            checkpoints.restore(folder / ADAPTERS, prepared.loaded.model)
            found = models.read_json(folder / SUMMARY)
        else:
            trained = index > 0 or e.resume_adapter_file is not None
            folders = [place.folder / ADAPTERS, *copies(e, log)]
            found = run(e, prepared, task, place, clock, console, folders, trained=trained)
        earlier, accuracy = accuracy, look(f"after_{name}")
        picture(log.folder / "stages" / name, earlier, accuracy, clock)
        about = {k: accuracy[k] for k in ACCURACY if k in accuracy}
        results.append({"name": name, "method": e.method, **found, **about})
    return results, accuracy


def stage_log(folder: Path) -> RunLog | None:
    """A stage's log, cut back to its newest checkpoint. None where the stage is finished."""
    if not (folder / STATUS).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        log = RunLog(folder)
        log.status("running")
        return log
    if models.read_json(folder / STATUS)["state"] == "finished":
        return None
    return RunLog.resume(folder, step=checkpoints.steps_done(folder / CHECKPOINTS) - 1)


def run(
    e: Stage,
    prepared: Prepared,
    task: Task | None,
    log: RunLog,
    clock: Clock,
    console: Console,
    folders: Sequence[Path],
    *,
    trained: bool,
) -> dict[str, Any]:
    """One of several stages; RL on a trained adapter begins with a check. Raises CheckFailed."""
    checked = {}
    try:
        if e.is_rl and trained:
            checked = {"check": health(prepared, log, clock, console)}
            remember_start(prepared.loaded.model)
        found = checked | train(e, prepared, task, log, clock, console, folders)
    except BaseException as error:
        log.status(*ended(log, error))
        raise
    log.write_json(SUMMARY, found)
    log.status("finished")
    return found


def health(prepared: Prepared, log: RunLog, clock: Clock, console: Console) -> str:
    """The verdict on the adapter that RL begins with, unless a stopped run left it behind."""
    found = models.read_json(log.folder / CHECK) if (log.folder / CHECK).exists() else {}
    if found.get("verdict") in ("pass", "warn"):
        return found["verdict"]
    return check_again(prepared, log, clock, console).verdict


def copies(e: Stage, log: RunLog) -> list[Path]:
    """Where the adapter of the whole run goes."""
    beside = [Path(e.adapter_path)] if e.adapter_path and distributed.leads() else []
    return [log.folder / ADAPTERS, *beside]


def ended(log: RunLog, error: BaseException) -> tuple[State, str]:
    """What the status file says of a run that did not finish."""
    if not isinstance(error, KeyboardInterrupt):
        return "failed", f"{type(error).__name__}: {error}"
    saved = (log.folder / ADAPTERS / files.CONFIG).exists()
    kept = "adapters/ holds the last step" if saved else "before the first step"
    return "interrupted", f"stopped by Ctrl-C, {kept}"


def train(
    e: Stage,
    prepared: Prepared,
    task: Task | None,
    log: RunLog,
    clock: Clock,
    console: Console,
    folders: Sequence[Path],
    measure: Exam | None = None,
) -> dict[str, Any]:
    """Train from the newest checkpoint in the log's folder, else from the adapter as it is.

    The adapter is saved in `folders` whatever happens. Returns what the summary says of the stage.
    `measure` is the evaluation of the run, where it is the stage's too.
    """
    loaded, model = prepared.loaded, prepared.loaded.model
    optimizer, recorder = optimizer_of(e), Recorder(e, log, clock)
    found: dict[str, Any] = {}
    made: dict[str, list[Text]] = {}
    options: dict[str, Any] = {"report_norms": recorder.gradients}
    loop: Callable[..., Iterator[int]]
    if e.method == "sft":
        with clock.measure("data"):
            made, found = lessons(e, prepared, task, log, clock, console)
        e = recorder.e = lasting(e, made["train"])
        loop, inputs = sft.train, made["train"]
        options["valid"] = made.get("valid", ())
    elif e.method == "grpo":
        loop, inputs = grpo.train, task
    else:
        assert task is not None, "the config requires a task for RL"
        look = looking(loaded, task, e, plain_texts(prepared.probes), clock)
        loop, inputs, options = es.train, task, {"anchor": es.factors(model), "look": look}
    start, memory = 0, {}
    if saved := checkpoints.every(log.folder / CHECKPOINTS):
        start = checkpoints.load(saved[-1], model, optimizer)
        memory = checkpoints.recall(saved[-1])
        recorder.remember()
    start, memory = together(start, e, model, optimizer, recorder), distributed.agreed(memory)
    contest = Contest(
        e,
        exam(e, prepared, task, measure),
        lambda: files.save(model, prepared.config, log.folder / ADAPTERS / BEST),
        log,
        clock,
    )
    try:
        title = escape(f"{e.method} on {e.model}")
        with (
            watch(console, title, e.iters, e.steps_per_report) as watcher,
            tracked(e, log.folder, resolved(e), console.print) as recorder.track,
        ):
            recorder.watcher = watcher
            options |= {"start": start, "history": recorder.history}
            steps = loop(loaded, inputs, e, optimizer, clock, recorder, **options)
            with clock.measure("guard"):
                guard = Guard(e, prepared, recorder)
            guard.recall(memory)
            done = follow(steps, start, e, prepared, optimizer, guard, contest, log)
    finally:
        with clock.measure("save adapter"):
            for folder in folders:
                files.save(model, prepared.config, folder)
    distributed.refuse_difference("the trained adapter", model.trainable_parameters())
    for name in ("valid_loss_before", "valid_loss"):
        measured = [h[name] for h in recorder.history if name in h]
        found |= {name: measured[-1]} if measured else {}
    if e.test:
        with clock.measure("test"):
            found |= tested(loaded, made["test"], e)
    if done < e.iters:
        console.print(f"Stopped after {done} steps: no better one in {e.eval.patience} evaluations")
    return {"steps": done, "alerts": sorted(recorder.seen), **found, **contest.summary()}


def picture(
    folder: Path, before: Mapping[str, Any], after: Mapping[str, Any], clock: Clock
) -> None:
    """`training.png` of the loop in a folder, with the evaluations around it on top."""
    first, last = Share.of(before), Share.of(after)
    found = gained(first, last) if first and last else None
    with clock.measure("plot"):
        held_out = f"{found.sentence}. {found.detail}" if found else ""
        curves.draw(curves.history_in(folder), folder / curves.FILE, held_out)


def tested(loaded: Loaded, texts: Sequence[Text], e: Stage) -> dict[str, Any]:
    """What the summary says of the test set."""
    loss, tokens = sft.mean_over(loaded.model, texts, e, e.test_batches)
    return {"test_loss": loss, "test_perplexity": math.exp(min(loss, 700)), "test_tokens": tokens}


def together(
    start: int, e: Stage, model: nn.Module, optimizer: optim.Optimizer, recorder: Recorder
) -> int:
    """Several machines at one point: what rank 0 resumed goes to all. Returns the steps done."""
    start = distributed.agreed(start)
    if start and distributed.size() > 1:
        if e.method == "sft":
            sft.begin(model, optimizer, e)
        optimizer.init(model.trainable_parameters())
        model.update(distributed.from_first(model.trainable_parameters()))
        optimizer.state = distributed.from_first(optimizer.state)
        set_scale(model, distributed.agreed(scale_of(model)))
        recorder.history[:] = distributed.agreed(recorder.history)
    distributed.refuse_difference("the adapter", model.trainable_parameters())
    return start


def exam(e: Stage, prepared: Prepared, task: Task | None, measure: Exam | None) -> Exam | None:
    """What measures the model while it trains; None where it is not asked for."""
    if task is None or not e.eval.every:
        return None
    some = e.es.test_samples if e.method == "es" else e.eval.n
    if measure and some == e.eval.n:
        return measure
    if e.method == "es":
        e = e.model_copy(update={"eval": e.eval.model_copy(update={"n": some})})
    return examination(prepared.loaded, task, e)


def follow(
    steps: Iterator[int],
    start: int,
    e: Stage,
    prepared: Prepared,
    optimizer: optim.Optimizer,
    guard: Guard,
    contest: Contest,
    log: RunLog,
) -> int:
    """Run the steps under guard, until patience is over. Returns how many are done.

    A run that was killed behind the checkpoint it stopped at is over before its next step. What
    stops the steps leaves the last whole one behind, Ctrl-C a checkpoint too. A checkpoint comes
    last in its step, so that whatever a resumed run finds on disk was there before.
    """
    if contest.over():
        return start
    model, folder, recorder = prepared.loaded.model, log.folder / CHECKPOINTS, guard.recorder

    def keep() -> None:
        about = guard.memory()
        checkpoints.save(folder, last.steps_done, model, optimizer, prepared.config, about)

    last = Snapshot.take(start, model, optimizer)
    guard.start(last)
    try:
        for step in steps:
            last = guard.after(step + 1, model, optimizer)
            recorder.spectra(step, model, optimizer)
            over = contest.after(last.steps_done, recorder.history[-1])
            if last.steps_done % e.save_every == 0:
                with recorder.clock.measure("checkpoint", kind="step"):
                    keep()
                recorder.clock.save()
            if over:
                break
            let_go(e)
    except Unhealthy:
        raise  # the guard has put the last healthy step back
    except BaseException as error:
        last.put_back(model, optimizer)
        behind = checkpoints.steps_done(folder) < last.steps_done
        if isinstance(error, KeyboardInterrupt) and behind:
            keep()
        raise
    return last.steps_done


def let_go(e: Stage) -> None:
    """Clear MLX's cache of free memory where it is above the threshold: at 0 always, as mlx-lm.

    RL decodes with buffers that come again, and keeps them unless told otherwise.
    """
    threshold = e.clear_cache_threshold
    if (threshold or not e.is_rl) and mx.get_cache_memory() > threshold:
        mx.clear_cache()
