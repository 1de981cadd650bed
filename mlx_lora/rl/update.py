"""What a step learns from its rollouts: which rows train, in which minibatches, how often."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlx_lora import distributed
from mlx_lora.adapter.attach import blocks
from mlx_lora.adapter.schedules import NEEDS_KL
from mlx_lora.optimizers import Metrics
from mlx_lora.recompute import recomputing
from mlx_lora.rl.advantages import advantages, overlong
from mlx_lora.rl.importance import effective, ways
from mlx_lora.rl.learner import (
    Arrays,
    Fixed,
    Rule,
    apply,
    combined,
    gradient_health,
    gradients,
    module_norms,
    policy_logps,
    scored,
    some_of,
)
from mlx_lora.rl.logprobs import Packed, pack, reference_logps, rows_of
from mlx_lora.rl.losses import losses
from mlx_lora.schema import Stage
from mlx_lora.types import Group, Whole


def rule_of(e: Stage) -> Rule:
    """The gradient that an experiment asks for."""
    return Rule(
        losses.bind(e.grpo.loss, e.grpo.clips),
        temperature=e.rollout.temperature or 1.0,
        max_tokens=e.rollout.max_tokens,
        beta=e.grpo.beta,
        weigh=ways[e.grpo.importance_sampling],
        is_cap=e.grpo.is_cap,
        parts=e.grad_accumulation_steps,
    )


def lessons(
    groups: Sequence[Group], rewards_PG: np.ndarray, e: Stage
) -> tuple[Packed | None, Metrics]:
    """The rows to learn from with their advantages, and what there is to say of these.

    A group all of whose advantages are 0 has nothing to teach; nor have rows cut at the limit,
    where these are masked. None where what is left has no advantage but 0: Adam would rescale the
    noise of a zero gradient into a full step, or go on by its momentum.
    """
    if not groups:
        return None, {}
    lengths_PG = np.array([[len(r.ids) for r in g.rollouts] for g in groups])
    penalty_PG = overlong(lengths_PG, e.rollout.max_tokens, e.grpo.overlong_buffer)
    advantages_PG = advantages.bind(e.grpo.advantage, {})(rewards_PG + penalty_PG)
    trains_PG = np.repeat((advantages_PG != 0).any(axis=1, keepdims=True), lengths_PG.shape[1], 1)
    if e.grpo.mask_truncated:
        trains_PG &= np.array([[r.finished for r in g.rollouts] for g in groups])
    metrics = {
        "advantage_min": float(advantages_PG.min()),
        "advantage_max": float(advantages_PG.max()),
        "advantage_std": float(advantages_PG.std()),
    }
    if e.grpo.overlong_buffer:
        metrics["overlong_penalty"] = float(penalty_PG.mean())
    rollouts = [r for g in groups for r in g.rollouts]
    if not advantages_PG[trains_PG].any():
        return None, metrics
    rows = np.flatnonzero(trains_PG)
    return pack([rollouts[r] for r in rows], advantages_PG.reshape(-1)[rows]), metrics


def update(
    model: nn.Module, packed: Packed, rule: Rule, optimizer: optim.Optimizer, e: Stage, step: int
) -> tuple[Metrics, Mapping[str, float]]:
    """The optimizer's passes over a step's rows: metrics, and the gradient norm of each module.

    One pass over all rows needs no forward of its own for the old policy. The norms are those of
    the first pass, every `monitor.every` steps. Each of several machines computes its part of the
    rows, whose gradients add up.
    """
    g = e.grpo
    own, mine = part_of(packed)
    score = partial(scored, model, mine, rule) if own else lambda _: None
    fixed = Fixed(
        score(policy_logps) if g.epochs * g.minibatches > 1 else None,
        score(reference_logps) if g.beta or wants_kl(e, step) else None,
    )
    found: list[Metrics] = []
    norms: Mapping[str, float] = {}
    for rows in minibatches(len(packed.prompt_of_B), e, step):
        whole = Whole(len(rows), tokens_of(packed, rows), rule.max_tokens)
        wanted = set(rows)
        places = [place for place, row in enumerate(own) if row in wanted]
        with recomputing(blocks(model), on=e.grad_checkpoint):
            measured, grads = shared(model, mine, rule, fixed, places, whole)
        if not found and (step + 1) % e.monitor.every == 0:
            norms = module_norms(grads)
        ratio = e.lora_parameters.lora_plus_ratio
        norm, taken = apply(model, optimizer, measured, grads, g.max_grad_norm, lora_plus=ratio)
        found.append(plain(measured) | {"grad_norm": norm, "update_taken": float(taken)})
    metrics = averaged(found) | {
        "learning_rate": float(optimizer.learning_rate),
        "tokens_trained": packed.tokens,
    }
    return metrics | (gradient_health(norms) if norms else {}), norms


def part_of(packed: Packed) -> tuple[list[int], Packed]:
    """The rows that this machine computes, by their index, and these rows."""
    rows = list(range(len(packed.prompt_of_B)))
    if distributed.size() == 1:
        return rows, packed
    own = list(distributed.mine(sorted(rows, key=packed.prompt_of_B.__getitem__)))
    return own, rows_of(packed, own) if own else packed


def shared(
    model: nn.Module,
    mine: Packed,
    rule: Rule,
    fixed: Fixed,
    places: Sequence[int],
    whole: Whole,
) -> tuple[Arrays, Any]:
    """Metrics and gradients of an update: those of the rows at `places`, and of other machines."""
    if places:
        part, known = some_of(mine, fixed, places)
        measured, grads = gradients(model, part, rule, known, whole)
    else:
        measured, grads = None, tree_map(mx.zeros_like, model.trainable_parameters())
    if distributed.size() > 1:
        said = distributed.everybody(measured and {k: v.item() for k, v in measured.items()})
        measured = combined([{k: mx.array(v) for k, v in m.items()} for m in said if m])
        grads = distributed.summed(grads)
    assert measured is not None, "an update without rows"
    return measured, grads


def tokens_of(packed: Packed, rows: Sequence[int]) -> int:
    """Completion tokens of some rows."""
    return int(np.array(packed.mask_BT)[rows].sum())


def minibatches(rows: int, e: Stage, step: int) -> Iterator[list[int]]:
    """Rows of each optimizer step: each once an epoch, in an order of (seed, step, epoch)."""
    for epoch in range(e.grpo.epochs):
        order = list(range(rows))
        if e.grpo.minibatches > 1:
            random.Random(f"minibatches/{e.seed}/{step}/{epoch}").shuffle(order)
        for part in np.array_split(order, min(e.grpo.minibatches, rows)):
            yield sorted(part.tolist())


def plain(measured: Mapping[str, mx.array]) -> Metrics:
    """Numbers of one update; the weights' mean square becomes the effective sample size."""
    found = {k: cast(float, v.item()) for k, v in measured.items()}
    square = found.pop("is_weight_square")
    return found | {"is_effective": effective(found["is_weight_mean"], square)}


def averaged(found: Sequence[Metrics]) -> Metrics:
    """Metrics of the updates of one step: means, of _min and _max the extremes."""
    kinds: dict[str, Callable[..., Any]] = {"min": np.min, "max": np.max}
    return {
        key: float(kinds.get(key.rpartition("_")[2], np.mean)([metrics[key] for metrics in found]))
        for key in found[0]
    }


def wants_kl(e: Stage, step: int) -> bool:
    """Every `monitor.every` steps, at both ends, and always where the scale depends on it."""
    if e.scale_schedule and e.scale_schedule.name in NEEDS_KL:
        return True
    return (step + 1) % e.monitor.every == 0 or step in (0, e.iters - 1)
