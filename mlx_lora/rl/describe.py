"""What a step's rollouts look like, as metrics, before any learning."""

from collections.abc import Sequence

import numpy as np

from mlx_lora.optimizers import Metrics
from mlx_lora.rl.advantages import zero_variance
from mlx_lora.types import Group


def describe(groups: Sequence[Group], rewards_PG: np.ndarray) -> Metrics:
    """What the rollouts look like, before any learning."""
    rows = [r for g in groups for r in g.rollouts]
    lengths = np.array([len(r.ids) for r in rows])
    reasons = [r.reason for g in groups for r in g.rewards]
    return {
        "reward": float(rewards_PG.mean()),
        "reward_std": float(rewards_PG.std()),
        "accuracy": float(np.mean([r == "correct" for r in reasons])),
        "groups_without_signal": float(zero_variance(rewards_PG).mean()),
        "completion_tokens": float(lengths.mean()),
        "truncated": float(np.mean([not r.finished for r in rows])),
        "empty": float(np.mean([not r.text.strip() for r in rows])),
        "sampled_logp": float(np.mean([np.mean(r.logps) for r in rows])),
        "tokens_sampled": int(lengths.sum()),
    }
