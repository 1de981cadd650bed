"""Accuracy of a model on a task's held-out problems, greedy and sampled, with its interval."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mlx_lora.generate import generate
from mlx_lora.models import Loaded
from mlx_lora.tasks import score
from mlx_lora.types import Reward, Sample, Task

ROWS = 128  # decoded together


def evaluate(
    loaded: Loaded, task: Task, *, n: int = 512, max_tokens: int = 256, seed: int = 0
) -> dict[str, Any]:
    """The JSON of `mlx-lora eval`: greedy accuracy with its 95 % Wilson interval, sampled accuracy.

    The problems depend on the task and n alone, so that before and after face the same ones. The
    sampled accuracy is at temperature 1, one completion a problem.
    """
    samples = task.load("test", n, 0)
    greedy = judge(loaded, task, samples, max_tokens, 0.0, seed)
    sampled = judge(loaded, task, samples, max_tokens, 1.0, seed)
    hits = sum(r.value >= task.high for r in greedy)
    low, high = wilson(hits, n)
    return {
        "n": n,
        "accuracy": hits / n,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_sampled": sum(r.value >= task.high for r in sampled) / n,
        "reasons": dict(Counter(r.reason for r in greedy).most_common()),
    }


def judge(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[Reward]:
    """One completion and its reward per sample, in blocks of fixed width."""
    rewards: list[Reward] = []
    for start in range(0, len(samples), ROWS):
        block = samples[start : start + ROWS]
        prompts = [s.prompt for s in block]
        groups = generate(
            loaded, prompts, max_tokens=max_tokens, temperature=temperature, seed=seed, step=start
        )
        rewards += [score(task, s, g[0].text) for s, g in zip(block, groups, strict=True)]
    return rewards


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion that behaves at 0 and 1. Source: Wilson 1927.

    >>> [round(x, 3) for x in wilson(0, 10)]
    [0.0, 0.278]
    """
    p = hits / n
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
