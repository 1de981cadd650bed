"""Tasks. One file per task; the file's name is the task's name, its `build` makes the Task."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from mlx_lora.errors import TaskError, UnknownNameError, near
from mlx_lora.registry import check_options, first_line
from mlx_lora.types import Reward, Sample, Task


def names() -> list[str]:
    """Every task there is."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def describe() -> dict[str, str]:
    """First docstring line of each task."""
    return {name: first_line(importlib.import_module(f"{__name__}.{name}")) for name in names()}


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The named task with its options checked."""
    if name not in names():
        raise UnknownNameError(f"unknown task {name!r}", near(name, names()))
    build = importlib.import_module(f"{__name__}.{name}").build
    return build(**check_options(f"task {name}", build, options or {}))


def score(task: Task, sample: Sample, completion: str) -> Reward:
    """The reward, with a crash or a value out of range turned into an error, never into a zero."""
    try:
        reward = task.reward(sample, completion)
    except Exception as error:
        raise TaskError(f"the reward crashed on {completion[:80]!r} ({sample.prompt!r})") from error
    if not task.low <= reward.value <= task.high:
        raise TaskError(
            f"reward {reward.value} of {completion[:80]!r} is outside [{task.low}, {task.high}]"
        )
    return reward
