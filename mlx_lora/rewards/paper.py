"""Countdown's reward in "Evolution Strategies at Scale": 0.1 · format + answer, in [0, 1.1].

Source: Qiu et al., arXiv 2509.24372, after GRPO-Zero. What differs: nothing runs as code, so
that powers, floor division and signs earn nothing; and only the completion is read, not the prompt,
which shows the tags that are asked for. All searches are linear in the text.
"""

import re

from mlx_lora.rewards.answers import CLOSE, OPEN, THINK, THOUGHT
from mlx_lora.rewards.arithmetic import evaluate
from mlx_lora.types import CORRECT, Reward, Sample

LOW, HIGH = 0.0, 1.1
FORMAT_WEIGHT, TOLERANCE = 0.1, 1e-5
JOINT = f"{THOUGHT}\n{OPEN}"
CHARSET = re.compile(r"[0-9+\-*/() ]+\n?")


def paper(sample: Sample, completion: str) -> Reward:
    """The paper's reward of a completion whose prompt ended with <think>. Its parts are logged."""
    shape, (answer, reason) = format_score(completion), answer_score(sample, completion)
    inner = last_block(completion)
    return Reward(
        FORMAT_WEIGHT * shape + answer,
        reason,
        {"format": shape, "answer": answer},
        answer=None if inner is None else inner.strip(),
    )


def format_score(completion: str) -> float:
    """1 for <think>..</think>, a newline, <answer>..</answer>; else 0.1 and 0.5 for each alone.

    >>> format_score("so</think>\\n<answer>1</answer>"), format_score("<answer>1</answer> it is")
    (1.0, 0.5)
    """
    text = THINK + completion
    joint = text.find(JOINT, len(THINK))
    end = text[:-1] if text.endswith("\n") else text
    if joint >= 0 and end.endswith(CLOSE) and len(end) - len(CLOSE) >= joint + len(JOINT):
        return 1.0
    thought = text.find(THOUGHT, len(THINK)) >= 0
    start = text.find(OPEN)
    answered = start >= 0 and text.find(CLOSE, start + len(OPEN)) >= 0
    return 0.1 * thought + 0.5 * answered


def answer_score(sample: Sample, completion: str) -> tuple[float, str]:
    """1 where the last answer block uses each number once and hits the target, and a reason."""
    inner = last_block(completion)
    if inner is None:
        return 0.0, "no_answer"
    if not CHARSET.fullmatch(inner):
        return 0.0, "bad_characters"
    value, used, problem = evaluate(inner)
    if value is None:
        return 0.0, problem
    if sorted(used) != sorted(sample.columns["numbers"]):
        return 0.0, "wrong_numbers"
    if not abs(value - sample.columns["target"]) < TOLERANCE:
        return 0.0, "wrong_value"
    return 1.0, CORRECT


def last_block(text: str) -> str | None:
    """What the last match of `<answer>(.*?)</answer>` holds, matches not overlapping.

    >>> last_block("<answer>1</answer> or <answer>2</answer>")
    '2'
    """
    found, start = None, text.find(OPEN)
    while start >= 0:
        end = text.find(CLOSE, start + len(OPEN))
        if end < 0:
            break
        found = text[start + len(OPEN) : end]
        start = text.find(OPEN, end + len(CLOSE))
    return found
