"""A warm start and RL after it: resumed equals uninterrupted, wherever the run was cut."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_lora import config, curves, experiment, lessons, models, sft, stages
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.check import gate
from mlx_lora.errors import ConfigError, RunError
from mlx_lora.plan import plan
from mlx_lora.progress import console
from mlx_lora.rl import grpo
from mlx_lora.show import print_plan, print_summary

YAML = """
model: demo
task: {name: countdown, partial_credit: 0.5}
learning_rate: 1e-3
rollout: {max_tokens: 12}
eval: {n: 8}
monitor: {every: 1}
save_every: 2
stages:
- method: sft
  rejection_sampling: {problems: 16, samples: 4, keep: 2}
  scale_schedule: {name: linear, start: 0.2, until: 1.0}
  iters: 3
  batch_size: 4
- method: grpo
  iters: 3
  batch_size: 4
  grpo: {group_size: 8}
"""
TIMES = {"seconds", "tokens_per_second"}
STAGES = ("1_sft", "2_grpo")


def run(folder, text=YAML, **options):
    return experiment.run(config.from_text(text), folder, console(quiet=True), **options)


def metrics(folder):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def equal(one, two):
    a, b = (files.read(folder)[1] for folder in (one, two))
    settings = [files.read(folder)[0]["lora_parameters"] for folder in (one, two)]
    return settings[0] == settings[1] and all(mx.array_equal(a[k], b[k]) for k in a | b)


REPORTS: dict[str, gate.Report] = {}  # of the uninterrupted run, by what was expected


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and its summary."""
    folder, real = tmp_path_factory.mktemp("whole"), gate.judge

    def judge(*given, **more):
        return REPORTS.setdefault(given[3], real(*given, **more))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "judge", judge)
        return folder, run(folder)


@pytest.fixture
def quick(whole, monkeypatch):
    """No pictures, and the verdicts of the uninterrupted run, which saw the same adapters."""
    for module, name in ((experiment, "write"), (experiment, "plot"), (curves, "draw")):
        monkeypatch.setattr(module, name, lambda *given: None)
    monkeypatch.setattr(gate, "judge", lambda *given, **more: REPORTS[given[3]])


def test_every_stage_leaves_its_files(whole):
    folder, summary = whole
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml", "environment.json", "check.json", "adapters", "stages", "spectrum.json",
        "summary.json", "eval_before.json", "eval_after_1_sft.json", "eval_after_2_grpo.json",
        "time_breakdown.json", "base", "status.json",
    }  # fmt: skip
    assert not list(folder.glob("*.jsonl")) and not (folder / "checkpoints").exists()
    for name in STAGES:
        place = folder / "stages" / name
        assert {p.name for p in place.iterdir()} >= {
            "metrics.jsonl", "checkpoints", "adapters", "status.json", "training.png",
        }  # fmt: skip
        assert json.loads((place / "status.json").read_text())["state"] == "finished"
        assert len(metrics(place)) == 3
    last = folder / "stages" / "2_grpo"
    assert (last / "samples.jsonl").exists() and (last / "check.json").exists()
    assert equal(last / "adapters", folder / "adapters")
    assert not equal(last / "adapters", folder / "stages" / "1_sft" / "adapters")
    warm, rl = summary["stages"]
    assert warm["method"] == "sft" and rl["steps"] == 3 and rl["check"] in ("pass", "warn")
    rows = (folder / "stages" / "1_sft" / "rejection_sampling.jsonl").read_text().splitlines()
    assert len(rows) == warm["rejection_sampling"]["kept"] > 0
    assert json.loads(rows[0]).keys() == {"prompt", "completion", "reward"}
    assert summary["accuracy_after"] == rl["accuracy"]
    files.load(models.load("demo").model, folder / "adapters")


def test_rl_refers_to_where_it_began_and_keeps_the_scale_it_found(whole):
    folder, _ = whole
    warm, rl = (metrics(folder / "stages" / name) for name in STAGES)
    assert [m["scale"] for m in warm] == pytest.approx([4.0, 4.0 + 16 / 3, 4.0 + 32 / 3])
    assert [m["scale"] for m in rl] == [warm[-1]["scale"]] * 3
    assert all(m["tokens_trained"] <= 4 * 13 for m in warm), "prompts carry no loss"
    assert [m["update_taken"] for m in rl] == [1.0] * 3, "else a lost optimizer would not show"
    assert rl[0]["kl"] == 0.0 < rl[1]["kl"], (
        "the reference is the adapter that the warm start left behind"
    )


class Cut(Exception):
    """Stands for a power failure."""


def after(steps, real):
    """The loop, cut after so many steps."""

    def loop(*args, **options):
        for done, step in enumerate(real(*args, **options), start=1):
            yield step
            if done == steps:
                raise Cut

    return loop


def cut(*args, **options):
    raise Cut


PLACES = {
    "while sampling": (lessons, "harvest", cut),
    "inside the first stage": (sft, "train", after(3, sft.train)),
    "before its first checkpoint": (sft, "train", after(1, sft.train)),
    "between the stages": (stages, "check_again", cut),
    "inside the second stage": (grpo, "train", after(3, grpo.train)),
    "while explaining": (experiment, "LoRAAnalyzer", cut),
}


SELDOM = ("before its first checkpoint", "between the stages", "while explaining")


@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=[pytest.mark.slow] * (p in SELDOM)) for p in PLACES]
)
def test_a_run_cut_anywhere_and_resumed_equals_an_uninterrupted_one(
    place, whole, quick, tmp_path, monkeypatch
):
    folder, summary = whole
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[place])
        with pytest.raises(Cut):
            run(tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "status.json").read_text())["state"] == "failed"
    resumed = run(tmp_path / "cut", resume=True)
    for name in STAGES:
        one, two = (root / "stages" / name for root in (folder, tmp_path / "cut"))
        assert metrics(one) == metrics(two)
        assert equal(one / "adapters", two / "adapters")
    sampled = "stages/1_sft/rejection_sampling.jsonl"
    assert (folder / sampled).read_bytes() == (tmp_path / "cut" / sampled).read_bytes()
    times = {"run_dir", "seconds", "check"}
    assert {k: v for k, v in resumed.items() if k not in times} == {
        k: v for k, v in summary.items() if k not in times
    }


def test_finished_stages_are_not_run_again(whole, quick, tmp_path, monkeypatch):
    folder, summary = whole
    shutil.copytree(folder, tmp_path / "run")
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "running"))  # killed at the very end
    for module in (sft, grpo):
        monkeypatch.setattr(module, "train", cut)
    monkeypatch.setattr(lessons, "harvest", cut)
    assert run(tmp_path / "run", resume=True)["stages"] == summary["stages"]


def test_a_failing_check_between_the_stages_stops_the_run_for_good(quick, tmp_path, monkeypatch):
    monkeypatch.setitem(REPORTS, "healthy", replace(REPORTS["healthy"], verdict="fail"))
    for resume in (False, True):
        with pytest.raises(experiment.CheckFailed):
            run(tmp_path / "run", resume=resume)
        place = tmp_path / "run" / "stages" / "2_grpo"
        assert not (place / "metrics.jsonl").exists()
        assert json.loads((place / "status.json").read_text())["state"] == "failed"


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(whole, quick, tmp_path, monkeypatch):
    folder, _ = whole

    def stopped(*args, **options):
        yield next(grpo_train(*args, **options))
        for layer in lora_layers(args[0].model).values():
            layer.lora_b = layer.lora_b + 1.0  # half of an update
        raise KeyboardInterrupt

    grpo_train = grpo.train
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    place = tmp_path / "run" / "stages" / "2_grpo"
    for status in (tmp_path / "run", place):
        assert json.loads((status / "status.json").read_text())["state"] == "interrupted"
    assert [p.name for p in (place / "checkpoints").iterdir()] == ["0000001"]
    run(tmp_path / "run", resume=True)
    assert equal(place / "adapters", folder / "stages" / "2_grpo" / "adapters")


def test_what_stages_cannot_do_together_is_refused_at_once(tmp_path):
    text = YAML.replace("- method: grpo", "- method: grpo\n  model: other")
    text = text.replace("eval: {n: 8}", "eval: {n: 8}\nscale_schedule: linear")
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "run", text)
    message = str(caught.value)
    assert "stages.1.scale_schedule" in message and "first stage" in message
    assert "model should be the same in all" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("init: gaussian", "scale_schedule: linear does not go with the init gaussian"),
        ("stages: []\nscale_schedule: kl_budget\ndata: x", "looks at the KL"),
        ("stages: []\nfine_tune_type: full", "fine_tune_type full"),
        ("stages: []\ndata: nowhere", "no file or folder nowhere"),
    ],
)
def test_refused_before_any_work(change, part, tmp_path):
    keys = {line.split(":")[0] for line in change.splitlines()}
    head, _, tail = YAML.partition("stages:")
    text = head + ("" if "stages" in keys else "stages:" + tail) + change + "\n"
    with pytest.raises(ConfigError, match=part):
        run(tmp_path / "run", text)
    assert not (tmp_path / "run").exists()


def test_resume_says_that_there_is_no_run(tmp_path):
    with pytest.raises(RunError, match="there is no run in"):
        run(tmp_path / "missing", resume=True)


def test_a_plan_covers_every_stage(capsys):
    found = plan(config.from_text(YAML), console(quiet=True))
    warm, rl = found["stages"]
    assert warm["rollouts"] == 64 and warm["steps"] == rl["steps"] == 3
    assert warm["texts"] == 32 and rl["rollouts"] == 96
    assert found["minutes"] >= 0 and found["trainable_parameters"] == 97_280
    print_plan(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "stage 2" in said and "it fits in memory. Run it without --dry-run." in said
    rl |= {"memory_fits": False, "memory_advice": ["a smaller group_size"]}
    print_plan(found)
    assert "it may not fit in memory" in " ".join(capsys.readouterr().out.split())


SFT = """
model: demo
method: sft
data: {data}
mask_prompt: true
iters: 4
batch_size: 4
learning_rate: 1e-3
steps_per_eval: 2
save_every: 2
"""


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    row = '{"prompt": "How many legs has a duck?", "completion": "A duck has two legs."}\n'
    (folder / "train.jsonl").write_text(row * 6)
    (folder / "valid.jsonl").write_text(row * 2)
    return folder


def test_sft_alone_learns_a_folder_of_rows_without_any_task(rows, tmp_path, capsys):
    summary = run(tmp_path / "run", SFT.format(data=rows))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "valid_loss" in line] == [1, 3]
    assert all(line["loss"] > 0 for line in lines)
    assert summary["valid_loss"] == lines[-1]["valid_loss"] and summary["task"] is None
    assert not [k for k in summary if k.startswith("accuracy")]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"adapters", "checkpoints", "spectrum.json", "training.png"} <= names
    assert not {"samples.jsonl", "eval_before.json", "stages"} & names
    print_summary(summary)
    assert "Held-out loss" in capsys.readouterr().out


@pytest.mark.slow
def test_sft_alone_resumes_bitwise(rows, tmp_path, monkeypatch):
    text = SFT.format(data=rows / "train.jsonl").replace("iters: 4", "epochs: 2")
    run(tmp_path / "whole", text)
    assert len(metrics(tmp_path / "whole")) == 3, "two passes over 6 rows by 4"
    with monkeypatch.context() as patch:
        patch.setattr(sft, "train", after(3, sft.train))
        with pytest.raises(Cut):
            run(tmp_path / "cut", text)
    run(tmp_path / "cut", text, resume=True)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert equal(tmp_path / "whole" / "adapters", tmp_path / "cut" / "adapters")


@pytest.mark.slow
def test_dora_and_lora_plus_go_through_both_stages(quick, tmp_path):
    lora = "lora_parameters: {scale: 2.0, lora_plus_ratio: 4}\nfine_tune_type: dora"
    run(tmp_path / "run", YAML.replace("model: demo", f"model: demo\n{lora}"))
    settings, last = files.read(tmp_path / "run" / "adapters")
    assert settings["fine_tune_type"] == "dora"
    places = ("adapters/initial", "stages/1_sft/adapters")
    first, warm = (files.read(tmp_path / "run" / place)[1] for place in places)
    for name in (n for n in last if n.endswith(("lora_b", ".m"))):
        assert not mx.array_equal(first[name], warm[name]), name
        assert not mx.array_equal(warm[name], last[name]), name
