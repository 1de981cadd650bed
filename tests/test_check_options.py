"""What an experiment's `check:` block says reaches the check, in `check`, `train` and training."""

import io
from typing import Any

import pytest
from rich.console import Console

from mlx_lora import config, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach
from mlx_lora.check import writing
from mlx_lora.check.gate import check
from mlx_lora.check.run import check_named, of_experiment, request
from mlx_lora.errors import ConfigError
from mlx_lora.experiment import CheckFailed, run
from mlx_lora.plan import plan

SMALL = """
model: demo
method: grpo
task: {name: countdown, max_count: 2}
iters: 1
batch_size: 2
grpo: {group_size: 2}
rollout: {max_tokens: 4}
eval: {n: 4}
lora_parameters: {rank: 2, scale: 1.0, keys: [q_proj]}
"""
LOUD = "init: {name: gaussian, std: 0.5}\n"
NOTHING: dict[str, Any] = {"adapter": None, "init": "zero", "option": [], "lora": {}, "bits": None}


def experiment(more: str) -> config.Experiment:
    return config.from_text(SMALL + more, "small.yaml", [])


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_failed_check_stops_the_run_or_is_only_said(tmp_path):
    with pytest.raises(CheckFailed):
        run(experiment(LOUD), tmp_path / "stop", quiet())
    summary = run(experiment(LOUD + "check: {on_fail: warn}\n"), tmp_path / "warn", quiet())
    assert summary["check"]["verdict"] == "fail"
    assert (tmp_path / "warn" / "metrics.jsonl").exists()
    assert not (tmp_path / "stop" / "metrics.jsonl").exists()


def test_limits_expectation_prompts_and_samples_come_from_the_block(tmp_path):
    texts = tmp_path / "mine.txt"
    texts.write_text("Tom has a red cup.\nThe duck is in the garden.\nBen went home.\n")
    limits = "limits: {divergence: {fail: 1e-9, warn: 1e-9}}"
    start = "init: {name: gaussian, std: 0.02}\n"
    more = f"{start}check: {{prompts: {texts}, samples: 2, {limits}}}\n"
    with pytest.raises(CheckFailed) as caught:
        run(experiment(more), tmp_path / "run", quiet())
    said = {g.name: g.verdict for g in caught.value.report.gates}
    assert said["divergence"] == "fail"
    assert [pair.prompt for pair in caught.value.report.measured.samples] == [
        "Tom has a red cup.",
        "The duck is in the garden.",
    ]
    assert len(set(caught.value.report.reading.text_K)) == 3


def test_check_on_a_file_reads_the_block_and_the_command_line_goes_first(tmp_path):
    path = tmp_path / "e.yaml"
    block = "check: {expect: healthy, samples: 3, limits: {size: {warn: 9}, reading: {fail: 8}}}\n"
    path.write_text(SMALL + block)
    asked = request(str(path), **NOTHING)
    assert (asked.expect, asked.samples) == ("healthy", 3)
    assert asked.limits == {"size": {"warn": 9.0}, "reading": {"fail": 8.0}}
    asked = request(str(path), **NOTHING, limit=["size.warn=2"], expect="same")
    assert asked.expect == "same" and asked.limits["size"] == {"warn": 2}
    assert of_experiment(str(path), asked).samples == 3


def test_texts_and_prompts_are_judged_before_anything_is_loaded(tmp_path):
    """By --dry-run too, which said that all was well."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "Tom ran."}\n{"question": "Why?"}\n{"prompt": " "}\n')
    for path, said in ((bad, "bad.jsonl:2.*bad.jsonl:3"), (tmp_path / "none.jsonl", "cannot read")):
        e = experiment(f"check: {{prompts: {path}}}\n").model_copy(update={"model": "no/such"})
        match = f"(?s){said}"
        with pytest.raises(ConfigError, match=match):
            plan(e, quiet())
        with pytest.raises(ConfigError, match=match):
            run(e, tmp_path / "run", quiet())
        with pytest.raises(ConfigError, match=match):
            check_named(request("no/such", **NOTHING, prompts=path))
    assert not (tmp_path / "run").exists()


def test_check_on_a_file_attaches_what_training_would(tmp_path):
    """An adapter to go on with at the file's scale, LoRA dropout, and nothing for `full`."""
    loaded, folder = models.load("demo"), tmp_path / "adapter"
    start: dict[str, Any] = {"init": "gaussian", "init_options": {"std": 0.02}}
    files.save(loaded.model, attach(loaded, rank=2, scale=1.0, keys=["q_proj"], **start), folder)
    path = tmp_path / "e.yaml"
    sizes = {}
    for scale in (1.0, 3.0):
        path.write_text(
            f"model: demo\nresume_adapter_file: {folder}\n"
            f"lora_parameters: {{scale: {scale}, dropout: 0.25}}\ncheck: {{samples: 1}}\n"
        )
        measured = check_named(request(str(path), **NOTHING)).measured
        assert measured.dropout == pytest.approx(0.25)
        sizes[scale] = measured.update_size
    assert sizes[3.0] == pytest.approx(3 * sizes[1.0], rel=1e-5)
    path.write_text("model: demo\nlora_parameters: {dropout: 0.25}\n")
    assert request(str(path), **NOTHING).lora["dropout"] == 0.25
    path.write_text("model: demo\nfine_tune_type: full\n")
    with pytest.raises(ConfigError, match="attaches nothing"):
        request(str(path), **NOTHING)


def test_nothing_on_the_command_line_is_passed_over(tmp_path):
    """What only a fresh adapter takes is an error beside a file, an adapter and another model."""
    path = tmp_path / "e.yaml"
    path.write_text(SMALL + "seed: 5\n")
    fresh = [{"lora": {key: 2}} for key in ("rank", "scale", "keys")]
    for given in (*fresh, {"adapter2": tmp_path}):
        with pytest.raises(ConfigError, match="everything comes from it"):
            request(str(path), **NOTHING | given)
    for given in fresh:
        with pytest.raises(ConfigError, match="brings its own"):
            request("demo", **NOTHING | given | {"adapter": tmp_path})
        with pytest.raises(ConfigError, match="as they are"):
            request("demo", **NOTHING | given | {"against": "demo"})
    asked = request("demo", **NOTHING | {"lora": {"rank": 2, "scale": None}})
    assert asked.lora == {"rank": 2} and asked.seed == 0
    assert request(str(path), **NOTHING).seed == 5
    assert request(str(path), **NOTHING, seed=0).seed == 0


def test_gates_and_thresholds_that_do_not_exist_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        config.check_names(experiment("check: {limits: {divergance: {fail: 1}, size: {wan: 2}}}\n"))
    assert "divergance" in str(caught.value) and "wan" in str(caught.value)


def test_an_adapter_of_exact_zeros_is_decoded_once_and_any_other_twice(monkeypatch):
    decoded = []
    real = writing.continuations
    monkeypatch.setattr(
        writing, "continuations", lambda side, *rest: decoded.append(side.off) or real(side, *rest)
    )
    report = check(models.load("demo"), samples=2)
    assert report.verdict == "pass" and decoded == [False]
    decoded.clear()
    check(models.load("demo"), init="gaussian", samples=2)
    assert sorted(decoded) == [False, True]
