"""Tasks from files: rows, answers, a user's own rewards, several of them, and what is refused."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_lora import config
from mlx_lora.errors import ConfigError, ModelError, TaskError, UserError
from mlx_lora.models import encode_prompt
from mlx_lora.rewards import answers
from mlx_lora.rewards.answers import number, stated
from mlx_lora.rewards.parts import judges
from mlx_lora.rewards.score import score, score_all
from mlx_lora.rl.prompts import refuse_unfit
from mlx_lora.tasks import load_task
from mlx_lora.types import CORRECT, SCORED, Reward, Sample
from tests.tiny import ByteTokenizer, tiny_loaded

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
USER = """
from mlx_lora.types import Reward, Sample, Task
print("loaded")  # stdout is for results: this may not reach it

def length(prompts, completions, **columns):
    assert len(prompts) == len(completions)
    return [len(text) for text in completions]

def named(completions, answer):
    return [float(text == a) for text, a in zip(completions, answer)]

def broken(completions):
    return [1 / (text != "seven") for text in completions]

def returning(completions, give):
    return give[0]

def needs(completions, colour):
    return [0.0] * len(completions)

async def late(completions):
    return [0.0]

def build(*, points: float = 1.0) -> Task:
    one = Sample("p", {}, "g")
    return Task(lambda *_: [one], lambda s, t: Reward(points, "correct"), one, "", high=9.0)

made = build(points=2.0)
def no_task():
    return 3
number = 7
"""


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def rows(tmp_path) -> str:
    return write(
        tmp_path / "rows.jsonl", *[{"prompt": f"{i} + {i}?", "answer": 2 * i} for i in range(50)]
    )


@pytest.fixture
def user(tmp_path, rows):
    """`user("length")`: the python task of a function in a file."""
    (tmp_path / "mine.py").write_text(USER)

    def load(name: str, **more):
        data = {} if name in ("build", "made", "no_task", "number") else {"data": rows}
        return load_task("python", {"path": f"{tmp_path}/mine.py:{name}", **data, **more})

    return load


# The contract of a task from rows


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({}, "1,200 + 34 = 1,234\n#### 1,234"),
        ({}, -7.50),
        ({"marked": True}, "$18"),
        ({"answer": "exact"}, "New  York"),
        ({"answer": "exact", "ignore_case": True, "marked": True}, "NO"),
    ],
)
def test_gold_earns_all_wrong_and_empty_nothing(tmp_path, options, answer):
    path = write(tmp_path / "r.jsonl", *[{"prompt": f"{i}?", "answer": answer} for i in range(9)])
    task = load_task("jsonl", {"path": path, **options})
    assert task.load("train", 1, 0)[0] == task.first
    for split in ("train", "test"):
        for problem in task.load(split, 9, 0):
            assert score(task, problem, problem.gold) == Reward(1.0, CORRECT)
            assert score(task, problem, task.wrong) == Reward(0.0, "no_answer")
            assert score(task, problem, "").value == 0


def test_the_held_out_rows_stay_the_same_whatever_the_order_and_the_number(tmp_path):
    every = [{"prompt": f"{i}?", "answer": i} for i in range(200)]
    whole = load_task("jsonl", {"path": write(tmp_path / "a.jsonl", *every)})
    part = load_task("jsonl", {"path": write(tmp_path / "b.jsonl", *every[99::-1])})
    test = {s.prompt for s in whole.load("test", 999, 0)}
    train = {s.prompt for s in whole.load("train", 999, 0)}
    assert len(test) + len(train) == 200 and not test & train
    assert 10 <= len(test) <= 30, "about a tenth"
    assert {s.prompt for s in part.load("test", 999, 0)} <= test
    assert {s.prompt for s in part.load("train", 999, 0)} <= train
    assert whole.notice.startswith(f"{len(test)} of the 200 problems of ")
    a, b = whole.load("train", 150, 3), whole.load("train", 150, 4)
    assert a != b and a[:20] == whole.load("train", 20, 3)


def test_two_rows_are_one_to_train_and_one_to_test_on(tmp_path):
    path = write(tmp_path / "r.jsonl", *[{"prompt": p, "answer": 1} for p in "ab"])
    task = load_task("jsonl", {"path": path})
    assert len(task.load("train", 9, 0)) == len(task.load("test", 9, 0)) == 1
    lone = write(tmp_path / "s.jsonl", *[{"prompt": "a", "answer": 1}] * 3)
    with pytest.raises(TaskError, match="two different prompts"):
        load_task("jsonl", {"path": lone})


def test_a_test_file_is_kept_apart_and_shared_problems_are_said(tmp_path, rows):
    other = [{"prompt": "0 + 0?", "answer": 0}, {"prompt": "new", "answer": 1}]
    path = write(tmp_path / "test.jsonl", *other)
    task = load_task("jsonl", {"path": rows, "test_path": path})
    assert len(task.load("train", 99, 0)) == 50 and len(task.load("test", 99, 0)) == 2
    assert task.notice.startswith("1 of the 2 problems")
    alone = load_task("jsonl", {"test_path": path})
    assert len(alone.load("test", 99, 0)) == 2
    with pytest.raises(TaskError, match="to test on only"):
        alone.load("train", 1, 0)
    with pytest.raises(ConfigError, match="needs the option path"):
        load_task("jsonl")


BAD_ROWS = {
    "not json": ("{'prompt': 1}\n", "not JSON"),
    "nan": ('{"prompt": "p", "answer": NaN}\n', "NaN is no number of JSON"),
    "infinite": ('{"prompt": "p", "answer": 1e999}\n', "not finite"),
    "a list": ("[]\n", "not an object"),
    "deep": ("[" * 10**5 + "\n", "not JSON"),
    "no prompt": ({"question": "q", "answer": 1}, "has question, answer (prompt_key names another"),
    "empty prompt": ({"prompt": " \n", "answer": 1}, "`prompt` is empty"),
    "number prompt": ({"prompt": 3, "answer": 1}, "should be text"),
    "surrogate": ({"prompt": "\ud800", "answer": 1}, "surrogate"),
    "both": ({"prompt": "p", "messages": CHAT, "answer": 1}, "not both"),
    "no answer": ({"prompt": "p"}, "needs `answer`"),
    "null answer": ({"prompt": "p", "answer": None}, "needs `answer`"),
    "bool answer": ({"prompt": "p", "answer": True}, "text or a number"),
    "words": ({"prompt": "p", "answer": "none"}, "holds no number"),
    "no messages": ({"messages": [], "answer": 1}, "list of {role, content}"),
    "bad message": ({"messages": ["hi"], "answer": 1}, "should be {role, content}"),
    "bad role": ({"messages": [{"role": "bot", "content": "x"}], "answer": 1}, "is 'bot'"),
    "late system": ({"messages": [CHAT[1], *CHAT], "answer": 1}, "a system message comes first"),
    "assistant last": (
        {"messages": [*CHAT, {"role": "assistant", "content": "4"}], "answer": 4},
        "move it to `answer`",
    ),
}


def test_every_bad_row_is_named_at_once_with_its_line(tmp_path):
    good = {"prompt": "p", "answer": 1}
    path = write(tmp_path / "r.jsonl", *[x for row, _ in BAD_ROWS.values() for x in (good, row)])
    with pytest.raises(TaskError) as caught:
        load_task("jsonl", {"path": path})
    *lines, last = str(caught.value).split("\n")
    assert len(lines) == 10 and last == f"... {len(BAD_ROWS)} problems in all"
    for index, (line, (_, words)) in enumerate(zip(lines, BAD_ROWS.values(), strict=False)):
        assert line.startswith(f"{path}:{2 * index + 2}: ") and words in line, line


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused(tmp_path, name):
    row, words = BAD_ROWS[name]
    with pytest.raises(TaskError) as caught:
        load_task("jsonl", {"path": write(tmp_path / "r.jsonl", row)})
    assert words in str(caught.value) and "r.jsonl:1: " in str(caught.value)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe")
    cases = {
        "rows.jsonl": "not UTF-8",
        "rwos.jsonl": "cannot be read",
        ".": "cannot be read",
        "empty.jsonl": "is empty",
    }
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for name, words in cases.items():
        with pytest.raises(TaskError, match=words) as caught:
            load_task("jsonl", {"path": str(tmp_path / name)})
        assert name != "rwos.jsonl" or "rows.jsonl" in caught.value.hint


def test_a_line_may_hold_any_separator_that_json_allows(tmp_path):
    rows = [{"prompt": f"a\u2028b{i}", "answer": i} for i in range(3)]
    path = tmp_path / "r.jsonl"
    text = "\ufeff" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    path.write_text(text, encoding="utf-8")
    task = load_task("jsonl", {"path": str(path)})
    assert len(task.load("train", 9, 0)) + len(task.load("test", 9, 0)) == 3


def test_other_names_of_the_fields(tmp_path):
    row = {"question": "q", "solution": "#### 5"}
    path = write(tmp_path / "r.jsonl", row, row | {"question": "r"})
    names = {"prompt_key": "question", "answer_key": "solution"}
    first = load_task("jsonl", {"path": path, **names}).first
    assert first.prompt in ("q", "r") and first.place.startswith(path)


# Answers


def test_numbers_as_people_write_them():
    same = [
        "1234.5",
        "$1,234.50",
        "= 1234.5000.",
        "1234.5%",
        "\\$1{,}234.5",
        "so 2469/2",
        "**1234.5**",
    ]
    assert {number(text) for text in same} == {Fraction(2469, 2)}
    others = {
        "10-5": 5, "x = -5": -5, "(−3)": -3, "-$5": -5, "1,2,3": 3, "1,2345": 2345, "is...5": 5,
        ".5": Fraction(1, 2), "2.5.": Fraction(5, 2), "1e3": 1000, "\\frac{3}{4}": Fraction(3, 4),
        "h2o": None, "1/0": None, "": None, "٣": None, "9" * 5000: None, "5km": 5, "3 / 4": 4,
    }  # fmt: skip
    assert {text: number(text) for text in others} == others


ANSWERS = [
    ("The answer is 18.", "correct", "no_answer"),
    ("#### 18", "correct", "correct"),
    ("<answer> $18.00 </answer>", "correct", "correct"),
    ("so \\boxed{\\text{about } 18}", "correct", "correct"),
    ("18 <answer>19</answer>", "wrong_answer", "wrong_answer"),
    ("<answer>19</answer> no: <answer>18</answer>", "correct", "correct"),
    ("\\boxed{18} or 19", "correct", "correct"),
    ("#### 18\nbut 19 too", "wrong_answer", "wrong_answer"),
    ("18 or 19", "wrong_answer", "no_answer"),
    ("<think>19</think>18", "correct", "no_answer"),
    ("<think>18", "answer_in_think", "answer_in_think"),
    ("19</think> #### 18", "correct", "correct"),
    ("<think>#### 18</think>", "no_answer", "no_answer"),
    ("none", "no_answer", "no_answer"),
    ("<answer></answer>18", "no_answer", "no_answer"),
    ("\\boxed{18", "correct", "no_answer"),
    ("</answer>18<answer>", "correct", "no_answer"),
]


@pytest.mark.parametrize(("completion", "reason", "marked"), ANSWERS)
def test_where_the_answer_stands(tmp_path, completion, reason, marked):
    path = write(tmp_path / "r.jsonl", *[{"prompt": p, "answer": "#### 18"} for p in "ab"])
    for options, wanted in ({}, reason), ({"marked": True}, marked):
        task = load_task("jsonl", {"path": path, **options})
        assert score(task, task.first, completion) == Reward(float(wanted == "correct"), wanted)


PIECES = ["<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "}", "####", "-", ",", "."]
PIECES += ["/", "$", "\\frac{1}{0}", "e9", *"0123456789", " ", "\n", "\ud800", "٣"]


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_a_reward_is_total(text):
    from mlx_lora.tasks.jsonl import Key

    for kind in ("number", "exact", "none"):
        for marked in (False, True):
            key = Key(kind, "answer", marked, False)
            found = key.reward(Sample("p", {}, "7"), text)
            assert found.value in (0.0, 1.0) and found.reason
            assert (found.value == 1) == (found.reason == CORRECT)
            key({"answer": text})
    assert judges["format"](Sample("p", {}, ""), text).value in (0.0, 1.0)


@pytest.mark.parametrize("piece", [*PIECES, "\\boxed{{", "1,", "1,111", "-.", "9/"])
def test_long_texts_finish(piece):
    text = piece * (10**6 // len(piece))
    for completion in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}", f"#### {text}"):
        stated(completion)
        number(completion)
        answers.spoken(completion)


# A user's own


def test_a_function_gets_prompts_completions_and_columns(user, capsys):
    task = user("length")
    assert capsys.readouterr().out == ""
    assert score_all(task, task.first, ["", "abc"]) == [Reward(0.0, SCORED), Reward(3.0, SCORED)]
    assert task.threads == 1 and user("length", parallel=True).threads == 4
    graded = user("length", solved=2)
    assert [r.reason for r in score_all(graded, graded.first, ["ab", "a"])] == [CORRECT, "unsolved"]
    picky = user("named")
    assert score(picky, picky.first, "x").value == 0


def test_the_user_turn_is_the_prompt_of_a_conversation(tmp_path):
    turns = [[*CHAT[:1], {"role": "user", "content": text}] for text in "ab"]
    path = write(tmp_path / "c.jsonl", *[{"messages": messages} for messages in turns])
    (tmp_path / "see.py").write_text(
        "def f(prompts, completions, messages):\n"
        "    return [float(prompts == [m[-1]['content'] for m in messages])]\n"
    )
    task = load_task("python", {"path": f"{tmp_path}/see.py:f", "data": path})
    assert score(task, task.first, "x").value == 1
    assert task.first.prompt[0] == ("system", "Be brief.")


@pytest.mark.parametrize(
    ("give", "words"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0, 2.0, 3.0], "returned 3 values for 2 completions"),
        ([1.0, None], "returned None, which is no number"),
        ([1.0, "1.0"], "returned '1.0', which is no number"),
        (None, "returned None, not a list"),
        (1.0, "returned 1.0, not a list"),
        ("ab", "returned 'ab', not a list"),
        ({"a": 1.0, "b": 2.0}, "not a list"),
    ],
)
def test_what_a_function_may_not_return(tmp_path, user, give, words):
    data = write(tmp_path / "give.jsonl", *[{"prompt": p, "give": give} for p in "pq"])
    task = user("returning", data=data)
    with pytest.raises(TaskError) as caught:
        score_all(task, task.first, ["first", "second"])
    assert words in str(caught.value) and "'first'" in str(caught.value)
    assert "task python" in str(caught.value) and "give.jsonl:" in str(caught.value)


def test_a_crash_names_the_line_and_the_completion_that_caused_it(user):
    task = user("broken")
    with pytest.raises(TaskError, match=r"ZeroDivisionError.*mine\.py:13\) on 'seven'"):
        score_all(task, task.first, ["six", "seven", "eight"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, -(10**19)])
def test_values_are_finite_in_float32_with_their_squares(user, value):
    task = user("length")
    broken = type(task)(
        task.load, lambda s, t: Reward(value, SCORED), task.first, "", -math.inf, math.inf
    )
    words = "beyond 1e\\+18" if math.isfinite(value) else "no finite number"
    with pytest.raises(TaskError, match=words):
        score(broken, task.first, "x")


def test_what_a_name_may_be(user):
    assert score(user("made"), user("made").first, "x").value == 2
    assert score(user("build", options={"points": 3}), user("made").first, "x").value == 3
    wrong = {
        "lenght": "Did you mean length",
        "needs": "needs colour, and the rows have answer",
        "late": "plain function",
        "no_task": "returned 3, not a mlx_lora.types.Task",
        "number": "is 7: neither",
    }
    for name, words in wrong.items():
        with pytest.raises(UserError) as caught:
            user(name)
        assert words in str(caught.value) + caught.value.hint
    for name, options, words in [
        ("length", {"options": {"a": 1}}, "takes columns"),
        ("build", {"solved": 1.0}, "no use for solved"),
        ("build", {"options": {"pionts": 1}}, "Did you mean points"),
        ("made", {"options": {"a": 1}}, "Task already"),
        ("length", {"data": None}, "needs `data`"),
    ]:
        with pytest.raises(ConfigError, match=words):
            user(name, **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:", "SyntaxError"),
        ("import nowhere_at_all", "nowhere_at_all"),
        ("raise SystemExit(0)", "SystemExit"),
        ("1 / 0", r"ZeroDivisionError.*bad.py:1"),
    ],
)
def test_a_file_that_does_not_load_is_named(tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(TaskError, match=words):
        load_task("python", {"path": f"{tmp_path}/bad.py:f"})


@pytest.mark.parametrize(
    "path", ["mine.py", "mine:f", "mine.py:", "mine.py:a.b", "http://x/y.py:f"]
)
def test_a_target_is_a_local_file_and_a_name(path):
    with pytest.raises(TaskError, match=r"path\.py:name|no file"):
        load_task("python", {"path": path})


# Several rewards and system prompts


def test_rewards_are_weighted_sums_with_their_parts(user, tmp_path, rows):
    entries = [
        {"python": f"{tmp_path}/mine.py:length", "weight": -0.5, "label": "brief"},
        {"name": "format", "weight": 0.25},
        {"name": "task", "weight": 2},
    ]
    user("length")
    task = load_task("jsonl", {"path": rows, "rewards": entries})
    text = f"<answer>{task.first.gold}</answer>"
    found = score(task, task.first, text)
    assert found.parts == {"brief": len(text), "format": 1.0, "task": 1.0}
    assert found.value == pytest.approx(-0.5 * len(text) + 0.25 + 2)
    assert found.reason == CORRECT, "the task's own reward says so, wherever it stands"
    assert (task.low, task.high) == (-math.inf, math.inf) and task.threads == 1
    bounded = load_task("jsonl", {"path": rows, "rewards": entries[1:]})
    assert (bounded.low, bounded.high) == (0.0, 2.25)
    assert score(bounded, task.first, "").parts == {"format": 0.0, "task": 0.0}


def test_a_part_that_fails_is_named_once(user, tmp_path, rows):
    user("length")
    entries = [{"name": "task"}, {"python": f"{tmp_path}/mine.py:broken", "weight": 0.5}]
    task = load_task("jsonl", {"path": rows, "rewards": entries})
    with pytest.raises(TaskError) as caught:
        score_all(task, task.first, ["six", "seven"])
    words = str(caught.value)
    assert words.startswith("the reward of task jsonl, part broken crashed: ZeroDivisionError")
    assert words.count("'seven'") == 1


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "is empty"),
        ([{"weight": 1}], r"rewards\[0\]: should be"),
        ([{"name": "task", "python": "a.py:f"}], "should be"),
        ([{"name": "fromat"}], "Did you mean format"),
        ([{"name": "format", "thnk": True}], "Did you mean think"),
        ([{"name": "task", "weight": "x"}], "weight should be a number"),
        ([{"name": "task", "weight": math.nan}], "weight should be a number"),
        ([{"name": "task", "weight": 0}], "weight of 0"),
        ([{"name": "task"}, {"name": "task"}], "two rewards are called task"),
        ([{"name": "task", "solved": 1}], "`solved` is for"),
        ([{"name": "task", "label": 3}], "label"),
        ([{"python": "nowhere.py:f"}], "no file nowhere.py"),
        ([{"python": "nowhere.py:f", "wieght": 1}], "Did you mean weight"),
    ],
)
def test_bad_rewards_are_named(rows, entries, words):
    with pytest.raises(ConfigError, match=words):
        load_task("jsonl", {"path": rows, "rewards": entries})


def test_format():
    def judge(text, **options):
        return judges.bind("format", options)(Sample("p", {}, ""), text).reason

    assert judge("so <answer>7</answer>") == "well_formed"
    assert judge("<answer>7</answer> so") == "text_after_answer"
    assert judge("<think>a</think><answer>7</answer>", think=True) == "well_formed"
    assert judge("a<answer>7</answer>", think=True) == "no_thought"
    assert judge("<think>a<think>b</think><answer>7</answer>", think=True) == "no_thought"


def test_a_system_prompt_goes_before_every_problem(tmp_path):
    task = load_task("countdown", {"system": "Think."})
    assert task.first.prompt[0] == ("system", "Think.") and task.first.prompt[1][0] == "user"
    assert task.load("train", 1, 0)[0] == task.first
    assert score(task, task.first, task.first.gold).reason == CORRECT
    path = write(tmp_path / "c.jsonl", *[{"messages": CHAT, "answer": i} for i in (4, 5)])
    with pytest.raises(TaskError, match="two different"):
        load_task("jsonl", {"path": path})
    two = {"messages": [*CHAT[:1], {"role": "user", "content": "3 + 3?"}], "answer": 6}
    path = write(tmp_path / "c.jsonl", {"messages": CHAT, "answer": 4}, two)
    with pytest.raises(TaskError, match=r"c\.jsonl:\d: the row has a system message"):
        load_task("jsonl", {"path": path, "system": "Think."})
    with pytest.raises(ConfigError, match="empty"):
        load_task("countdown", {"system": " "})
    with pytest.raises(ConfigError, match="Did you mean system"):
        load_task("countdown", {"sytem": "x"})


class Chat(ByteTokenizer):
    chat_template = "a template"

    def apply_chat_template(self, messages, **_):
        if messages[0]["role"] == "system":
            raise ValueError("System role not supported")
        return {"input_ids": self.encode("".join(m["content"] for m in messages))}


def test_conversations_need_a_chat_template_that_takes_them():
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert encode_prompt(Chat(), turns) == tuple(ByteTokenizer().encode("abc"))
    assert encode_prompt(Chat(), "abc") == tuple(ByteTokenizer().encode("abc"))
    with pytest.raises(ModelError, match="no chat template") as caught:
        encode_prompt(ByteTokenizer(), turns)
    assert "`prompt`" in caught.value.hint
    with pytest.raises(ModelError, match="System role not supported"):
        encode_prompt(Chat(), (("system", "s"), *turns))


def test_prompts_that_do_not_fit_are_named_before_sampling():
    loaded = tiny_loaded()  # made for 256 tokens
    samples = [Sample("x" * size, {}, "", f"r.jsonl:{size}") for size in (10, 200, 250)]
    refuse_unfit(loaded, samples[:2], max_tokens=56)
    with pytest.raises(TaskError) as caught:
        refuse_unfit(loaded, samples, max_tokens=57)
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")] == [
        "r.jsonl:200", "r.jsonl:250",
    ]  # fmt: skip


# In an experiment file


def test_files_are_looked_for_beside_the_experiment(tmp_path, monkeypatch, user):
    user("length")
    text = "model: demo\nmethod: grpo\ntask: {python: mine.py:length, data: rows.jsonl,\n"
    (tmp_path / "e.yaml").write_text(text + "  rewards: [{name: task}, {python: mine.py:named}]}\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    experiment = config.load(tmp_path / "e.yaml")
    config.check_names(experiment)
    assert experiment.task and experiment.task.name == "python"
    assert experiment.task.options["data"] == str(tmp_path / "rows.jsonl")
    assert experiment.task.options["rewards"][1]["python"] == f"{tmp_path}/mine.py:named"
    plain = config.resolved(experiment)
    assert config.resolved(config.from_text(config.yamlfile.dump(plain))) == plain
    moved = config.load(tmp_path / "e.yaml", ["task.data=rows.jsonl"])
    with pytest.raises(ConfigError, match="cannot be read"):
        config.check_names(moved)


def test_problems_of_a_file_are_listed_in_its_order_and_once(tmp_path):
    write(tmp_path / "r.jsonl", *["x\n"] * 12)
    (tmp_path / "e.yaml").write_text("method: grpo\ntask: {name: jsonl, path: r.jsonl}\n")
    with pytest.raises(ConfigError) as caught:
        config.check_names(config.load(tmp_path / "e.yaml"))
    lines = str(caught.value).split("\n")
    assert [f"r.jsonl:{i}: not JSON" in line for i, line in enumerate(lines, 1)] == [True] * 10 + [
        False
    ]
    assert "12 problems in all" in lines[-1] and "e.yaml:2:1" in lines[0]


LOADS = {
    "[]": "gave no problem",
    "1 / 0": r"crashed: ZeroDivisionError: division by zero \(.*made.py:3\)",
    "['q'] * n": "'q', number 0, is no problem",
    "[Sample([('user', 'q')], {}, '')] * n": "is no problem",
}


@pytest.mark.parametrize("found", LOADS)
def test_problems_of_a_users_task_are_looked_at(found, tmp_path):
    (tmp_path / "made.py").write_text(
        "from mlx_lora.types import Reward, Sample, Task\n"
        "first = Sample('q', {}, '')\n"
        f"task = Task(lambda split, n, seed: {found}, None, first=first, wrong='')\n"
    )
    task = load_task("python", {"path": f"{tmp_path}/made.py:task"})
    with pytest.raises(TaskError, match=LOADS[found]):
        task.load("test", 3, 0)


def test_a_users_task_may_make_problems_without_end(tmp_path):
    (tmp_path / "made.py").write_text(
        "import itertools\nfrom mlx_lora.types import Sample, Task\n"
        "first = Sample((('user', 'q'),), {}, '')\n"
        "task = Task(lambda *_: itertools.repeat(first), None, first=first, wrong='')\n"
    )
    task = load_task("python", {"path": f"{tmp_path}/made.py:task"})
    assert len(task.load("train", 3, 0)) == 3
