"""Contracts over the advantage table, and values worked by hand."""

import numpy as np
import pytest

from mlx_lora.errors import ConfigError
from mlx_lora.rl.advantages import advantages, overlong, zero_variance

SIX = np.array([[1.0, 0.0, 0.5], [1.0, 1.0, 1.0]])  # a group with a spread, one without


@pytest.mark.parametrize("name", list(advantages))
def test_advantage_contract(name):
    function = advantages.bind(name, {})
    rewards_PG = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.25, 0.75, 0.5]])
    found_PG = function(rewards_PG)
    assert found_PG.shape == rewards_PG.shape
    assert found_PG.sum() == pytest.approx(0), "better than usual and worse cancel"
    for found_G, rewards_G in zip(found_PG, rewards_PG, strict=True):
        above_GG = rewards_G[:, None] > rewards_G
        assert (found_G[:, None] > found_G)[above_GG].all(), "more reward, more advantage"
    assert np.allclose(function(rewards_PG + 3), found_PG), "only differences count"
    tenfold_PG = function(10 * rewards_PG)
    factor = tenfold_PG[0, 0] / found_PG[0, 0]
    assert np.allclose(tenfold_PG, factor * found_PG, rtol=1e-2), "one factor for all"


@pytest.mark.parametrize("name", list(advantages))
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-9, 1 / 3, 1e6])
def test_no_spread_is_no_advantage_to_the_bit(name, value):
    """Ten times 0.1 is not quite 1: what the mean leaves must not be blown up by a zero std."""
    found_PG = advantages.bind(name, {})(np.full((3, 10), value))
    assert (found_PG == 0).all()


BY_HAND = {
    # group mean 0.5
    "group_mean": [[0.5, -0.5, 0.0], [0, 0, 0]],
    # ... over the std of the group, sqrt((0.25 + 0.25 + 0) / 3) = 0.408248
    "group_std": [[1.224745, -1.224745, 0.0], [0, 0, 0]],
    # 1 - (0 + 0.5) / 2, 0 - (1 + 0.5) / 2, 0.5 - (1 + 0) / 2
    "leave_one_out": [[0.75, -0.75, 0.0], [0, 0, 0]],
    # group_mean over the std of all six: mean 0.75, squares 4 · 0.0625 + 0.5625 + 0.0625 = 0.875,
    # sqrt(0.875 / 6) = 0.381881
    "batch_std": [[1.309307, -1.309307, 0.0], [0, 0, 0]],
    # (reward - 0.75) / 0.381881
    "batch_normalised": [[0.654654, -1.963961, -0.654654], [0.654654] * 3],
}


@pytest.mark.parametrize("name", list(advantages))
def test_six_numbers_by_hand(name):
    given = {"epsilon": 0.0} if name in ("group_std", "batch_std", "batch_normalised") else {}
    with np.errstate(invalid="ignore"):  # without an epsilon the second group is 0 / 0 in group_std
        found_PG = advantages.bind(name, given)(SIX)
    rows = [0] if name == "group_std" else [0, 1]
    assert np.allclose(found_PG[rows], np.array(BY_HAND[name])[rows], atol=1e-6)


def test_a_group_without_a_spread_is_seen():
    assert zero_variance(SIX).tolist() == [False, True]


def test_one_rollout_has_no_others_to_be_compared_with():
    with pytest.raises(ConfigError, match=r"leave_one_out .* grpo.group_size"):
        advantages.bind("leave_one_out", {})(np.ones((2, 1)))


def test_the_overlong_penalty_by_hand():
    """Limit 10, buffer 4: free up to 6, then a quarter a token (DAPO, eq. 13)."""
    found = overlong(np.array([[1, 6, 7, 8, 9, 10]]), 10, 4)
    assert np.allclose(found, [[0, 0, -0.25, -0.5, -0.75, -1]])
    assert (overlong(np.array([[1, 10]]), 10, 0) == 0).all()
