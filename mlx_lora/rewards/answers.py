"""What a completion answers. Total, and linear in the length of the text."""

import re
from collections import deque
from fractions import Fraction

OPEN, CLOSE = "<answer>", "</answer>"
THINK, THOUGHT = "<think>", "</think>"
BOX, LINE = "\\boxed{", "####"
TAIL = 4_000  # characters of an answer that are read, from its end
LONGEST = 64  # characters of a number
SPELLINGS = (("\u2212", "-"), ("\\$", "$"), ("{,}", ","), ("\\,", ""), ("-$", "-"), ("$", " "))
FRAC = re.compile(r"\\[dt]?frac\{(-?[0-9]{1,9})\}\{([0-9]{1,9})\}")
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+])?"  # a sign, not the operator in 10-5
    r"(?:(?<![A-Za-z0-9_])(?<![0-9]\.)(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"|(?<![\w.])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,2}(?![0-9]))?"
    r"(?:/[0-9]{1,9}(?![0-9/]))?",
    re.ASCII,
)


def answer_block(completion: str) -> tuple[str | None, str]:
    """The text of the only answer block, which ends the completion, or None and the reason."""
    start, end = completion.find(OPEN), completion.find(CLOSE)
    if start < 0 or end < 0:
        return None, "no_answer"
    if completion.count(OPEN) > 1 or completion.count(CLOSE) > 1:
        return None, "several_answers"
    if end < start:
        return None, "no_answer"
    if completion.rfind(THINK, 0, start) > completion.rfind(THOUGHT, 0, start):
        return None, "answer_in_think"
    if completion[end + len(CLOSE) :].strip():
        return None, "text_after_answer"
    return completion[start + len(OPEN) : end], ""


def spoken(completion: str) -> str | None:
    """The completion after its thoughts; None where it never stopped thinking."""
    end = completion.rfind(THOUGHT)
    if completion.rfind(THINK) > end:
        return None
    return completion[end + len(THOUGHT) :] if end >= 0 else completion


def stated(text: str) -> str | None:
    r"""The last answer that is marked as one, by tags, a box or ####. None where none is.

    >>> stated(r"so <answer> \boxed{7} </answer>"), stated("9 + 9 = 18\n#### 18"), stated("18")
    ('7', '18', None)
    """
    found = None
    for reader in (tagged, boxed, after_line):
        inner = reader(text)
        if inner is not None:
            found = text = inner
    return None if found is None else found.strip()


def tagged(text: str) -> str | None:
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, end) if end >= 0 else -1
    return text[start + len(OPEN) : end] if start >= 0 else None


def boxed(text: str) -> str | None:
    start = text.rfind(BOX)
    if start < 0:
        return None
    start += len(BOX)
    depth = 1
    for at, character in enumerate(text[start : start + TAIL], start=start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:at]
    return None


def after_line(text: str) -> str | None:
    start = text.rfind(LINE)
    return text[start + len(LINE) :] if start >= 0 else None


def number(text: str) -> Fraction | None:
    r"""The last number in a text, exactly; None where there is none.

    Signs of money and percent, separators of thousands and trailing zeros make no difference.

    >>> number("$1,234.50 in all"), number("10-5 = 5."), number(r"\frac{3}{4}"), number("none")
    (Fraction(2469, 2), Fraction(5, 1), Fraction(3, 4), None)
    """
    text = text[-TAIL:]
    for written, plain in SPELLINGS:
        text = text.replace(written, plain)
    text = FRAC.sub(r" \1/\2", text)
    last = deque(NUMBER.finditer(text), maxlen=1)
    if not last or len(last[0][0]) > LONGEST:
        return None
    above, _, below = last[0][0].replace(",", "").partition("/")
    if below and not int(below):
        return None
    return Fraction(above) / int(below or 1)


def words(text: str, *, ignore_case: bool = False) -> str:
    """A text with single spaces, for comparison.

    >>> words("  New   York\\n", ignore_case=True)
    'new york'
    """
    plain = " ".join(text.split())
    return plain.casefold() if ignore_case else plain
