"""Supervised fine-tuning: cross-entropy on texts. Also the warm start of RL. No trainer class.

Left out, for now: chat rows, hub datasets, gradient accumulation, batches of one length.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlx_lora import cpu
from mlx_lora.adapter.attach import blocks, lora_layers
from mlx_lora.adapter.schedules import (
    scale_as_array,
    scale_at,
    scale_of,
    schedules,
    set_scale,
)
from mlx_lora.data import Text, draw
from mlx_lora.models import Loaded, split_head
from mlx_lora.numerics import log_softmax
from mlx_lora.optimizers import Metrics, Patience, copied, learning_rate, overwrite
from mlx_lora.recompute import recomputing
from mlx_lora.rl.learner import step as optimizer_step
from mlx_lora.rl.losses import masked_mean
from mlx_lora.runlog import Clock
from mlx_lora.schema import Stage

Packed = tuple[mx.array, mx.array, mx.array, mx.array]  # ids_BT, at_BS, targets_BS, mask_BS
WIDTH = 32  # rows are padded to a multiple of this, so that few shapes are compiled ...
SCORED = 8  # ... and so are the tokens of a row that count
NO_LIMIT = float("inf")


def train(
    loaded: Loaded,
    texts: Sequence[Text],
    experiment: Stage,
    optimizer: optim.Optimizer,
    clock: Clock,
    report: Callable[[int, Metrics], None],
    *,
    valid: Sequence[Text] = (),
    start: int = 0,
    history: Sequence[Metrics] = (),
) -> Iterator[int]:
    """Run the steps from `start` to `iters`, one at each `next`, yielding the step just done.

    `report` gets its metrics. Everything random is a function of (seed, step); the scale schedule
    looks at the metrics of the step before. `history` holds those before `start`.
    """
    model, e = loaded.model, experiment
    schedule = e.scale_schedule and schedules.bind(e.scale_schedule.name, e.scale_schedule.options)
    patience, before = Patience(e, history), history[-1] if history else None
    with scale_as_array(model):
        update = compiled_update(model, optimizer, e)
        for step in range(start, e.iters):
            optimizer.learning_rate = learning_rate(e, step)
            if schedule:
                configured = e.lora_parameters.effective_scale
                set_scale(model, scale_at(schedule, configured, e.iters, step, before))
            with clock.measure("learn", kind="step"), in_training(model):
                batch = pack(draw(texts, step, e.batch_size, e.seed))
                mx.random.seed(dropout_seed(e.seed, step))
                loss, norm = update(*batch)
                mx.eval(model.trainable_parameters(), optimizer.state, loss, norm)
            metrics: Metrics = {
                "loss": float(loss),
                "grad_norm": float(norm),
                "update_taken": float(np.isfinite(float(norm))),
                "tokens_trained": int(float(batch[-1].sum())),
                "learning_rate": float(optimizer.learning_rate),
                "scale": scale_of(model),
            }
            if valid and ((step + 1) % e.steps_per_eval == 0 or step + 1 == e.iters):
                with clock.measure("validate"):
                    metrics["valid_loss"] = validate(model, valid, e)
            report(step, metrics)
            patience.saw(step, metrics)
            before = metrics
            yield step


def compiled_update(
    model: nn.Module, optimizer: optim.Optimizer, e: Stage
) -> Callable[..., tuple[mx.array, mx.array]]:
    """(a packed batch) -> its loss and gradient norm, after one step of the optimizer."""
    split_head(model)  # tried on real numbers, which tracing has none of
    optimizer.init(model.trainable_parameters())
    state: list[Any] = [model.state, optimizer.state, mx.random.state, *remembered(model)]
    limit = e.sft.max_grad_norm or NO_LIMIT
    ratio = e.lora_parameters.lora_plus_ratio

    @partial(mx.compile, inputs=state, outputs=state)
    def update(*batch: mx.array) -> tuple[mx.array, mx.array]:
        with recomputing(blocks(model), on=e.grad_checkpoint, at_once=cpu.active()):
            loss, grads = nn.value_and_grad(model, mean_loss)(model, *batch)
        return loss, step_if_finite(model, optimizer, grads, limit, ratio)

    return update


def remembered(model: nn.Module) -> list[dict[str, mx.array]]:
    """The starts that weight decay pulls to, which may be the arrays that training begins with.

    Handed to the compiled step, because it may not hold one of its inputs as a constant.
    """
    kept = (vars(layer).get("_start") for layer in lora_layers(model).values())
    return [start for start in kept if start]


def step_if_finite(
    model: nn.Module, optimizer: optim.Optimizer, grads: Any, max_norm: float, lora_plus: float
) -> mx.array:
    """Clip and update; where the gradient is not finite all stays as it was. Returns its norm.

    Looks at no value, so that it can be compiled.
    """
    clipped, norm = optim.clip_grad_norm(grads, max_norm)
    weights, state = copied(model.trainable_parameters()), copied(optimizer.state)
    optimizer_step(model, optimizer, clipped, lora_plus)
    good = mx.isfinite(norm)

    def chosen(after: mx.array, before: mx.array) -> mx.array:
        return mx.where(good, after, before)

    model.update(tree_map(chosen, model.trainable_parameters(), weights))
    overwrite(optimizer.state, tree_map(chosen, optimizer.state, state))
    return norm


def mean_loss(
    model: nn.Module, ids_BT: mx.array, at_BS: mx.array, targets_BS: mx.array, mask_BS: mx.array
) -> mx.array:
    """Mean cross-entropy in nats over the tokens that count; only they meet the vocabulary."""
    split = split_head(model)
    hidden_BSD = mx.take_along_axis(split.body(ids_BT), at_BS[..., None], axis=1)
    logps_BSV = log_softmax(split.head(hidden_BSD).astype(mx.float32))
    logps_BS = mx.take_along_axis(logps_BSV, targets_BS[..., None], axis=-1)[..., 0]
    return -masked_mean(logps_BS, mask_BS)


def pack(texts: Sequence[Text]) -> Packed:
    """Texts as arrays: ids [B, T], and of the S tokens that count the place before and the token.

    Padding is on the right, where a causal model does not look, and masked.
    """
    width = rounded_up(max(len(t.ids) - 1 for t in texts), WIDTH)
    scored = rounded_up(max(len(t.ids) - t.start for t in texts), SCORED)
    ids = np.zeros((len(texts), width), np.int32)
    at, targets = (np.zeros((len(texts), scored), np.int32) for _ in range(2))
    mask = np.zeros((len(texts), scored), np.float32)
    for row, text in enumerate(texts):
        count = len(text.ids) - text.start
        ids[row, : len(text.ids) - 1] = text.ids[:-1]
        at[row, :count] = np.arange(text.start - 1, len(text.ids) - 1)
        targets[row, :count] = text.ids[text.start :]
        mask[row, :count] = 1
    return mx.array(ids), mx.array(at), mx.array(targets), mx.array(mask)


def rounded_up(count: int, to: int) -> int:
    """
    >>> rounded_up(33, 32), rounded_up(32, 32)
    (64, 32)
    """
    return -(-count // to) * to


def validate(model: nn.Module, texts: Sequence[Text], e: Stage) -> float:
    """Mean cross-entropy per token of the first `val_batches` batches, in nats."""
    count = len(texts) if e.val_batches == -1 else e.val_batches * e.batch_size
    total = tokens = 0.0
    for begin in range(0, min(count, len(texts)), e.batch_size):
        batch = pack(texts[begin : min(begin + e.batch_size, count)])
        counted = float(batch[-1].sum())
        total += float(mean_loss(model, *batch)) * counted
        tokens += counted
    return total / tokens


@contextlib.contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is on. Outside it is off: whoever looks at the model sees it whole."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def dropout_seed(seed: int, step: int) -> int:
    """What MLX's global stream, which dropout reads, is seeded with before a step."""
    digest = hashlib.blake2s(f"sft/{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
