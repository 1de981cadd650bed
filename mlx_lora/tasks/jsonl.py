"""Problems and answers from a JSONL file, GSM8K's way: is the final number, or the text, right?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt

from mlx_lora.errors import ConfigError
from mlx_lora.problems import parted
from mlx_lora.rewards.answers import CLOSE, OPEN, number, spoken, stated, words
from mlx_lora.types import CORRECT, SCORED, Reward, Sample, Task

Kind = Literal["number", "exact", "none"]
Share = Annotated[float, Gt(0), Lt(1)]


def build(
    *,
    path: str | None = None,
    test_path: str | None = None,
    test_share: Share = 0.1,
    answer: Kind = "number",
    marked: bool = False,
    ignore_case: bool = False,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    stop: str | None = None,
) -> Task:
    """Rows of `prompt` or `messages`, and `answer`. Held-out ones in `test_path`, or `test_share`.

    Without `path` there is only something to test on.

    An answer is read from <answer> tags, \\boxed{} or after ####; without these, and unless
    `marked`, it is the last number of the completion (`exact`: all of it). `none`: rows have no
    answer, rewards beside the task's own judge.
    """
    if path is None and test_path is None:
        raise ConfigError("task jsonl needs the option path, or test_path to evaluate only")
    key = Key(answer, answer_key, marked, ignore_case)
    problems = parted(path, test_path, test_share, prompt_key=prompt_key, judge=key, gold=key.gold)
    return Task(
        load=problems.load,
        reward=key.reward,
        first=problems.first,
        wrong="",
        stop=stop,
        notice=problems.notice,
    )


@dataclass(frozen=True)
class Key:
    """How answers are compared. Called with a row, says what is wrong with its answer."""

    kind: Kind
    name: str
    marked: bool
    ignore_case: bool

    def __call__(self, row: Mapping[str, Any]) -> str:
        given = row.get(self.name)
        if self.kind == "none":
            return ""
        if given is None:
            return f"needs `{self.name}` (answer_key names another, `answer: none` needs none)"
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            return f"`{self.name}` should be text or a number, is {given!r:.40}"
        if isinstance(given, float) and not math.isfinite(given):
            return f"`{self.name}` is not finite"
        right = self.right(str(given))
        if right is None:
            return f"`{self.name}` holds no number: {given!r:.40} (`answer: exact` compares text)"
        return f"`{self.name}` is empty" if right == "" else ""

    def gold(self, row: Mapping[str, Any]) -> str:
        """The answer as a completion, marked where it has to be."""
        given = str(row.get(self.name, ""))
        return given if not self.marked or stated(given) else f"{OPEN}{given}{CLOSE}"

    def right(self, gold: str) -> Any:
        return self.value(stated(gold) or gold)

    def value(self, text: str) -> Any:
        """What an answer comes to: a fraction, or text with single spaces."""
        if self.kind == "number":
            return number(text)
        return words(text, ignore_case=self.ignore_case)

    def reward(self, sample: Sample, completion: str) -> Reward:
        """1 for the right answer. Total: any text gets a value and a reason."""
        if self.kind == "none":
            return Reward(0.0, SCORED)
        text = spoken(completion)
        if text is None:
            return Reward(0.0, "answer_in_think")
        said = stated(text)
        if said is None and not self.marked:
            said = text
        found = None if said is None else self.value(said)
        if found is None or found == "":
            return Reward(0.0, "no_answer")
        right = self.right(sample.gold)
        return Reward(
            float(found == right), CORRECT if found == right else "wrong_answer", answer=str(found)
        )
