"""From the rewards of a group to advantages. Functions of rewards [P, G], returning [P, G].

Where there is no spread to divide by, advantages are 0 to the bit, not rounding noise blown up.
"""

from collections.abc import Callable

import numpy as np

from mlx_lora.errors import ConfigError
from mlx_lora.registry import Table

advantages: Table[Callable[..., np.ndarray]] = Table("advantage")


@advantages.add
def group_mean(rewards_PG: np.ndarray) -> np.ndarray:
    """Reward minus its group's mean, no division by the std. Source: Dr. GRPO, arXiv 2503.20783.

    >>> group_mean(np.array([[1.0, 0.0]]))
    array([[ 0.5, -0.5]])
    """
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    return np.where(zero_variance(rewards_PG)[:, None], 0.0, centred_PG)


@advantages.add
def group_std(rewards_PG: np.ndarray, *, epsilon: float = 1e-4) -> np.ndarray:
    """group_mean over the std: up-weights easy and hard prompts. Source: GRPO, arXiv 2402.03300.

    >>> group_std(np.array([[1.0, 0.0]])).round(2)
    array([[ 1., -1.]])
    """
    return group_mean(rewards_PG) / (rewards_PG.std(axis=1, keepdims=True) + epsilon)


@advantages.add
def leave_one_out(rewards_PG: np.ndarray) -> np.ndarray:
    """Reward minus the mean of the others in its group. Source: RLOO, arXiv 2402.14740.

    >>> leave_one_out(np.array([[1.0, 0.0, 0.0]]))
    array([[ 1. , -0.5, -0.5]])
    """
    group = rewards_PG.shape[1]
    if group < 2:
        raise ConfigError(
            "advantage leave_one_out compares a rollout with the others of its group: give "
            "grpo.group_size 2 or more"
        )
    return group_mean(rewards_PG) * group / (group - 1)


@advantages.add
def batch_std(rewards_PG: np.ndarray, *, epsilon: float = 1e-4) -> np.ndarray:
    """group_mean over the std of all rewards: one scale for all. Source: Lite PPO, 2508.08221.

    >>> batch_std(np.array([[1.0, 0.0], [0.5, 0.5]])).round(2)
    array([[ 1.41, -1.41],
           [ 0.  ,  0.  ]])
    """
    return group_mean(rewards_PG) / (rewards_PG.std() + epsilon)


@advantages.add
def batch_normalised(rewards_PG: np.ndarray, *, epsilon: float = 1e-4) -> np.ndarray:
    """Reward minus the mean of all rewards, over their std. Source: REINFORCE++, 2501.03262.

    The baseline is the batch, so that a group without a spread has advantages, too.

    >>> batch_normalised(np.array([[1.0, 1.0], [0.0, 0.0]])).round(2)
    array([[ 1.,  1.],
           [-1., -1.]])
    """
    if np.ptp(rewards_PG) == 0:
        return np.zeros_like(rewards_PG)
    return (rewards_PG - rewards_PG.mean()) / (rewards_PG.std() + epsilon)


def zero_variance(rewards_PG: np.ndarray) -> np.ndarray:
    """[P] True where every member earned the same: its members teach nothing about each other."""
    return np.ptp(rewards_PG, axis=1) == 0


def overlong(lengths_PG: np.ndarray, max_tokens: int, buffer: int) -> np.ndarray:
    """Penalty from 0 at `buffer` tokens before the limit to -1 at it. Source: DAPO, eq. 13.

    >>> overlong(np.array([[6, 8, 9, 10]]), max_tokens=10, buffer=4)
    array([[ 0.  , -0.5 , -0.75, -1.  ]])
    """
    if not buffer:
        return np.zeros(lengths_PG.shape)
    return np.clip((max_tokens - buffer - lengths_PG) / buffer, -1.0, 0.0)
