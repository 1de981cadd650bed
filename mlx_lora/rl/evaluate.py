"""How well a model does on a task's held-out problems, greedy and sampled, with its interval."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mlx_lora.generate import WIDTH
from mlx_lora.models import Loaded
from mlx_lora.rl.drift import kl_to_base
from mlx_lora.rl.rollout import rollout
from mlx_lora.schema import Stage
from mlx_lora.types import CORRECT, SCORED, Group, Reward, Sample, Task

Heard = Callable[[float, Sequence[Group]], None]  # (temperature, groups)


def evaluate(
    loaded: Loaded,
    task: Task,
    *,
    n: int = 512,
    max_tokens: int = 256,
    seed: int = 0,
    stop: Sequence[str] | None = None,
    group: int = 1,
    reward_seconds: float = 60,
    width: int = WIDTH,
    heard: Heard = lambda temperature, groups: None,
) -> dict[str, Any]:
    """The JSON of `mlx-lora eval`: greedy accuracy with its 95 % Wilson interval, sampled accuracy.

    The problems depend on the task and n alone, so that before and after face the same ones: all of
    them where there are fewer than n. `group` completions of each are sampled at temperature 1, at
    most `width` rows together. `stop` None: the task's own. `heard` gets all completions. A task
    may want more of each, to measure the KL to the base on.
    """
    samples = task.load("test", n, 0)
    options = {"stop": stop, "reward_seconds": reward_seconds, "width": width}
    greedy = judge(loaded, task, samples, max_tokens, 0.0, seed, **options)
    heard(0.0, greedy)
    group = max(group, task.kl_samples)
    sampled = judge(loaded, task, samples, max_tokens, 1.0, seed, group=group, **options)
    heard(1.0, sampled)
    found = summed_up([g.rewards[0] for g in greedy], [g.rewards for g in sampled])
    return found | {"kl_to_base": kl_to_base(loaded.model, sampled) if task.kl_samples else None}


def examination(loaded: Loaded, task: Task, e: Stage) -> Callable[[], dict[str, Any]]:
    """The evaluation that a stage asks for, to be made whenever it is called."""
    return partial(
        evaluate,
        loaded,
        task,
        n=e.eval.n,
        max_tokens=e.rollout.max_tokens,
        stop=e.rollout.stop,
        reward_seconds=e.rollout.reward_seconds,
        width=e.rollout.width,
    )


def judge(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    max_tokens: int,
    temperature: float,
    seed: int,
    **options: Any,
) -> list[Group]:
    """Completions of each sample with their rewards, one unless `group` says otherwise."""
    options = {"group": 1, "temperature": temperature, "max_tokens": max_tokens, **options}
    return rollout(loaded, task, samples, seed=seed, step=0, purpose="evaluate", **options)


def summed_up(greedy_P: Sequence[Reward], sampled_PG: Sequence[Sequence[Reward]]) -> dict[str, Any]:
    """The numbers of an evaluation. Accuracies are null for a task that calls nothing correct."""
    n = len(greedy_P)
    found: dict[str, Any] = {"n": n} | dict.fromkeys(
        ("accuracy", "accuracy_low", "accuracy_high", "accuracy_sampled")
    )
    found |= {"pass_at": {}, "reward_mean": mean_value(greedy_P)}
    found["reward_mean_sampled"] = mean_value([r for row in sampled_PG for r in row])
    if any(r.reason != SCORED for r in greedy_P):
        hits = sum(r.reason == CORRECT for r in greedy_P)
        low, high = wilson(hits, n)
        counts = [(len(row), sum(r.reason == CORRECT for r in row)) for row in sampled_PG]
        group = counts[0][0]
        sizes = sorted({2**i for i in range(group.bit_length())} | {group})
        passed = {str(k): float(np.mean([pass_at(k, *c) for c in counts])) for k in sizes}
        found |= {
            "accuracy": hits / n,
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_sampled": passed["1"],
            "pass_at": passed,
        }
    return found | {"reasons": dict(Counter(r.reason for r in greedy_P).most_common())}


def mean_value(rewards: Sequence[Reward]) -> float:
    return float(np.mean([r.value for r in rewards]))


def pass_at(k: int, n: int, correct: int) -> float:
    """Chance that k of n completions, drawn without replacement, hold a correct one.

    Source: Chen et al., arXiv 2107.03374, equation 1: unbiased for k up to n.

    >>> pass_at(1, 4, 1), pass_at(2, 4, 1), pass_at(4, 4, 1)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def sentence(result: dict[str, Any]) -> str:
    """An evaluation in one line: accuracies, or the mean reward where nothing is correct."""
    if result["accuracy"] is None:
        return f"mean reward {result['reward_mean']:.4g} of {result['n']} held-out problems"
    return (
        f"accuracy {result['accuracy']:.1%} of {result['n']} held-out problems "
        f"({result['accuracy_low']:.1%} to {result['accuracy_high']:.1%}), "
        f"sampled {result['accuracy_sampled']:.1%}" + beside(result)
    )


def beside(result: dict[str, Any]) -> str:
    """Reward and KL, of a task that has its KL measured."""
    if result.get("kl_to_base") is None:
        return ""
    return f"; mean reward {result['reward_mean']:.4g}, KL to base {result['kl_to_base']:.3g}"


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
