"""Policy losses: functions of a Batch, returning a scalar and metrics. They never sample or log."""

from collections.abc import Callable

import mlx.core as mx

from mlx_lora.registry import Table
from mlx_lora.types import Batch

losses: Table[Callable[..., tuple[mx.array, dict[str, mx.array]]]] = Table("loss")


@losses.add
def dapo(
    batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.28, is_cap: float = 2.0
) -> tuple[mx.array, dict[str, mx.array]]:
    """Clipped ratio, higher upper clip, mean over all tokens. Source: DAPO, arXiv 2503.14476."""
    objective_BT, metrics = clipped(batch, clip_low, clip_high, is_cap)
    return -masked_mean(objective_BT, batch.mask_BT), metrics


@losses.add
def grpo(
    batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.2, is_cap: float = 2.0
) -> tuple[mx.array, dict[str, mx.array]]:
    """Clipped ratio, mean per completion, then over completions. Source: GRPO, arXiv 2402.03300."""
    objective_BT, metrics = clipped(batch, clip_low, clip_high, is_cap)
    per_row_B = (objective_BT * batch.mask_BT).sum(axis=1) / mx.maximum(
        batch.mask_BT.sum(axis=1), 1
    )
    return -per_row_B.mean(), metrics


def clipped(
    batch: Batch, low: float, high: float, is_cap: float
) -> tuple[mx.array, dict[str, mx.array]]:
    """The clipped surrogate [B, T], weighted by the truncated sampler ratio, and what was clipped.

    The sampler ratio min(exp(old - sampler), is_cap) corrects for tokens drawn by the cached decode
    and scored by a full forward. Padding is masked before the exponential, so it cannot overflow.
    """
    mask_BT = batch.mask_BT
    ratio_BT = mx.exp((batch.logps_BT - batch.old_logps_BT) * mask_BT)
    gap_BT = mx.stop_gradient((batch.old_logps_BT - batch.sampler_logps_BT) * mask_BT)
    weight_BT = mx.minimum(mx.exp(gap_BT), is_cap)
    advantage_BT = weight_BT * batch.advantages_B[:, None]
    inside_BT = mx.clip(ratio_BT, 1 - low, 1 + high)
    objective_BT = mx.minimum(ratio_BT * advantage_BT, inside_BT * advantage_BT)
    metrics = {
        "clip_fraction": masked_mean((ratio_BT != inside_BT).astype(mx.float32), mask_BT),
        "mismatch_kl": masked_mean(mx.exp(gap_BT) - 1 - gap_BT, mask_BT),
        "mismatch_max": mx.abs(gap_BT).max(),
    }
    return objective_BT, metrics


def k3(logps_BT: mx.array, ref_logps_BT: mx.array) -> mx.array:
    """Per-token KL(policy || reference) estimate on the policy's own tokens, >= 0, in nats.

    Source: Schulman, "Approximating KL divergence" (k3): r - 1 - log r with r = ref / policy.
    """
    gap_BT = ref_logps_BT - logps_BT
    return mx.exp(gap_BT) - 1 - gap_BT


def masked_mean(x_BT: mx.array, mask_BT: mx.array) -> mx.array:
    """Mean over the tokens that count; 0 when none does."""
    return (x_BT * mask_BT).sum() / mx.maximum(mask_BT.sum(), 1)
