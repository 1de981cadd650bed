"""Looks at an adapter in training: what they measure, what they amount to, that runs keep them."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_lora import config, experiment, stages
from mlx_lora.adapter.attach import attach
from mlx_lora.errors import ConfigError
from mlx_lora.progress import console
from mlx_lora.spectral import dynamics, live
from mlx_lora.spectral.dynamics import Look, summed_up
from mlx_lora.spectral.metrics import effective_rank
from mlx_lora.spectral.report import LoRAAnalyzer, write
from mlx_lora.spectral.request import analyze_named
from mlx_lora.spectral.show import moved
from mlx_lora.spectral.spectrum import Pair, measure
from mlx_lora.spectral.trajectories import by_kind
from tests.tiny import tiny


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def pair(name: str = "m", seed: int = 0) -> Pair:
    return Pair(name, random(30, 4, seed=seed), random(4, 20, seed=seed + 1), 2.0, 2.0**-23)


def seen(*means: float | None, every: int = 10, kappa_a=lambda i: 10.0) -> list[Look]:
    """Looks whose mean utilization is this."""
    return [
        Look(
            step=i * every,
            rank_utilization_mean=mean,
            effective_rank_BA={},
            rank_utilization={},
            kappa_A={"m": kappa_a(i)},
            kappa_B={"m": None},
            sigma_max_BA={},
            frobenius_BA={},
            gradient_rank={"m": 2.0, "n": 4.0, "o": None},
        )
        for i, mean in enumerate(means)
    ]


# One look


def test_a_look_says_what_the_spectrum_says():
    p, m = pair(), measure(pair())
    found = dynamics.look(7, [p], {})
    assert (found.step, found.rank_utilization_mean) == (7, pytest.approx(m.rank_utilization))
    for key in dynamics.BY_MODULE[:-1]:
        assert getattr(found, key)["m"] == pytest.approx(getattr(m, key)), key
    assert found.gradient_rank == {"m": None}
    assert Look.from_line(json.dumps(asdict(found))) == found


def test_the_gradient_of_ba_without_forming_it():
    p = pair()
    grad_a, grad_b = random(30, 4, seed=5), random(4, 20, seed=6)
    step = grad_a @ p.b_RO + p.a_IR @ grad_b
    wanted = effective_rank(np.linalg.svd(step, compute_uv=False)[:8])
    assert dynamics.gradient_rank(p, grad_a, grad_b) == pytest.approx(wanted)
    start = replace(p, b_RO=0 * p.b_RO)
    one = np.outer([1, 2, 3, 4], random(20))  # of rank one
    assert dynamics.gradient_rank(start, 0 * grad_a, one) == pytest.approx(1)
    assert dynamics.gradient_rank(start, 0 * grad_a, 0 * one) is None
    assert dynamics.gradient_rank(p, grad_a * np.nan, grad_b) is None


def test_a_module_with_nan_and_one_at_zero():
    broken, idle = pair("broken"), replace(pair("idle"), b_RO=np.zeros((4, 20)))
    broken.b_RO[0, 0] = np.nan
    found = dynamics.look(0, [broken, idle, pair("good")], {})
    assert {key: getattr(found, key)["broken"] for key in dynamics.BY_MODULE} == dict.fromkeys(
        dynamics.BY_MODULE
    )
    assert found.rank_utilization["idle"] is None and found.frobenius_BA["idle"] == 0
    assert found.rank_utilization_mean == found.rank_utilization["good"]


def test_of_many_some_are_looked_at(monkeypatch):
    monkeypatch.setattr(dynamics, "MOST", 3)
    found = dynamics.look(0, [pair(f"m{i}") for i in range(9)], {})
    assert list(found.kappa_A) == ["m0", "m4", "m8"]


@pytest.mark.parametrize(
    ("optimizer", "knows"),
    [*((optimizer, True) for optimizer in live.MEANS), (optim.Adafactor, False)],
)
def test_gradients_are_what_the_optimizer_remembers(optimizer, knows):
    model = tiny()
    attach(model, rank=4, keys=["q_proj"])
    options = {"momentum": 0.9} if optimizer is optim.SGD else {}
    made = optimizer(learning_rate=0.0, **options)
    grads = tree_map(lambda x: mx.random.normal(x.shape), model.trainable_parameters())
    made.update(model, grads)
    found = live.look_at(0, model, made)
    assert len(found.gradient_rank) == 2
    assert all((rank is not None) == knows for rank in found.gradient_rank.values())
    if knows:
        assert all(1 < rank <= 4 for rank in found.gradient_rank.values())  # B = 0: of grad_B


# What looks amount to


def test_trends_at_their_boundary():
    def trend(*means: float | None, **options) -> str | None:
        return summed_up(seen(*means), **options).rank_utilization_trend

    assert trend(*[0.5] * 5, *[0.625] * 5, change=0.25) == "stable"
    assert trend(*[0.5] * 5, *[0.626] * 5, change=0.25) == "increasing"
    assert trend(*[0.5] * 5, *[0.375] * 5, change=0.25) == "stable"
    assert trend(*[0.5] * 5, *[0.374] * 5, change=0.25) == "collapsing"
    assert trend(*[0.4] * 5, *[0.43] * 5) == "increasing"
    assert trend(0.9, *[0.4] * 10) == "stable"  # older looks are past
    assert trend(0.4, 0.5) == "increasing"
    assert trend(0.4, 0.5, change=0.3) == "stable"
    assert trend(0.2, 0.4, 0.4, 0.4, window=1) == "stable"
    assert trend(None, 0.4) is None


def test_saturation():
    def settled(*means: float | None) -> int | None:
        return summed_up(seen(*means)).steps_to_saturation

    assert settled(0.2, 0.3, *[0.4] * 6) == 20
    assert settled(0.2, 0.3, *[0.4] * 5) is None  # for 40 steps only
    assert settled(*[0.4] * 6) == 0
    assert settled(0.4, 0.3, *[0.4] * 6) == 20
    assert settled(0.2, 0.3, 0.39, 0.4, 0.4, 0.4, 0.4, 0.4) == 20  # within 5 %
    assert settled(None, None) is None


def test_volatility_is_in_decades():
    swinging = seen(*[0.4] * 8, kappa_a=lambda i: 10.0 if i % 2 else 1000.0)
    found = summed_up(swinging, window=4)
    assert found.kappa_A_volatility == pytest.approx(1.0)
    assert found.kappa_B_volatility is None and found.gradient_rank == 3.0
    assert summed_up(seen(0.4, 0.4)).kappa_A_volatility == 0
    assert summed_up(seen(0.4)) is None and summed_up([]) is None


def test_wrong_options_are_named():
    for given, message in [
        ("dynamics.window=0", "greater than or equal to 1"),
        ("dynamics.window=2.5", "window"),
        ("dynamics.settle=1", "Did you mean settled?"),
    ]:
        with pytest.raises(ConfigError, match=message):
            analyze_named(Path("nowhere"), None, option=[given])
        key, _, value = given.removeprefix("dynamics.").partition("=")
        yaml = YAML.replace("dynamics: {window: 1", f"dynamics: {{{key}: {value}")
        with pytest.raises(ConfigError, match=message):
            config.check_names(config.from_text(yaml))


# In a run


YAML = """
model: demo
method: grpo
task: countdown
iters: 4
batch_size: 2
learning_rate: 1e-3
save_every: 2
check: {samples: 1}
grpo: {group_size: 4}
rollout: {max_tokens: 16}
eval: {n: 8}
monitor: {spectrum_every: 1, check_every: 0, alerts: {saturated: {steps: 2, change: 1000}},
  dynamics: {window: 1, settled: 1}}
"""


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "write", partial(write, pictures=False))
        patch.setattr(experiment, "plot", lambda *about: None)
        patch.setattr(stages.curves, "draw", lambda *about: None)
        yield


@pytest.fixture(scope="module")
def run(no_pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    experiment.run(config.from_text(YAML), folder, console(quiet=True))
    return folder


def test_a_run_keeps_its_looks_and_spectrum_reads_them(run):
    looks = dynamics.looks_in(run)
    assert [x.step for x in looks] == [0, 1, 2, 3]
    assert all(rank > 1 for rank in looks[-1].gradient_rank.values())
    report = analyze_named(run, None, option=["dynamics.window=1", "dynamics.settled=1"])
    assert report.dynamics == summed_up(looks, window=1, settled=1) and report.dynamics.step == 3
    assert report.dynamics != summed_up(looks)
    (document,) = [json.loads((run / "spectrum.json").read_text())]
    assert document["dynamics"] == asdict(report.dynamics)
    assert LoRAAnalyzer(run / "adapters").analyze().dynamics is None
    assert (
        LoRAAnalyzer(run).analyze(dynamics={"settled": 1}).dynamics.steps_to_saturation is not None
    )


def test_a_run_has_a_picture_of_its_looks(run, tmp_path):
    report = LoRAAnalyzer(run).analyze()
    assert (tmp_path / "dynamics.png") in write(report, tmp_path)
    assert (tmp_path / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    (said,) = moved(report.dynamics)
    assert said.startswith("Up to step 3 its use of rank is ")


def test_modules_of_a_kind_are_one_line():
    where = {"a": (0, "q"), "b": (1, "q"), "c": (2, "q"), "d": (0, "v")}
    values = {"a": 1.0, "b": 2.0, "c": 90.0, "d": None, "gone": 5.0}
    assert by_kind(values, where) == {"q": 2.0}


def test_alerts_are_told_once_while_it_trains(run):
    lines = [json.loads(x) for x in (run / "alerts.jsonl").read_text().splitlines()]
    assert [(x["name"], x["step"]) for x in lines if x["name"] == "saturated"] == [("saturated", 2)]


def test_a_resumed_run_has_the_same_looks(run, tmp_path, monkeypatch):
    folder, look_at = tmp_path / "run", live.look_at

    def stopping(step, *rest):
        if step == 3:
            raise RuntimeError("power cut")
        return look_at(step, *rest)

    monkeypatch.setattr(live, "look_at", stopping)
    with pytest.raises(RuntimeError, match="power cut"):
        experiment.run(config.from_text(YAML), folder, console(quiet=True))
    monkeypatch.undo()
    experiment.run(config.from_text(YAML), folder, console(quiet=True), resume=True)
    for name in (dynamics.FILE, "alerts.jsonl"):
        assert (folder / name).read_text() == (run / name).read_text()


def test_unknown_alerts_and_thresholds_are_refused():
    for wrong in ("{saturatd: {steps: 1}}", "{saturated: {step: 1}}"):
        changed = YAML.replace("{saturated: {steps: 2, change: 1000}}", wrong)
        with pytest.raises(ConfigError, match=r"saturated|steps"):
            config.check_names(config.from_text(changed))


def test_stages_are_searched_from_the_last(tmp_path):
    for name, step in (("1_sft", 1), ("2_sft", 2), ("10_grpo", 3), ("11_grpo", None)):
        place = tmp_path / "stages" / name
        place.mkdir(parents=True)
        if step:
            look = dynamics.look(step, [pair()], {})
            (place / dynamics.FILE).write_text(json.dumps(asdict(look)) + "\n")
    assert [x.step for x in dynamics.looks_in(tmp_path)] == [3]
