"""Countdown: combine all the numbers, each used once, into an expression that equals the target."""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import islice
from operator import add, mul, sub, truediv

from mlx_lora.errors import ConfigError, TaskError, near
from mlx_lora.rewards.answers import CLOSE, OPEN, answer_block
from mlx_lora.types import Reward, Sample, Task

SPLITS = ("train", "test")
MAX_CHARS, MAX_DEPTH, MAX_DIGITS = 256, 32, 6
ALLOWED, TOKEN = re.compile(r"[-+*/()0-9 \t\r\n]*"), re.compile(r"[0-9]+|[-+*/()]")
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv}


def build(
    *,
    min_count: int = 2,
    max_count: int = 3,
    low: int = 1,
    high: int = 30,
    target_low: int = 1,
    target_high: int = 99,
    operators: str = "+-*",
    template: str = "Numbers: {numbers}. Target: {target}.",
    partial_credit: float = 0.0,
) -> Task:
    """Numbers from `low` to `high`, `min_count` to `max_count` of them, and a whole-number target.

    `partial_credit` in [0, 1) pays a well-formed answer over the right numbers that misses the
    target. Test problems are those whose (numbers, target) hash falls in the held-out fifth, so no
    order, seed or option can leak one into training.
    """
    problems = []
    if not 2 <= min_count <= max_count <= 6:
        counts = f"{min_count}, {max_count}"
        problems.append(f"countdown: 2 <= min_count <= max_count <= 6, got {counts}")
    if not 0 <= low <= high < 10**MAX_DIGITS:
        problems.append(f"countdown: 0 <= low <= high < 10^{MAX_DIGITS}, got {low}, {high}")
    if target_low > target_high:
        problems.append(f"countdown: target_low {target_low} is above target_high {target_high}")
    if not operators or set(operators) - set(PRECEDENCE):
        problems.append(f"countdown: operators are some of + - * /, got {operators!r}")
    if not 0 <= partial_credit < 1:
        problems.append(f"countdown: partial_credit is in [0, 1), got {partial_credit}")
    try:
        shown = template.format(numbers="{numbers}", target="{target}")
    except (LookupError, ValueError, AttributeError):
        shown = ""
    if "{numbers}" not in shown or "{target}" not in shown:
        problems.append(f"countdown: template shows {{numbers}} and {{target}}, got {template!r}")
    if problems:
        raise ConfigError("\n".join(problems))

    def load(split: str, count: int, seed: int) -> Sequence[Sample]:
        if split not in SPLITS:
            raise TaskError(f"countdown has no split {split!r}", near(split, SPLITS))
        rng = random.Random(f"countdown/{split}/{seed}")
        ranges = (min_count, max_count), (low, high), (target_low, target_high)
        draws = stream(rng, split, *ranges, operators, distinct=True)
        samples = [make_sample(*draw, template) for draw in islice(draws, count)]
        if len(samples) < count:
            raise TaskError(
                f"countdown: only {len(samples)} of {count} distinct {split} problems turned up",
                "Widen low..high or target_low..target_high, or ask for fewer.",
            )
        return samples

    return Task(
        load=load,
        reward=partial(reward, partial_credit=partial_credit),
        first=make_sample([7, 25], 18, "25 - 7", template),
        wrong=f"{OPEN} 1 {CLOSE}",
        stop=CLOSE,
    )


def stream(
    rng: random.Random,
    split: str,
    count: tuple[int, int],
    number: tuple[int, int],
    target: tuple[int, int],
    operators: str,
    *,
    distinct: bool = False,
) -> Iterator[tuple[tuple[int, ...], int, str]]:
    """(numbers, target, solution), for ever; every range is inclusive. `distinct`: no repeats.

    Ends after 10,000 draws in a row without a problem, so that hopeless ranges do not hang.
    """
    seen: set[tuple] = set()
    misses = 0
    counts = range(count[0], count[1] + 1)
    shares = [k**2 for k in counts]  # short problems are few: drawn as often, they would run out
    while misses < 10_000:
        misses += 1
        size = rng.choices(counts, shares)[0]
        numbers = sorted(rng.randint(*number) for _ in range(size))
        found = expression(numbers, operators, rng)
        if found is None or found[1].denominator != 1 or not target[0] <= found[1] <= target[1]:
            continue
        problem = (tuple(numbers), int(found[1]))
        if split_of(*problem) != split or problem in seen:
            continue
        if distinct:
            seen.add(problem)
        misses = 0
        yield *problem, found[0]


def make_sample(numbers: Sequence[int], target: int, gold: str, template: str) -> Sample:
    prompt = template.format(numbers=" ".join(map(str, numbers)), target=target)
    columns = {"numbers": tuple(numbers), "target": target}
    return Sample(prompt, columns, f"{OPEN} {gold} {CLOSE}")


def split_of(numbers: Sequence[int], target: int) -> str:
    """train or test, from the problem alone: four fifths train, one fifth test."""
    problem = f"{sorted(numbers)} {target}"
    digest = hashlib.blake2s(problem.encode(), digest_size=2).digest()
    return "test" if int.from_bytes(digest, "big") % 5 == 0 else "train"


def expression(
    numbers: Sequence[int], operators: str, rng: random.Random
) -> tuple[str, int | Fraction] | None:
    """A random expression over all the numbers, one space between tokens, and its exact value."""
    # (text, value, precedence of the outermost operator); a bare number binds tightest
    parts: list[tuple[str, int | Fraction, int]] = [(str(n), n, 3) for n in numbers]
    while len(parts) > 1:
        i, j = rng.sample(range(len(parts)), 2)
        (left, a, p), (right, b, q) = parts[i], parts[j]
        op = rng.choice(operators)
        if op == "/" and b == 0:
            return None
        value = OPERATIONS[op](a, Fraction(b) if op == "/" else b)
        mine = PRECEDENCE[op]
        left = f"( {left} )" if p < mine else left
        right = f"( {right} )" if q < mine or (q == mine and op in "-/") else right
        parts = [x for k, x in enumerate(parts) if k not in (i, j)]
        parts.append((f"{left} {op} {right}", value, mine))
    return parts[0][0], parts[0][1]


def reward(sample: Sample, completion: str, *, partial_credit: float = 0.0) -> Reward:
    """1 for exactly one answer block, at the end, that uses each number once and hits the target.

    Total: any text gets a value and a reason. Exact: rational arithmetic. Strict: ASCII digits and
    + - * / ( ) only; no power, floor division, unary sign, implicit product or leading zero.
    """
    inner, problem = answer_block(completion)
    if inner is None:
        return Reward(0.0, problem)
    value, used, problem = evaluate(inner)
    answer = inner.strip()
    if value is None:
        return Reward(0.0, problem, answer=answer)
    if sorted(used) != sorted(sample.columns["numbers"]):
        return Reward(0.0, "wrong_numbers", answer=answer)
    if value != sample.columns["target"]:
        return Reward(partial_credit, "wrong_value", answer=answer)
    return Reward(1.0, "correct", answer=answer)


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
