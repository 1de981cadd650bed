"""What goes wrong in an RL run, named while it happens: a watcher is a function of the history."""

from collections.abc import Callable, Sequence

import numpy as np

from mlx_lora.registry import Table
from mlx_lora.types import Finding

History = Sequence[dict[str, float]]
watchers: Table[Callable[..., Finding | None]] = Table("alert")


def recent(history: History, key: str, window: int) -> float | None:
    """Mean of a metric over the last steps that logged it; None before there are enough."""
    values = [h[key] for h in history if key in h]
    return float(np.mean(values[-window:])) if len(values) >= window else None


def best(history: History, key: str, window: int) -> float:
    """The highest running mean so far."""
    values = [h[key] for h in history if key in h]
    width = min(window, max(1, len(values) - window))  # what came before the latest window
    means = np.convolve(values, np.ones(width) / width, "valid") if values else [0]
    return float(np.max(means))


@watchers.add
def reward_collapsed(history: History, *, window: int = 5, share: float = 0.5) -> Finding | None:
    """The reward fell below half of its best running mean."""
    now, top = recent(history, "reward", window), best(history, "reward", window)
    if now is None or top < 0.05 or now >= share * top:
        return None
    message = f"the reward's mean over {window} steps fell from {top:.2f} to {now:.2f}"
    action = "Lower the learning rate or the scale, or raise beta; earlier adapters were better."
    return Finding("reward_collapsed", "", message, action)


@watchers.add
def empty_answers(history: History, *, window: int = 3, share: float = 0.5) -> Finding | None:
    """Most completions are empty."""
    now = recent(history, "empty", window)
    if now is None or now <= share:
        return None
    message = f"{now:.0%} of the completions of the last {window} steps are empty"
    return Finding("empty_answers", "", message, "Lower the learning rate and start again.")


@watchers.add
def endless_answers(history: History, *, window: int = 3, share: float = 0.9) -> Finding | None:
    """Nearly every completion runs into max_tokens without ending."""
    now = recent(history, "truncated", window)
    if now is None or now <= share:
        return None
    message = f"{now:.0%} of the completions of the last {window} steps never ended"
    action = "Raise rollout.max_tokens if the text is sound, else lower the learning rate."
    return Finding("endless_answers", "", message, action)


@watchers.add
def no_signal(history: History, *, window: int = 5, share: float = 0.95) -> Finding | None:
    """Nearly every group earned one and the same reward, so there is nothing to learn from."""
    now = recent(history, "groups_without_signal", window)
    if now is None or now <= share:
        return None
    reward = recent(history, "reward", window) or 0.0
    message = f"{now:.0%} of the groups had no spread in their rewards (mean {reward:.2f})"
    easier = "The task is solved: stop, or make it harder."
    harder = "Start from a model that sometimes succeeds (SFT first), or make the task easier."
    if reward < 0.5 * best(history, "reward", window) and reward >= 0:
        harder = "It did succeed before: lower the learning rate and start again."
    return Finding("no_signal", "", message, easier if reward > 0.5 else harder)


@watchers.add
def entropy_collapsed(history: History, *, window: int = 5, share: float = 0.05) -> Finding | None:
    """The policy's entropy fell below a twentieth of where it began: it explores no more."""
    values = [h["entropy"] for h in history if "entropy" in h]
    now = recent(history, "entropy", window)
    if now is None or now >= share * values[0]:
        return None
    message = f"entropy fell from {values[0]:.3f} to {now:.4f} nats per token"
    return Finding("entropy_collapsed", "", message, "Stop here, or lower the learning rate.")


@watchers.add
def kl_runaway(history: History, *, limit: float = 2.0) -> Finding | None:
    """The policy has moved far from its base."""
    values = [h["kl"] for h in history if "kl" in h]
    if not values or values[-1] <= limit:
        return None
    message = f"KL to the base is {values[-1]:.2f} nats per token, above {limit:g}"
    action = "Raise beta or lower the learning rate; of ES raise es.anchor or lower es.step_scale."
    return Finding("kl_runaway", "", message, action)


@watchers.add
def sampler_mismatch(history: History, *, limit: float = 0.01) -> Finding | None:
    """Cached decode and full forward disagree about the sampled tokens."""
    values = [h["mismatch_kl"] for h in history if "mismatch_kl" in h]
    if not values or values[-1] <= limit:
        return None
    message = f"sampler and learner differ by {values[-1]:.3f} nats per token, above {limit:g}"
    action = "Run `mlx-lora doctor`; with top_p or top_k this much is expected."
    return Finding("sampler_mismatch", "", message, action)


@watchers.add
def gradient_vanished(history: History, *, window: int = 5, limit: float = 1e-8) -> Finding | None:
    """The gradient has all but gone, so nothing is learned any more."""
    now = recent(history, "grad_norm", window)
    if now is None or now > limit:
        return None
    message = f"the gradient's mean norm over {window} steps is {now:.1e}"
    action = "Check that the adapter has an effect (`mlx-lora check`), and the rewards a spread."
    return Finding("gradient_vanished", "", message, action)


@watchers.add
def gradient_exploded(history: History, *, window: int = 10, times: float = 100) -> Finding | None:
    """The gradient is many times what it was."""
    norms = [h["grad_norm"] for h in history if "grad_norm" in h]
    if len(norms) <= window or not norms[-1] > times * float(np.median(norms[:-1])):
        return None
    usual = float(np.median(norms[:-1]))
    message = f"the gradient's norm is {norms[-1]:.2g}, its median so far {usual:.2g}"
    return Finding("gradient_exploded", "", message, "Lower the learning rate, or max_grad_norm.")


@watchers.add
def dead_modules(history: History, *, window: int = 2) -> Finding | None:
    """Some modules get no gradient at all."""
    counts = [h["grad_dead_modules"] for h in history if "grad_dead_modules" in h][-window:]
    if len(counts) < window or min(counts) == 0:
        return None
    message = f"{counts[-1]:.0f} modules have had no gradient at the last {window} measurements"
    action = "They cost memory and learn nothing: leave them out with lora_parameters.keys."
    return Finding("dead_modules", "", message, action)


@watchers.add
def overfitting(history: History, *, rises: int = 2, share: float = 0.02) -> Finding | None:
    """The validation loss rises while the training loss falls."""
    valid = [(i, h["valid_loss"]) for i, h in enumerate(history) if "valid_loss" in h]
    best_at, best_loss = min(valid, key=lambda pair: pair[1], default=(0, 0.0))
    after = [loss for at, loss in valid if at > best_at]
    if len(after) < rises or min(after) <= best_loss * (1 + share):
        return None
    since = [h["loss"] for h in history[best_at:] if "loss" in h]
    if len(since) < 2 or since[-1] >= since[0]:
        return None
    message = (
        f"the validation loss was {best_loss:.3f} at step {best_at} and is {after[-1]:.3f}, while "
        f"the training loss fell from {since[0]:.3f} to {since[-1]:.3f}"
    )
    return Finding("overfitting", "", message, "Stop earlier, or train on more examples.")


def fresh(history: History, seen: set[str]) -> list[Finding]:
    """Findings that have not been reported yet in this run."""
    found = [watchers[name](history) for name in watchers]
    new = [f for f in found if f is not None and f.name not in seen]
    seen |= {f.name for f in new}
    return new
