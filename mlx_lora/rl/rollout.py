"""Rollouts of the policy with their rewards: what a learning step starts from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mlx_lora import distributed
from mlx_lora.caches import Sit, nobody
from mlx_lora.generate import WIDTH, generate
from mlx_lora.models import Loaded
from mlx_lora.rl.rewards import Scorer
from mlx_lora.runlog import Clock
from mlx_lora.types import Group, Reward, Rollout, Sample, Task


def rollout(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    *,
    numbers: Sequence[int] | None = None,
    **options: Any,
) -> list[Group]:
    """Groups of completions as `sampled` makes them; each of several machines makes its part.

    `numbers` are the samples' in the random keys: 0, 1, 2 ... unless given.
    """
    numbers = range(len(samples)) if numbers is None else numbers
    if distributed.size() == 1:
        return sampled(loaded, task, samples, numbers=numbers, **options)
    mine, own = distributed.mine(samples), distributed.mine(numbers)

    def part() -> list[dict[str, Any]]:
        groups = sampled(loaded, task, mine, numbers=own, **options) if mine else []
        return [{"rollouts": plain(g.rollouts), "rewards": plain(g.rewards)} for g in groups]

    said = distributed.everything(part)
    return [restored(sample, record) for sample, record in zip(samples, said, strict=True)]


def plain(records: Sequence[Rollout] | Sequence[Reward]) -> list[dict[str, Any]]:
    return [asdict(record) for record in records]


def restored(sample: Sample, said: Mapping[str, Any]) -> Group:
    """A group as another machine told it. Float32 numbers survive JSON to the bit."""
    rollouts = [
        Rollout(**r | {k: tuple(r[k]) for k in ("prompt_ids", "ids", "logps")})
        for r in said["rollouts"]
    ]
    return Group(sample, rollouts, [Reward(**r) for r in said["rewards"]])


def sampled(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    *,
    group: int,
    seed: int,
    step: int,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] | None = None,
    width: int = WIDTH,
    reward_seconds: float = 60,
    numbers: Sequence[int] | None = None,
    purpose: str = "rollout",
    heard: Callable[[int], None] = lambda prompts: None,
    sit: Sit = nobody,
    clock: Clock | None = None,
) -> list[Group]:
    """`group` completions of each sample by the model as it stands, scored while others decode.

    `stop` None means the task's own. `heard` learns how many samples have all their completions.
    `clock` gets the times of prefill, decode, and the wait for rewards when decoding is over.
    """
    clock = clock or Clock()
    with Scorer(task, reward_seconds) as scorer:

        def done(p: int, rollouts: list[Rollout]) -> None:
            scorer.submit(p, samples[p], [r.text for r in rollouts])
            heard(len(scorer.jobs))

        rows_PG = generate(
            loaded,
            [s.prompt for s in samples],
            purpose=purpose,
            group=group,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            step=step,
            numbers=numbers,
            stop=stops(task) if stop is None else stop,
            width=width,
            done=done,
            sit=sit,
            clock=clock,
        )
        with clock.measure("reward", kind="step"):
            rewards_PG = scorer.results()
    return [Group(*parts) for parts in zip(samples, rows_PG, rewards_PG, strict=True)]


def stops(task: Task) -> tuple[str, ...]:
    """The texts after which a completion of this task ends."""
    return (task.stop,) if task.stop else ()


def rewards(groups: Sequence[Group]) -> np.ndarray:
    """[P, G]."""
    return np.array([[r.value for r in g.rewards] for g in groups])
