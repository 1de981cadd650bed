"""Policy losses: functions of a Batch, returning an Objective. They never sample or log.

What a token is worth and its share of the update are kept apart: the share is a function of the
whole update, so that gradients of its parts (micro-batches, machines) add up to that of the whole.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_lora.registry import Table
from mlx_lora.types import Batch, Objective

LOG_RATIO = 20.0  # beyond e^20 a ratio is cut, as in verl: it would overflow to NaN gradients

losses: Table[Callable[..., Objective]] = Table("loss")


@losses.add
def dapo(batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Objective:
    """Clipped ratio, higher upper clip, mean over all tokens. Source: DAPO, arXiv 2503.14476."""
    return clipped(batch, ratio(batch), clip_low, clip_high, per_token(batch))


@losses.add
def grpo(batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """Clipped ratio, mean per completion, then over completions. Source: GRPO, arXiv 2402.03300."""
    return clipped(batch, ratio(batch), clip_low, clip_high, per_row(batch))


@losses.add
def dr_grpo(batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """Clipped ratio, sum over a fixed length: no favour for short. Source: arXiv 2503.20783."""
    return clipped(batch, ratio(batch), clip_low, clip_high, per_place(batch))


@losses.add
def gspo(batch: Batch, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """One ratio for a completion, the geometric mean of its tokens'. Source: arXiv 2507.18071."""
    lengths_B1 = mx.maximum(batch.mask_BT.sum(axis=1, keepdims=True), 1)
    mean_B1 = log_ratio(batch).sum(axis=1, keepdims=True) / lengths_B1
    ratio_BT = mx.broadcast_to(mx.exp(mean_B1), batch.mask_BT.shape)
    return clipped(batch, ratio_BT, clip_low, clip_high, per_row(batch))


@losses.add
def cispo(batch: Batch, *, clip_high: float = 5.0) -> Objective:
    """REINFORCE times the ratio, cut at clip_high: no token is lost. Source: arXiv 2506.13585."""
    ratio_BT = mx.stop_gradient(ratio(batch))
    value_BT = mx.minimum(ratio_BT, clip_high) * advantage(batch) * kept(batch.logps_BT, batch)
    high_BT = (ratio_BT > clip_high) & (advantage(batch) > 0)
    return Objective(value_BT, per_token(batch), clips(batch, mx.zeros_like(high_BT), high_BT))


@losses.add
def reinforce(batch: Batch) -> Objective:
    """Ratio without a clip, summed per completion, as RLOO wants it. Source: arXiv 2402.14740.

    At one update per rollout the ratio is 1 and the gradient that of -advantage · log p.
    """
    none_BT = mx.zeros_like(batch.mask_BT)
    value_BT = ratio(batch) * advantage(batch)
    return Objective(value_BT, batch.mask_BT / batch.whole.rows, clips(batch, none_BT, none_BT))


def clipped(
    batch: Batch, ratio_BT: mx.array, low: float, high: float, share_BT: mx.array
) -> Objective:
    """PPO's surrogate: the lower of ratio · advantage and clipped ratio · advantage."""
    advantage_BT = advantage(batch)
    inside_BT = mx.clip(ratio_BT, 1 - low, 1 + high)
    value_BT = mx.minimum(ratio_BT * advantage_BT, inside_BT * advantage_BT)
    low_BT = (ratio_BT < 1 - low) & (advantage_BT < 0)
    high_BT = (ratio_BT > 1 + high) & (advantage_BT > 0)
    return Objective(value_BT, share_BT, clips(batch, low_BT, high_BT))


def clips(batch: Batch, low_BT: mx.array, high_BT: mx.array) -> dict[str, mx.array]:
    """Shares of tokens whose clip is at work, from below and from above."""
    share_BT = per_token(batch)
    low, high = (mx.stop_gradient((x * share_BT).sum()) for x in (low_BT, high_BT))
    return {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio": low + high}


def per_token(batch: Batch) -> mx.array:
    """Every token of the update counts alike: long completions weigh more."""
    return batch.mask_BT / batch.whole.tokens


def per_row(batch: Batch) -> mx.array:
    """Every completion counts alike: a token of a short one weighs more."""
    lengths_B1 = mx.maximum(batch.mask_BT.sum(axis=1, keepdims=True), 1)
    return batch.mask_BT / (lengths_B1 * batch.whole.rows)


def per_place(batch: Batch) -> mx.array:
    """Every place that a token could be at counts alike, taken or not."""
    return batch.mask_BT / (batch.whole.rows * batch.whole.max_tokens)


def ratio(batch: Batch) -> mx.array:
    """Policy over old policy, [B, T]; 1 on padding."""
    return mx.exp(log_ratio(batch))


def log_ratio(batch: Batch) -> mx.array:
    """ln(policy / old policy), [B, T], cut at ±LOG_RATIO; 0 on padding."""
    return mx.clip(kept(batch.logps_BT - batch.old_logps_BT, batch), -LOG_RATIO, LOG_RATIO)


def advantage(batch: Batch) -> mx.array:
    """The row's advantage, corrected for the sampler's distribution, [B, T]."""
    return batch.weights_BT * batch.advantages_B[:, None]


def kept(x_BT: mx.array, batch: Batch) -> mx.array:
    """0 on padding, which may hold anything: even inf · 0 would be NaN."""
    return mx.where(batch.mask_BT > 0, x_BT, 0.0)


def k3(logps_BT: mx.array, ref_logps_BT: mx.array) -> mx.array:
    """Per-token KL(policy || reference) estimate on the policy's own tokens, >= 0, in nats.

    Source: Schulman, "Approximating KL divergence" (k3): r - 1 - log r with r = ref / policy.
    """
    gap_BT = ref_logps_BT - logps_BT
    return mx.exp(gap_BT) - 1 - gap_BT


def masked_mean(x_BT: mx.array, mask_BT: mx.array) -> mx.array:
    """Mean over the tokens that count; 0 when none does."""
    return (x_BT * mask_BT).sum() / mx.maximum(mask_BT.sum(), 1)
