"""Contracts over the loss and advantage tables, and values worked by hand."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.rl.advantages import advantages, zero_variance
from mlx_lora.rl.losses import k3, losses
from mlx_lora.types import Batch

LOGPS = mx.log(mx.array([[0.5, 0.25, 0.5], [0.2, 0.5, 0.5]]))
BATCH = Batch(
    logps_BT=LOGPS,
    old_logps_BT=LOGPS,
    sampler_logps_BT=LOGPS,
    ref_logps_BT=None,
    advantages_B=mx.array([1.0, -0.5]),
    mask_BT=mx.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
)


@pytest.mark.parametrize("name", list(losses))
def test_loss_contract(name):
    loss = losses.bind(name, {})

    def value(logps_BT, advantages_B=BATCH.advantages_B):
        return loss(replace(BATCH, logps_BT=logps_BT, advantages_B=advantages_B))[0]

    grad_BT = mx.grad(value)(LOGPS)
    assert (grad_BT * (1 - BATCH.mask_BT) == 0).all().item(), "padding must not train"
    assert mx.array_equal(mx.sign(grad_BT[:, 0]), -mx.sign(BATCH.advantages_B)), "wrong direction"
    still_BT = mx.grad(lambda x: value(x, 0 * BATCH.advantages_B))(LOGPS)
    assert (still_BT == 0).all().item(), "zero advantage must not train"
    metrics = loss(BATCH)[1]
    assert metrics["clip_fraction"].item() == metrics["mismatch_kl"].item() == 0.0


@pytest.mark.parametrize("name", list(losses))
def test_nothing_in_the_padding_can_overflow(name):
    wild = mx.where(BATCH.mask_BT > 0, LOGPS, 1e4)
    value, _ = losses.bind(name, {})(replace(BATCH, logps_BT=wild))
    assert mx.isfinite(value).item()


def test_dapo_by_hand():
    """Ratios 1.5, 1, 1 | 0.5; advantages 1, -0.5; clip [0.8, 1.28]; mean over 4 tokens.

    Row 1: min(1.5, 1.28) + 1 + 1 = 3.28. Row 2: min(0.5·-0.5, 0.8·-0.5) = -0.4. -(3.28 - 0.4) / 4.
    """
    value, metrics = losses.bind("dapo", {})(off_policy())
    assert value.item() == pytest.approx(-0.72, abs=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(0.5)


def test_grpo_by_hand():
    """Same ratios, clip [0.8, 1.2], mean per row, then over rows (arXiv 2402.03300).

    Row 1: (1.2 + 1 + 1) / 3. Row 2: -0.4. -(1.066667 - 0.4) / 2.
    """
    value, _ = losses.bind("grpo", {})(off_policy())
    assert value.item() == pytest.approx(-(3.2 / 3 - 0.4) / 2, abs=1e-6)


def off_policy() -> Batch:
    ratio = mx.array([[1.5, 1.0, 1.0], [0.5, 1.0, 1.0]])
    return replace(
        BATCH, old_logps_BT=LOGPS - mx.log(ratio), sampler_logps_BT=LOGPS - mx.log(ratio)
    )


def test_sampler_weight_is_truncated():
    """The learner finds a drawn token 3 times likelier than the sampler did: weight 2, not 3."""
    sampler = LOGPS - mx.log(mx.array([[3.0, 1.0, 1.0], [1.0, 1.0, 1.0]]))
    value, metrics = losses.bind("dapo", {})(replace(BATCH, sampler_logps_BT=sampler))
    assert value.item() == pytest.approx(-(2 + 1 + 1 - 0.5) / 4, abs=1e-6)
    assert metrics["mismatch_max"].item() == pytest.approx(np.log(3), abs=1e-6)


def test_k3_is_zero_on_equal_and_positive_otherwise():
    assert k3(LOGPS, LOGPS).max().item() == 0.0
    assert (k3(LOGPS, LOGPS - 0.3) > 0).all().item()


@pytest.mark.parametrize("name", list(advantages))
def test_advantage_contract(name):
    rewards_PG = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    found_PG = advantages.bind(name, {})(rewards_PG)
    assert found_PG.shape == rewards_PG.shape
    assert np.allclose(found_PG.sum(axis=1), 0), "a group's advantages sum to zero"
    assert (found_PG[0] * (rewards_PG[0] - 0.5) > 0).all(), "better than the group is positive"
    assert (found_PG[1] == 0).all() and np.isfinite(found_PG).all(), "no spread, no signal"
    assert zero_variance(rewards_PG).tolist() == [False, True]
