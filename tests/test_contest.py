"""The best adapter is kept, and a run without progress ends: by what evals.jsonl says, no more."""

import json
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.lora import LoRALinear

from mlx_lora import config, experiment, sft, stages
from mlx_lora.adapter import files
from mlx_lora.contest import Contest, Remembered
from mlx_lora.errors import ConfigError
from mlx_lora.progress import console
from mlx_lora.rl import checkpoints
from mlx_lora.rl import evaluate as evaluating
from mlx_lora.runlog import Clock, RunLog

YAML = """
model: demo
method: grpo
task: {name: countdown, partial_credit: 0.5}
iters: 6
save_every: 2
batch_size: 6
learning_rate: 1e-3
grpo: {group_size: 4}
rollout: {max_tokens: 12}
eval: {n: 8, every: 1, patience: 2}
monitor: {every: 2}
"""
SFT = """
model: demo
method: sft
data: DATA
iters: 6
batch_size: 2
learning_rate: 1e-3
steps_per_eval: 2
"""


def contest(tmp_path, results, patience=0, every=2):
    e = config.from_text(YAML, "e.yaml", [f"eval.every={every}", f"eval.patience={patience}"])
    kept, left = [], iter(results)
    log = RunLog(tmp_path)
    made = Contest(e, lambda: {"accuracy": next(left)}, lambda: kept.append(1), log, Clock())
    return made, kept


def test_it_measures_when_due_keeps_what_is_better_and_stops_when_patience_is_over(tmp_path):
    made, kept = contest(tmp_path, [0.2, 0.4, 0.4, 0.3], patience=2)
    stops = [made.after(step, {}) for step in range(1, 9)]
    assert [r["accuracy"] for r in made.rows] == [0.2, 0.4, 0.4, 0.3]
    assert len(kept) == 2 and made.summary()["best"]["step"] == 3
    assert stops == [False] * 7 + [True]
    rows = [json.loads(x) for x in (tmp_path / "evals.jsonl").read_text().splitlines()]
    assert [r["best"] for r in rows] == [True, True, False, False]


def test_a_resumed_contest_decides_as_the_whole_one(tmp_path):
    """Killed after the second evaluation, the third comes out the same: equal is not better."""
    made, _ = contest(tmp_path, [0.2, 0.4])
    for step in (2, 4):
        made.after(step, {})
    again, kept = contest(tmp_path, [0.4, 0.3], patience=2)
    assert not again.after(6, {}) and again.after(8, {})
    assert not kept and again.summary()["best"]["step"] == 3


def validated_only(tmp_path, patience=2):
    e = config.from_text(SFT, "e.yaml", [f"eval.patience={patience}"])
    kept = []
    return Contest(e, None, lambda: kept.append(1), RunLog(tmp_path), Clock()), kept


def test_a_validation_that_is_no_number_is_the_worst_and_never_kept(tmp_path):
    """In memory it is NaN, in evals.jsonl null."""
    made, kept = validated_only(tmp_path)
    losses = [math.nan, 2.0, math.inf, 1.5]
    assert not any([made.after(n, {"valid_loss": loss}) for n, loss in enumerate(losses, 1)])
    assert len(kept) == 2 and made.summary()["best"] == {
        "step": 3,
        "metric": "valid_loss",
        "value": 1.5,
    }
    again, kept = validated_only(tmp_path)
    assert again.summary() == made.summary() and not again.after(5, {"valid_loss": 1.7})
    assert again.after(6, {"valid_loss": math.nan}) and not kept


def test_where_no_validation_is_a_number_nothing_is_best_and_patience_ends(tmp_path):
    for _ in range(2):  # the second begins with what the first left in evals.jsonl
        made, kept = validated_only(tmp_path)
        stops = [made.after(n, {"valid_loss": math.nan}) for n in (1, 2, 3)]
        assert stops[-1] and not kept and made.summary() == {}


def test_without_patience_nothing_stops(tmp_path):
    made, _ = contest(tmp_path, [0.5] * 9, every=1)
    assert not any(made.after(step, {}) for step in range(1, 10))


def run(folder, text, **options):
    return experiment.run(config.from_text(text), folder, console(quiet=True), **options)


def test_a_run_that_does_not_improve_stops_with_its_best_adapter_kept(tmp_path, monkeypatch):
    """What it was measured at last is what it is measured at in the end: five times in all."""
    accuracies = iter([0.2, 0.1, 0.5, 0.3, 0.2])
    real = evaluating.evaluate

    def told(*args, **options):
        return real(*args, **options) | {"accuracy": next(accuracies)}

    monkeypatch.setattr(
        experiment, "examination", lambda loaded, task, e: lambda: told(loaded, task, n=e.eval.n)
    )
    summary = run(tmp_path / "run", YAML)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and summary["best"]["step"] == 1
    assert summary["accuracy_after"] == 0.2 and next(accuracies, None) is None
    best = files.read(tmp_path / "run" / "adapters" / "best")[1]
    last = files.read(tmp_path / "run" / "adapters")[1]
    second = files.read(tmp_path / "run" / "checkpoints" / "0000002")[1]
    assert all(mx.array_equal(best[k], second[k]) for k in best)
    assert any(not mx.array_equal(best[k], last[k]) for k in best)


def test_an_adapter_is_measured_again_once_its_factors_or_its_scale_are_others():
    layer = LoRALinear.from_base(nn.Linear(4, 4), r=2)
    model, calls = nn.Sequential(layer), iter(range(9))
    measure = Remembered(lambda: {"n": next(calls)}, model)
    assert [measure()["n"], measure()["n"]] == [0, 0]
    layer.scale *= 0.5
    assert [measure()["n"], measure()["n"]] == [1, 1]
    layer.lora_b += 1e-3
    assert measure()["n"] == 2


@pytest.fixture
def texts(tmp_path):
    """Six texts to learn, and two to validate on."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [f"Tom has {n} red cups and Max has a duck." for n in range(8)]
    for name, part in (("train", rows[:6]), ("valid", rows[6:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    return data


def test_no_step_is_taken_where_patience_is_over_already(tmp_path):
    """A run may be killed behind the checkpoint of the step it stopped at, and resumed."""
    made, _ = contest(tmp_path, [0.4, 0.2, 0.3], patience=2)
    assert [made.after(step, {}) for step in (2, 4, 6)] == [False, False, True]
    again, _ = contest(tmp_path, [], patience=2)
    nothing: Any = None
    log = again.log
    assert stages.follow(iter(()), 6, again.e, nothing, nothing, nothing, again, log) == 6


@pytest.mark.slow
def test_a_run_that_stopped_and_was_killed_ends_where_it_had_stopped(texts, tmp_path, monkeypatch):
    losses = iter([9.0, 1.0, 2.0, 3.0, 0.1, 0.1])  # before the first step, and after each
    monkeypatch.setattr(sft, "mean_over", lambda *given: (next(losses), 1))
    text = SFT.replace("DATA", str(texts)).replace("eval: 2", "eval: 1")
    text += "save_every: 1\neval: {patience: 2}\n"
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(stages.distributed, "refuse_difference", cut)
        run(tmp_path / "run", text)
    assert checkpoints.steps_done(tmp_path / "run" / "checkpoints") == 3
    summary = run(tmp_path / "run", text, resume=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and summary["best"]["step"] == 0


class Cut(Exception):
    """Stands for a power failure."""


def cut(what, *given):
    if what == "the trained adapter":
        raise Cut


def test_sft_keeps_the_adapter_of_the_lowest_validation_loss(texts, tmp_path):
    summary = run(tmp_path / "run", SFT.replace("DATA", str(texts)))
    evals = [json.loads(x) for x in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()]
    lowest = min(evals, key=lambda row: row["valid_loss"])
    assert (summary["best"]["step"], summary["best"]["value"]) == (
        lowest["step"],
        lowest["valid_loss"],
    )
    assert (tmp_path / "run" / "adapters" / "best" / "adapter_config.json").exists()


def test_patience_without_a_validation_is_refused():
    e = config.from_text(SFT + "val_batches: 0\neval: {patience: 1}\n")
    with pytest.raises(ConfigError, match="val_batches is 0"):
        experiment.refuse_patience(e, {"valid": ()})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (SFT.replace("DATA", "x.jsonl") + "eval: {every: 2}\n", "eval.every"),
        (YAML.replace("every: 1, ", ""), "eval.patience"),
    ],
)
def test_keys_that_cannot_act_are_refused(tmp_path, text, part):
    with pytest.raises(ConfigError, match=part):
        run(tmp_path / "run", text)
