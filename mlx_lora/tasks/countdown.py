"""Countdown: combine all the numbers, each used once, into an expression that equals the target."""

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal

from annotated_types import Ge

from mlx_lora.errors import ConfigError, TaskError, near
from mlx_lora.problems import SPLITS, Problems, faults_of_text, json_rows, refuse
from mlx_lora.registry import options
from mlx_lora.rewards.answers import CLOSE, OPEN, THOUGHT, answer_block
from mlx_lora.rewards.arithmetic import MAX_DIGITS, OPERATIONS, PRECEDENCE, evaluate
from mlx_lora.rewards.paper import HIGH, paper
from mlx_lora.types import Reward, Sample, Task

DECIMAL = re.compile(r"-?[0-9]{1,12}(\.[0-9]{1,12})?")
TRAIN_SHARE = 0.8  # of a set of so many `problems`; the hash holds a fifth of all problems out too
FEWEST = 10  # problems in such a set
OF_FILES = ("path", "train_rows", "reward", "partial_credit", "template")  # go with `path`


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
    reward: Literal["strict", "paper"] = "strict",
    problems: Annotated[int, Ge(FEWEST)] | None = None,
    path: str | None = None,
    train_rows: Annotated[int, Ge(1)] | None = None,
) -> Task:
    """Numbers from `low` to `high`, `min_count` to `max_count` of them, and a whole-number target.

    `partial_credit` in [0, 1) pays a well-formed answer over the right numbers that misses the
    target. Test problems are those whose (numbers, target) hash falls in the held-out fifth, so no
    order, seed or option can leak one into training. `problems`: a set of so many, four fifths to
    train on, in place of new ones without end. `reward: paper` is 0.1 · format + answer.

    `path`: problems from a file, like countdown.json of the ES paper; its first `train_rows` are to
    train on and the others to test, or else the hash decides.
    """
    given = {name: value for name, value in locals().items() if name in options(build)}
    refuse_options(given)
    style = partial(make_sample, template=template, paper=reward == "paper")
    strict = partial(strict_reward, partial_credit=partial_credit)
    judged: dict[str, Any] = {"reward": paper, "high": HIGH, "wrong": ""}
    if reward == "strict":
        judged = {"reward": strict, "wrong": f"{OPEN} 1 {CLOSE}"}
    if path is not None:
        filed = from_file(path, train_rows, style)
        return Task(load=filed.load, first=filed.first, stop=CLOSE, notice=filed.notice, **judged)
    ranges = (min_count, max_count), (low, high), (target_low, target_high)

    def draw(split: str, count: int, seed: int) -> Sequence[Sample]:
        if split not in SPLITS:
            raise TaskError(f"countdown has no split {split!r}", near(split, SPLITS))
        rng = random.Random(f"countdown/{split}/{seed}")
        draws = stream(rng, split, *ranges, operators, distinct=True)
        samples = [style(*draw) for draw in islice(draws, count)]
        if len(samples) < count:
            raise TaskError(
                f"countdown: only {len(samples)} of {count} distinct {split} problems turned up",
                "Widen low..high or target_low..target_high, or ask for fewer.",
            )
        return samples

    if problems is not None:
        train = round(problems * TRAIN_SHARE)
        made = Problems(draw("train", train, 0), draw("test", problems - train, 0))
        return Task(load=made.load, first=made.first, stop=CLOSE, **judged)
    return Task(load=draw, first=style([7, 25], 18, "25 - 7"), stop=CLOSE, **judged)


def refuse_options(given: Mapping[str, Any]) -> None:
    """ConfigError that lists what is wrong with these options of `build`."""
    problems = []
    g = given
    if not 2 <= g["min_count"] <= g["max_count"] <= 6:
        counts = f"{g['min_count']}, {g['max_count']}"
        problems.append(f"countdown: 2 <= min_count <= max_count <= 6, got {counts}")
    if not 0 <= g["low"] <= g["high"] < 10**MAX_DIGITS:
        got = f"{g['low']}, {g['high']}"
        problems.append(f"countdown: 0 <= low <= high < 10^{MAX_DIGITS}, got {got}")
    if (low := g["target_low"]) > (high := g["target_high"]):
        problems.append(f"countdown: target_low {low} is above target_high {high}")
    if not g["operators"] or set(g["operators"]) - set(PRECEDENCE):
        problems.append(f"countdown: operators are some of + - * /, got {g['operators']!r}")
    if not 0 <= g["partial_credit"] < 1:
        problems.append(f"countdown: partial_credit is in [0, 1), got {g['partial_credit']}")
    if g["partial_credit"] and g["reward"] == "paper":
        problems.append("countdown: partial_credit is for the strict reward; paper has its own")
    try:
        shown = g["template"].format(numbers="{numbers}", target="{target}")
    except (LookupError, ValueError, AttributeError):
        shown = ""
    if "{numbers}" not in shown or "{target}" not in shown:
        wrong = f"got {g['template']!r}"
        problems.append(f"countdown: template shows {{numbers}} and {{target}}, {wrong}")
    moot = [k for k, v in options(build).items() if k not in OF_FILES and g[k] != v]
    if g["path"] is not None and moot:
        problems.append(f"countdown: {', '.join(moot)} make problems, and path brings its own")
    if g["path"] is None and g["train_rows"] is not None:
        problems.append("countdown: train_rows counts rows of a file: give path")
    if problems:
        raise ConfigError("\n".join(problems))


Style = partial[Sample]  # make_sample with everything that all samples share


def from_file(path: str, train_rows: int | None, style: Style) -> Problems:
    """Problems of a file: a JSON list, or one row a line. TaskError lists all that is wrong.

    Rows have `numbers` (or `nums`) and `target`, perhaps `context` or `prompt` for the whole
    prompt, and a `solution`, which is believed where it is right.
    """
    found: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    wrong, unsolved = [], 0
    for number, (place, row) in enumerate(json_rows(path)):
        try:
            numbers, target, prompt = numbers_of(row), target_of(row), prompt_of(row)
        except TaskError as error:
            wrong.append(f"{place}: {error}")
            continue
        solution = str(row.get("solution") or "")
        value, used, _ = evaluate(solution)
        if value != target or sorted(used) != sorted(numbers):
            solution, unsolved = "", unsolved + 1
        split = split_of(numbers, target)
        if train_rows is not None:
            split = "train" if number < train_rows else "test"
        found[split].append(style(numbers, target, solution, prompt=prompt, place=place))
    refuse(wrong)
    if not found["train"] or not found["test"]:
        counts = f"{len(found['train'])} to train on and {len(found['test'])} to test"
        raise TaskError(f"{path}: {counts}: both are needed", "Change train_rows, or leave it out.")
    notice = f"{len(found['train']):,} problems of {path} are to train on, {len(found['test']):,} "
    notice += "to test"
    known = {problem_of(s) for s in found["train"]}
    if shared := sum(problem_of(s) in known for s in found["test"]):
        notice += f"; {shared:,} of these are among those to train on"
    if unsolved:
        notice += f"; {unsolved:,} come without a right solution, and some may have none"
    return Problems(found["train"], found["test"], notice)


def problem_of(sample: Sample) -> tuple[tuple[int, ...], int | Fraction]:
    return tuple(sorted(sample.columns["numbers"])), sample.columns["target"]


def numbers_of(row: Mapping[str, Any]) -> list[int]:
    numbers = row.get("numbers", row.get("nums"))
    if (
        not isinstance(numbers, list)
        or not numbers
        or not all(type(n) is int and 0 <= n < 10**MAX_DIGITS for n in numbers)
    ):
        raise TaskError(f"`numbers` should be a list of whole numbers, is {numbers!r:.40}")
    return numbers


def prompt_of(row: Mapping[str, Any]) -> str | None:
    """The whole prompt that a row brings, if it does."""
    key = next((k for k in ("context", "prompt") if row.get(k) is not None), None)
    if key is None:
        return None
    if not isinstance(row[key], str):
        raise TaskError(f"`{key}` should be text, is {row[key]!r:.40}")
    for fault in faults_of_text(key, row[key]):
        raise TaskError(fault)
    return row[key]


def target_of(row: Mapping[str, Any]) -> int | Fraction:
    """A whole number, or the fraction that text like '27.4' says."""
    text = str(row.get("target"))
    if not DECIMAL.fullmatch(text):
        raise TaskError(f"`target` should be a number, is {row.get('target')!r:.40}")
    value = Fraction(text)
    return int(value) if value.denominator == 1 else value


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


def make_sample(
    numbers: Sequence[int],
    target: int | Fraction,
    gold: str,
    *,
    template: str,
    paper: bool = False,
    prompt: str | None = None,
    place: str = "",
) -> Sample:
    """A problem; `prompt` replaces the template, `gold` is empty where no solution is known."""
    prompt = prompt or template.format(numbers=" ".join(map(str, numbers)), target=target)
    columns = {"numbers": tuple(numbers), "target": target}
    answer = f"{OPEN} {gold} {CLOSE}" if gold else ""
    return Sample(prompt, columns, f"{THOUGHT}\n{answer}" if paper and gold else answer, place)


def split_of(numbers: Sequence[int], target: int | Fraction) -> str:
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


def strict_reward(sample: Sample, completion: str, *, partial_credit: float = 0.0) -> Reward:
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
