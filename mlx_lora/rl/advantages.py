"""From the rewards of a group to advantages. Functions of rewards [P, G], returning [P, G]."""

from collections.abc import Callable

import numpy as np

from mlx_lora.registry import Table

advantages: Table[Callable[..., np.ndarray]] = Table("advantage")


@advantages.add
def group_mean(rewards_PG: np.ndarray) -> np.ndarray:
    """Reward minus its group's mean, no division by the std. Source: Dr. GRPO, arXiv 2503.20783.

    >>> group_mean(np.array([[1.0, 0.0]]))
    array([[ 0.5, -0.5]])
    """
    return rewards_PG - rewards_PG.mean(axis=1, keepdims=True)


@advantages.add
def group_std(rewards_PG: np.ndarray, *, epsilon: float = 1e-4) -> np.ndarray:
    """group_mean over the std: up-weights easy and hard prompts. Source: GRPO, arXiv 2402.03300.

    >>> group_std(np.array([[1.0, 0.0]])).round(2)
    array([[ 1., -1.]])
    """
    return group_mean(rewards_PG) / (rewards_PG.std(axis=1, keepdims=True) + epsilon)


def zero_variance(rewards_PG: np.ndarray) -> np.ndarray:
    """[P] True where every member earned the same: such a group has nothing to teach."""
    return np.ptp(rewards_PG, axis=1) == 0
