"""Rejection sampling keeps what is right, once, and says so when nothing is."""

from dataclasses import replace

import pytest

from mlx_lora import models
from mlx_lora.data import encode, end_of_answer
from mlx_lora.errors import RunError
from mlx_lora.rl import rejection
from mlx_lora.rl.rejection import harvest, sifted
from mlx_lora.schema import Stage
from mlx_lora.tasks import load_task
from mlx_lora.types import CORRECT, Group, Reward, Rollout, Sample


def group(prompt: str, *pairs: tuple[str, float]) -> Group:
    sample = Sample(prompt, {}, "")
    rollouts = [Rollout((1,), (2,), (-1.0,), text, True) for text, _ in pairs]
    return Group(
        sample, rollouts, [Reward(value, CORRECT if value == 1 else "wrong") for _, value in pairs]
    )


GROUPS = [
    group("p", ("a", 1.0), ("b", 0.5), ("a", 1.0), ("c", 1.0), ("d", 1.0)),
    group("q", ("a", 0.5), ("b", 0.0), ("c", 0.0), ("d", 0.0), ("e", 0.0)),
    group("r", ("a", 1.0), ("b", 0.0), ("c", 0.0), ("d", 0.0), ("e", 0.0)),
]


def test_full_rewards_are_kept_once_each_and_at_most_so_many_a_problem():
    found = sifted(GROUPS, keep=2)
    assert [(r["prompt"], r["completion"], r["reward"]) for r in found.rows] == [
        ("p", "a", 1.0), ("p", "c", 1.0), ("r", "a", 1.0),
    ]  # fmt: skip
    assert found.counts() == {
        "problems": 3, "sampled": 15, "correct": 5, "distinct": 4, "kept": 3,
    }  # fmt: skip
    assert len(sifted(GROUPS, keep=9).rows) == 4


def test_nothing_right_is_an_error_that_says_what_to_do():
    with pytest.raises(RunError, match="none of 5 completions of 1 problems") as caught:
        sifted(GROUPS[1:2], keep=2)
    assert "rejection_sampling.samples" in caught.value.hint and "`data`" in caught.value.hint


def test_what_was_cut_is_not_learnt_as_if_it_ended_there():
    cut = GROUPS[0].rollouts[0]
    rollouts = [replace(cut, finished=False), *GROUPS[0].rollouts[1:]]
    found = sifted([replace(GROUPS[0], rollouts=rollouts)], keep=9)
    assert [r["completion"] for r in found.rows] == ["a", "c", "d"] and found.correct == 4
    rollouts = [replace(r, finished=False) for r in rollouts]
    with pytest.raises(RunError, match="all 4 correct completions were cut"):
        sifted([replace(GROUPS[0], rollouts=rollouts)], keep=9)


def test_samples_are_the_models_own_and_repeatable():
    loaded, task = models.load("demo"), load_task("countdown")
    e = Stage.model_validate(
        {
            "method": "sft",
            "task": "countdown",
            "rollout": {"max_tokens": 12},
            "rejection_sampling": {"problems": 24, "samples": 8, "keep": 3},
        }
    )
    heard: list[int] = []
    found = harvest(loaded, task, e, heard.append)
    assert heard == list(range(1, 25)), "problem by problem"
    assert found.rows == harvest(loaded, task, e).rows
    assert found.problems == 24 and found.sampled == 192
    assert 0 < len(found.rows) <= found.distinct < found.correct < 192
    samples = {s.prompt: s for s in task.load("train", 24, 0)}
    for row in found.rows:
        assert task.reward(samples[row["prompt"]], row["completion"]).value == row["reward"] == 1.0


def test_no_step_of_training_draws_the_same_numbers(monkeypatch):
    heard: list[dict] = []

    def listening(loaded, task, samples, **options):
        heard.append({"purpose": "rollout", **options})
        return [group(s.prompt, ("a", 1.0)) for s in samples]

    monkeypatch.setattr(rejection, "rollout", listening)
    e = Stage.model_validate({"method": "sft", "task": "countdown", "rejection_sampling": {}})
    rejection.harvest(models.load("demo"), load_task("countdown"), e)
    assert [o["purpose"] for o in heard] == ["rejection"]


class Ends:
    """A tokenizer of letters with several EOS; its chat template closes turns with `turn`."""

    eos_token_ids, eos_token_id, chat_template = (1, 3, 5), 3, "given"

    def __init__(self, turn: str) -> None:
        self.turn = turn

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(c) if c.isdigit() else 10 + ord(c) for c in text]

    def apply_chat_template(self, turns, add_generation_prompt=False, **_) -> list[int]:
        if self.turn == "refused":
            raise ValueError("no system message")
        text = "".join(f"{t['role'][0].upper()}{t['content']}{self.turn}" for t in turns)
        return self.encode(text + "A" * add_generation_prompt)


@pytest.mark.parametrize(("turn", "end"), [("5", 5), ("513", 5), ("1", 1), ("", 3)])
def test_an_answer_ends_as_the_chat_template_ends_it(turn, end):
    tokenizer = Ends(turn)
    text = encode({"prompt": "q", "completion": "w"}, tokenizer)
    head = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], True)
    assert text.ids == (*head, *tokenizer.encode("w"), end) and text.start == len(head)
    assert end_of_answer(Ends("refused")) == 3
