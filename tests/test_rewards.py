"""Scoring in threads, and what a step's rollouts and an evaluation say of the rewards."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from mlx_lora.errors import TaskError
from mlx_lora.recorder import shown
from mlx_lora.rl.describe import REASONS, describe
from mlx_lora.rl.evaluate import pass_at, sentence, summed_up
from mlx_lora.rl.rewards import Scorer
from mlx_lora.types import SCORED, Group, Reward, Rollout, Sample, Task

PROBLEM = Sample("How many?", {}, "", "rows.jsonl:3")


def task_of(reward, **more) -> Task:
    return Task(lambda *_: [PROBLEM], reward, PROBLEM, "", name="mine", **more)


def numbered(sample: Sample, text: str) -> Reward:
    """The later a group, the sooner it is done."""
    time.sleep(float(text))
    return Reward(float(text), "ok")


# Scoring


def test_results_come_in_the_order_of_the_prompts_not_of_completion():
    with Scorer(task_of(numbered), 60) as scorer:
        for p, wait in ((3, "0.06"), (0, "0.03"), (2, "0.0")):
            scorer.submit(p, PROBLEM, [wait, wait])
        values = [[r.value for r in row] for row in scorer.results()]
    assert values == [[0.03, 0.03], [0.0, 0.0], [0.06, 0.06]]


def test_submitting_does_not_wait_and_a_task_says_how_many_calls_at_a_time():
    go, running, most = threading.Event(), [], []

    def reward(sample: Sample, text: str) -> Reward:
        running.append(text)
        most.append(len(running))
        go.wait(10)
        running.remove(text)
        return Reward(1.0, "ok")

    for threads in (1, 3):
        go.clear()
        most.clear()
        with Scorer(task_of(reward, threads=threads), 60) as scorer:
            for p in range(6):
                scorer.submit(p, PROBLEM, [str(p)])
            assert not go.is_set(), "all six are in, none is out"
            while len(running) < threads:
                time.sleep(0.001)
            go.set()
            assert len(scorer.results()) == 6
        assert max(most) <= threads and (threads == 1 or max(most) == threads)


def test_an_empty_rollout_has_no_results():
    with Scorer(task_of(numbered), 60) as scorer:
        assert scorer.results() == []


def raising(error):
    def reward(sample, text):
        if text == "bad":
            raise error
        return Reward(1.0, "ok")

    return reward


def returning(value):
    return lambda sample, text: value if text == "bad" else Reward(1.0, "ok")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (raising(ValueError("no luck")), "crashed: ValueError: no luck"),
        (raising(SystemExit(3)), "crashed: SystemExit: 3"),
        (raising(KeyboardInterrupt()), "crashed: KeyboardInterrupt"),
        (returning(Reward(float("nan"), "ok")), "returned nan, which is no finite number"),
        (returning(Reward(2.0, "ok")), "returned 2.0, outside [0, 1]"),
        (returning(Reward(None, "ok")), "returned None"),  # type: ignore[arg-type]
        (returning(Reward(True, "ok")), "returned True"),
        (returning(Reward(1.0, "ok", {"x": float("inf")})), "returned inf of part x"),
        (returning(None), "returned None, which is no Reward"),
        (returning(1.0), "returned 1.0, which is no Reward"),
    ],
)
def test_a_reward_that_fails_names_task_prompt_and_completion(reward, words):
    with Scorer(task_of(reward), 60) as scorer:
        for p, text in enumerate(["fine", "bad", "fine"]):
            scorer.submit(p, PROBLEM, ["fine", text])
        with pytest.raises(TaskError) as caught:
            scorer.results()
    message = str(caught.value)
    assert words in message and "task mine" in message and "rows.jsonl:3" in message
    assert "'How many?'" in message


def test_a_wrong_count_is_an_error():
    task = task_of(numbered, group=lambda sample, texts: [Reward(1.0, "ok")])
    with Scorer(task, 60) as scorer:
        scorer.submit(0, PROBLEM, ["a", "b"])
        with pytest.raises(TaskError, match="returned 1 rewards for 2 completions on 'a'"):
            scorer.results()


def test_a_reward_that_hangs_is_an_error_and_the_others_do_not_wait_for_it():
    stuck = threading.Event()

    def reward(sample, text):
        if text == "bad":
            stuck.wait(60)
        return Reward(1.0, "ok")

    with Scorer(task_of(reward), 0.5) as scorer:
        for p, text in enumerate(["fine", "x" * 200, "bad"]):
            scorer.submit(p, PROBLEM, [text])
        with pytest.raises(TaskError, match=r"took longer than 0\.5 s on 'bad'") as caught:
            scorer.results()
    stuck.set()
    assert "reward_seconds" in caught.value.hint


def test_time_counts_from_when_a_group_is_begun(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mlx_lora.rl.rewards.time.monotonic", lambda: now[0])

    def reward(sample, text):
        now[0] += 50
        return Reward(1.0, "ok")

    with Scorer(task_of(reward, threads=1), 60) as scorer:
        for p in range(4):
            scorer.submit(p, PROBLEM, ["x"])
        assert len(scorer.results()) == 4


HANGS = """
import time
from mlx_lora.rl.rewards import Scorer
from mlx_lora.errors import TaskError
from mlx_lora.types import Sample, Task
one = Sample("p", {}, "")
task = Task(lambda *_: [one], lambda s, t: time.sleep(10**6), one, "")
try:
    with Scorer(task, 0.05) as scorer:
        scorer.submit(0, one, ["x"])
        scorer.results()
except TaskError:
    print("ended")
"""


def test_a_reward_that_hangs_does_not_hold_the_process():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_what_a_reward_prints_stays_off_stdout(capsys):
    def reward(sample, text):
        print("debugging")
        return Reward(1.0, "ok")

    with Scorer(task_of(reward), 60) as scorer:
        scorer.submit(0, PROBLEM, ["x"])
        scorer.results()
    print("result")
    assert capsys.readouterr() == ("result\n", "debugging\n")


# What rollouts and evaluations say


def group(*rewards: Reward, lengths=None, finished=True) -> Group:
    lengths = lengths or [1] * len(rewards)
    rows = [
        Rollout((1,), (2,) * n, (-1.0,) * n, f"text {i}", finished) for i, n in enumerate(lengths)
    ]
    return Group(PROBLEM, rows, rewards)


def told(*groups: Group) -> dict:
    return describe(groups, np.array([[r.value for r in g.rewards] for g in groups]))


YES, NO = Reward(1.0, "correct", answer="7"), Reward(0.0, "wrong", answer="8")


def test_groups_are_counted_by_what_they_solve():
    found = told(group(YES, YES), group(YES, NO), group(NO, NO), group(NO, replace(NO, answer="9")))
    assert found["accuracy"] == 3 / 8 and found["pass_at_group"] == 0.5
    assert found["solve_none"] == 0.5 and found["solve_all"] == 0.25
    assert found["reason/correct"] == 3 / 8 and found["reason/wrong"] == 5 / 8
    assert found["distinct_answers"] == (0.5 + 1 + 0.5 + 1) / 4


def test_a_task_that_calls_nothing_correct_has_no_accuracy():
    found = told(group(Reward(3.0, SCORED), Reward(-1.0, SCORED)))
    assert not {"accuracy", "pass_at_group", "solve_none", "solve_all"} & found.keys()
    assert found["reward"] == 1.0 and found["reason/scored"] == 1.0
    assert found["distinct_answers"] == 1.0, "two texts"


def test_lengths():
    found = told(group(YES, NO, lengths=[2, 6]), group(YES, NO, lengths=[1, 11], finished=False))
    assert found["completion_tokens"] == 5 and found["finished_tokens"] == 4
    assert found["completion_tokens_min"] == 1 and found["completion_tokens_max"] == 11
    assert found["truncated"] == 0.5
    assert "finished_tokens" not in told(group(YES, NO, finished=False))


def test_parts_are_means_without_weights():
    a, b = (replace(YES, parts={"task": x, "format": y}) for x, y in ((1.0, 0.0), (0.0, 0.5)))
    found = told(group(a, b))
    assert found["reward/task"] == 0.5 and found["reward/format"] == 0.25


def test_a_flood_of_reasons_stays_readable():
    rows = [Reward(0.0, f"said {i:03}") for i in range(100)]
    found = told(group(*rows[:50], *rows[:1]), group(*rows[50:], *rows[:1]))
    shares = {k: v for k, v in found.items() if k.startswith("reason/")}
    assert len(shares) == REASONS + 1 and sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.__getitem__) == "reason/other"
    assert shares["reason/said 000"] == 3 / 102


def test_samples_show_the_best_the_worst_and_one_more():
    rewards = [Reward(v, "x", {"part": v}) for v in (0.2, 0.9, 0.1, 0.5)]
    lines = shown(20, [group(*rewards, finished=False)] * 9)
    assert len(lines) == 12
    first = {line["pick"]: line for line in lines[:3]}
    assert (first["best"]["reward"], first["worst"]["reward"]) == (0.9, 0.1)
    assert first["random"]["reward"] in (0.2, 0.5)
    assert first["best"]["completion"] == "text 1" and first["best"]["parts"] == {"part": 0.9}
    assert first["best"]["truncated"] and first["best"]["tokens"] == 1
    picks = {line["completion"] for line in lines if line["pick"] == "random"}
    assert picks == {"text 0", "text 3"}, "not always the same one"
    assert lines == shown(20, [group(*rewards, finished=False)] * 9), "repeatable"
    equal = shown(0, [group(YES, YES)])
    assert [line["pick"] for line in equal] == ["best", "random"]
    assert json.dumps(lines)


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    from itertools import combinations

    for n, correct in ((5, 2), (4, 0), (4, 4), (6, 1)):
        drawn = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            chosen = [any(c) for c in combinations(drawn, k)]
            assert pass_at(k, n, correct) == pytest.approx(np.mean(chosen))


def test_an_evaluation_sums_up():
    found = summed_up([YES, NO], [[YES, NO, NO], [NO, NO, NO]])
    assert found["accuracy"] == 0.5 and found["accuracy_sampled"] == pytest.approx(1 / 6)
    assert found["pass_at"] == pytest.approx({"1": 1 / 6, "2": 1 / 3, "3": 0.5})
    assert found["reward_mean"] == 0.5 and found["reasons"] == {"correct": 1, "wrong": 1}
    scored = summed_up([Reward(-2.0, SCORED)], [[Reward(3.0, SCORED)]])
    assert scored["accuracy"] is None and scored["pass_at"] == {} and scored["reward_mean"] == -2
    assert "accuracy 50.0%" in sentence(found) and "mean reward -2 of 1" in sentence(scored)
