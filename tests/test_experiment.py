"""A whole experiment: resumed equals uninterrupted, and what a file says is what happens."""

import json
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import config, experiment
from mlx_lora.adapter import files
from mlx_lora.errors import ConfigError, RunError
from mlx_lora.plan import plan
from mlx_lora.progress import console
from mlx_lora.rl import grpo
from mlx_lora.types import Reward, Sample, Task

YAML = """
model: demo
method: grpo
task: {name: countdown, partial_credit: 0.5}
iters: 5
save_every: 2
batch_size: 4
learning_rate: 1e-4
grpo: {group_size: 4}
rollout: {max_tokens: 12}
eval: {n: 16}
monitor: {every: 2}
"""
TIMES = {"seconds", "tokens_per_second"}


def read(folder, *, times=False):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if times or k not in TIMES} for x in lines]


def run(folder, text=YAML, **options):
    return experiment.run(config.from_text(text), folder, console(quiet=True), **options)


class Cut(Exception):
    """Stands for a power failure."""


def test_a_killed_run_resumed_equals_an_uninterrupted_one_bitwise(tmp_path, monkeypatch):
    text = YAML + "scale_schedule: {name: kl_budget, start: 0.5, budget: 1e-4}\n"
    whole = run(tmp_path / "whole", text)
    real = grpo.train

    def cut_short(*args, **options):
        for step in real(*args, **options):
            yield step
            if step == 2:  # after the checkpoint of two steps and one step more
                raise Cut

    monkeypatch.setattr(grpo, "train", cut_short)
    with pytest.raises(Cut):
        run(tmp_path / "cut", text)
    assert len(read(tmp_path / "cut")) == 3
    monkeypatch.setattr(grpo, "train", real)
    resumed = run(tmp_path / "cut", text, resume=True)
    assert read(tmp_path / "cut") == read(tmp_path / "whole")
    scales = [m["scale"] for m in read(tmp_path / "whole")]
    assert scales[0] < scales[1] < scales[-1] < 20, "the schedule is at work when the run is cut"
    taken = [m.get("update_taken") for m in read(tmp_path / "whole")]
    assert taken == [1.0] * 5, "steps without an update would hide a lost optimizer state"
    assert resumed["accuracy_after"] == whole["accuracy_after"]
    pairs = [files.read(tmp_path / name / "adapters")[1] for name in ("whole", "cut")]
    assert pairs[0].keys() == pairs[1].keys()
    assert all(mx.array_equal(pairs[0][k], pairs[1][k]) for k in pairs[0])
    times = json.loads((tmp_path / "cut" / "time_breakdown.json").read_text())
    counts = {row["name"]: row["count"] for row in times["rows"] if row["kind"] == "step"}
    assert times["parts"] == 2 and counts["learn"] == 3 + 3, "the step that was lost took time too"
    assert counts["prefill"] == counts["reward"] == 6 < counts["decode"]
    assert times["total"] == pytest.approx(sum(row["seconds"] for row in times["rows"]))
    start = files.read(tmp_path / "whole" / "adapters" / "initial")[1]
    assert any(not mx.array_equal(start[k], pairs[0][k]) for k in start), "nothing was learnt"


def test_resume_refuses_another_experiment_and_a_finished_run(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(RunError, match="finished"):
        run(tmp_path / "run", resume=True)
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "running"))
    with pytest.raises(ConfigError, match="learning_rate"):
        run(tmp_path / "run", YAML.replace("1e-4", "1e-3"), resume=True)
    held_out = tmp_path / "run" / "held_out.json"
    about = json.loads(held_out.read_text())
    assert len(set(about["ids"])) == about["n"] == about["while_training"] == 16
    held_out.write_text(json.dumps(about | {"ids": about["ids"][::-1]}))
    with pytest.raises(RunError, match=r"held-out problems of .* were others"):
        run(tmp_path / "run", resume=True)


@pytest.mark.slow
def test_a_run_that_was_killed_is_resumed_to_the_same_bits(tmp_path):
    """SIGKILL before the first step and within the run; the first one leaves no checkpoint."""
    path = tmp_path / "small.yaml"
    path.write_text(YAML)
    run(tmp_path / "whole", YAML)
    command = [sys.executable, "-m", "mlx_lora", "train", path, "--run-dir", tmp_path / "cut"]
    for seen, more in (("eval_before.json", []), ("checkpoints/0000002/state.json", ["--resume"])):
        process = subprocess.Popen([*command, *more], stderr=subprocess.DEVNULL)
        while not (tmp_path / "cut" / seen).exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.kill()
        process.wait()
    run(tmp_path / "cut", YAML, resume=True)
    assert read(tmp_path / "cut") == read(tmp_path / "whole")
    pairs = [files.read(tmp_path / name / "adapters")[1] for name in ("whole", "cut")]
    assert all(mx.array_equal(pairs[0][k], pairs[1][k]) for k in pairs[0])


@pytest.mark.parametrize("leads", [True, False])
def test_a_page_that_fails_leaves_a_finished_run_as_it_is(tmp_path, monkeypatch, capsys, leads):
    """Also without training; and only the leading machine tries."""
    (tmp_path / "test.jsonl").write_text('{"text": "A duck has two legs."}\n')
    text = f"model: demo\ntrain: false\ntest: true\nadapter_path: ''\ndata: {tmp_path}\n"

    def full(folder):
        raise OSError(28, "No space left on device")

    def measured(*_):
        monkeypatch.setattr(experiment.distributed, "leads", lambda: leads)
        return {"test_loss": 2.0}

    monkeypatch.setattr(experiment, "measured_alone", measured)
    monkeypatch.setattr(experiment.page, "of", full)
    folder = tmp_path / "run"
    found = experiment.run(config.from_text(text), folder, console())
    kept, status = (json.loads((folder / f"{n}.json").read_text()) for n in ("summary", "status"))
    assert found["test_loss"] == kept["test_loss"] == 2.0 and status["state"] == "finished"
    said = capsys.readouterr()
    told = " ".join((said.out + said.err).split())
    assert ("No space left on device" in told) == leads == ("mlx-lora report" in told)


def test_a_scheduled_scale_is_in_force_and_saved(tmp_path):
    text = YAML + "scale_schedule: {name: linear, start: 0.5, until: 1.0}\n"
    run(tmp_path / "run", text)
    settings, _ = files.read(tmp_path / "run" / "adapters")
    expected = 20.0 * (0.5 + 0.5 * 4 / 5)  # the scale of the last of five steps
    assert settings["lora_parameters"]["scale"] == pytest.approx(expected)


def test_an_adapter_can_be_trained_on(tmp_path):
    run(tmp_path / "one")
    text = YAML + f"resume_adapter_file: {tmp_path / 'one' / 'adapters'}\n"
    summary = run(tmp_path / "two", text + f"adapter_path: {tmp_path / 'copy'}\n")
    assert summary["check"]["expect"] == "healthy"
    assert summary["accuracy_before"] == pytest.approx(
        json.loads((tmp_path / "one" / "summary.json").read_text())["accuracy_after"]
    )
    folders = (tmp_path / "one" / "adapters", tmp_path / "two" / "adapters", tmp_path / "copy")
    one, two, copy = (files.read(folder)[1] for folder in folders)
    assert all(mx.array_equal(two[k], copy[k]) for k in two)
    assert any(not mx.array_equal(one[k], two[k]) for k in one)


def test_an_adapter_that_garbles_the_model_is_not_trained_on(tmp_path):
    """A scale saved 100 times too large, say: the check speaks before RL is paid for."""
    run(tmp_path / "one")
    folder = tmp_path / "one" / "adapters"
    settings, _ = files.read(folder)
    settings["lora_parameters"]["scale"] *= 100
    (folder / files.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(experiment.CheckFailed, match="perplexity"):
        run(tmp_path / "two", YAML + f"resume_adapter_file: {folder}\n")
    status = json.loads((tmp_path / "two" / "status.json").read_text())
    assert status["state"] == "failed"
    assert not (tmp_path / "two" / "metrics.jsonl").exists()


def test_keys_that_nothing_acts_on_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"does not act on test yet"):
        run(tmp_path / "run", YAML + "test: true\n")
    assert not (tmp_path / "run").exists()


def test_sft_needs_no_problems_to_train_on():
    e = config.from_text("method: sft\ntask: countdown\niters: 2").first
    problem, read = Sample("2 + 2?", {}, "4"), []

    def load(split, count, seed):
        read.append(split)
        return [problem][:count]

    task = Task(load, lambda sample, text: Reward(0.0, ""), first=problem, wrong="")
    assert experiment.asked(e, task) == [problem] and read == ["test"]


def test_a_plan_counts_and_measures_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plan(config.from_text(YAML), console(quiet=True))
    assert found["rollouts_per_step"] == 16 and found["rollouts"] == 80
    assert 0 < found["tokens_per_step"] <= 16 * 12
    assert found["trainable_parameters"] == 97_280
    assert np.isfinite(found["minutes"]) and found["peak_memory_mb"] > 0
    assert list(tmp_path.iterdir()) == []
