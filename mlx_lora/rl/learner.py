"""From log-probabilities to gradients to one update."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlx_lora.adapter.attach import start_of
from mlx_lora.adapter.spline import pulled, undecayed
from mlx_lora.rl.importance import Weigh, mismatch, token
from mlx_lora.rl.logprobs import Packed, completion_logps, rows_of
from mlx_lora.rl.losses import k3, ratio
from mlx_lora.types import Batch, Objective, Whole

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Rule:
    """How rollouts become a gradient: everything about it that does not change over the steps."""

    loss: Callable[[Batch], Objective]
    temperature: float = 1.0
    max_tokens: int = 256
    beta: float = 0.0  # weight of the KL to the reference
    weigh: Weigh = token
    is_cap: float = 2.0
    parts: int = 1  # micro-batches of an update


@dataclass(frozen=True)
class Fixed:
    """Log-probabilities [B, T] that an update does not change, in the order of its rows."""

    old_BT: mx.array | None = None  # None: the rollouts are of the policy as it is
    ref_BT: mx.array | None = None  # None: no KL is wanted

    def of(self, rows: Sequence[int], width: int) -> "Fixed":
        """The same of some rows, at the width of their longest."""
        at_B = mx.array(list(rows))
        old_BT, ref_BT = (x if x is None else x[at_B, :width] for x in (self.old_BT, self.ref_BT))
        return Fixed(old_BT, ref_BT)


def whole_of(packed: Packed, rule: Rule) -> Whole:
    """What one update learns from, where it is all of these rows."""
    return Whole(len(packed.prompt_of_B), packed.tokens, rule.max_tokens)


def gradients(
    model: nn.Module,
    packed: Packed,
    rule: Rule,
    fixed: Fixed | None = None,
    whole: Whole | None = None,
) -> tuple[Arrays, Any]:
    """Metrics (loss, entropy, KL to the reference ...) and gradients of one update.

    The rows are split into `rule.parts` micro-batches whose gradients are added, which gives what
    the whole would. Without old log-probabilities they are the current ones without gradient, and
    need no forward of their own: that is one update per rollout.
    """
    fixed, whole = fixed or Fixed(), whole or whole_of(packed, rule)
    found: tuple[Arrays, Any] | None = None
    for rows in split(packed, rule.parts):
        part, known = some_of(packed, fixed, rows)
        metrics, grads = part_of_gradients(model, part, rule, known, whole)
        if found is not None:
            metrics, grads = combined([found[0], metrics]), tree_map(mx.add, found[1], grads)
        if rule.parts > 1:
            mx.eval(metrics, grads)  # so that the memory of this part is free for the next
        found = metrics, grads
    assert found is not None, "an update without rows"
    return found


def split(packed: Packed, count: int) -> list[list[int]]:
    """Indices of all rows in at most so many parts, those of a prompt next to each other."""
    rows = sorted(range(len(packed.prompt_of_B)), key=packed.prompt_of_B.__getitem__)
    return [part.tolist() for part in np.array_split(rows, min(count, len(rows)))]


def some_of(packed: Packed, fixed: Fixed, rows: Sequence[int]) -> tuple[Packed, Fixed]:
    """Some rows of an update; all of them as they are."""
    if len(rows) == len(packed.prompt_of_B):
        return packed, fixed
    part = rows_of(packed, rows)
    return part, fixed.of(rows, part.targets_BT.shape[1])


def scored(
    model: nn.Module,
    packed: Packed,
    rule: Rule,
    score: Callable[[nn.Module, Packed, float], mx.array],
) -> mx.array:
    """Log-probabilities [B, T] of all rows, without gradient, in the micro-batches of an update."""
    if rule.parts == 1:
        return score(model, packed, rule.temperature)
    found_BT = np.zeros(packed.targets_BT.shape, np.float32)
    for rows in split(packed, rule.parts):
        part = rows_of(packed, rows)
        found_BT[rows, : part.targets_BT.shape[1]] = np.array(score(model, part, rule.temperature))
    return mx.array(found_BT)


def policy_logps(model: nn.Module, packed: Packed, temperature: float) -> mx.array:
    """Log-probabilities [B, T] under the policy as it is, without gradient."""
    logps_BT, _ = completion_logps(model, packed, temperature, gradient=False)
    mx.eval(logps_BT)
    return logps_BT


def part_of_gradients(
    model: nn.Module, packed: Packed, rule: Rule, fixed: Fixed, whole: Whole
) -> tuple[Arrays, Any]:
    """Metrics and gradients of a part of an update, as shares of the whole."""
    mask_BT = packed.mask_BT

    def clean(x_BT: mx.array) -> mx.array:
        return mx.where(mask_BT > 0, x_BT, 0.0)  # padding may hold anything: inf · 0 is NaN

    def objective(model: nn.Module) -> tuple[mx.array, Arrays]:
        logps_BT, entropy_BT = completion_logps(model, packed, rule.temperature)
        old_BT = mx.stop_gradient(logps_BT) if fixed.old_BT is None else fixed.old_BT
        gap_BT = clean(old_BT - packed.sampler_logps_BT)
        weights_BT = rule.weigh(gap_BT, rule.is_cap)
        batch = Batch(logps_BT, old_BT, weights_BT, packed.advantages_B, mask_BT, whole)
        said = rule.loss(batch)
        loss = -(clean(said.value_BT) * said.share_BT).sum()
        metrics = {**said.metrics, **mismatch(gap_BT, weights_BT, mask_BT, whole)}
        metrics["entropy"] = (clean(entropy_BT) * mask_BT).sum() / whole.tokens
        if fixed.old_BT is not None:
            metrics |= moved(clean(logps_BT - old_BT), mask_BT, whole)
        if fixed.ref_BT is not None:
            # the tokens are the old policy's: the ratio makes it the policy's own mean again
            kl_BT = k3(clean(logps_BT), clean(fixed.ref_BT)) * mx.stop_gradient(ratio(batch))
            metrics["kl"] = mx.stop_gradient(kl_BT * mask_BT).sum() / whole.tokens
            loss = loss + rule.beta * (kl_BT * said.share_BT).sum() if rule.beta else loss
        return loss, metrics | {"loss": loss}

    (_, metrics), grads = nn.value_and_grad(model, objective)(model)
    return metrics, grads


def moved(gap_BT: mx.array, mask_BT: mx.array, whole: Whole) -> Arrays:
    """How far the policy is from the one that the rollouts are of; gap = ln(policy / old)."""
    ratio_BT = mx.exp(mx.stop_gradient(gap_BT))
    return {
        "ratio_mean": (ratio_BT * mask_BT).sum() / whole.tokens,
        "ratio_min": mx.where(mask_BT > 0, ratio_BT, mx.inf).min(),
        "ratio_max": mx.where(mask_BT > 0, ratio_BT, 0.0).max(),
    }


def combined(found: Sequence[Mapping[str, mx.array]]) -> Arrays:
    """Metrics of the parts of one update as its own: sums, of _min and _max the extremes."""
    return {key: reduce(key, mx.stack([metrics[key] for metrics in found])) for key in found[0]}


def reduce(key: str, values_N: mx.array) -> mx.array:
    """What the parts' values of one metric come to."""
    kind = key.rpartition("_")[2]
    return {"min": mx.min, "max": mx.max}.get(kind, mx.sum)(values_N)


def apply(
    model: nn.Module,
    optimizer: optim.Optimizer,
    measured: Arrays,
    grads: Any,
    max_norm: float,
    *,
    lora_plus: float = 1.0,
) -> tuple[float, bool]:
    """Clip and update. Returns the gradient norm and whether the step was taken.

    It is where loss and gradient are finite; else nothing changes.
    """
    clipped, norm = optim.clip_grad_norm(grads, max_norm)
    mx.eval(clipped, norm, measured)
    length = cast(float, norm.item())
    if not np.isfinite(length) or not np.isfinite(measured["loss"].item()):
        return length, False
    step(model, optimizer, clipped, lora_plus)
    mx.eval(model.trainable_parameters(), optimizer.state)
    return length, True


def step(model: nn.Module, optimizer: optim.Optimizer, grads: Any, lora_plus: float = 1.0) -> None:
    """One optimizer step in the distance from the adapter's start, which weight decay pulls to.

    The start is zero unless the init moved the model: there plain decay would undo what the init
    put in. `lora_plus` is the learning rate of every lora_b over that of lora_a (LoRA+, arXiv
    2402.12354): whatever the optimizer, B's step is that much longer. Curves of splines do not
    decay: their regulariser is added to the gradients here, for every loss alike.
    """
    grads = pulled(model, grads)
    start, now = start_of(model) | undecayed(model), model.trainable_parameters()
    before = tree_map_with_path(lambda n, x: x - start[n] if n in start else x, now)
    after = dict(tree_flatten(optimizer.apply_gradients(grads, before)))

    def longer(name: str, old: mx.array, distance: mx.array) -> mx.array:
        ratio = lora_plus if name.endswith(".lora_b") else 1.0
        if ratio == 1 and name not in start:
            return after[name]
        return old + ratio * (after[name] - distance)

    model.update(tree_map_with_path(longer, now, before))


def module_norms(grads: Any) -> dict[str, float]:
    """L2 norm of the gradient of each module, its factors together."""
    squares: dict[str, list[mx.array]] = {}
    g: Any
    for name, g in tree_flatten(grads):
        squares.setdefault(name.rpartition(".")[0], []).append(mx.square(g).sum())
    norms_M = np.array(mx.sqrt(mx.stack([mx.stack(s).sum() for s in squares.values()])))
    return dict(zip(squares, norms_M.tolist(), strict=True))


def gradient_health(norms: Mapping[str, float]) -> dict[str, float]:
    """How the gradient is spread over modules: how many have none, and the largest one's share."""
    squares_M = np.square(list(norms.values()))
    total = float(squares_M.sum())
    shared = 0 < total < np.inf
    return {
        "grad_dead_modules": float((squares_M == 0).sum()),
        "grad_largest_share": float(squares_M.max() / total) if shared else 0.0,
    }


def trainable_count(model: nn.Module) -> int:
    return sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
