"""Countdown: the task's contract, and a verifier that no text can crash, stall or fool."""

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_lora.errors import ConfigError, TaskError, UnknownNameError
from mlx_lora.tasks import load_task, score
from mlx_lora.tasks.countdown import OPERATIONS, evaluate, expression, strict_reward
from mlx_lora.types import Reward, Sample, Task

OPTIONS = [
    {},
    {"operators": "+-*/", "max_count": 4},
    {"min_count": 6, "max_count": 6, "high": 9},
    {"low": 0, "target_low": -20, "target_high": 20, "template": "{target} from {numbers}:"},
    {"operators": "-*", "high": 12, "partial_credit": 0.1},
]


def sample(numbers=(3, 5), target: int = 8) -> Sample:
    return Sample("", {"numbers": tuple(numbers), "target": target}, "")


def answer(text: str) -> str:
    return f"<answer>{text}</answer>"


# The contract of every task, those from files in test_tasks.py


def test_first_sample_is_the_literal_one():
    task = load_task("countdown")
    assert task.load("train", 1, 0)[0] == task.first


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_gold_earns_all_and_wrong_earns_nothing(options, split):
    task = load_task("countdown", options)
    for problem in task.load(split, 60, 3):
        assert score(task, problem, problem.gold) == Reward(1.0, "correct")
        assert score(task, problem, task.wrong).value == 0
        assert score(task, problem, "") == Reward(0.0, "no_answer")


@pytest.mark.parametrize("options", OPTIONS)
def test_splits_are_disjoint_and_without_repeats(options):
    seen = {}
    for split in ("train", "test"):
        task = load_task("countdown", options)
        loaded = [{s.prompt for s in task.load(split, 60, seed)} for seed in (0, 1, 2)]
        assert all(len(prompts) == 60 for prompts in loaded)
        seen[split] = set().union(*loaded)
    assert not seen["train"] & seen["test"]


def test_no_option_moves_a_problem_to_the_other_split():
    wide, narrow = load_task("countdown", {"operators": "+-*/"}), load_task("countdown")
    test = {s.prompt for s in wide.load("test", 400, 5)}
    assert not test & {s.prompt for s in narrow.load("train", 400, 6)}


def test_problems_are_a_function_of_the_seed():
    first, again, other = (load_task("countdown").load("train", 50, seed) for seed in (7, 7, 8))
    assert first == again != other
    assert load_task("countdown").load("train", 20, 7) == first[:20]
    assert load_task("countdown").load("test", 0, 7) == []


def test_problems_stay_in_their_ranges():
    options = {"low": 2, "high": 9, "min_count": 3, "max_count": 4, "target_high": 30}
    for problem in load_task("countdown", options).load("train", 100, 0):
        numbers, target = problem.columns["numbers"], problem.columns["target"]
        assert 3 <= len(numbers) <= 4 and all(2 <= n <= 9 for n in numbers)
        assert type(target) is int and 1 <= target <= 30
        assert f"Target: {target}." in problem.prompt


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cuont": 3}, "Did you mean max_count"),
        ({"high": "many"}, "high='many'"),
        ({"high": 2.5}, "high=2.5"),
        ({"min_count": 1}, "min_count"),
        ({"min_count": 4}, "min_count <= max_count"),
        ({"max_count": 7}, "max_count <= 6"),
        ({"low": -1}, "low"),
        ({"low": 26, "high": 25}, "low <= high"),
        ({"high": 10**6}, "high"),
        ({"target_low": 50, "target_high": 40}, "target_low 50 is above target_high 40"),
        ({"operators": ""}, "operators"),
        ({"operators": "+^"}, "operators"),
        ({"partial_credit": 1.0}, "partial_credit"),
        ({"partial_credit": float("nan")}, "partial_credit"),
        ({"template": "Reach {target}."}, "template"),
        ({"template": "{numbers} {target} {hint}"}, "template"),
        ({"template": "{numbers} {target} {"}, "template"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        load_task("countdown", options)


def test_all_problems_with_the_options_come_at_once():
    with pytest.raises(ConfigError) as caught:
        load_task("countdown", {"operators": "%", "low": 9, "high": 3})
    assert str(caught.value).count("countdown:") == 2


@pytest.mark.parametrize(
    "options",
    [
        {"low": 0, "high": 0, "target_low": 5},
        {"target_low": 10**9, "target_high": 10**9},
        {"high": 1, "operators": "*", "target_low": 2},
        {"high": 2, "max_count": 2},  # possible, but far fewer than asked for
        {"low": 0, "high": 0, "operators": "/"},
        {"operators": "*", "min_count": 6, "max_count": 6},  # possible, and hopelessly rare
    ],
)
def test_hopeless_ranges_are_an_error_not_a_hang(options):
    with pytest.raises(TaskError, match="of 200 distinct train problems") as caught:
        load_task("countdown", options).load("train", 200, 0)
    assert "target_low" in caught.value.hint


def test_unknown_names():
    with pytest.raises(UnknownNameError) as caught:
        load_task("cuontdown")
    assert "countdown" in caught.value.hint
    with pytest.raises(TaskError, match="'tset'") as caught:
        load_task("countdown").load("tset", 1, 0)
    assert "test" in caught.value.hint


def test_partial_credit_pays_only_the_right_numbers():
    task = load_task("countdown", {"partial_credit": 0.25})
    assert score(task, sample(), answer("3 * 5")) == Reward(0.25, "wrong_value")
    assert score(task, sample(), answer("3 + 5")) == Reward(1.0, "correct")
    for text in ("3 + 3", "3", "3 +", "", "3 + 5 - 0"):
        assert score(task, sample(), answer(text)).value == 0


@pytest.mark.parametrize("broken", [lambda *_: 1 / 0, lambda *_: Reward(2.0, "correct")])
def test_a_broken_reward_is_an_error_that_names_the_completion(broken):
    task = Task(load=lambda *_: [], reward=broken, first=sample(), wrong="")
    with pytest.raises(TaskError, match="seven"):
        score(task, sample(), "seven")


# Hostile answers

ACCEPTED = [
    ((3, 5), 8, "3+5"),
    ((3, 5), 8, " 5 + 3 "),
    ((3, 5), 8, "\n(3)\t+\r\n((5))"),
    ((3, 5), -2, "3-5"),
    ((8, 3, 3), 8, "8/(3/3)"),
    ((3, 3, 8, 8), 24, "8/(3-8/3)"),
    ((14, 14, 39), 39, "39 * 14 / 14"),
    ((2, 3, 4), 20, "4*(2+3)"),
    ((2, 3, 4), 14, "2+3*4"),
    ((7, 3, 2), 2, "7-3-2"),
    ((12, 3, 2), 2, "12/3/2"),
    ((0, 3), 3, "0+3"),
]
HOSTILE = [
    # power, floor division, and other operators that are not in the rules
    ((2, 3), 8, "2**3", "not_an_expression"),
    ((2, 3, 1), 3, "3-2**-1", "not_an_expression"),
    ((0, 0), 1, "0**0", "not_an_expression"),
    ((7, 2), 3, "7//2", "not_an_expression"),
    ((99, 98, 97), 1, "99**98**97", "not_an_expression"),
    ((7, 7, 7, 7), 1, "7**7**7**7", "not_an_expression"),
    ((3, 5), 6, "3^5", "bad_characters"),
    ((3, 5), 3, "3%5", "bad_characters"),
    # unary signs
    ((3, 5), 2, "-3+5", "not_an_expression"),
    ((3, 5), -15, "5*-3", "not_an_expression"),
    ((3, 5), 8, "+3+5", "not_an_expression"),
    ((3, 5), 2, "+-+3+5", "not_an_expression"),
    ((3, 5), 8, "--3+5", "not_an_expression"),
    ((3,), 3, "--3", "not_an_expression"),
    ((3, 5), 8, "3++5", "not_an_expression"),
    ((3, 5), 8, "-" * 200 + "3+5", "not_an_expression"),
    ((3, 5), 8, "-" * 2000 + "3+5", "too_long"),
    # not quite an expression
    ((3, 5), 8, "", "empty_answer"),
    ((3, 5), 8, " \n\t ", "empty_answer"),
    ((3, 5), 8, "()", "not_an_expression"),
    ((3, 5), 8, "3+", "not_an_expression"),
    ((3, 5), 8, "(3+5", "not_an_expression"),
    ((3, 5), 8, "3+5)", "not_an_expression"),
    ((3, 5), 8, ")3+5(", "not_an_expression"),
    ((3, 5), 15, "3 5", "not_an_expression"),
    ((3, 5), 15, "(3)(5)", "not_an_expression"),
    ((3, 5), 15, "3(5)", "not_an_expression"),
    ((3, 5), 8, "3+5=8", "bad_characters"),
    ((3, 5), 8, "3+5 # x", "bad_characters"),
    # numbers written some other way
    ((3, 5), 35, "35", "wrong_numbers"),
    ((3, 5), 300000, "3e5", "bad_characters"),
    ((1, 3), 1000, "1e3", "bad_characters"),
    ((0, 3), 3, "0x3", "bad_characters"),
    ((3, 5), 8, "3.0+5", "bad_characters"),
    ((3, 5), 8, "3,5", "bad_characters"),
    ((3, 5), 8, "3_0+5", "bad_characters"),
    ((3, 5), 8, "03+5", "bad_number"),
    ((0, 3), 3, "00+3", "bad_number"),
    ((0, 0), 0, "00", "bad_number"),
    ((9, 1), 10, "9" * 200 + "+1", "bad_number"),
    ((9, 1), 10, "9" * 5000 + "+1", "too_long"),
    ((3, 5), 8, "nan", "bad_characters"),
    ((3, 5), 8, "inf", "bad_characters"),
    # division
    ((1, 0), 0, "1/0", "division_by_zero"),
    ((1, 3, 3), 0, "1/(3-3)", "division_by_zero"),
    ((0, 0), 0, "0/0", "division_by_zero"),
    ((1, 10, 6), 0, "1/(10**6)", "not_an_expression"),
    ((1, 999999), 0, "1/999999", "wrong_value"),
    ((3, 5, 7), 8, "3+5*7/7", "wrong_numbers"),
    # code and other alphabets
    ((3, 5), 8, "__import__('os')", "bad_characters"),
    ((3, 5), 8, "[]", "bad_characters"),
    ((3, 5), 8, "{}", "bad_characters"),
    ((3, 5), 8, "3+5\x00", "bad_characters"),
    ((3, 5), 8, "\ufeff3+5", "bad_characters"),
    ((3, 5), 8, "3\u200b+5", "bad_characters"),
    ((3, 5), 8, "3\u00a0+\u00a05", "bad_characters"),
    ((3, 5), 8, "3+5\ud800", "bad_characters"),
    ((3, 5), 8, "３+５", "bad_characters"),
    ((3, 5), 8, "٣+٥", "bad_characters"),
    ((3, 5), 8, "3+5²", "bad_characters"),
    ((3, 5), 15, "3×5", "bad_characters"),
    ((5, 5), 1, "5÷5", "bad_characters"),
    ((3, 5), -2, "3−5", "bad_characters"),
    ((3, 5), 15, r"3 \times 5", "bad_characters"),
    ((3, 5), 8, r"\frac{3}{5}", "bad_characters"),
    ((3, 5), 8, r"\boxed{3+5}", "bad_characters"),
    ((3, 5), 8, "3+5<|im_end|>", "bad_characters"),
    # depth and length
    ((3, 5), 8, "(" * 40 + "3+5" + ")" * 40, "not_an_expression"),
    ((3, 5), 8, "(" * 10**5, "too_long"),
    ((3, 5), 8, " " * 10**5 + "3+5", "too_long"),
    # the right value from the wrong numbers
    ((49, 49), 98, "98", "wrong_numbers"),
    ((3, 5, 8), 8, "3+5", "wrong_numbers"),
    ((3, 5), 8, "3+5+0", "wrong_numbers"),
    ((3, 5), 8, "3+5+8-8", "wrong_numbers"),
    ((3, 5), 6, "3+3", "wrong_numbers"),
    ((14, 14, 39), 53, "14+39", "wrong_numbers"),
    ((3, 5), 8, "3*5", "wrong_value"),
]
COMPLETIONS = [
    ("", "no_answer"),
    ("   \n", "no_answer"),
    ("3+5", "no_answer"),
    ("<answer>3+5", "no_answer"),  # cut before it closed
    ("3+5</answer>", "no_answer"),
    ("</answer>3+5<answer>", "no_answer"),
    ("<ANSWER>3+5</ANSWER>", "no_answer"),
    ("< answer >3+5</ answer >", "no_answer"),
    (r"\boxed{3+5}", "no_answer"),
    ("<answer>1</answer><answer>3+5</answer>", "several_answers"),
    ("<answer>3+5</answer><answer>3+5</answer>", "several_answers"),
    ("<answer><answer>3+5</answer></answer>", "several_answers"),
    ("<answer>3+5</answer></answer>", "several_answers"),
    ("</answer><answer>3+5</answer>", "several_answers"),
    (answer("3+5") * 1000, "several_answers"),
    ("<think><answer>3+5</answer></think>", "answer_in_think"),
    ("<think>so <answer>3+5</answer>", "answer_in_think"),
    ("<think>a</think><think><answer>3+5</answer>", "answer_in_think"),
    ("<answer>3+5</answer> is the answer", "text_after_answer"),
    ("<answer>3+5</answer><|im_end|>", "text_after_answer"),
    ("<answer>3+5</answer>\u200b", "text_after_answer"),
    ("<answer>1 <think> 3+5</answer>", "bad_characters"),
    ("<think>3 and 5</think> so <answer>3+5</answer>", "correct"),
    ("Numbers: 3 5. Target: 8.\n<answer> 3 + 5 </answer>\n", "correct"),
    ("</think><answer>3+5</answer>", "correct"),  # the prompt may have opened the block
]


@pytest.mark.parametrize(("numbers", "target", "text"), ACCEPTED)
def test_honest_answers_earn_one(numbers, target, text):
    assert strict_reward(sample(numbers, target), answer(text)) == Reward(1.0, "correct")


@pytest.mark.parametrize(("numbers", "target", "text", "reason"), HOSTILE)
def test_hostile_answers_earn_nothing_and_say_why(numbers, target, text, reason):
    assert strict_reward(sample(numbers, target), answer(text)) == Reward(0.0, reason)


@pytest.mark.parametrize(("completion", "reason"), COMPLETIONS)
def test_answer_blocks(completion, reason):
    assert strict_reward(sample(), completion) == Reward(float(reason == "correct"), reason)


@pytest.mark.parametrize(
    "piece",
    ["<think>", "</think>\n<answer>", "<answer>", "</answer>", "<", "(", "9", " ", "-", "é"],
)
def test_long_texts_finish(piece):
    text = piece * (10**6 // len(piece))
    for completion in (text, answer(text), "<think>" + text + answer("3+5")):
        assert strict_reward(sample(), completion).value == 0


# Properties

GRAMMAR = ["<answer>", "</answer>", "<think>", "</think>", *"0123456789+-*/() .", "\n", "**", "//"]


@given(st.text() | st.lists(st.sampled_from(GRAMMAR)).map("".join))
def test_reward_is_total_and_bounded(text):
    for completion in (text, answer(text)):
        got = strict_reward(sample(), completion, partial_credit=0.5)
        assert 0 <= got.value <= 1 and got.reason
        assert (got.value == 1) == (got.reason == "correct")


@given(st.text(st.sampled_from("0123456789+-*/() "), max_size=40))
def test_an_accepted_expression_is_one_that_python_reads_the_same_way(text):
    value, numbers, reason = evaluate(text)
    assert (value is None) == bool(reason)
    if value is not None:
        exact = "".join(f"Fraction({t})" if t.isdigit() else t for t in spaced(text))
        assert eval(exact, {"Fraction": Fraction}) == value  # a test may; the package must not
        assert sorted(numbers) == sorted(int(t) for t in spaced(text) if t.isdigit())


def spaced(text: str) -> list[str]:
    for symbol in "+-*/()":
        text = text.replace(symbol, f" {symbol} ")
    return text.split()


trees = st.recursive(
    st.integers(0, 999),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner),
    max_leaves=12,
)


def written(tree) -> str:
    """The tree with every parenthesis spelled out."""
    return (
        str(tree) if isinstance(tree, int) else f"({written(tree[0])}{tree[1]}{written(tree[2])})"
    )


def value_of(tree) -> Fraction:
    if isinstance(tree, int):
        return Fraction(tree)
    return OPERATIONS[tree[1]](value_of(tree[0]), value_of(tree[2]))


def leaves(tree) -> list[int]:
    return [tree] if isinstance(tree, int) else leaves(tree[0]) + leaves(tree[2])


@given(trees)
def test_evaluate_is_exact(tree):
    try:
        expected = (value_of(tree), leaves(tree), "")
    except ZeroDivisionError:
        expected = (None, [], "division_by_zero")
    assert evaluate(written(tree)) == expected


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_generated_expressions_mean_what_they_claim(numbers, rng: random.Random):
    found = expression(numbers, "+-*/", rng)
    if found is not None:
        value, used, _ = evaluate(found[0])
        assert value == found[1] and sorted(used) == sorted(numbers)
