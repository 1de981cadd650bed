"""Group-relative policy optimisation on the quantized model's own rollouts. No trainer class.

Left out on purpose: a value function, a second model as reference, more than one update per
rollout.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_lora.adapter.schedules import NEEDS_KL, scale_at, scale_of, schedules, set_scale
from mlx_lora.data import draw
from mlx_lora.models import Loaded
from mlx_lora.optimizers import Diverged, Metrics, Patience, learning_rate
from mlx_lora.rl.advantages import advantages, zero_variance
from mlx_lora.rl.describe import describe
from mlx_lora.rl.learner import apply, gradient_health, gradients
from mlx_lora.rl.logprobs import pack
from mlx_lora.rl.losses import losses
from mlx_lora.rl.rollout import rewards, rollout
from mlx_lora.runlog import Clock
from mlx_lora.schema import Stage
from mlx_lora.types import Group, Sample, Task

__all__ = ["Diverged", "train"]
POOL = 4096  # training problems kept; longer runs reshuffle them every epoch


def train(
    loaded: Loaded,
    task: Task,
    experiment: Stage,
    optimizer: optim.Optimizer,
    clock: Clock,
    report: Callable[[int, Metrics, Sequence[Group]], None],
    *,
    start: int = 0,
    before: Metrics | None = None,
) -> Iterator[int]:
    """Run the steps from `start` to `iters`, one at each `next`, yielding the step just done.

    `report` gets its metrics and groups. Everything random is a function of (seed, step); the scale
    schedule looks at the metrics of the step before, for the first one at `before`.
    """
    model, e = loaded.model, experiment
    loss = losses.bind(e.grpo.loss, loss_options(e))
    advantage = advantages.bind(e.grpo.advantage, {})
    schedule = e.scale_schedule and schedules.bind(e.scale_schedule.name, e.scale_schedule.options)
    samples = problems(task, e.iters * e.batch_size, e.seed)
    patience = Patience(e)
    for step in range(start, e.iters):
        optimizer.learning_rate = learning_rate(e, step)
        if schedule:
            configured = e.lora_parameters.effective_scale
            set_scale(model, scale_at(schedule, configured, e.iters, step, before))
        with clock.measure("rollout", kind="step"):
            groups = rollout(
                loaded,
                task,
                draw(samples, step, e.batch_size, e.seed),
                group=e.grpo.group_size,
                seed=e.seed,
                step=step,
                **e.rollout.model_dump(),
            )
        rewards_PG = rewards(groups)
        metrics = describe(groups, rewards_PG) | {"scale": scale_of(model)}
        useful_P = ~zero_variance(rewards_PG)
        if useful_P.any():  # Adam would rescale the noise of a zero gradient into a full step
            with clock.measure("learn", kind="step"):
                metrics |= update(
                    model, groups, advantage(rewards_PG), useful_P, loss, optimizer, e, step
                )
        report(step, metrics, groups)
        patience.saw(step, metrics)
        before = metrics
        yield step


def update(
    model: nn.Module,
    groups: Sequence[Group],
    advantages_PG: np.ndarray,
    useful_P: np.ndarray,
    loss: Callable,
    optimizer: optim.Optimizer,
    e: Stage,
    step: int,
) -> Metrics:
    """One optimizer step on the groups that disagree within themselves."""
    rollouts = [r for g, useful in zip(groups, useful_P, strict=True) if useful for r in g.rollouts]
    packed = pack(rollouts, advantages_PG[useful_P].reshape(-1))
    measured, grads = gradients(
        model,
        packed,
        loss,
        temperature=e.rollout.temperature or 1.0,
        beta=e.grpo.beta,
        measure_kl=wants_kl(e, step),
    )
    more = gradient_health(grads) if (step + 1) % e.monitor.every == 0 else {}
    ratio = e.lora_parameters.lora_plus_ratio
    norm, taken = apply(model, optimizer, grads, e.grpo.max_grad_norm, lora_plus=ratio)
    return {k: cast(float, v.item()) for k, v in measured.items()} | {
        "grad_norm": norm,
        "update_taken": float(taken),
        "learning_rate": float(optimizer.learning_rate),
        "tokens_trained": packed.tokens,
        **more,
    }


def wants_kl(e: Stage, step: int) -> bool:
    """Every `monitor.every` steps, at both ends, and always where the scale depends on it."""
    if e.scale_schedule and e.scale_schedule.name in NEEDS_KL:
        return True
    return (step + 1) % e.monitor.every == 0 or step in (0, e.iters - 1)


def problems(task: Task, wanted: int, seed: int) -> Sequence[Sample]:
    return task.load("train", min(wanted, POOL), seed)


def loss_options(e: Stage) -> Mapping[str, Any]:
    return {"clip_low": e.grpo.clip_low, "clip_high": e.grpo.clip_high}
