"""A population in one batch equals its members one by one."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.lora import LoRASwitchLinear

from mlx_lora import cpu, cpu_pass, cpu_step, cpu_threads, models
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.adapter.population import (
    Noise,
    perturbed,
    population,
    refuse_unfit,
    remember_sizes,
    sigma_of,
    size_of,
)
from mlx_lora.errors import AdapterError
from mlx_lora.generate import generate
from mlx_lora.models import dense_weight
from mlx_lora.tasks import load_task
from tests.tiny import tiny

MEMBERS = 6
PERTURB = 0.5


def sizes(model, factor):
    return {name: sigma_of(m, factor, PERTURB) for name, m in lora_layers(model).items()}


def prompts(count):
    return [s.prompt for s in load_task("countdown").load("train", count, 0)]


def trained(keys=None):
    """The embedded model with an adapter whose factors are both nonzero."""
    loaded = models.load("demo")
    attach(loaded, init="tiny_scale", init_options={"size": 0.5}, keys=keys)
    return loaded


def together(loaded, noise, members, asked, **options):
    """Completions by (member, prompt), all decoded in one batch."""
    pairs = [(p, g) for p in range(len(asked)) for g in range(len(members))]
    places = [g for _, g in pairs]
    sigmas = sizes(loaded.model, noise.factor)
    with population(loaded.model, noise, sigmas, members, places) as sit:
        found = generate(
            loaded, [asked[p] for p, _ in pairs], purpose="es", numbers=[p for p, _ in pairs],
            max_tokens=10, sit=sit, **options,
        )  # fmt: skip
    return {(members[g], p): found[i][0] for i, (p, g) in enumerate(pairs)}


def alone(loaded, noise, member, asked, **options):
    """One member the plain way: its factor is set, and set back afterwards."""
    (direction,), (sign,) = noise.of([member])
    sigmas = sizes(loaded.model, noise.factor)
    layers = lora_layers(loaded.model)
    before = {name: layer[noise.factor] for name, layer in layers.items()}
    for name, layer in layers.items():
        drawn = noise.drawn(name, [direction], before[name].shape)
        size = mx.array(np.float32(sigmas[name]) * np.array([sign]))
        layer[noise.factor] = perturbed(before[name], drawn, size)[0]
    found = generate(loaded, asked, purpose="es", max_tokens=10, **options)
    for name, layer in layers.items():
        layer[noise.factor] = before[name]
    return [rows[0] for rows in found]


@pytest.mark.parametrize("factor", ["lora_b", "lora_a"])
@pytest.mark.parametrize(("temperature", "threads"), [(0.0, 1), (1.0, 2)])
def test_a_population_writes_what_its_members_write_alone(
    factor, temperature, threads, monkeypatch
):
    """Few rows at a time, so that they come and go: five problems, six members, eleven rows."""
    monkeypatch.setattr(cpu_threads, "workers", lambda: threads)
    for module in (cpu_step, cpu_pass):
        monkeypatch.setattr(module, "LEAST", 1)
    loaded, asked = trained(), prompts(5)
    noise = Noise(3, 7, factor, antithetic=temperature == 0)
    before = {n: (m.lora_a, m.lora_b) for n, m in lora_layers(loaded.model).items()}
    options = {"temperature": temperature, "width": 11}
    found = together(loaded, noise, range(MEMBERS), asked, **options)
    logps = set()
    for member in range(MEMBERS):
        for p, one in enumerate(alone(loaded, noise, member, asked, **options)):
            assert found[member, p].ids == one.ids
            np.testing.assert_allclose(found[member, p].logps, one.logps, atol=1e-3)
            logps.add(one.logps)
    assert len(logps) == MEMBERS * len(asked), "the members should differ"
    after = {n: (m.lora_a, m.lora_b) for n, m in lora_layers(loaded.model).items()}
    assert all(before[n][i] is after[n][i] for n in before for i in (0, 1)), "masters stay"


@pytest.mark.parametrize("factor", ["lora_b", "lora_a"])
def test_some_of_the_layers_that_share_an_input_may_be_adapted(factor):
    loaded, asked, noise = trained(["q_proj", "v_proj", "up_proj"]), prompts(3), Noise(1, 1, factor)
    found = together(loaded, noise, range(4), asked, temperature=0.0)
    for member in range(4):
        for p, one in enumerate(alone(loaded, noise, member, asked, temperature=0.0)):
            assert found[member, p].ids == one.ids
            np.testing.assert_allclose(found[member, p].logps, one.logps, atol=1e-3)


BITWISE = """
import mlx_lora
from tests.test_population import *
from mlx_lora import cpu
assert cpu.mode() == "plain"
for factor in ("lora_b", "lora_a"):
    loaded, asked, noise = trained(), prompts(4)[:1] * 4, Noise(0, 0, factor)
    found = together(loaded, noise, range(4), asked, temperature=0.0, width=4)
    for member in range(4):
        for p, one in enumerate(alone(loaded, noise, member, asked, temperature=0.0, width=4)):
            assert found[member, p] == one, (factor, member, p)
    assert len({r.logps for r in found.values()}) == 4
"""


@pytest.mark.slow
def test_it_does_so_to_the_bit_on_the_plain_path():
    """In batches of one shape, in a process of its own: the path is chosen when MLX loads."""
    environment = os.environ | {"MLX_LORA_CPU": "plain"}
    done = subprocess.run(
        [sys.executable, "-c", BITWISE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_noise_is_a_function_of_its_names_and_pairs_are_mirrored():
    noise = Noise(1, 2)
    one = noise.drawn("q_proj", [0, 5], (4, 64))
    assert mx.array_equal(one[1], Noise(1, 2).drawn("q_proj", [5], (4, 64))[0])
    others = [Noise(2, 2), Noise(1, 3), Noise(1, 2, "lora_a")]
    others = [n.drawn("q_proj", [0], (4, 64)) for n in others] + [noise.drawn("k", [0], (4, 64))]
    assert not any(mx.array_equal(one[:1], other) for other in others)
    assert not mx.array_equal(one[0], one[1])
    directions, signs = noise.of([0, 1, 6, 7])
    assert directions == [0, 0, 3, 3] and signs.tolist() == [1, -1, 1, -1]
    assert Noise(1, 2, antithetic=False).of([3])[0] == [3]


@pytest.mark.parametrize("kind", ["rademacher", "uniform"])
def test_noise_has_mean_0_and_variance_1(kind):
    x = np.array(Noise(0, 0, kind=kind).drawn("x", [0], (200, 500)))
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert set(np.unique(x)) == {-1, 1} if kind == "rademacher" else abs(x).max() < 3**0.5
    first = {"rademacher": [-1, 1, -1], "uniform": [0.943, 0.725, -1.143]}[kind]
    np.testing.assert_allclose(x[0, 0, :3], first, atol=1e-3)  # the same on every machine


@pytest.mark.parametrize("factor", ["lora_b", "lora_a"])
def test_a_perturbation_has_the_size_that_was_asked_for(factor):
    loaded = trained()
    for name, layer in list(lora_layers(loaded.model).items())[:5]:
        sigma = sigma_of(layer, factor, 0.1)
        drawn = sigma * Noise(0, 0, factor).drawn(name, range(8), layer[factor].shape)
        moved = layer.scale * (layer.lora_a @ drawn if factor == "lora_b" else drawn @ layer.lora_b)
        rms = float(np.sqrt(np.square(np.array(dense_weight(layer.linear), np.float64)).mean()))
        assert size_of(layer) == pytest.approx(rms, rel=1e-4)
        assert float(mx.sqrt(mx.square(moved).mean())) == pytest.approx(0.1 * rms, rel=0.15)


def test_sizes_that_were_measured_are_not_measured_again():
    loaded = models.load("demo")
    attach(loaded)
    layers = lora_layers(loaded.model)
    remember_sizes(loaded.model, dict.fromkeys(layers, 3.0))
    assert all(size_of(m) == 3.0 for m in layers.values())
    one, first = next(iter(layers.values())), sigma_of(next(iter(layers.values())), "lora_b", 0.1)
    one.__dict__.pop("_size")
    assert sigma_of(one, "lora_b", 0.1) == pytest.approx(first * size_of(one) / 3.0)


def test_where_the_other_factor_is_zero_there_is_no_noise():
    loaded = models.load("demo")
    attach(loaded)
    assert all(sigma_of(m, "lora_a", 0.1) == 0 for m in lora_layers(loaded.model).values())


def test_layers_of_another_kind_are_named():
    model = tiny("llama", bits=4)
    attach(model, dora=True)
    with pytest.raises(AdapterError, match=r"(?s)q_proj \(DoRA layer\).*14 in all"):
        refuse_unfit(model)
    model = tiny("llama", bits=4)
    attach(model, keys=["q_proj"])
    model.layers[0].mlp.up_proj = LoRASwitchLinear(8, 8, 2)
    with pytest.raises(AdapterError, match=r"up_proj \(mixture-of-experts layer\)"):
        refuse_unfit(model)


@pytest.mark.skipif(not cpu.fast(), reason="the CPU fast path")
def test_whole_blocks_are_computed_with_what_is_beside_them():
    loaded = trained()
    names, noise = list(lora_layers(loaded.model)), Noise(0, 0)
    sigmas = dict.fromkeys(names, 0.1)
    with population(loaded.model, noise, sigmas, range(MEMBERS), [0]), cpu.decoding(loaded.model):
        held = [block.__dict__.get("_stacked") for block in loaded.model.layers]
    assert all(s is not None and s.qkv.beside and s.down.beside for s in held)
