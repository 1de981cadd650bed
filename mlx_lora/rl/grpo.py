"""Group-relative policy optimisation on the quantized model's own rollouts. No trainer class.

Left out on purpose: a value function, a second model as reference.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import mlx.optimizers as optim
import numpy as np

from mlx_lora.adapter.schedules import scale_at, scale_of, schedules, set_scale
from mlx_lora.adapter.spline import keep_up
from mlx_lora.data import POOL, draw
from mlx_lora.models import Loaded
from mlx_lora.optimizers import Diverged, Metrics, Patience, learning_rate
from mlx_lora.rl.advantages import zero_variance
from mlx_lora.rl.describe import describe
from mlx_lora.rl.rollout import rewards, rollout
from mlx_lora.rl.update import lessons, rule_of, update
from mlx_lora.runlog import Clock
from mlx_lora.schema import Stage
from mlx_lora.types import Group, Sample, Task

__all__ = ["Diverged", "train"]
Norms = Mapping[str, float]  # of the gradient, by module


def train(
    loaded: Loaded,
    task: Task,
    experiment: Stage,
    optimizer: optim.Optimizer,
    clock: Clock,
    report: Callable[[int, Metrics, Sequence[Group]], None],
    *,
    start: int = 0,
    history: Sequence[Metrics] = (),
    report_norms: Callable[[int, Norms], None] = lambda step, norms: None,
) -> Iterator[int]:
    """Run the steps from `start` to `iters`, one at each `next`, yielding the step just done.

    `report` gets its metrics and groups. Everything random is a function of (seed, step); the scale
    schedule looks at the metrics of the step before. `history` holds those before `start`.
    """
    model, e = loaded.model, experiment
    rule, before = rule_of(e), history[-1] if history else None
    schedule = e.scale_schedule and schedules.bind(e.scale_schedule.name, e.scale_schedule.options)
    samples = problems(task, drawn(e), e.seed)
    patience = Patience(e, history)
    for step in range(start, e.iters):
        optimizer.learning_rate = learning_rate(e, step)
        if schedule:
            configured = e.lora_parameters.effective_scale
            set_scale(model, scale_at(schedule, configured, e.iters, step, before))
        with clock.measure("rollout", kind="step"):
            sampled, groups = sample(loaded, task, samples, e, step, clock)
        metrics = describe(sampled, rewards(sampled)) | {"scale": scale_of(model)}
        if e.grpo.dynamic_sampling:
            metrics["groups_resampled"] = len(sampled) - e.batch_size
        packed, about = lessons(groups, rewards(groups), e)
        metrics |= about
        if packed is not None:
            with clock.measure("learn", kind="step"):
                learnt, norms = update(model, packed, rule, optimizer, e, step)
            metrics |= learnt
            if norms:
                report_norms(step, norms)
        elif not math.isfinite(metrics["sampled_logp"]):
            metrics["update_taken"] = 0.0  # the policy is broken: equal rewards must not hide it
        keep_up(model, read_by(sampled), e.lora_parameters.calibrate, step + 1)
        report(step, metrics, sampled)
        patience.saw(step, metrics)
        before = metrics
        yield step


def read_by(groups: Sequence[Group]) -> Iterator[tuple[int, ...]]:
    """The token ids of every rollout with its prompt."""
    return (r.prompt_ids + r.ids for g in groups for r in g.rollouts)


def sample(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    e: Stage,
    step: int,
    clock: Clock | None = None,
) -> tuple[list[Group], list[Group]]:
    """All groups that were sampled in a step, and those to learn from.

    Dynamic sampling: while fewer than batch_size groups have a spread of rewards, another batch of
    problems, at most so many times. These are the problems of a step after the run's last, so that
    they are a function of (seed, step, round) and new. Source: DAPO, arXiv 2503.14476, section 3.2.
    """
    found: list[Group] = []
    useful: Sequence[int] = []
    for turn in range(1 + e.grpo.dynamic_sampling):
        numbers = range(turn * e.batch_size, (turn + 1) * e.batch_size)
        found += rollout(
            loaded,
            task,
            draw(samples, step + turn * e.iters, e.batch_size, e.seed),
            group=e.grpo.group_size,
            seed=e.seed,
            step=step,
            numbers=numbers,
            clock=clock,
            **e.rollout.model_dump(),
        )
        useful = np.flatnonzero(~zero_variance(rewards(found))).tolist()
        if len(useful) >= e.batch_size:
            break
    if not e.grpo.dynamic_sampling:
        return found, found
    return found, [found[p] for p in useful[: e.batch_size]]


def drawn(e: Stage) -> int:
    """Problems that a run draws, at most."""
    return e.iters * e.batch_size * (1 + e.grpo.dynamic_sampling)


def problems(task: Task, wanted: int, seed: int) -> Sequence[Sample]:
    return task.load("train", min(wanted, POOL), seed)
