"""Contracts over the loss table, and values worked by hand."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.registry import options
from mlx_lora.rl.importance import effective, sequence, token, ways
from mlx_lora.rl.losses import k3, losses
from mlx_lora.types import Batch, Whole

LOGPS = mx.log(mx.array([[0.5, 0.25, 0.5], [0.2, 0.5, 0.5]]))
WHOLE = Whole(rows=2, tokens=4, max_tokens=8)
BATCH = Batch(
    logps_BT=LOGPS,
    old_logps_BT=LOGPS,
    weights_BT=mx.ones((2, 3)),
    advantages_B=mx.array([1.0, -0.5]),
    mask_BT=mx.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
    whole=WHOLE,
)
UNCLIPPED = ("reinforce",)


def value_of(name, batch, **given):
    said = losses.bind(name, given)(batch)
    return -(mx.where(batch.mask_BT > 0, said.value_BT, 0) * said.share_BT).sum()


def gradient_of(name, batch, **given):
    """Of the loss with respect to the log-probabilities, [B, T]."""
    return mx.grad(lambda x: value_of(name, replace(batch, logps_BT=x), **given))(batch.logps_BT)


def off_policy() -> Batch:
    """Six numbers: ratios 1.5, 1, 1 and 0.5 (two of padding), advantages 1 and -0.5."""
    ratio = mx.array([[1.5, 1.0, 1.0], [0.5, 1.0, 1.0]])
    return replace(BATCH, old_logps_BT=LOGPS - mx.log(ratio))


def random_batch(rows=5, width=4, seed=0) -> Batch:
    """Off policy on both sides, some of it beyond any clip."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, width + 1, rows)
    mask = (np.arange(width) < lengths[:, None]).astype(np.float32)
    logps = np.log(draw.uniform(0.05, 0.9, (rows, width)))
    return Batch(
        mx.array(logps.astype(np.float32)),
        mx.array((logps - draw.normal(0, 0.3, (rows, width))).astype(np.float32)),
        mx.array(draw.uniform(0.5, 2.0, (rows, width)).astype(np.float32)),
        mx.array(draw.normal(0, 1, rows).astype(np.float32)),
        mx.array(mask),
        Whole(rows, int(mask.sum()), 2 * width),
    )


@pytest.mark.parametrize("name", list(losses))
def test_loss_contract(name):
    grad_BT = gradient_of(name, BATCH)
    assert (grad_BT * (1 - BATCH.mask_BT) == 0).all().item(), "padding must not train"
    assert mx.array_equal(mx.sign(grad_BT[:, 0]), -mx.sign(BATCH.advantages_B)), "wrong direction"
    still_BT = gradient_of(name, replace(random_batch(), advantages_B=mx.zeros(5)))
    assert (still_BT == 0).all().item(), "zero advantage must not train"
    metrics = losses.bind(name, {})(BATCH).metrics
    assert {k: v.item() for k, v in metrics.items()} == {
        "clip_ratio_low": 0.0,
        "clip_ratio_high": 0.0,
        "clip_ratio": 0.0,
    }


@pytest.mark.parametrize("name", list(losses))
def test_on_policy_every_loss_is_minus_advantage_times_share(name):
    """At ratio 1 the gradient by log p is -A · weight · share: REINFORCE, whatever the clip."""
    batch = random_batch()
    batch = replace(batch, old_logps_BT=batch.logps_BT, weights_BT=mx.full((5, 4), 0.7))
    share_BT = losses.bind(name, {})(batch).share_BT
    expected = -0.7 * batch.advantages_B[:, None] * share_BT
    assert mx.allclose(gradient_of(name, batch), expected, atol=1e-7)


@pytest.mark.parametrize("name", list(losses))
def test_parts_add_up_to_the_whole(name):
    batch = random_batch()
    whole, grad_BT = value_of(name, batch), gradient_of(name, batch)
    metrics = losses.bind(name, {})(batch).metrics
    parts = [part_of(batch, rows) for rows in ([0, 3], [1], [2, 4])]
    assert sum(value_of(name, p).item() for p in parts) == pytest.approx(whole.item(), abs=1e-6)
    for rows, part in zip(([0, 3], [1], [2, 4]), parts, strict=True):
        assert mx.allclose(gradient_of(name, part), grad_BT[mx.array(rows)], atol=1e-7)
    for key, value in metrics.items():
        several = sum(losses.bind(name, {})(p).metrics[key].item() for p in parts)
        assert several == pytest.approx(value.item(), abs=1e-6), key


def part_of(batch: Batch, rows) -> Batch:
    at = mx.array(rows)
    names = ("logps_BT", "old_logps_BT", "weights_BT", "advantages_B", "mask_BT")
    return replace(batch, **{n: getattr(batch, n)[at] for n in names})


@pytest.mark.parametrize("name", list(losses))
def test_a_masked_row_trains_nothing(name):
    batch = random_batch()
    keep = mx.array([1.0, 1.0, 0.0, 1.0, 1.0])[:, None]
    weightless = gradient_of(name, replace(batch, weights_BT=batch.weights_BT * keep))
    maskless = gradient_of(name, replace(batch, mask_BT=batch.mask_BT * keep))
    assert (weightless[2] == 0).all().item() and (maskless[2] == 0).all().item()
    assert (weightless[0] != 0).any().item()


@pytest.mark.parametrize("name", list(losses))
def test_the_gradient_grows_with_the_rewards(name):
    batch = random_batch()
    twice = replace(batch, advantages_B=2 * batch.advantages_B)
    assert mx.allclose(gradient_of(name, twice), 2 * gradient_of(name, batch), atol=1e-6)


@pytest.mark.parametrize("name", list(losses))
@pytest.mark.parametrize("wild", [1e4, -1e4, float("inf"), float("nan")])
def test_nothing_in_the_padding_reaches_the_loss(name, wild):
    wild_BT = mx.where(BATCH.mask_BT > 0, LOGPS, wild)
    batch = replace(BATCH, logps_BT=wild_BT)
    assert value_of(name, batch).item() == value_of(name, BATCH).item()
    assert mx.array_equal(gradient_of(name, batch), gradient_of(name, BATCH))


@pytest.mark.parametrize("name", list(losses))
def test_a_token_far_from_where_it_was_has_a_finite_gradient(name):
    for shift in (200.0, -200.0):
        batch = replace(BATCH, old_logps_BT=LOGPS - shift)
        assert mx.isfinite(gradient_of(name, batch)).all().item()


@pytest.mark.parametrize("name", [n for n in losses if n not in UNCLIPPED])
def test_beyond_the_clip_a_token_adds_no_more(name):
    """With a positive advantage, a ratio of e² and one of e³ pull alike: not at all, or capped."""
    high = options(losses[name])["clip_high"]

    def pull(log_ratio):
        batch = replace(BATCH, old_logps_BT=LOGPS - log_ratio * BATCH.mask_BT)
        return gradient_of(name, batch, clip_high=high)[0]

    assert mx.allclose(pull(2.0), pull(3.0), atol=1e-6)
    assert not mx.allclose(pull(0.0), pull(2.0), atol=1e-3)


BY_HAND = {
    # dapo, 2503.14476: clip [0.8, 1.28], mean over 4 tokens.
    # Row 1: min(1.5, 1.28) + 1 + 1 = 3.28. Row 2: min(0.5·-0.5, 0.8·-0.5) = -0.4.
    "dapo": -(3.28 - 0.4) / 4,
    # grpo, 2402.03300: clip [0.8, 1.2], mean of a row, then over 2 rows. Row 1: 3.2 / 3.
    "grpo": -(3.2 / 3 - 0.4) / 2,
    # dr_grpo, 2503.20783: the same sums over 2 rows of 8 places each.
    "dr_grpo": -(3.2 - 0.4) / 16,
    # gspo, 2507.18071: ratios (1.5·1·1)^(1/3) = 1.1447 and 0.5; clip [0.9997, 1.0004].
    # Row 1: min(1.1447, 1.0004) · 1. Row 2: min(0.5·-0.5, 0.9997·-0.5).
    "gspo": -(1.0004 - 0.49985) / 2,
    # cispo, 2506.13585: ratio · A · ln p; none is above 5. Mean over 4 tokens.
    # Row 1: 1.5 ln 0.5 + ln 0.25 + ln 0.5. Row 2: 0.5 · -0.5 · ln 0.2.
    "cispo": -(1.5 * math.log(0.5) + math.log(0.25) + math.log(0.5) - 0.25 * math.log(0.2)) / 4,
    # reinforce, 2402.14740: ratio · A, sum of a row, mean of 2 rows: 3.5 and 0.5·-0.5.
    "reinforce": -(3.5 - 0.25) / 2,
}


@pytest.mark.parametrize("name", list(losses))
def test_six_numbers_by_hand(name):
    assert value_of(name, off_policy()).item() == pytest.approx(BY_HAND[name], abs=1e-6)


def test_gradients_by_hand():
    """By ln p, of the same six numbers: what is clipped is 0, the rest -ratio · A · share."""
    close = {"atol": 1e-6}
    assert np.allclose(gradient_of("dapo", off_policy()), [[0, -0.25, -0.25], [0, 0, 0]], **close)
    assert np.allclose(
        gradient_of("cispo", off_policy()), [[-0.375, -0.25, -0.25], [0.0625, 0, 0]], **close
    )
    # a wide clip lets gspo's ratio through: s · A · 1/|o| · 1/rows for each token of the row
    s = 1.5 ** (1 / 3)
    wide = gradient_of("gspo", off_policy(), clip_low=0.9, clip_high=9.0)
    assert np.allclose(wide, [[-s / 6] * 3, [0.125, 0, 0]], **close)


def test_cispo_caps_the_ratio_and_loses_no_token():
    capped = gradient_of("cispo", off_policy(), clip_high=1.2)
    assert np.allclose(capped, [[-0.3, -0.25, -0.25], [0.0625, 0, 0]], atol=1e-6)


def test_what_was_clipped_is_counted_on_the_side_where_it_matters():
    """Row 1 is above with A > 0, row 2 below with A < 0; the other way round nothing is clipped."""
    metrics = losses.bind("dapo", {})(off_policy()).metrics
    assert metrics["clip_ratio_high"].item() == metrics["clip_ratio_low"].item() == 0.25
    assert metrics["clip_ratio"].item() == 0.5
    other = replace(off_policy(), advantages_B=-BATCH.advantages_B)
    assert losses.bind("dapo", {})(other).metrics["clip_ratio"].item() == 0.0


def test_sampler_weights_are_truncated_by_token_or_drop_the_row():
    """Learner over sampler: 3, 0.5 | 1.25, 1.25 (1.5625 together) | 2, 2 (4 together)."""
    gap = mx.log(mx.array([[3.0, 0.5], [1.25, 1.25], [2.0, 2.0]]))
    assert np.allclose(token(gap, 2.0), [[2, 0.5], [1.25, 1.25], [2, 2]], atol=1e-6)
    expected = [[1.5, 1.5], [1.5625, 1.5625], [0, 0]]
    assert np.allclose(sequence(gap, 2.0), expected, atol=1e-6)
    assert (ways["none"](gap, 2.0) == 1).all().item()
    assert np.allclose(sequence(mx.full((1, 2), 80.0), 2.0), 0), "an overflow is above the cap"


def test_effective_sample_size_by_hand():
    """Weights 2, 1, 1, 0: (Σw)² / (n Σw²) = 16 / (4 · 6)."""
    assert effective(4 / 4, 6 / 4) == pytest.approx(2 / 3)
    assert effective(1.0, 1.0) == 1.0 and effective(0.0, 0.0) == 0.0


def test_k3_is_zero_on_equal_and_positive_otherwise():
    assert k3(LOGPS, LOGPS).max().item() == 0.0
    assert (k3(LOGPS, LOGPS - 0.3) > 0).all().item()
