"""The exact value of an arithmetic expression, without running it."""

import re
from fractions import Fraction
from operator import add, mul, sub, truediv

MAX_CHARS, MAX_DEPTH, MAX_DIGITS = 256, 32, 6
ALLOWED, TOKEN = re.compile(r"[-+*/()0-9 \t\r\n]*"), re.compile(r"[0-9]+|[-+*/()]")
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv}


def evaluate(text: str) -> tuple[Fraction | None, list[int], str]:
    """Value and numbers of an arithmetic expression, or None and a reason. Total; never evals.

    >>> evaluate("( 7 - 3 ) * 12")
    (Fraction(48, 1), [7, 3, 12], '')
    >>> evaluate("7 ** 2")[2]
    'not_an_expression'
    """
    if len(text) > MAX_CHARS:
        return None, [], "too_long"
    if not ALLOWED.fullmatch(text):
        return None, [], "bad_characters"
    tokens = TOKEN.findall(text)
    if not tokens:
        return None, [], "empty_answer"
    numbers = [t for t in tokens if t.isdigit()]
    if any(len(t) > MAX_DIGITS or (t[0] == "0" and t != "0") for t in numbers):
        return None, [], "bad_number"
    try:
        value, rest = parse(tokens, 0, 0, 0)
    except ZeroDivisionError:
        return None, [], "division_by_zero"
    except Unparsable:
        return None, [], "not_an_expression"
    if rest != len(tokens):
        return None, [], "not_an_expression"
    return value, [int(t) for t in numbers], ""


class Unparsable(Exception):
    """The tokens are not an expression. Caught in `evaluate`, seen nowhere else."""


def parse(tokens: list[str], at: int, floor: int, depth: int) -> tuple[Fraction, int]:
    """Precedence climbing: the expression from `at`, operators above `floor`, and where it ends."""
    if at >= len(tokens) or depth > MAX_DEPTH:
        raise Unparsable
    if tokens[at] == "(":
        value, at = parse(tokens, at + 1, 0, depth + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise Unparsable
        at += 1
    elif tokens[at].isdigit():
        value, at = Fraction(int(tokens[at])), at + 1
    else:
        raise Unparsable
    while at < len(tokens) and PRECEDENCE.get(tokens[at], 0) > floor:
        op = tokens[at]
        right, at = parse(tokens, at + 1, PRECEDENCE[op], depth + 1)
        value = OPERATIONS[op](value, right)
    return value, at
