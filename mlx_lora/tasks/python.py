"""Your own reward or task: a name in a local Python file, run as your own code."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Annotated, Any

from annotated_types import Gt, Lt

from mlx_lora.errors import ConfigError, TaskError, UserError
from mlx_lora.problems import Row, parted
from mlx_lora.registry import check_options
from mlx_lora.rewards import user
from mlx_lora.rewards.score import described
from mlx_lora.types import Reward, Sample, Task

Share = Annotated[float, Gt(0), Lt(1)]
FORM = "It should be a types.Sample whose prompt is text, or a tuple of (role, content) tuples."
OF_ROWS = ("data", "test_data", "solved")  # options that only a reward function has a use for


def build(
    *,
    path: str,
    data: str | None = None,
    test_data: str | None = None,
    test_share: Share = 0.1,
    solved: float | None = None,
    parallel: bool = False,
    prompt_key: str = "prompt",
    stop: str | None = None,
    options: dict[str, Any] = {},  # noqa: B006  read, never changed
) -> Task:
    """`path.py:name`: f(prompts, completions, **columns) over `data`, a Task, or a build of one.

    A reward from `solved` on counts as correct. `parallel`: it may be called from several threads.
    """
    thing = user.find(path)
    if user.is_reward(thing):
        if options:
            raise ConfigError(f"{path} is a reward: it takes columns of the rows, not `options`")
        if data is None and test_data is None:
            raise ConfigError(f"{path} is a reward, which needs `data`: a JSONL file of prompts")
        problems = parted(
            data, test_data, test_share, prompt_key=prompt_key, judge=nothing, gold=gold
        )
        judge = user.judged_by(thing, path, problems.first.columns, solved)
        return Task(
            load=problems.load,
            reward=partial(one, judge),
            first=problems.first,
            wrong="",
            low=-math.inf,
            high=math.inf,
            stop=stop,
            group=judge,
            threads=4 if parallel else 1,
            notice=problems.notice,
        )
    given = {"data": data, "test_data": test_data, "solved": solved}
    unused = [k for k in OF_ROWS if given[k] is not None]
    if unused:
        raise ConfigError(f"{path} is no reward function: it has no use for {', '.join(unused)}")
    return made(thing, path, options)


def made(thing: Any, path: str, options: dict[str, Any]) -> Task:
    """A Task that is there, or that a `build` makes. TaskError for anything else."""
    if isinstance(thing, Task):
        if options:
            raise ConfigError(f"{path} is a Task already: it takes no `options`")
        return looked_at(thing, path)
    if not callable(thing):
        raise TaskError(f"{path} is {thing!r:.40}: neither {user.SIGNATURE}, a Task nor a build")
    task = thing(**check_options(path, thing, options))
    if not isinstance(task, Task):
        raise TaskError(
            f"{path} returned {task!r:.40}, not a mlx_lora.types.Task",
            f"A reward has the form {user.SIGNATURE}.",
        )
    return looked_at(task, path)


def looked_at(task: Task, path: str) -> Task:
    """A user's task whose problems are looked at before they are believed."""

    def load(split: str, count: int, seed: int) -> Sequence[Sample]:
        asked = f"{path}: load({split!r}, {count}, {seed})"
        try:
            found = list(islice(task.load(split, count, seed), count))
        except UserError:
            raise
        except Exception as error:
            raise TaskError(f"{asked} crashed: {described(error)}") from error
        if not found:
            raise TaskError(f"{asked} gave no problem: a run trains on some and tests on others")
        for number, sample in enumerate(found):
            if not isinstance(sample, Sample) or not is_prompt(sample.prompt):
                raise TaskError(f"{asked}: {sample!r:.80}, number {number}, is no problem", FORM)
        return found

    return replace(task, load=load)


def is_prompt(thing: Any) -> bool:
    """Text, or turns as types.Prompt has them."""
    return isinstance(thing, str) or (
        isinstance(thing, tuple)
        and len(thing) > 0
        and all(isinstance(t, tuple) and [type(x) for x in t] == [str, str] for t in thing)
    )


def nothing(row: Row) -> str:
    """Rows may hold what they like: their columns are the function's own business."""
    return ""


def gold(row: Row) -> str:
    """What the row itself gives as a good completion, for inits that look at data."""
    return str(row.get("completion") or row.get("answer") or "")


def one(judge: Any, sample: Sample, completion: str) -> Reward:
    return judge(sample, [completion])[0]
