"""What the page of a run answers: on the evidence there is, and no more than it shows."""

import json
import os

import pytest
from report_pages import CHECK, CONFIG, LAYERS, SUMMARY, adapter, changed, documents, save

from mlx_lora.report import page
from mlx_lora.report.answers import Answer
from mlx_lora.report.measured import shares

AFTER = ("accuracy_after", "accuracy_after_low", "accuracy_after_high")
GUARDED = CONFIG + "save_every: 100\nmonitor: {check_every: %d}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return save(folder, documents(folder))


def answers(folder) -> dict[str, Answer]:
    return dict(page.of(folder).answers)


def share(value: float) -> dict[str, float]:
    ends = {"accuracy": value, "accuracy_low": value - 0.04, "accuracy_high": value + 0.04}
    return {k: round(v, 3) for k, v in ends.items()}


def staged(folder, **files):
    """A run of two stages that has not finished, with other files by their paths."""
    begun = {"status.json": {"state": "interrupted"}, "eval_before.json": share(0.37)}
    for i, name in enumerate(("1_sft", "2_grpo")):
        steps = [{"step": step, "loss": 1.0} for step in range(4 + i)]
        begun[f"stages/{name}/metrics.jsonl"] = steps
    return save(folder, begun | files, "model: demo\nstages: [{method: sft}, {method: grpo}]\n")


def test_the_worst_of_all_checks_is_told_with_its_stage(tmp_path):
    worse = {**CHECK, "verdict": "fail", "reasons": ["perplexity is ten times the base's"]}
    files = {"check.json": CHECK, "stages/2_grpo/check.json": worse}
    found = answers(staged(tmp_path, **files))["harmless"]
    assert (found.verdict, found.tone) == ("fail", "bad")
    assert found.sentence == "Before 2_grpo: fail" and "ten times" in found.detail


def test_stages_are_compared_on_the_task_of_the_run_and_no_other(tmp_path):
    """A stage's own evaluations are of its own task."""
    easy = [{"step": 3, **share(0.9)}]
    folder = staged(tmp_path, **{"stages/2_grpo/evals.jsonl": easy})
    assert answers(folder)["learned"].verdict == "unclear", "nothing to compare with yet"
    save(folder, {"eval_after_1_sft.json": share(0.5)})
    found = answers(folder)["learned"]
    assert found.sentence == (
        "It learned: accuracy on held-out problems from 37.0% to 50.0% after 1_sft"
    )
    save(folder, {"eval_after_2_grpo.json": share(0.2)})
    assert answers(folder)["learned"].sentence.endswith("37.0% to 20.0% after 2_grpo")
    known = [name for name, found in shares(page.of(folder).folder).items() if found]
    assert known == ["before", "after 1_sft", "after 2_grpo"]


def test_a_run_that_stopped_says_at_which_step_it_was_measured(run, tmp_path):
    found = page.of(changed(run, tmp_path / "r", **{"summary.json": None}))
    assert found.answers["learned"].sentence.endswith("37.0% to 50.0% at step 5")
    assert ">at step 5<" in found.parts["held-out"][1], "in the chart"


@pytest.mark.parametrize(
    ("after", "verdict", "words"),
    [
        (2.0, "yes", "Held-out loss of 2_sft fell: 3 to 2"),
        (3.1, "no", "Held-out loss of 2_sft rose: 3 to 3.1"),
        (2.9999, "unclear", "Held-out loss of 2_sft stayed at 3"),
    ],
)
def test_held_out_loss_is_of_the_last_stage_that_has_both(tmp_path, after, verdict, words):
    losses = {"valid_loss_before": 3.0, "valid_loss": after}
    files = {
        "status.json": {"state": "finished"},
        "stages/1_sft/summary.json": {"valid_loss_before": 9.0, "valid_loss": 1.0},
        "stages/2_sft/summary.json": losses,
        "stages/3_es/summary.json": {"steps": 4},
    }
    found = answers(save(tmp_path, files))["learned"]
    assert found.verdict == verdict and found.sentence.startswith(words)
    assert "no interval" in found.detail


def test_nothing_stood_out_is_said_only_where_something_was_watched(run, tmp_path):
    bare = save(tmp_path, {"status.json": {"state": "failed"}})
    found = page.of(bare)
    assert (found.answers["alerts"].verdict, found.answers["alerts"].tone) == ("unknown", "plain")
    assert found.missing["Alerts"] == "nothing was watched"
    save(bare, {"metrics.jsonl": [{"step": 0, "loss": 1.0}]})
    assert answers(bare)["alerts"].verdict == "none"


def test_a_run_that_only_tests_did_not_learn_and_says_so(tmp_path):
    files = {"status.json": {"state": "finished"}, "summary.json": {"test_loss": 2.25}}
    found = answers(save(tmp_path, files, "model: demo\ntrain: false\n"))["learned"]
    assert found.verdict == "tested"
    assert found.sentence == "It was only tested: test loss 2.25 nats per token"


def test_what_was_written_last_is_measured_and_named(tmp_path):
    """A resumed run that was killed: its checkpoint is newer than what Ctrl-C had saved."""
    places = ("adapters", "checkpoints/0000008", "stages/2_es/checkpoints/0000004")
    for i, name in enumerate(places):
        adapter(tmp_path / name, seed=i)
        (tmp_path / name / "state.json").write_text("{}")
    save(tmp_path, {"metrics.jsonl": [{"step": 0}]})
    for latest in places:
        for name in places:
            second = 2000 if name == latest else 1000
            os.utime(tmp_path / name / "adapter_config.json", (second, second))
        assert f"From {latest}/, measured now." in page.of(tmp_path).parts["ranks"][1]


def test_steps_are_counted_where_they_are_logged(tmp_path):
    """A resumed run's status has lost count, and of stages it never had one."""
    folder = staged(tmp_path)
    assert answers(folder)["finished"].detail.endswith("9 steps were logged")
    bare = save(tmp_path / "bare", {"status.json": {"state": "failed", "step": 6}})
    assert answers(bare)["finished"].detail.endswith("7 steps were logged")


@pytest.mark.parametrize(("every", "last"), [(12, 12), (5, 10), (13, 0), (0, 0)])
def test_it_is_said_when_the_check_looked_last(run, tmp_path, every, last):
    """12 steps were logged. What a start was proven to be does not turn on it."""
    folder = changed(run, tmp_path / "r")
    (folder / "config.yaml").write_text(GUARDED % every)
    found = answers(folder)
    told = f"last after {last} of 12 steps: no failure" if last else "did not look in 12 steps"
    assert told in found["moved"].detail and found["moved"].tone == "plain"
    assert found["harmless"].tone == "good" and "look" not in found["harmless"].detail


def test_a_checkpoint_is_a_look_too(run, tmp_path):
    folder = changed(run, tmp_path / "r")
    (folder / "config.yaml").write_text((GUARDED % 50).replace("100", "10"))
    assert "last after 10 of 12 steps" in answers(folder)["moved"].detail


def test_how_far_it_moved_is_never_green_and_its_best_measure_comes_first(run, tmp_path):
    found = answers(run)["moved"]
    assert (found.verdict, found.tone) == ("moved", "plain")
    assert found.sentence == "KL to the base: 0.1 nats a token"
    assert "KL to where it began: 0.11 nats a token" in found.detail
    summary = {**SUMMARY, "kl_to_base_after": None}
    found = answers(changed(run, tmp_path / "a", **{"summary.json": summary}))["moved"]
    assert found.sentence == "KL to where it began: 0.11 nats a token"
    assert found.detail.startswith("In the rollouts of step 11. Largest singular value of an upd")
    bare = save(tmp_path / "b", {"metrics.jsonl": [{"step": 0, "loss": 1.0}]})
    assert answers(bare)["moved"].sentence == "Not measured"


def test_alerts_on_the_adapter_stand_beside_what_it_gained(run, tmp_path):
    gained = "All the same held-out accuracy rose, by 19.6 to 31.7 points"
    quiet = changed(run, tmp_path / "a", **{"alerts.jsonl": None})
    found = page.of(quiet)
    assert found.answers["alerts"].detail == f"loud in 4 modules. {gained}"
    assert f"{gained}. Whether the model forgot" in found.parts["alerts"][1]
    pasted = f"mlx-lora check demo --adapter {quiet / 'adapters'}"
    assert pasted in found.parts["alerts"][1] and pasted in found.answers["moved"].detail
    assert gained not in page.of(run).parts["alerts"][1], "the run itself had one"
    same = {**SUMMARY, **{k: SUMMARY[k.replace("after", "before")] for k in AFTER}}
    files = {"alerts.jsonl": None, "summary.json": same}
    assert "All the same" not in page.of(changed(run, tmp_path / "b", **files)).parts["alerts"][1]


@pytest.mark.parametrize(
    ("suggested", "words"),
    [
        (8, "A module uses nearly all of its rank: try rank 8 if it learns too little"),
        (4, "Rank 4 holds what every module uses"),
        (None, ""),
    ],
)
def test_a_rank_is_advised_as_the_terminal_does(run, tmp_path, suggested, words):
    spectrum = json.loads((run / "spectrum.json").read_text()) | {"suggested_rank": suggested}
    found = page.of(changed(run, tmp_path / "r", **{"spectrum.json": spectrum}))
    assert found.answers["rank"].detail == words
    assert f"<p>{words}.</p>" in found.parts["ranks"][1] or not words


def test_no_rank_is_advised_above_those_that_are_tried(tmp_path):
    found = page.of(adapter(tmp_path, rank=256, width=256, names=LAYERS[:1]))
    assert found.answers["rank"].detail == ""


def test_a_spectrum_without_a_single_rank_is_no_crash(run, tmp_path):
    spectrum = json.loads((run / "spectrum.json").read_text())
    for module in spectrum["adapters"].values():
        module["effective_rank_BA"] = None
    found = answers(changed(run, tmp_path / "r", **{"spectrum.json": spectrum}))["rank"]
    assert "no known effective rank in any of 4 modules" in found.sentence


def test_rewards_without_right_and_wrong_have_no_interval(run, tmp_path):
    summary = {k: v for k, v in SUMMARY.items() if "accuracy" not in k and k != "stages"}
    summary |= {"reward_mean_before": -17.25, "reward_mean_after": -7.5, "valid_loss": None}
    files = {"summary.json": summary, "eval_before.json": None, "evals.jsonl": None}
    found = answers(changed(run, tmp_path / "a", **files))["learned"]
    assert found.sentence.endswith("from -17.2 to -7.5") and "not right or wrong" in found.detail
    nothing = {f"accuracy_{when}{k[8:]}": 0.0 for when in ("before", "after") for k in share(0)}
    files = {"summary.json": summary | nothing}
    found = answers(changed(run, tmp_path / "b", **files))["learned"]
    assert found.verdict == "unclear" and found.detail.endswith("from -17.2 to -7.5")


def test_evolution_names_its_population_and_not_what_it_does_not_read(tmp_path):
    config = "method: es\nbatch_size: 4\nlearning_rate: 1.0e-5\nes: {population: 32}\n"
    facts = page.of(save(tmp_path, {"metrics.jsonl": [{"step": 0}]}, config)).facts
    assert facts == {"method": "es", "population": "32"}
