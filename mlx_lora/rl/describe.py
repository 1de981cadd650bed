"""What a step's rollouts look like, as metrics, before any learning."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mlx_lora.optimizers import Metrics
from mlx_lora.rl.advantages import zero_variance
from mlx_lora.types import CORRECT, SCORED, Group

REASONS = 20  # logged one by one; the rest of a step's is `reason/other`


def describe(groups: Sequence[Group], rewards_PG: np.ndarray) -> Metrics:
    """What the rollouts look like, before any learning."""
    rows = [r for g in groups for r in g.rollouts]
    lengths = np.array([len(r.ids) for r in rows])
    finished = [len(r.ids) for r in rows if r.finished]
    found: Metrics = {
        "reward": float(rewards_PG.mean()),
        "reward_std": float(rewards_PG.std()),
        "groups_without_signal": float(zero_variance(rewards_PG).mean()),
        "completion_tokens": float(lengths.mean()),
        "completion_tokens_min": int(lengths.min()),
        "completion_tokens_max": int(lengths.max()),
        "truncated": float(np.mean([not r.finished for r in rows])),
        "empty": float(np.mean([not r.text.strip() for r in rows])),
        "distinct_answers": float(np.mean([distinct(g) for g in groups])),
        "sampled_logp": float(np.mean([np.mean(r.logps) for r in rows])),
        "tokens_sampled": int(lengths.sum()),
    }
    if finished:
        found["finished_tokens"] = float(np.mean(finished))
    return found | solved(groups) | reasons(groups) | parts(groups)


def distinct(group: Group) -> float:
    """Share of a group's answers that differ; the text is the answer where none was read."""
    answers = {
        reward.answer if reward.answer is not None else rollout.text.strip()
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
    }
    return len(answers) / len(group.rollouts)


def solved(groups: Sequence[Group]) -> Metrics:
    """Shares of rollouts and of groups that are correct, for a task that calls any so."""
    if all(r.reason == SCORED for g in groups for r in g.rewards):
        return {}
    shares = [float(np.mean([r.reason == CORRECT for r in g.rewards])) for g in groups]
    return {
        "accuracy": float(np.mean(shares)),
        "pass_at_group": float(np.mean([s > 0 for s in shares])),
        "solve_none": float(np.mean([s == 0 for s in shares])),
        "solve_all": float(np.mean([s == 1 for s in shares])),
    }


def reasons(groups: Sequence[Group]) -> Metrics:
    """Share of the rollouts by reason, the most frequent ones by name."""
    counts = Counter(r.reason for g in groups for r in g.rewards)
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    total = counts.total()
    found: Metrics = {f"reason/{reason}": count / total for reason, count in ranked[:REASONS]}
    if rest := sum(count for _, count in ranked[REASONS:]):
        found["reason/other"] = rest / total
    return found


def parts(groups: Sequence[Group]) -> Metrics:
    """Means of the parts of the reward, without their weights."""
    found: dict[str, list[float]] = {}
    for reward in (r for g in groups for r in g.rewards):
        for name, value in reward.parts.items():
            found.setdefault(name, []).append(value)
    return {f"reward/{name}": float(np.mean(values)) for name, values in found.items()}


def extremes(group: Group, number: int) -> Mapping[str, int]:
    """Which rollouts to show: the best, the worst, and one that chance picked by `number`."""
    values = [r.value for r in group.rewards]
    picked = {"best": int(np.argmax(values)), "worst": int(np.argmin(values))}
    rest = [i for i in range(len(values)) if i not in picked.values()]
    if rest:
        picked["random"] = rest[int(np.random.default_rng(number).integers(len(rest)))]
    if picked["best"] == picked["worst"]:
        del picked["worst"]
    return picked
