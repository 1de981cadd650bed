"""Tasks. One file per task; the file's name is the task's name, its `build` makes the Task."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_lora.errors import ConfigError, TaskError, UnknownNameError, near
from mlx_lora.registry import check_options, first_line, options
from mlx_lora.rewards.parts import mixed
from mlx_lora.rewards.score import score, score_all
from mlx_lora.types import Message, Prompt, Sample, Task

__all__ = ["describe", "load_task", "names", "score", "score_all"]
FILES = ("path", "test_path", "data", "test_data", "python")  # options that name a file


def names() -> list[str]:
    """Every task there is."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def describe() -> dict[str, str]:
    """First docstring line of each task."""
    return {name: first_line(importlib.import_module(f"{__name__}.{name}")) for name in names()}


def load_task(name: str, given: Mapping[str, Any] | None = None) -> Task:
    """The named task with its options checked, those of every task among them."""
    if name not in names():
        raise UnknownNameError(f"unknown task {name!r}", near(name, names()))
    build = importlib.import_module(f"{__name__}.{name}").build
    common = options(dressed).keys()
    own = {k: v for k, v in (given or {}).items() if k not in common}
    more = {k: v for k, v in (given or {}).items() if k in common}
    problems, checked = [], []
    for function, values in ((build, own), (dressed, more)):
        try:
            checked.append(check_options(f"task {name}", function, values, also=common))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return dressed(replace(build(**checked[0]), name=name), **checked[1])


def dressed(
    task: Task, *, system: str | None = None, rewards: list[dict[str, Any]] | None = None
) -> Task:
    """The task with a system prompt before every problem, and with several rewards in one."""
    if rewards is not None:
        task = mixed(task, rewards)
    if system is None:
        return task
    if not system.strip():
        raise ConfigError(f"task {task.name}: system is empty: leave it out")
    first = instructed(task.first, system)

    def load(split: str, count: int, seed: int) -> Sequence[Sample]:
        return [instructed(s, system) for s in task.load(split, count, seed)]

    return replace(task, load=load, first=first)


def instructed(sample: Sample, system: str) -> Sample:
    """The problem with a system prompt. TaskError where it has one of its own."""
    prompt: Prompt = sample.prompt
    turns: tuple[Message, ...] = (("user", prompt),) if isinstance(prompt, str) else prompt
    if turns[0][0] == "system":
        where = f"{sample.place}: " if sample.place else ""
        raise TaskError(f"{where}the row has a system message, and the task gives `system`")
    return replace(sample, prompt=(("system", system), *turns))


def anchored(given: Any, folder: Path) -> Any:
    """What an experiment file says of a task, its relative files looked for beside that file."""
    if isinstance(given, list):
        return [anchored(entry, folder) for entry in given]
    if not isinstance(given, dict):
        return given
    return {
        key: str(folder / Path(value).expanduser())
        if key in FILES and isinstance(value, str)
        else anchored(value, folder)
        if key == "rewards"
        else value
        for key, value in given.items()
    }


def spelled_out(given: Any) -> Any:
    """`{python: path.py:name, ...}` as `{name: python, path: path.py:name, ...}`.

    >>> spelled_out({"python": "my.py:reward", "data": "rows.jsonl"})
    {'name': 'python', 'path': 'my.py:reward', 'data': 'rows.jsonl'}
    """
    if not isinstance(given, dict) or "python" not in given or "name" in given:
        return given
    rest = {k: v for k, v in given.items() if k != "python"}
    return {"name": "python", "path": given["python"], **rest}
