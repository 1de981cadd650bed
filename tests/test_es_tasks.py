"""Tasks of evolution strategies: the paper's rewards, problems from a file, and who solves what."""

import json
import math
import re
from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_lora.adapter.attach import attach, switched_off
from mlx_lora.data import cycled
from mlx_lora.errors import ConfigError, TaskError
from mlx_lora.models import Loaded
from mlx_lora.numerics import log_softmax
from mlx_lora.rewards.paper import answer_score, format_score, last_block, paper
from mlx_lora.rl import drift
from mlx_lora.rl.evaluate import evaluate
from mlx_lora.rl.rollout import rollout
from mlx_lora.tasks import conciseness, load_task, score
from mlx_lora.types import Group, Reward, Sample
from tests.tiny import tiny_loaded

# Exact-coverage cycling

sizes = st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(sizes, st.integers(0, 5))
def test_every_problem_comes_once_an_epoch_and_never_twice_in_a_step(sizes, seed):
    size, count = sizes
    items = [f"p{i}" for i in range(size)]
    steps = [cycled(items, step, count, seed) for step in range(3 * size)]
    assert all(len(set(step)) == count for step in steps)
    flat = list(chain(*steps))
    for epoch in range(len(flat) // size):
        assert sorted(flat[epoch * size : (epoch + 1) * size]) == sorted(items)
    backwards = [cycled(items, step, count, seed) for step in reversed(range(3 * size))]
    assert backwards[::-1] == steps, "a step does not depend on which were asked for before it"


def test_epochs_are_shuffled_anew_and_by_the_seed():
    first, second = (cycled(range(50), step, 50, 0) for step in (0, 1))
    assert first != second != sorted(second) and cycled(range(50), 0, 50, 1) != first
    with pytest.raises(ConfigError, match="51 problems a step were asked for, and there are 50"):
        cycled(range(50), 0, 51, 0)


# The paper's Countdown reward: the definition itself, with its regular expressions and eval

FULL = re.compile(r"^<think>.*?</think>\n<answer>.*?</answer>$", re.DOTALL)
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def published(numbers: list[int], target: int, completion: str) -> float:
    text = "<think>" + completion
    shape = 0.1 * bool(THOUGHT.search(text)) + 0.5 * bool(ANSWER.search(text))
    shape = 1.0 if FULL.match(text) else shape
    found = ANSWER.findall(completion)
    if not found or not re.match(r"^[0-9+\-*/() ]+$", found[-1]):
        return 0.1 * shape
    if sorted(map(int, re.findall(r"\d+", found[-1]))) != sorted(numbers):
        return 0.1 * shape
    try:  # a test may; the package must not
        value = eval(found[-1], {"__builtins__": None}, {})
        return 0.1 * shape + (abs(float(value) - float(target)) < 1e-5)
    except Exception:
        return 0.1 * shape


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "\n", " ", "so", "3 + 5", "5-3", "8", "("]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
def test_the_papers_reward_is_the_published_one(completion):
    sample = Sample("", {"numbers": (3, 5), "target": 8}, "")
    assert paper(sample, completion).value == pytest.approx(published([3, 5], 8, completion))


@pytest.mark.parametrize(
    ("completion", "value", "reason"),
    [
        ("so</think>\n<answer>3 + 5</answer>", 1.1, "correct"),
        ("so</think>\n<answer>3 + 5</answer>\n", 1.1, "correct"),
        ("so</think> <answer>3 + 5</answer>", 1.06, "correct"),
        ("so</think>\n<answer>3 + 5</answer> there", 1.06, "correct"),
        ("<answer>9</answer> or <answer>5 + 3</answer>", 1.05, "correct"),
        ("so</think>\n<answer>\n3 + 5\n</answer>", 0.1, "bad_characters"),
        ("so</think>\n<answer>3 + 5 = 8</answer>", 0.1, "bad_characters"),
        ("so</think>\n<answer>5 - 3</answer>", 0.1, "wrong_value"),
        ("so</think>\n<answer>8</answer>", 0.1, "wrong_numbers"),
        ("so</think>", 0.01, "no_answer"),
        ("garbage", 0.0, "no_answer"),  # the prompt's own tags are not read
        ("", 0.0, "no_answer"),
    ],
)
def test_parts_of_the_papers_reward(completion, value, reason):
    task = load_task("countdown", {"reward": "paper"})
    found = score(
        task, Sample("<answer>1</answer>", {"numbers": (3, 5), "target": 8}, ""), completion
    )
    assert found.value == pytest.approx(value) and found.reason == reason
    assert 0.1 * found.parts["format"] + found.parts["answer"] == pytest.approx(value)
    assert task.high == 1.1 and task.low == 0


@pytest.mark.parametrize(
    ("numbers", "target", "text"),
    [
        ((2, 3), 8, "2**3"), ((7, 2), 3, "7//2"), ((3, 5), 2, "-3+5"), ((3, 0), 3, "00+3"),
        ((99, 98, 97), 1, "99**98**97"), ((9,), 9, "9" * 5000), ((3, 5), 8, "-" * 2000 + "3+5"),
        ((1, 10, 6), 0, "1/(10**6)"), ((3, 5), 8, "(" * 10**5), ((0,), 0, "1/0"),
    ],
)  # fmt: skip
def test_what_broke_the_published_verifier_earns_nothing(numbers, target, text):
    sample = Sample("", {"numbers": numbers, "target": target}, "")
    assert answer_score(sample, f"<answer>{text}</answer>")[0] == 0


@pytest.mark.parametrize(
    "text", ["<think>" * 20_000, "</think>\n<answer>" * 3000, "<answer>" * 20_000]
)
def test_long_texts_of_tags_are_read_in_one_pass(text, monkeypatch):
    """Published patterns took up to 29 s on these; find() sees each character a few times."""
    assert format_score(text) < 1 and last_block(text) is None


def test_gold_of_the_paper_earns_all_and_a_partial_credit_does_not_go_with_it():
    task = load_task("countdown", {"reward": "paper", "problems": 50})
    for sample in task.load("train", 9, 0):
        assert score(task, sample, sample.gold).value == task.high
    with pytest.raises(ConfigError, match="partial_credit is for the strict reward"):
        load_task("countdown", {"reward": "paper", "partial_credit": 0.1})
    with pytest.raises(ConfigError, match="reward='strikt'"):
        load_task("countdown", {"reward": "strikt"})


# Problems: a set of so many, or a file


def test_a_set_of_problems_is_parted_in_fifths_whatever_the_seed():
    task = load_task("countdown", {"problems": 200})
    train, test = (task.load(split, 999, 3) for split in ("train", "test"))
    assert (len(train), len(test)) == (160, 40) and task.first == task.load("train", 1, 0)[0]
    assert not {s.prompt for s in train} & {s.prompt for s in test}
    assert {s.prompt for s in task.load("train", 999, 4)} == {s.prompt for s in train}
    assert task.load("train", 999, 4) != train


ROWS = [
    {"id": 0, "context": "Use 44 19 35. <think>", "numbers": [44, 19, 35], "target": "98",
     "solution": "44 + 19 + 35"},
    {"id": 1, "context": "b <think>", "numbers": [3, 5], "target": "-2", "solution": "3 - 5"},
    {"nums": [7, 5], "target": 1.4, "solution": None},
    {"numbers": [2, 2], "target": "4", "solution": "2 + 3"},
]  # fmt: skip


def test_the_papers_file_loads(tmp_path):
    path = tmp_path / "countdown.json"
    path.write_text(json.dumps(ROWS))
    task = load_task("countdown", {"path": str(path), "train_rows": 1, "reward": "paper"})
    (sample,) = task.load("train", 9, 0)
    assert sample.prompt == ROWS[0]["context"] and sample.columns["target"] == 98
    assert score(task, sample, sample.gold) == Reward(
        1.1, "correct", {"format": 1.0, "answer": 1.0}
    )
    by_place = {s.place.rpartition("[")[2]: s for s in task.load("test", 9, 0)}
    assert score(task, by_place["1]"], by_place["1]"].gold).value == 1.1
    assert by_place["2]"].prompt == "Numbers: 7 5. Target: 7/5." and by_place["2]"].gold == ""
    assert score(task, by_place["2]"], "</think>\n<answer>7 / 5</answer>").value == 1.1
    assert by_place["3]"].gold == "", "a stored solution that is wrong is not believed"
    assert "1 problems" in task.notice and "2 come without a right solution" in task.notice
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS * 20))
    hashed = load_task("countdown", {"path": str(lines), "train_rows": 4})
    assert "76 of these are among those to train on" in hashed.notice


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"numbers": [1, 2]}, 7]', r"\[1\]: not an object"),
        ('[{"numbers": [1, "2"], "target": 3}]', r"\[0\]: `numbers` should be a list"),
        ('[{"numbers": [1, 2], "target": "three"}]', "`target` should be a number, is 'three'"),
        ('[{"numbers": [1, 2], "target": "1e999999"}]', "should be a number"),
        ('[{"numbers": [1, 2], "target": 3, "prompt": 7}]', "`prompt` should be text, is 7"),
        ('[{"numbers": [1, 2], "target": 3, "context": " "}]', "`context` is empty"),
        ('[{"numbers": [1, 2], "target": NaN}]', "NaN is no number"),
        ("[", "not JSON"),
        ("", "is empty"),
        ('[{"numbers": [1, 2], "target": 3}]', "both are needed"),
    ],
)
def test_a_bad_file_is_named_row_by_row(tmp_path, content, message):
    path = tmp_path / "countdown.json"
    path.write_text(content)
    with pytest.raises(TaskError, match=message):
        load_task("countdown", {"path": str(path)})


def test_options_that_a_file_makes_moot_are_refused():
    with pytest.raises(ConfigError, match="high, problems make problems, and path brings its own"):
        load_task("countdown", {"path": "x.json", "high": 9, "problems": 50})
    with pytest.raises(ConfigError, match="train_rows counts rows of a file"):
        load_task("countdown", {"train_rows": 9})


# Conciseness


def test_gold_is_the_best_there_is_and_longer_or_shorter_is_worse():
    task = load_task("conciseness")
    train, test = (task.load(split, 99, 0) for split in ("train", "test"))
    assert (len(train), len(test)) == (2, 8) and task.first == train[0]
    for sample in (*train, *test):
        assert score(task, sample, sample.gold) == Reward(0.0, "correct")
        assert score(task, sample, task.wrong).reason == "wrong_answer"
        assert score(task, sample, "").reason == "no_answer"
    assert {s.prompt for s in task.load("train", 2, 1)} == {s.prompt for s in train}


@given(st.text(max_size=60), st.sampled_from(["8", "No", "Paris"]))
def test_the_reward_counts_characters_of_the_completion_alone(completion, answer):
    sample = Sample("A long prompt that must not count", {"answer": answer}, answer)
    found = conciseness.length_reward(sample, completion)
    assert found.value == -abs(len(completion) - len(answer)) <= 0


@pytest.mark.parametrize(
    ("completion", "value", "reason"),
    [
        ("paris.", -1, "correct"),
        ("It is Paris!", -7, "contains_answer"),
        ("Paris2", -1, "wrong_answer"),
        ("@#$%!", 0, "wrong_answer"),  # a hack of the length reward shows in the reason
        ("🦆🦆🦆🦆🦆", 0, "wrong_answer"),
        ("x" * 10**6, -2000, "wrong_answer"),
    ],
)
def test_the_reason_says_whether_it_is_the_answer(completion, value, reason):
    task = load_task("conciseness")
    sample = Sample("Capital of France?", {"answer": "Paris"}, "Paris")
    assert score(task, sample, completion) == Reward(float(value), reason)
    assert task.low <= value <= task.high


def test_your_own_questions_and_what_is_refused():
    own = {"train": {"2 + 2?": "4"}, "test": {"3 + 3?": "6"}, "longest": 10}
    task = load_task("conciseness", own)
    assert score(task, task.first, "x" * 99).value == task.low == -10
    with pytest.raises(ConfigError) as caught:
        load_task("conciseness", {"train": {"a": " ", "b": "1"}, "test": {"b": "2"}})
    assert "neither may be empty" in str(caught.value) and "'b' is in train" in str(caught.value)
    with pytest.raises(ConfigError, match="train"):
        load_task("conciseness", {"train": {}})


# KL to the base on the model's own samples


def moved(size: float) -> Loaded:
    loaded = tiny_loaded()
    attach(loaded, rank=2, scale=2.0, init="gaussian", init_options={"std": size})
    return loaded


def by_hand(loaded: Loaded, groups: list[Group]) -> float:
    """k3 token by token, from whole forward passes of single rows."""
    found: list[float] = []
    for row in (r for g in groups for r in g.rollouts):
        ids = mx.array([[*row.prompt_ids, *row.ids]])
        at = slice(len(row.prompt_ids) - 1, -1)
        with switched_off(loaded.model):
            base = np.array(log_softmax(loaded.model(ids).astype(mx.float32))[0, at])
        own = np.array(log_softmax(loaded.model(ids).astype(mx.float32))[0, at])
        for place, token in enumerate(row.ids):
            gap = float(base[place, token] - own[place, token])
            found.append(math.exp(gap) - 1 - gap)
    return float(np.mean(found))


def test_the_kl_to_the_base_is_that_of_the_models_own_tokens(monkeypatch):
    monkeypatch.setattr(drift, "ROWS", 3)
    loaded, task = moved(0.2), load_task("conciseness")
    groups = rollout(
        loaded,
        task,
        task.load("test", 2, 0),
        group=4,
        seed=0,
        step=0,
        max_tokens=9,
        temperature=1.0,
    )
    found = drift.kl_to_base(loaded.model, groups)
    assert found > 0.001 and found == pytest.approx(by_hand(loaded, groups), rel=1e-3)
    with switched_off(loaded.model):
        assert drift.kl_to_base(loaded.model, groups) == 0
    assert drift.kl_to_base(tiny_loaded().model, groups) == 0, "a model without an adapter"


def test_an_evaluation_of_conciseness_samples_twenty_and_reports_the_kl():
    found = evaluate(moved(0.2), load_task("conciseness"), n=2, max_tokens=4)
    assert found["kl_to_base"] > 0 and list(found["pass_at"])[-1] == "20"
    assert found["reward_mean_sampled"] < 0
    assert evaluate(moved(0.2), load_task("countdown"), n=2, max_tokens=4)["kl_to_base"] is None
