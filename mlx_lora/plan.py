"""`train --dry-run`: everything validated, one step tried, and what a run will cost."""

import time
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console

from mlx_lora import models
from mlx_lora.config import Experiment
from mlx_lora.experiment import attach, validated
from mlx_lora.rl.grpo import loss_options, problems
from mlx_lora.rl.learner import gradients, pack, trainable_count
from mlx_lora.rl.losses import losses
from mlx_lora.rl.rollout import rollout


def plan(e: Experiment, console: Console) -> dict[str, Any]:
    """Counts from the config, time and memory from one rollout and one gradient. Writes nothing."""
    task = validated(e, console)
    loaded = models.load(e.model, quantize=e.quantize.model_dump() if e.quantize else None)
    attach(loaded, e)
    samples = problems(task, e.batch_size, e.seed)
    mx.reset_peak_memory()
    begin = time.perf_counter()
    groups = rollout(
        loaded,
        task,
        samples,
        group=e.grpo.group_size,
        seed=e.seed,
        step=0,
        **e.rollout.model_dump(),
    )
    sampled = time.perf_counter()
    rows = [r for g in groups for r in g.rollouts]
    packed = pack(rows, np.ones(len(rows)))
    found = gradients(
        loaded.model,
        packed,
        losses.bind(e.grpo.loss, loss_options(e)),
        temperature=e.rollout.temperature or 1.0,
        beta=e.grpo.beta,
        measure_kl=False,
    )
    mx.eval(found)
    learnt = time.perf_counter()
    tokens = sum(len(r.ids) for r in rows)
    return {
        "model": e.model,
        "task": e.task.name if e.task else None,
        "trainable_parameters": trainable_count(loaded.model),
        "steps": e.iters,
        "rollouts_per_step": len(rows),
        "rollouts": len(rows) * e.iters,
        "tokens_per_step": tokens,
        "tokens": tokens * e.iters,
        "seconds_rollout": round(sampled - begin, 2),
        "seconds_learning": round(learnt - sampled, 2),
        "minutes": round((learnt - begin) * e.iters / 60, 1),
        "peak_memory_mb": round(mx.get_peak_memory() / 1e6),
    }
