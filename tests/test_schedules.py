"""Scale schedules: pure, resumable from the log, and in force inside compiled steps."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_lora import config, cpu
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers, switched_off
from mlx_lora.adapter.schedules import (
    NEEDS_KL,
    Moment,
    kl_budget,
    scale_as_array,
    scale_at,
    schedules,
    set_scale,
)
from mlx_lora.errors import ConfigError
from mlx_lora.rl import grpo
from mlx_lora.runlog import Clock
from mlx_lora.tasks import load_task
from tests import compiled_sft
from tests.test_grpo import attached
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", list(schedules))
def test_a_schedule_begins_above_0_and_stays_within_the_scale(name):
    schedule = schedules[name]
    factors, factor = [], None
    for step in range(100):
        moment = Moment(step / 100, step, factor, 1e-4)
        factor = schedule(moment)
        assert factor == schedule(moment), "a schedule is a function of the moment"
        factors.append(factor)
    assert 0 < factors[0] <= factors[-1] == 1.0
    assert factors == sorted(factors)


SHARE = st.floats(0.01, 1)


@given(SHARE, st.none() | st.floats(0, 10), st.integers(1, 500), SHARE)
def test_a_kl_budget_never_falls_nor_jumps_nor_overspends(factor, kl, step, budget):
    then = kl_budget(Moment(0.5, step, factor, kl), budget=budget, growth=1.2)
    assert factor <= then <= min(1.0, factor * 1.2 * (1 + 1e-12))
    if kl is None:
        assert then == factor
    elif then > factor:
        assert kl * (then / factor) ** 2 <= budget * (step + 1) * (1 + 1e-9)


@pytest.mark.parametrize(
    "options",
    ["linear, start: 2", "cosine, until: 0", "warmup_hold, steps: 0", "kl_budget, start: 0",
     "kl_budget, growth: 1", "kl_budget, budget: -1", "linear, end: 1"],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused_with_their_place(options):
    e = config.from_text(f"method: grpo\ntask: countdown\nscale_schedule: {{name: {options}}}")
    with pytest.raises(ConfigError, match=rf"3:1: .*{options.split()[1].strip(':')}"):
        config.check_names(e)


def test_a_start_at_0_is_taken_with_a_notice():
    e = config.from_text("scale_schedule: {name: linear, start: 0}")
    config.check_names(e)
    assert any("no gradient" in notice for notice in config.notices(e))


def test_the_log_is_all_a_schedule_remembers():
    schedule = schedules.bind("kl_budget", {"budget": 0.01})
    scale = scale_at(schedule, 3.0, 20, 0, None)
    assert scale == pytest.approx(0.3)
    for step in range(1, 8):
        logged = json.loads(json.dumps({"scale": scale, "kl": 0.001}))
        after = scale_at(schedule, 3.0, 20, step, logged)
        assert after == scale_at(schedule, 3.0, 20, step, {"scale": scale, "kl": 0.001})
        assert after == pytest.approx(scale * 1.1)
        scale = after


def test_as_an_array_the_scale_is_state_and_neither_trained_nor_saved(tmp_path):
    model = tiny(bits=4)
    adapter = attach(model, init="gaussian", scale=5.3)
    ids = mx.array([[1, 2, 3]])
    before = model(ids)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    with scale_as_array(model):
        layer = next(iter(lora_layers(model).values()))
        assert isinstance(layer.scale, mx.array) and "scale" in layer.state
        assert {name for name, _ in tree_flatten(model.trainable_parameters())} == names
        assert mx.allclose(model(ids), before, atol=1e-5)
        with switched_off(model):
            assert not mx.allclose(model(ids), before, atol=1e-3)
        set_scale(model, 1.25)
        assert isinstance(layer.scale, mx.array), "a compiled step would not see a number"
        files.save(model, adapter, tmp_path)
    settings, tensors = files.read(tmp_path)
    assert settings["lora_parameters"]["scale"] == 1.25
    assert not [name for name in tensors if "scale" in name]
    assert layer.scale == 1.25 and isinstance(layer.scale, float)
    set_scale(model, 5.3)
    with scale_as_array(model):
        pass
    assert layer.scale == 5.3, "unchanged is unchanged, to the last bit of a Python number"


def test_a_scheduled_run_equals_one_with_the_scale_set_by_hand():
    cpu.settle()  # as loading a model does
    trained = compiled_sft.trained()
    assert compiled_sft.apart(trained, compiled_sft.by_hand()) < 1e-6
    without = compiled_sft.trained(compiled_sft.STILL)
    assert compiled_sft.apart(trained, without) > 1e-2


def test_and_so_does_a_compiled_one():
    """In a process of its own, where compilation is on and the CPU's fast path is not."""
    if sys.platform.startswith("linux") and not shutil.which("g++"):
        pytest.skip("no C++ compiler: MLX cannot compile on this CPU")
    command = [sys.executable, "-m", "tests.compiled_sft"]
    environment = os.environ | {"MLX_LORA_CPU": "plain"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["traces"] == 1, "six steps of one shape: the loss is traced once"
    assert found["compiled"] < 1e-6
    assert found["moved"] < 1e-6, "a start that is remembered, and dropout"
    assert found["frozen"] > 1e-2, "a number in place of an array should stay what it was at first"


def rl_run(text: str) -> list[dict]:
    e = config.from_text(
        "model: demo\nmethod: grpo\ntask: countdown\niters: 5\nbatch_size: 4\nlearning_rate: 3e-3\n"
        f"grpo: {{group_size: 4}}\nrollout: {{max_tokens: 12}}\n{text}"
    )
    loaded, seen = attached(), []
    loop = grpo.train(
        loaded, load_task("countdown"), e, optim.Adam(3e-3), Clock(), lambda s, m, g: seen.append(m)
    )
    for _ in loop:
        scales = {layer.scale for layer in lora_layers(loaded.model).values()}
        assert scales == {seen[-1]["scale"]}, "what is logged is in force"
    return seen


def test_rl_follows_its_schedule_and_logs_it():
    seen = rl_run("lora_parameters: {scale: 2.0}\nscale_schedule: {name: linear, until: 0.5}")
    expected = [2.0 * (0.1 + 0.9 * min(1.0, step / 5 / 0.5)) for step in range(5)]
    assert [m["scale"] for m in seen] == pytest.approx(expected)
    without = rl_run("lora_parameters: {scale: 2.0}")
    assert [m["scale"] for m in without] == [2.0] * 5
    first, other = seen[0]["grad_norm"], without[0]["grad_norm"]
    assert first == pytest.approx(0.1 * other), "with B = 0 the gradient grows with the scale"


def test_a_kl_budget_measures_the_kl_at_every_step_and_answers_it():
    assert set(NEEDS_KL) == {"kl_budget"}
    budget = "{name: kl_budget, start: 0.2, budget: 1e-5, growth: 1.5}"
    seen = rl_run(f"lora_parameters: {{scale: 4.0}}\nscale_schedule: {budget}")
    assert all("kl" in m for m in seen if "loss" in m)
    for step, (before, after) in enumerate(itertools.pairwise(seen), start=1):
        moment = Moment(step / 5, step, before["scale"] / 4.0, before.get("kl"))
        expected = 4.0 * kl_budget(moment, start=0.2, budget=1e-5, growth=1.5)
        assert after["scale"] == pytest.approx(expected)
    factors = [m["scale"] / 4.0 for m in seen]
    assert factors[1] == pytest.approx(0.3), "a harmless start has spent nothing"
    assert factors[-1] < 0.2 * 1.5**4, "the KL of a moving policy slows it down"
