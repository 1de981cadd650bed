"""Sampler and learner disagree a little about the same tokens: how much, and its correction.

The tokens were drawn by a cached decode and are scored by a full forward; top-p and top-k change
the distribution further. Truncated importance sampling weighs a token by what the learner gives it
over what it was drawn with. Source: the mismatch notes of verl and TRL's sequence_mask.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_lora.types import Whole

Weigh = Callable[[mx.array, float], mx.array]  # (gap_BT, cap) -> weights_BT


def none(gap_BT: mx.array, cap: float) -> mx.array:
    """Every token counts as it is."""
    return mx.ones_like(gap_BT)


def token(gap_BT: mx.array, cap: float) -> mx.array:
    """min(ratio, cap) for each token by itself.

    >>> token(mx.log(mx.array([[3.0, 0.5]])), 2.0).tolist()
    [[2.0, 0.5]]
    """
    return mx.minimum(mx.exp(gap_BT), cap)


def sequence(gap_BT: mx.array, cap: float) -> mx.array:
    """The ratio of the whole row, and 0 above the cap: such a row does not train.

    >>> sequence(mx.log(mx.array([[1.25, 1.25], [2.0, 2.0]])), 2.0).tolist()
    [[1.5625, 1.5625], [0.0, 0.0]]
    """
    ratio_B1 = mx.exp(gap_BT.sum(axis=1, keepdims=True))
    return mx.broadcast_to(mx.where(ratio_B1 <= cap, ratio_B1, 0.0), gap_BT.shape)


ways: dict[str, Weigh] = {"token": token, "sequence": sequence, "none": none}


def mismatch(
    gap_BT: mx.array, weights_BT: mx.array, mask_BT: mx.array, whole: Whole
) -> dict[str, mx.array]:
    """Metrics of one part of an update; `gap_BT` is ln(learner / sampler), 0 on padding."""
    share_BT = mask_BT / whole.tokens
    real_BT = mask_BT > 0
    return {
        "mismatch_kl": ((mx.exp(gap_BT) - 1 - gap_BT) * share_BT).sum(),
        "mismatch_max": mx.abs(gap_BT).max(),
        "is_weight_mean": (weights_BT * share_BT).sum(),
        "is_weight_min": mx.where(real_BT, weights_BT, mx.inf).min(),
        "is_weight_max": mx.where(real_BT, weights_BT, 0.0).max(),
        "is_weight_square": (weights_BT * weights_BT * share_BT).sum(),
    }


def effective(mean: float, mean_square: float) -> float:
    """Effective sample size over sample size: (Σw)² / (n·Σw²), 1 where all weights are equal.

    Source: Kish, Survey Sampling, 1965.

    >>> effective(0.5, 0.5)  # half of the weights are 0
    0.5
    """
    return mean * mean / mean_square if mean_square else 0.0
