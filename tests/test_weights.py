"""Statistics of frozen matrices: exact against NumPy, packed or not, and unmoved by outliers."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_lora import config
from mlx_lora.adapter import weights
from mlx_lora.adapter.weights import WeightStats, rms_of, statistics
from mlx_lora.conflicts import notices
from mlx_lora.errors import ModelError
from mlx_lora.models import dense_weight
from mlx_lora.spectral import weight_map


def linear(weight: np.ndarray, bits: int | None = None) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = mx.array(weight.astype(np.float32))
    return nn.QuantizedLinear.from_linear(layer, 32, bits) if bits else layer


def normal(rows: int = 300, width: int = 128, *, size: float = 0.02) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, width)) * size


def by_hand(w: np.ndarray) -> dict[str, float]:
    w = w.astype(np.float64).ravel()
    size, median = np.abs(w), np.median(np.abs(w))
    cut = 6 * (1.4826 * median or np.quantile(size, 0.99))
    return {
        "rms": math.sqrt((w**2).mean()),
        "rms_robust": math.sqrt((np.minimum(size, cut) ** 2).mean()),
        "median": median,
        "p99": np.quantile(size, 0.99),
        "max": size.max(),
        "kurtosis": ((w - w.mean()) ** 4).mean() / w.var() ** 2,
        "outlier_ratio": (size > cut).mean(),
    }


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("chunk", [1 << 22, 1000])
def test_statistics_are_those_of_the_dequantized_weights(bits, chunk, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", chunk)
    w = normal() + 0.003
    w[7] *= 40
    layer = linear(w, bits)
    found, dense = statistics(layer), np.array(dense_weight(layer))
    assert found.shape == (300, 128)
    for key, value in by_hand(dense).items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-4, abs=1e-9), key


def test_a_matrix_larger_than_the_sample_keeps_its_exact_moments(monkeypatch):
    monkeypatch.setattr(weights, "SAMPLED", 10_000)
    w = normal(2000)
    w[1999, 127] = 5.0  # in no sampled row
    found, exact = statistics(linear(w)), by_hand(w)
    assert found.max == pytest.approx(5.0, rel=1e-6)
    assert found.rms == pytest.approx(exact["rms"], rel=1e-5)
    assert found.median != exact["median"] == pytest.approx(found.median, rel=0.05)


def test_no_large_matrix_is_unpacked_whole(monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 4096)
    monkeypatch.setattr(weights, "SAMPLED", 4096)
    sizes, real = [], weights.dense_weight

    def watched(*args):
        part = real(*args)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(weights, "dense_weight", watched)
    statistics(linear(normal(1024), 4))
    assert max(sizes) <= 4096 and sum(sizes) >= 1024 * 128


def test_a_few_giants_do_not_make_a_matrix_large():
    """One o_proj with rows a hundred times too large: its rms triples, its size does not."""
    w = normal(1000)
    plain = rms_of(linear(w))
    w[123] *= 100
    found = statistics(linear(w))
    assert found.rms > 3 * plain
    assert plain <= found.rms_robust < 1.03 * plain
    assert found.peak > weights.PEAK and found.outlier_ratio == pytest.approx(0.001, rel=0.1)


def test_without_outliers_the_size_is_the_rms():
    for w in (normal(), np.sign(normal()), np.random.default_rng(1).uniform(-1, 1, (64, 64))):
        found = statistics(linear(w))
        assert found.rms_robust == found.rms and found.outlier_ratio == 0


def test_mostly_zeros_and_all_zeros_have_a_size():
    w = np.where(np.random.default_rng(0).random((100, 64)) < 0.8, 0.0, normal(100, 64))
    found = statistics(linear(w))
    assert found.median == 0 and found.rms_robust == pytest.approx(by_hand(w)["rms"], rel=1e-5)
    none = statistics(linear(np.zeros((4, 64))))
    assert none == WeightStats((4, 64), 0.0, 0.0, 0.0, 0.0, 0.0, None, 0.0) and none.peak == 0


def test_experts_count_together():
    layer = SwitchLinear(64, 32, 3, bias=False)
    packed = layer.to_quantized(32, 4)
    assert isinstance(packed, QuantizedSwitchLinear)
    for experts in (layer, packed):
        every = np.stack([np.array(dense_weight(experts, e)) for e in range(3)])
        found = statistics(experts)
        assert found.shape == (3, 32, 64)
        assert found.rms == pytest.approx(by_hand(every)["rms"], rel=1e-5)
        assert found.median == pytest.approx(by_hand(every)["median"], rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error(bad):
    w = normal()
    w[3, 4] = bad
    with pytest.raises(ModelError, match="not finite"):
        statistics(linear(w))


def test_files_name_the_outlying_matrices_and_the_picture_holds(tmp_path):
    w = normal(1000)
    odd = w.copy()
    odd[5] *= 100
    names = [f"model.layers.{b}.{k}" for b in (0, 1) for k in ("self_attn.o_proj", "mlp.up_proj")]
    stats = {name: statistics(linear(odd if name == names[2] else w)) for name in names}
    stats["lm_head"] = statistics(linear(np.zeros((4, 64))))
    weight_map.write(stats, tmp_path)
    found = json.loads((tmp_path / "weights.json").read_text())
    assert found["outlying"] == [names[2]] and found["matrices"].keys() == stats.keys()
    assert found["matrices"][names[0]]["rms"] == pytest.approx(0.02, rel=0.01)
    assert (tmp_path / "weights.png").read_bytes()[:4] == b"\x89PNG"
    assert weight_map.headline(stats).startswith("Outliers in layers.1.self_attn.o_proj (")
    assert "No matrix" in weight_map.headline({n: stats[names[0]] for n in names})


@pytest.mark.parametrize(("options", "said"), [
    ("{perturb_scale: 0.5}", True), ("{perturb_scale: 0.3}", False), ("{sigma: 0.5}", False),
])  # fmt: skip
def test_a_perturbation_of_the_weights_own_size_is_said_to_be_relative(options, said):
    e = config.from_text(f"model: demo\nmethod: es\ntask: countdown\niters: 1\nes: {options}\n")
    assert any("relative to the weights" in line and "50%" in line for line in notices(e)) == said
