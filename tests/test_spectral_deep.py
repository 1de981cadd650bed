"""A deep look at tiny models, against dense linear algebra; and what is kept of a base."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora import models
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.errors import AdapterError
from mlx_lora.spectral import base, deep, remembered
from mlx_lora.spectral.report import LoRAAnalyzer
from mlx_lora.spectral.spectrum import Pair
from tests.tiny import tiny_loaded


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def packed(out: int, into: int, *, small: int = 0) -> tuple[base.Matrix, np.ndarray]:
    """A 4-bit weight and its numbers."""
    layer = nn.QuantizedLinear(into, out, bias=False, group_size=32, bits=4)
    weight = mx.array(random(out, into).astype(np.float32))
    layer.weight, layer.scales, layer.biases = mx.quantize(weight, 32, 4)
    held = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4)
    return base.matrix(layer, small=small), np.array(held).astype(np.float64)


def pair(into: int, out: int, scale: float, rank: int = 3) -> Pair:
    return Pair("m", random(into, rank, seed=1), random(rank, out, seed=2), scale, 2.0**-23)


@pytest.mark.parametrize("vectors", [1, 3, base.MANY + 1])
@pytest.mark.parametrize("small", [0, base.SMALL], ids=["packed", "dense"])
def test_products_of_one_and_of_many(vectors, small, monkeypatch):
    monkeypatch.setattr(base, "CHUNK", 64 * 20)
    weight, dense = packed(96, 64, small=small)
    x, y = random(vectors, 64), random(vectors, 96, seed=1)
    np.testing.assert_allclose(weight.times(x), x @ dense.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(weight.transposed(y), y @ dense, rtol=1e-4, atol=1e-4)
    one = weight.times(x[0])
    assert one.shape == (96,)
    np.testing.assert_allclose(one, dense @ x[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.5, 20.0])
def test_an_updated_weight_without_forming_it(scale):
    weight, dense = packed(96, 64)
    p = pair(64, 96, scale)
    total = dense + scale * (p.a_IR @ p.b_RO).T
    wanted_u, wanted_s, _ = np.linalg.svd(total)
    updated = base.Updated(weight, p.a_IR, p.b_RO, scale)
    found_s, found_u = base.top_triples(updated, 5, tolerance=1e-7)
    np.testing.assert_allclose(found_s, wanted_s[:5], rtol=1e-5)
    np.testing.assert_allclose(np.abs((found_u * wanted_u[:, :5].T).sum(1)), 1, atol=1e-3)


def test_intruders_are_those_of_the_full_svd():
    weight, dense = packed(96, 64)
    for scale, at_least in ((1e-3, 0), (5.0, 3)):
        p = pair(64, 96, scale)
        after, _, _ = np.linalg.svd(dense + scale * (p.a_IR @ p.b_RO).T)
        before, _, _ = np.linalg.svd(dense)
        cosines = np.abs(after[:, :10].T @ before[:, :40])
        found = deep.intruders(weight, p)
        assert found == (cosines.max(axis=1) < 0.5).sum() and found >= at_least
    assert deep.intruders(weight, pair(64, 96, 1e-3)) == 0
    assert deep.intruders(weight, p, cosine=0.0) == 0


def test_directional_dominance():
    weight, dense = packed(96, 64)
    p = pair(64, 96, 2.0)
    u, s, _ = np.linalg.svd(p.a_IR @ p.b_RO, full_matrices=False)
    wanted = max(2.0 * s[i] / np.linalg.norm(dense @ u[:, i]) for i in range(3))
    assert deep.directional(weight, p) == pytest.approx(wanted, rel=1e-4)
    nothing = base.dense(mx.zeros((96, 64)))
    assert deep.directional(nothing, p) is None


@pytest.fixture(scope="module")
def demo():
    """The embedded model, its adapter attached and moved."""
    loaded = models.load("demo")
    attach(loaded, rank=4, keys=["q_proj", "down_proj"], init="gaussian", init_options={"std": 0.1})
    return loaded


def test_a_deep_look_at_the_embedded_model(demo):
    plain = LoRAAnalyzer(demo.model, demo).analyze()
    assert plain.structural.directional_max_dominance is None
    assert plain.structural.per_layer_intruders is None
    heard = []
    analyzer = LoRAAnalyzer(demo.model, demo)
    report = analyzer.analyze(deep=True, tell=lambda *about: heard.append(about))
    s, names = report.structural, set(report.adapters)
    assert set(s.directional_per_layer_dominance) == set(s.per_layer_intruders) == names
    assert s.intruder_dimensions == sum(s.per_layer_intruders.values()) > 0
    # a direction is answered with at most σ_max(W)
    for name, value in s.directional_per_layer_dominance.items():
        assert value >= s.scaled_per_layer_dominance[name] * (1 - 1e-5)
    assert 0 < s.activation_mean_dominance <= s.activation_max_dominance
    assert heard[-1] == ("a deep look", len(names), len(names))


def test_dominance_on_text_is_a_ratio_of_lengths(demo):
    layers = lora_layers(demo.model)
    found = LoRAAnalyzer(demo.model, demo).read()
    loud = deep.on_text(demo, found)
    assert set(loud) == set(layers) and all(value > 0 for value in loud.values())
    for layer in layers.values():
        layer.scale *= 2
    twice = deep.on_text(demo, LoRAAnalyzer(demo.model, demo).read())
    for layer in layers.values():
        layer.scale /= 2
    for name, value in loud.items():
        assert twice[name] == pytest.approx(2 * value, rel=1e-5)


def test_the_ratio_of_one_layer_by_hand():
    a, b = mx.array(random(8, 2)), mx.array(random(2, 6, seed=1))
    x, wx = mx.array(random(5, 8, seed=2)), mx.array(random(5, 6, seed=3))
    update = np.linalg.norm(3.0 * np.array(x) @ np.array(a) @ np.array(b), axis=1).sum()
    found = np.array(deep.sizes(a, b, 3.0, 5.0, x, wx + 5.0))
    np.testing.assert_allclose(found, [update, np.linalg.norm(wx, axis=1).sum()], rtol=1e-5)


def test_a_bias_is_no_answer_of_the_weight():
    loaded, name = tiny_loaded("qwen2"), "model.layers.0.self_attn.q_proj"
    attach(loaded, rank=4, keys=["q_proj"], init="gaussian", init_options={"std": 0.1})
    layer = lora_layers(loaded.model)[name]
    found = []
    for size in (0.0, 50.0):
        layer.linear.bias = mx.full(layer.linear.bias.shape, size)
        found.append(deep.on_text(loaded, LoRAAnalyzer(loaded.model, loaded).read())[name])
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[0] > 0


def test_a_deep_look_needs_a_tokenizer(demo):
    with pytest.raises(AdapterError, match="reads text"):
        LoRAAnalyzer(demo.model).analyze(deep=True)


# What is kept of a base


def test_sizes_are_measured_once_per_base(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(remembered, "SMALL", 0)
    weight, dense = packed(96, 64)
    model = nn.Linear(64, 96, bias=False)

    def sizes() -> remembered.Sizes:
        return remembered.Sizes(model)

    first = sizes()
    found = first.of("m", weight)
    assert found == pytest.approx((np.linalg.norm(dense, 2), np.linalg.norm(dense)), rel=1e-5)
    first.keep()
    (file,) = (tmp_path / "mlx_lora" / "bases").iterdir()
    assert json.loads(file.read_text()).keys() == {"m"}
    real = remembered.sigma_max
    monkeypatch.setattr(remembered, "sigma_max", lambda weight: pytest.fail("measured again"))
    assert sizes().of("m", weight) == found
    monkeypatch.setattr(remembered, "sigma_max", real)
    other = base.Matrix(weight.weight, weight.scales * 2, weight.biases * 2, weight.settings)
    assert sizes().of("m", other)[0] == pytest.approx(2 * found[0], rel=1e-5)  # not the file's
    file.write_text("{torn")
    assert sizes().of("m", weight) == found


def test_a_cache_that_cannot_be_written_costs_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(remembered, "SMALL", 0)
    sizes = remembered.Sizes(nn.Linear(64, 96, bias=False))
    sizes.of("m", packed(96, 64)[0])
    sizes.keep()
