"""From log-probabilities to gradients to one update."""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_lora.adapter.attach import start_of
from mlx_lora.rl.logprobs import Packed, completion_logps, reference_logps
from mlx_lora.rl.losses import k3, masked_mean
from mlx_lora.types import Batch


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
            # masked before the exponential: padding may hold anything, and inf · 0 is NaN
            kl = masked_mean(k3(logps_BT * packed.mask_BT, ref_BT * packed.mask_BT), packed.mask_BT)
            metrics["kl"] = mx.stop_gradient(kl)
            value = value + beta * kl if beta else value
        return value, metrics | {"loss": value}

    (_, metrics), grads = nn.value_and_grad(model, objective)(model)
    return metrics, grads


def apply(
    model: nn.Module,
    optimizer: optim.Optimizer,
    grads: Any,
    max_norm: float,
    *,
    lora_plus: float = 1.0,
) -> tuple[float, bool]:
    """Clip and update. Returns the gradient norm and whether the step was taken: only if finite."""
    clipped, norm = optim.clip_grad_norm(grads, max_norm)
    mx.eval(clipped, norm)
    length = cast(float, norm.item())
    if not np.isfinite(length):
        return length, False
    step(model, optimizer, clipped, lora_plus)
    mx.eval(model.trainable_parameters(), optimizer.state)
    return length, True


def step(model: nn.Module, optimizer: optim.Optimizer, grads: Any, lora_plus: float = 1.0) -> None:
    """One optimizer step in the distance from the adapter's start, which weight decay pulls to.

    The start is zero unless the init moved the model: there plain decay would undo what the init
    put in. `lora_plus` is the learning rate of every lora_b over that of lora_a (LoRA+, arXiv
    2402.12354): whatever the optimizer, B's step is that much longer.
    """
    start, now = start_of(model), model.trainable_parameters()
    before = tree_map_with_path(lambda n, x: x - start[n] if n in start else x, now)
    after = dict(tree_flatten(optimizer.apply_gradients(grads, before)))

    def longer(name: str, old: mx.array, distance: mx.array) -> mx.array:
        ratio = lora_plus if name.endswith(".lora_b") else 1.0
        if ratio == 1 and name not in start:
            return after[name]
        return old + ratio * (after[name] - distance)

    model.update(tree_map_with_path(longer, now, before))


def gradient_health(grads: Any) -> dict[str, float]:
    """How the gradient is spread over modules: how many have none, and the largest one's share."""
    norms: dict[str, list[mx.array]] = {}
    g: Any
    for name, g in tree_flatten(grads):
        norms.setdefault(name.rpartition(".")[0], []).append(mx.square(g).sum())
    squares = np.array(mx.stack([mx.stack(parts).sum() for parts in norms.values()]))
    total = float(squares.sum())
    return {
        "grad_dead_modules": float((squares == 0).sum()),
        "grad_largest_share": float(squares.max() / total) if total > 0 else 0.0,
    }


def trainable_count(model: nn.Module) -> int:
    return sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
