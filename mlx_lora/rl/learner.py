"""From rollouts to gradients: packing, log-probabilities of completion tokens, one update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.adapter.attach import switched_off
from mlx_lora.models import split_head
from mlx_lora.rl.losses import k3, masked_mean
from mlx_lora.types import Batch, Rollout

HEAD_CHUNK = 4096  # completion tokens that meet the vocabulary at a time


@dataclass(frozen=True)
class Packed:
    """Rollouts as arrays. Shapes: B rows, L prompt + completion tokens, T completion tokens."""

    ids_BL: mx.array
    at_BT: mx.array  # position whose logits predict completion token t
    targets_BT: mx.array
    mask_BT: mx.array
    sampler_logps_BT: mx.array
    advantages_B: mx.array

    @property
    def tokens(self) -> int:
        return int(cast(float, self.mask_BT.sum().item()))


def pack(rollouts: Sequence[Rollout], advantages_B: np.ndarray) -> Packed:
    """Right-padded rows; every completion token counts, EOS included, padding never does."""
    length = max(len(r.prompt_ids) + len(r.ids) for r in rollouts)
    width = max(len(r.ids) for r in rollouts)
    ids = np.zeros((len(rollouts), length), np.int32)
    at, targets = (np.zeros((len(rollouts), width), np.int32) for _ in range(2))
    mask, logps = (np.zeros((len(rollouts), width), np.float32) for _ in range(2))
    for row, r in enumerate(rollouts):
        start, count = len(r.prompt_ids), len(r.ids)
        ids[row, : start + count] = r.prompt_ids + r.ids
        at[row, :count] = np.arange(start - 1, start - 1 + count)
        targets[row, :count] = r.ids
        mask[row, :count] = 1
        logps[row, :count] = r.logps
    return Packed(
        mx.array(ids),
        mx.array(at),
        mx.array(targets),
        mx.array(mask),
        mx.array(logps),
        mx.array(advantages_B.astype(np.float32)),
    )


def completion_logps(
    model: nn.Module, packed: Packed, temperature: float
) -> tuple[mx.array, mx.array]:
    """Log-probabilities [B, T] of the completion tokens and the entropy [B, T] there, in nats.

    The vocabulary is met at completion positions only where the model's head can be split off.
    """
    split = split_head(model)
    inputs_BL = packed.ids_BL[:, :-1]
    hidden = split.body(inputs_BL) if split else model(inputs_BL)
    at_BT1 = mx.minimum(packed.at_BT, hidden.shape[1] - 1)[..., None]
    hidden_BTD = mx.take_along_axis(hidden, at_BT1, axis=1)
    logits_BTV = (split.head(hidden_BTD) if split else hidden_BTD).astype(mx.float32) / temperature
    logps_BTV = logits_BTV - mx.logsumexp(logits_BTV, axis=-1, keepdims=True)
    logps_BT = mx.take_along_axis(logps_BTV, packed.targets_BT[..., None], axis=-1)[..., 0]
    still_BTV = mx.stop_gradient(logps_BTV)
    return logps_BT, -(mx.exp(still_BTV) * still_BTV).sum(axis=-1)


def reference_logps(model: nn.Module, packed: Packed, temperature: float) -> mx.array:
    """The same under the base: adapter switched off, no second model in memory."""
    with switched_off(model):
        logps_BT, _ = completion_logps(model, packed, temperature)
        mx.eval(logps_BT)
    return logps_BT


def gradients(
    model: nn.Module,
    packed: Packed,
    loss: Callable[[Batch], tuple[mx.array, dict[str, mx.array]]],
    *,
    temperature: float,
    beta: float,
    measure_kl: bool,
) -> tuple[dict[str, mx.array], Any]:
    """Metrics (loss, entropy, KL to base ...) and gradients of one on-policy update.

    One update per batch of rollouts, so the old policy is this one: its log-probabilities are the
    current ones without gradient, and need no forward of their own.
    """
    ref_BT = reference_logps(model, packed, temperature) if beta or measure_kl else None

    def objective(model: nn.Module) -> tuple[mx.array, dict[str, mx.array]]:
        logps_BT, entropy_BT = completion_logps(model, packed, temperature)
        old_BT = mx.stop_gradient(logps_BT)
        batch = Batch(
            logps_BT, old_BT, packed.sampler_logps_BT, ref_BT, packed.advantages_B, packed.mask_BT
        )
        value, metrics = loss(batch)
        metrics["entropy"] = masked_mean(entropy_BT, packed.mask_BT)
        if ref_BT is not None:
            kl = masked_mean(k3(logps_BT, ref_BT), packed.mask_BT)
            metrics["kl"] = mx.stop_gradient(kl)
            value = value + beta * kl
        return value, metrics | {"loss": value}

    (_, metrics), grads = nn.value_and_grad(model, objective)(model)
    return metrics, grads


def apply(
    model: nn.Module, optimizer: optim.Optimizer, grads: Any, max_norm: float
) -> tuple[float, bool]:
    """Clip and update. Returns the gradient norm and whether the step was taken: only if finite."""
    clipped, norm = optim.clip_grad_norm(grads, max_norm)
    mx.eval(clipped, norm)
    length = cast(float, norm.item())
    if not np.isfinite(length):
        return length, False
    optimizer.update(model, clipped)
    mx.eval(model.trainable_parameters(), optimizer.state)
    return length, True


def trainable_count(model: nn.Module) -> int:
    return sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
