"""`train --dry-run`: everything validated, a step of each stage tried, and what a run will cost."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from rich.console import Console

from mlx_lora import models, sft
from mlx_lora.adapter import warm
from mlx_lora.adapter.attach import blocks, remember_start
from mlx_lora.batches import best_fit
from mlx_lora.config import Experiment, Stage
from mlx_lora.data import training_texts
from mlx_lora.errors import ModelError
from mlx_lora.experiment import task_name, validated
from mlx_lora.footprint import watched
from mlx_lora.lessons import lasting, lessons_of, refuse_few
from mlx_lora.memory import rollouts_of, told
from mlx_lora.models import Loaded, encode_prompt
from mlx_lora.optimizers import optimizer_of
from mlx_lora.prepare import attach, load
from mlx_lora.recompute import recomputing
from mlx_lora.rl import es
from mlx_lora.rl.grpo import problems
from mlx_lora.rl.learner import gradients, trainable_count
from mlx_lora.rl.logprobs import pack
from mlx_lora.rl.rollout import rollout
from mlx_lora.rl.update import rule_of
from mlx_lora.runlog import Clock
from mlx_lora.sources import sources_of
from mlx_lora.types import Group, Sample, Task

ROLLING = ("rollout", "noise", "prefill", "decode", "reward")  # rows of the clock
Result = TypeVar("Result")


def plan(experiment: Experiment, console: Console) -> dict[str, Any]:
    """Counts and memory from the config, time from one step tried. Writes nothing.

    Where the weights are not there, config.json is enough for the counts and the memory.
    """
    experiment = warm.adopted(experiment, console)
    tasks = validated(experiment, console)
    config, here = description(experiment.first.model)
    about = {
        "model": experiment.first.model,
        "task": task_name(experiment),
        "tried": here,
    }
    if not experiment.first.train:
        return about | {"steps": 0}
    if here:
        loaded = load(experiment.first)
        attach(loaded, experiment, console)
        about["trainable_parameters"] = trainable_count(loaded.model)
    else:
        loaded = None
    costs = [
        (cost(loaded, e, task) if loaded else counts(e, task)) | memory(config, loaded, e, task)
        for e, task in zip(experiment.loops, tasks, strict=True)
    ]
    if not experiment.stages:
        return about | costs[0]
    stages = [{"method": e.method} | c for e, c in zip(experiment.loops, costs, strict=True)]
    minutes = {"minutes": round(sum(c["minutes"] for c in costs), 1)} if loaded else {}
    return about | minutes | {"stages": stages}


def description(name: str) -> tuple[dict[str, Any], bool]:
    """A model's config.json, and whether its weights are on this machine too."""
    if name == models.DEMO or Path(name).expanduser().exists() or name.count("/") != 1:
        folder = models.resolve(name)
    else:
        from huggingface_hub import snapshot_download

        try:  # which fails at once without a network, where a file alone is asked for six times
            folder = Path(snapshot_download(name, allow_patterns=["config.json"]))
        except Exception as error:
            raise ModelError(
                f"{name} is neither a local folder nor could its config.json be fetched: {error}",
                models.OFFLINE.format(name=name),
            ) from error
    return models.read_json(folder / "config.json"), any(folder.glob("model*.safetensors"))


def memory(
    config: Mapping[str, Any], loaded: Loaded | None, e: Stage, task: Task | None
) -> dict[str, Any]:
    """What RL will take, foretold; nothing for SFT."""
    if not e.is_rl or task is None:
        return {}
    asked = e.es.samples_per_generation if e.method == "es" else e.batch_size
    prompts = [s.prompt for s in problems(task, asked, e.seed)]
    lengths = [
        len(encode_prompt(loaded.tokenizer, p)) if loaded else guessed_length(p) for p in prompts
    ]
    try:
        return told(config, e, max(lengths))
    except ModelError as error:
        return {"memory_advice": [str(error)]}


def guessed_length(prompt: Any) -> int:
    """Tokens of a prompt without its tokenizer: one for every three characters."""
    text = prompt if isinstance(prompt, str) else "".join(content for _, content in prompt)
    return len(text) // 3 + 16


def counts(e: Stage, task: Task | None) -> dict[str, Any]:
    """What the config alone says."""
    if not e.is_rl:
        return {"steps": e.iters}
    rollouts = rollouts_of(e)
    return {"steps": e.iters, "rollouts_per_step": rollouts, "rollouts": rollouts * e.iters} | (
        {"rollouts_of_evaluations": of_evaluations(e, task)} if e.method == "es" and task else {}
    )


def of_evaluations(e: Stage, task: Task) -> int:
    """Completions of all evaluations: each problem greedily and sampled, before, after, between."""
    while_training = -(-e.iters // e.eval.every) if e.eval.every else 0
    whole, some = (len(task.load("test", n, 0)) for n in (e.eval.n, e.es.test_samples))
    return (1 + max(1, task.kl_samples)) * (2 * whole + while_training * some)


def cost(loaded: Loaded, e: Stage, task: Task | None) -> dict[str, Any]:
    with watched() as peak:
        if e.method == "sft":
            found = cost_of_sft(loaded, e, task)
        else:
            assert task is not None, "the config requires a task for RL"
            remember_start(loaded.model)  # from disk, or a stage before has moved it
            found = (cost_of_es if e.method == "es" else cost_of_grpo)(loaded, e, task)
        return found | {"peak_memory_mb": round(peak() / 1e6)}


def cost_of_grpo(loaded: Loaded, e: Stage, task: Task) -> dict[str, Any]:
    """One rollout of a step's prompts, and its gradient."""
    samples = problems(task, e.batch_size, e.seed)
    groups, sampled = sampling(loaded, task, samples, e, e.grpo.group_size, e.rollout.temperature)
    rows = [r for g in groups for r in g.rollouts]
    packed = pack(rows, np.ones(len(rows)))
    with recomputing(blocks(loaded.model), on=e.grad_checkpoint):
        _, learnt = timed(lambda: gradients(loaded.model, packed, rule_of(e)))
    tokens = sum(len(r.ids) for r in rows)
    return {
        "steps": e.iters,
        "rollouts_per_step": len(rows),
        "rollouts": len(rows) * e.iters,
        "tokens_per_step": tokens,
        "tokens": tokens * e.iters,
        "seconds_rollout": round(sampled, 2),
        "seconds_learning": round(learnt, 2),
        "minutes": round((sampled + learnt) * e.iters / 60, 1),
    }


def cost_of_es(loaded: Loaded, e: Stage, task: Task) -> dict[str, Any]:
    """One generation: its rollouts, and its update where the rewards call for one."""
    one, reports = e.model_copy(update={"iters": 1}), []
    clock = Clock()
    loop = es.train(
        loaded, task, one, optimizer_of(e), clock, lambda *report: reports.append(report)
    )
    list(loop)
    metrics = reports[0][1]
    seconds = {row["name"]: row["seconds"] for row in clock.report()["rows"]}
    tokens, known = int(metrics["tokens_sampled"]), counts(e, task)
    rolling = sum(seconds.get(name, 0.0) for name in ROLLING)
    evaluating = rolling / known["rollouts_per_step"] * known["rollouts_of_evaluations"]
    update = seconds.get("update", 0.0)
    return known | {
        "tokens_per_step": tokens,
        "tokens": tokens * e.iters,
        "seconds_rollout": round(rolling, 2),
        "seconds_learning": round(update, 2),
        "minutes": round((rolling + update) * e.iters / 60, 1),
        "minutes_of_evaluations": round(evaluating / 60, 1),
    }


def cost_of_sft(loaded: Loaded, e: Stage, task: Task | None) -> dict[str, Any]:
    """One step on a batch; before it one block of rejection samples, where there are any."""
    if e.rejection_sampling:
        assert task is not None, "the config requires a task for rejection sampling"
        asked = e.rejection_sampling
        together = max(1, e.rollout.width // asked.samples)
        block = task.load("train", min(asked.problems, together), e.seed)
        _, sampled = sampling(loaded, task, block, e, asked.samples, asked.temperature)
        sampled *= asked.problems / len(block)
        pairs, source = [(0, {"prompt": s.prompt, "completion": s.gold}) for s in block], "the task"
        found = {"rollouts": asked.problems * asked.samples, "seconds_sampling": round(sampled, 1)}
        count = asked.problems * asked.keep  # at most
        texts, _ = training_texts(loaded, pairs, source, limit=e.max_seq_length, mask_prompt=True)
        steps = math.ceil(e.epochs * count / e.batch_size) if e.epochs else e.iters
    else:
        sampled = 0.0
        lessons = lessons_of(loaded, sources_of(e)["train"], e)
        texts, found = lessons.texts, {"notes": lessons.notes}
        refuse_few(texts, e)
        count, steps = len(texts), lasting(e, texts).iters
    kept = e.sft.model_copy(update={"order": e.order})
    two = e.model_copy(update={"iters": 2, "epochs": None, "sft": kept})  # the first may compile
    loop = sft.train(loaded, texts, two, optimizer_of(two), Clock(), lambda step, metrics: None)
    next(loop)
    _, learnt = timed(lambda: next(loop))
    rows = best_fit(texts, e.max_seq_length) if e.sft.packing else texts
    tokens = round(sum(len(t.ids) - t.start for t in texts) / len(rows) * e.batch_size)
    return {
        "steps": steps,
        "texts": count,
        "tokens_per_step": tokens,
        "tokens": tokens * steps,
        **found,
        "seconds_learning": round(learnt, 2),
        "minutes": round((sampled + learnt * steps) / 60, 1),
    }


def sampling(
    loaded: Loaded, task: Task, samples: Sequence[Sample], e: Stage, group: int, temperature: float
) -> tuple[list[Group], float]:
    """Rollouts of these samples, and the seconds they took."""
    options: dict[str, Any] = {**e.rollout.model_dump(), "temperature": temperature}
    return timed(
        lambda: rollout(loaded, task, samples, group=group, seed=e.seed, step=0, **options)
    )


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What `work` returns, and the seconds it took."""
    begin = time.perf_counter()
    found = work()
    mx.eval(found)
    return found, time.perf_counter() - begin
