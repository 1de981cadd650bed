"""Several rewards as one: a weighted sum, each part of it logged by name."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlx_lora.errors import ConfigError, TaskError, UserError, near
from mlx_lora.registry import Table
from mlx_lora.rewards import user
from mlx_lora.rewards.answers import OPEN, THINK, THOUGHT, answer_block
from mlx_lora.rewards.score import score_all
from mlx_lora.types import Reward, Sample, Task

OWN = "task"  # the name of the task's own reward among others
KEYS = {"name", "python", "weight", "label", "solved"}
judges: Table[Callable[..., Reward]] = Table("reward")


@judges.add
def format(sample: Sample, completion: str, *, think: bool = False) -> Reward:
    """1 for one answer block at the end; with `think`, after one thought block at the start."""
    inner, problem = answer_block(completion)
    if inner is None:
        return Reward(0.0, problem)
    head = completion[: completion.find(OPEN)].strip()
    if think and not (
        head.startswith(THINK)
        and head.endswith(THOUGHT)
        and head.count(THINK) == head.count(THOUGHT) == 1
    ):
        return Reward(0.0, "no_thought")
    return Reward(1.0, "well_formed", answer=inner.strip())


@dataclass(frozen=True)
class Part:
    """One of several rewards, as a task of its own."""

    label: str
    weight: float
    task: Task
    own: bool  # the task's


def mixed(task: Task, entries: Sequence[Mapping[str, Any]]) -> Task:
    """The task with a weighted sum of rewards in place of its own, which `name: task` stands for.

    The task's own reward, or else the first, says whether a completion is correct, and why not.
    """
    parts, problems = [], []
    for number, entry in enumerate(entries):
        try:
            parts.append(part_of(task, entry))
        except UserError as error:
            hint = f". {error.hint}" if error.hint else ""
            problems += [f"rewards[{number}]: {x}{hint}" for x in str(error).split("\n")]
    labels = [p.label for p in parts]
    twice = sorted({x for x in labels if labels.count(x) > 1})
    problems += [f"two rewards are called {x}: give one of them another `label`" for x in twice]
    if not entries:
        problems.append("rewards is empty: list `{name: task}` for the task's own")
    elif parts and not any(p.weight for p in parts):
        problems.append("every reward has a weight of 0: nothing would be learned")
    if problems:
        raise ConfigError("\n".join(problems))
    lead = next((i for i, p in enumerate(parts) if p.own), 0)
    judge = partial(summed, parts, lead)
    ends = [sorted((p.weight * p.task.low, p.weight * p.task.high)) for p in parts if p.weight]
    return replace(
        task,
        reward=partial(first_of, judge),
        group=judge,
        low=math.fsum(low for low, _ in ends),
        high=math.fsum(high for _, high in ends),
        threads=min(p.task.threads for p in parts),
    )


def part_of(task: Task, entry: Mapping[str, Any]) -> Part:
    """A part from its entry: {name or python, weight, label, and the options of a name}."""
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"weight should be a number, is {weight!r:.40}")
    named = [k for k in ("name", "python") if k in entry]
    if len(named) != 1 or not isinstance(entry[named[0]], str):
        raise ConfigError("should be {name: NAME} or {python: path.py:name}, with a weight if any")
    more = {k: v for k, v in entry.items() if k not in KEYS}
    name = entry[named[0]]
    if "python" in entry:
        part = of_python(task, name, entry.get("solved"), more)
    elif "solved" in entry:
        raise ConfigError("`solved` is for a `python` reward: others know what is correct")
    elif name == OWN:
        if more:
            raise ConfigError(f"{', '.join(more)}: options of the task stand beside its name")
        part = task
    elif name not in judges:
        raise ConfigError(f"unknown reward {name!r}. {near(name, [OWN, *judges])}")
    else:
        part = replace(task, reward=judges.bind(name, more), group=None, low=0.0, high=1.0)
    label = entry.get("label", name.rpartition(":")[2])
    if not isinstance(label, str) or not label:
        raise ConfigError(f"label should be a word, is {label!r:.40}")
    labelled = replace(part, name=f"{task.name}, part {label}")
    return Part(label, float(weight), labelled, own=part is task)


def of_python(task: Task, target: str, solved: Any, more: Mapping[str, Any]) -> Task:
    """A user's function as a part."""
    if more:
        raise ConfigError(f"unknown {', '.join(more)}. {near(next(iter(more)), KEYS)}")
    if solved is not None and (isinstance(solved, bool) or not isinstance(solved, int | float)):
        raise ConfigError(f"solved should be a number, is {solved!r:.40}")
    function = user.find(target)
    if not user.is_reward(function):
        raise TaskError(f"{target} is no reward: it should be {user.SIGNATURE}")
    judge = user.judged_by(function, target, task.first.columns, solved)
    limits = {"low": -math.inf, "high": math.inf}
    return replace(task, reward=partial(first_of, judge), group=judge, threads=1, **limits)


Judge = Callable[[Sample, Sequence[str]], Sequence[Reward]]


def first_of(judge: Judge, sample: Sample, completion: str) -> Reward:
    return judge(sample, [completion])[0]


def summed(
    parts: Sequence[Part], lead: int, sample: Sample, completions: Sequence[str]
) -> list[Reward]:
    """Weighted sums, by fsum: rounded once, they stay within the sums of the limits.

    Reason and answer are those of part `lead`.
    """
    found = [score_all(part.task, sample, completions) for part in parts]
    return [
        replace(
            rewards[lead],
            value=math.fsum(p.weight * r.value for p, r in zip(parts, rewards, strict=True)),
            parts={p.label: float(r.value) for p, r in zip(parts, rewards, strict=True)},
        )
        for rewards in zip(*found, strict=True)
    ]
