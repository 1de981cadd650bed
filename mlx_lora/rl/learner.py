"""From rollouts to gradients: packing, log-probabilities of completion tokens, one update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_lora.adapter.attach import reference, start_of
from mlx_lora.generate import prefill
from mlx_lora.models import pad_right, plain_cache, split_head
from mlx_lora.numerics import entropy, log_softmax
from mlx_lora.rl.losses import k3, masked_mean
from mlx_lora.types import Batch, Rollout


@dataclass(frozen=True)
class Packed:
    """Rollouts as arrays. Shapes: B rows, T completion tokens, right-padded."""

    prompts: Sequence[tuple[int, ...]]  # each distinct prompt once
    prompt_of_B: Sequence[int]
    targets_BT: mx.array
    mask_BT: mx.array
    sampler_logps_BT: mx.array
    advantages_B: mx.array

    @property
    def tokens(self) -> int:
        return int(np.array(self.mask_BT).sum())


def pack(rollouts: Sequence[Rollout], advantages_B: np.ndarray) -> Packed:
    """Every completion token counts, EOS included; padding never does."""
    place_of = {p: i for i, p in enumerate(dict.fromkeys(r.prompt_ids for r in rollouts))}
    width = max(len(r.ids) for r in rollouts)
    targets = np.zeros((len(rollouts), width), np.int32)
    mask, logps = (np.zeros((len(rollouts), width), np.float32) for _ in range(2))
    for row, r in enumerate(rollouts):
        targets[row, : len(r.ids)] = r.ids
        mask[row, : len(r.ids)] = 1
        logps[row, : len(r.ids)] = r.logps
    return Packed(
        list(place_of),
        [place_of[r.prompt_ids] for r in rollouts],
        mx.array(targets),
        mx.array(mask),
        mx.array(logps),
        mx.array(advantages_B.astype(np.float32)),
    )


def completion_logps(
    model: nn.Module, packed: Packed, temperature: float
) -> tuple[mx.array, mx.array]:
    """Log-probabilities [B, T] of the completion tokens and the entropy [B, T] there, in nats.

    The vocabulary is met at completion positions only, and a prompt is computed once for its whole
    group: the completions run as one block over its forked cache. Where caches do not fork
    (sliding windows, state spaces) every row runs in full.
    """
    whole = completion_hidden if plain_cache(model) else completion_hidden_in_full
    hidden_BTD = whole(model, packed)
    logits_BTV = split_head(model).head(hidden_BTD).astype(mx.float32) / temperature
    logps_BTV = log_softmax(logits_BTV)
    logps_BT = mx.take_along_axis(logps_BTV, packed.targets_BT[..., None], axis=-1)[..., 0]
    return logps_BT, entropy(logps_BTV)


def completion_hidden(model: nn.Module, packed: Packed) -> mx.array:
    """Hidden states [B, T, D] that predict the completion tokens, prompts shared."""
    first_BD, cache = prefill(model, packed.prompts, packed.prompt_of_B)
    if packed.targets_BT.shape[1] == 1:
        return first_BD[:, None, :]
    rest_BTD = split_head(model).body(packed.targets_BT[:, :-1], cache=cache)
    return mx.concatenate([first_BD[:, None, :], rest_BTD], axis=1)


def completion_hidden_in_full(model: nn.Module, packed: Packed) -> mx.array:
    """The same by one forward of every whole row."""
    targets, mask = np.array(packed.targets_BT), np.array(packed.mask_BT)
    prompts = [packed.prompts[p] for p in packed.prompt_of_B]
    rows = [
        [*p, *t[: int(m.sum())].tolist()] for p, t, m in zip(prompts, targets, mask, strict=True)
    ]
    ids_BL, _ = pad_right(rows)
    start_B1 = mx.array([[len(p) - 1] for p in prompts])
    at_BT = mx.minimum(start_B1 + mx.arange(targets.shape[1]), ids_BL.shape[1] - 2)
    hidden_BLD = split_head(model).body(ids_BL[:, :-1])
    return mx.take_along_axis(hidden_BLD, at_BT[..., None], axis=1)


def reference_logps(model: nn.Module, packed: Packed, temperature: float) -> mx.array:
    """The same under the reference policy, which needs no second model in memory."""
    with reference(model):
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
