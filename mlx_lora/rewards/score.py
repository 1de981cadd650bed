"""Rewards of a problem's completions, each looked at before it is believed."""

import math
from collections.abc import Callable, Sequence
from numbers import Real

from mlx_lora.errors import RewardError, TaskError
from mlx_lora.problems import question
from mlx_lora.types import Reward, Sample, Task

LARGEST = 1e18  # of a reward: spreads and advantages are computed from squares
SHOWN = 80  # characters of a completion in a message


def score(task: Task, sample: Sample, completion: str) -> Reward:
    """The reward of one completion, as `score_all` gives it."""
    return score_all(task, sample, [completion])[0]


def score_all(task: Task, sample: Sample, completions: Sequence[str]) -> list[Reward]:
    """A reward for each completion.

    RewardError, never a zero, for a crash, a wrong count, and a value that is no number in range.
    """
    if task.group is not None:
        found = list(grouped(task, task.group, sample, completions))
    else:
        found = [single(task, sample, text) for text in completions]
    if len(found) != len(completions):
        raise RewardError(
            f"{about(task)} returned {len(found)} rewards for {len(completions)} completions "
            f"{of(sample, completions[0])}"
        )
    problems = [
        f"{about(task)} {what} {of(sample, text)}"
        for text, reward in zip(completions, found, strict=True)
        if (what := wrong_with(task, reward))
    ]
    if problems:
        raise RewardError(problems[0])
    return found


def grouped(
    task: Task,
    judge: Callable[[Sample, Sequence[str]], Sequence[Reward]],
    sample: Sample,
    completions: Sequence[str],
) -> Sequence[Reward]:
    """The rewards of all completions by one call; after a crash the first that crashes alone."""
    try:
        return judge(sample, completions)
    except RewardError:  # of a part of several: it says on what
        raise
    except Exception as error:
        culprit = completions[0]
        for text in completions if len(completions) > 1 else ():
            try:
                judge(sample, [text])
            except Exception:
                culprit = text
                break
        raise crashed(task, sample, culprit, error) from error


def single(task: Task, sample: Sample, completion: str) -> Reward:
    try:
        return task.reward(sample, completion)
    except Exception as error:
        raise crashed(task, sample, completion, error) from error


def crashed(task: Task, sample: Sample, completion: str, error: BaseException) -> RewardError:
    """What a reward raised, in words that say on what. A TaskError speaks for itself."""
    what = str(error) if isinstance(error, TaskError) else f"crashed: {described(error)}"
    return RewardError(f"{about(task)} {what} {of(sample, completion)}")


def described(error: BaseException) -> str:
    """An exception with the line that raised it.

    >>> described(ValueError("no luck"))
    'ValueError: no luck'
    """
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {error}{where}"


def wrong_with(task: Task, reward: object) -> str:
    """Why this is no reward of the task, or nothing."""
    if not isinstance(reward, Reward):
        return f"returned {reward!r:.40}, which is no Reward,"
    numbers = {"": reward.value, **{f" of part {k}": v for k, v in reward.parts.items()}}
    for part, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            return f"returned {value!r:.40}{part}, which is no finite number,"
        if abs(value) > LARGEST:
            return f"returned {value!r:.40}{part}, beyond {LARGEST:g}: no float32 holds its square,"
    if not task.low <= reward.value <= task.high:
        return f"returned {reward.value}, outside [{task.low:g}, {task.high:g}],"
    return ""


def about(task: Task) -> str:
    return f"the reward of task {task.name}" if task.name else "the reward"


def of(sample: Sample, completion: str) -> str:
    """The prompt and the beginning of the completion, for a message."""
    place = f"{sample.place}: " if sample.place else ""
    return f"on {completion[:SHOWN]!r} ({place}prompt {question(sample.prompt)[:SHOWN]!r})"
