"""Rollouts of the policy with their rewards: what a learning step starts from."""

from collections.abc import Sequence

import numpy as np

from mlx_lora.generate import generate
from mlx_lora.models import Loaded
from mlx_lora.tasks import score
from mlx_lora.types import Group, Sample, Task


def rollout(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    *,
    group: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    step: int,
) -> list[Group]:
    """`group` completions of each sample by the model as it stands, scored."""
    rows_PG = generate(
        loaded,
        [s.prompt for s in samples],
        group=group,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        step=step,
    )
    return [
        Group(sample, rows, [score(task, sample, r.text) for r in rows])
        for sample, rows in zip(samples, rows_PG, strict=True)
    ]


def rewards(groups: Sequence[Group]) -> np.ndarray:
    """[P, G]."""
    return np.array([[r.value for r in g.rewards] for g in groups])
