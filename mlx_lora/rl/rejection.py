"""Rejection sampling: the model's own correct completions, to learn from before RL begins.

Sources: STaR, arXiv 2203.14465 (learn from what came out right); RAFT, arXiv 2304.06767 (the same
with a reward).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_lora.errors import RunError
from mlx_lora.models import Loaded
from mlx_lora.rl.rollout import rollout
from mlx_lora.schema import Stage
from mlx_lora.types import CORRECT, Group, Task


@dataclass(frozen=True)
class Harvest:
    """Rows {prompt, completion, reward} to learn from, and how they came about."""

    rows: Sequence[dict[str, Any]]
    problems: int
    sampled: int
    correct: int
    distinct: int  # ... and whole, and not the same text as another of their problem

    def counts(self) -> dict[str, int]:
        about = {k: v for k, v in asdict(self).items() if k != "rows"}
        return about | {"kept": len(self.rows)}


def harvest(
    loaded: Loaded, task: Task, e: Stage, done: Callable[[int], None] = lambda problems: None
) -> Harvest:
    """Sample the task's training problems from the model as it stands and keep what is right.

    `done` hears how many problems are through. RunError when nothing is right.
    """
    asked = e.rejection_sampling
    assert asked is not None, "called for a stage without rejection sampling"
    samples = task.load("train", asked.problems, e.seed)
    options: dict[str, Any] = {**e.rollout.model_dump(), "temperature": asked.temperature}
    groups = rollout(
        loaded,
        task,
        samples,
        group=asked.samples,
        seed=e.seed,
        step=0,
        purpose="rejection",  # no step of a training loop draws these random numbers again
        heard=done,
        **options,
    )
    return sifted(groups, asked.keep)


def sifted(groups: Sequence[Group], keep: int) -> Harvest:
    """Of each group the first `keep` distinct completions that are correct and ended by themselves.

    One that was cut would be learnt as if it ended there: right by luck, amid a thought.
    """
    rows, correct, distinct = [], 0, 0
    for group in groups:
        right = [
            (rollout, reward.value)
            for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
            if reward.reason == CORRECT
        ]
        correct += len(right)
        different = {rollout.text: value for rollout, value in right if rollout.finished}
        distinct += len(different)
        rows += [
            {"prompt": group.sample.prompt, "completion": text, "reward": value}
            for text, value in list(different.items())[:keep]
        ]
    sampled = sum(len(group.rollouts) for group in groups)
    if correct and not rows:
        raise RunError(
            f"rejection sampling kept nothing: all {correct:,} correct completions were cut at "
            "rollout.max_tokens, and would be learnt as if they ended there",
            "Raise rollout.max_tokens, or give the task a `stop`.",
        )
    if not rows:
        raise RunError(
            f"rejection sampling kept nothing: none of {sampled:,} completions of {len(groups):,} "
            f"problems is correct",
            "Raise rejection_sampling.samples or problems, make the task easier, or give `data`: "
            "correct completions from elsewhere.",
        )
    return Harvest(rows, len(groups), sampled, correct, distinct)
