"""Rollouts: rewards come while rows decode and in order, and stop is the task's unless given."""

import dataclasses
import threading

import pytest

from mlx_lora import models
from mlx_lora.blocks import RolloutOptions
from mlx_lora.errors import TaskError
from mlx_lora.rl import rollout as module
from mlx_lora.rl.rollout import rewards, rollout
from mlx_lora.tasks import load_task

OPTIONS = {"group": 4, "seed": 0, "step": 0, "max_tokens": 12, "temperature": 1.0}


@pytest.fixture(scope="module")
def loaded():
    return models.load("demo")


@pytest.fixture(scope="module")
def task():
    return load_task("countdown")


def test_rewards_are_of_their_own_texts_in_order(loaded, task):
    samples = task.load("train", 10, 0)
    heard: list[int] = []
    groups = rollout(loaded, task, samples, width=8, heard=heard.append, **OPTIONS)
    assert [g.sample for g in groups] == list(samples) and heard == list(range(1, 11))
    for group in groups:
        assert [r.value for r in group.rewards] == [
            task.reward(group.sample, r.text).value for r in group.rollouts
        ]
    assert rewards(groups).shape == (10, 4) and 0 < rewards(groups).mean() < 1


def test_a_part_of_the_samples_gets_what_the_whole_would(loaded, task):
    samples = task.load("train", 6, 0)
    whole = rollout(loaded, task, samples, **OPTIONS)
    half = rollout(loaded, task, samples[3:], numbers=[3, 4, 5], **OPTIONS)
    for a, b in zip(whole[3:], half, strict=True):
        assert [r.ids for r in a.rollouts] == [r.ids for r in b.rollouts]


def test_groups_are_scored_while_others_decode(loaded, task, monkeypatch):
    """A reward waits for the decoding to go on: it would wait for ever if scoring came after."""
    decoding_again = threading.Event()
    first = threading.Event()

    def reward(sample, text):
        first.set()
        assert decoding_again.wait(20), "nothing decoded while this was scored"
        return task.reward(sample, text)

    real = module.generate

    def watching(*args, done, **options):
        def told(p, rows):
            done(p, rows)
            if first.wait(5):
                decoding_again.set()

        return real(*args, done=told, **options)

    monkeypatch.setattr(module, "generate", watching)
    samples = task.load("train", 4, 0)
    groups = rollout(loaded, dataclasses.replace(task, reward=reward), samples, width=4, **OPTIONS)
    assert len(groups) == 4


def test_the_tasks_stop_is_used_unless_the_options_say_otherwise(loaded, task):
    samples = task.load("train", 4, 0)

    def texts(**options):
        groups = rollout(loaded, task, samples, **OPTIONS, **options)
        return [r for g in groups for r in g.rollouts]

    eos = loaded.tokenizer.eos_token_ids
    own, none, other = texts(), texts(stop=()), texts(stop=("answer> ",))
    ended = [r for r in own if r.finished and r.ids[-1] not in eos]
    assert ended and all(r.text.endswith("</answer>") for r in ended)
    assert {r.ids[-1] for r in none if r.finished} <= set(eos)
    for a, b in zip(own, none, strict=True):
        assert a.ids == b.ids[: len(a.ids)]
    assert any(len(a.ids) > len(b.ids) for a, b in zip(own, other, strict=True))
    assert all(t.rstrip().endswith("</answer>") or "answer>" in t for t in (r.text for r in own))
    unending = dataclasses.replace(task, stop=None)
    assert [r for g in rollout(loaded, unending, samples, **OPTIONS) for r in g.rollouts] == none


def test_a_reward_that_crashes_is_an_error(loaded, task):
    def reward(sample, text):
        raise ZeroDivisionError

    with pytest.raises(TaskError):
        rollout(
            loaded, dataclasses.replace(task, reward=reward), task.load("train", 2, 0), **OPTIONS
        )


def test_the_options_of_a_file_are_those_of_a_rollout(loaded, task):
    options = RolloutOptions(max_tokens=5, width=3, stop=(" ",)).model_dump()
    groups = rollout(loaded, task, task.load("train", 2, 0), group=2, seed=0, step=0, **options)
    assert all(len(r.ids) <= 5 for g in groups for r in g.rollouts)
    assert RolloutOptions.model_validate({"stop": []}).stop == ()
    assert RolloutOptions.model_validate({"stop": None}).stop is None
    with pytest.raises(ValueError, match="at least 1 character"):
        RolloutOptions.model_validate({"stop": [""]})


def test_another_purpose_draws_other_texts(loaded, task):
    samples = task.load("train", 4, 0)
    texts = [
        [
            r.text
            for g in rollout(loaded, task, samples, purpose=purpose, **OPTIONS)
            for r in g.rollouts
        ]
        for purpose in ("rollout", "rollout", "evaluate")
    ]
    assert texts[0] == texts[1] != texts[2]
