"""A population in one batch equals its members one by one."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import models
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.adapter.population import (
    Noise,
    perturbed,
    population,
    sigma_of,
)
from mlx_lora.generate import generate
from mlx_lora.tasks import load_task

MEMBERS = 6


def sizes(model, factor):
    return {name: sigma_of(m, factor, 0.1) for name, m in lora_layers(model).items()}


def prompts(count):
    return [s.prompt for s in load_task("countdown").load("train", count, 0)]


def trained():
    """The embedded model with an adapter whose factors are both nonzero."""
    loaded = models.load("demo")
    attach(loaded, init="tiny_scale", init_options={"size": 0.5})
    return loaded


def together(loaded, noise, members, asked, **options):
    pairs = [(p, g) for p in range(len(asked)) for g in range(len(members))]
    with population(
        loaded.model, noise, sizes(loaded.model, noise.factor), members, [g for _, g in pairs]
    ) as sit:
        found = generate(
            loaded, [asked[p] for p, _ in pairs], purpose="es", numbers=[p for p, _ in pairs],
            max_tokens=12, sit=sit, **options,
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
    found = generate(loaded, asked, purpose="es", max_tokens=12, **options)
    for name, layer in layers.items():
        layer[noise.factor] = before[name]
    return [rows[0] for rows in found]


@pytest.mark.parametrize("factor", ["lora_b", "lora_a"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_a_population_writes_what_its_members_write_alone(factor, antithetic):
    """Few rows at a time, so that they come and go: five problems, six members, eleven rows."""
    loaded, asked = trained(), prompts(5)
    noise = Noise(3, 7, factor, antithetic=antithetic)
    found = together(loaded, noise, range(MEMBERS), asked, temperature=0.0, width=11)
    texts = set()
    for member in range(MEMBERS):
        for p, one in enumerate(alone(loaded, noise, member, asked, temperature=0.0)):
            other = found[member, p]
            assert other.ids == one.ids
            np.testing.assert_allclose(other.logps, one.logps, atol=1e-3)
            texts.add(one.ids)
    assert len(texts) > 2 * len(asked), "the members should differ"
