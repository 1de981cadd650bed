"""Spectra against dense linear algebra, the report's contract, and its pictures."""

import dataclasses
import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRASwitchLinear

from mlx_lora import models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.errors import AdapterError, ModelError, RunError
from mlx_lora.report.compare import compare
from mlx_lora.spectral import base, remembered
from mlx_lora.spectral.gram import ba_singular_values, spectra
from mlx_lora.spectral.metrics import LoRAAdapterMetrics, LoRAStructuralMetrics, kappa, metrics
from mlx_lora.spectral.names import places
from mlx_lora.spectral.report import LoRAAnalyzer, to_json, write
from mlx_lora.spectral.show import summary, table
from mlx_lora.spectral.spectrum import Pair, measure, pairs
from mlx_lora.spectral.structure import structure, suggested_rank
from tests.test_ship import adapter
from tests.tiny import tiny_loaded

TOP_KEYS = {
    "schema", "status", "adapters", "structural", "dynamics", "alerts", "suggested_rank", "notices",
}  # fmt: skip
ADAPTER_KEYS = {
    "nominal_rank", "alpha", "effective_rank_BA", "effective_rank_A", "effective_rank_B",
    "rank_utilization", "kappa_A", "kappa_B", "sigma_max_BA", "frobenius_BA", "effective_lr_scale",
    "status", "kappa_A_status", "kappa_B_status", "singular_values",
}  # fmt: skip
STRUCTURAL_KEYS = {
    "mean_dominance", "max_dominance", "per_layer_dominance", "scaled_mean_dominance",
    "scaled_max_dominance", "scaled_per_layer_dominance", "adapter_health", "is_dominating",
    "is_ill_conditioned",
    "energy_top_tenth", "energy_concentration", "by_block", "by_kind",
    "directional_mean_dominance", "directional_max_dominance",
    "directional_per_layer_dominance", "activation_mean_dominance", "activation_max_dominance",
    "activation_per_layer_dominance", "intruder_dimensions", "per_layer_intruders",
}  # fmt: skip
PICTURES = {"singular_values.png", "effective_rank.png", "dominance.png"}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def pair(a_IR: np.ndarray, b_RO: np.ndarray, scale: float = 2.0) -> Pair:
    return Pair("model.layers.0.mlp.up_proj", a_IR, b_RO, scale, 2.0**-23)


def tiny(quantized: bool = True, **attached) -> nn.Module:
    """A random Llama of two blocks, in 4 bits, with an adapter unless nothing is asked for."""
    mx.random.seed(0)
    args = ModelArgs(
        model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=96,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=96,
    )  # fmt: skip
    model = Model(args)
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
    if attached:
        attach(model, rank=4, **attached)
    return model


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return tiny(init="gaussian", init_options={"std": 0.05})


@pytest.fixture(scope="module")
def report(trained):
    return LoRAAnalyzer(trained).analyze()


# Spectra


@pytest.mark.parametrize("shape", [(40, 8, 30), (300, 16, 20), (5, 8, 6), (7, 1, 9)])
def test_singular_values_equal_a_dense_svd(shape):
    i, r, o = shape
    a, b = random(i, r), random(r, o, seed=1) * np.geomspace(1, 1e-4, r)[:, None]
    dense = np.linalg.svd(b.T @ a.T, compute_uv=False)[: min(shape)]
    np.testing.assert_allclose(ba_singular_values(a, b), dense, rtol=1e-10, atol=1e-10 * dense[0])
    _, s_a, s_b = spectra(a, b)
    np.testing.assert_allclose(s_a, np.linalg.svd(a, compute_uv=False), rtol=1e-10)
    np.testing.assert_allclose(s_b, np.linalg.svd(b, compute_uv=False), rtol=1e-10)


def test_a_product_that_is_zero_is_exactly_zero():
    a, b = random(50, 8), random(8, 40, seed=1)
    a[:, 4:], b[:4] = 0, 0  # both factors are not, every one of their products is
    assert not ba_singular_values(a, b).any()
    assert measure(pair(a, b)).status == "untrained"
    assert not ba_singular_values(a, np.zeros((8, 40))).any()


def test_known_spectra():
    flat, one = np.full(8, 3.0), np.array([2.0, *[0.0] * 7])
    for name in set(metrics) - {"k90", "k95", "k99"}:
        assert metrics[name](flat) == pytest.approx(8), name
        assert metrics[name](one) == pytest.approx(1), name
    decaying = 0.85 ** np.arange(64)
    found = {name: round(float(metrics[name](decaying)), 1) for name in metrics}
    wanted = {"effective_rank": 16.7, "energy_rank": 8.4, "participation_ratio": 6.2}
    assert found == {**wanted, "stable_rank": 3.6, "k90": 8, "k95": 10, "k99": 15}


SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)


@pytest.mark.parametrize("name", list(metrics))
@given(s=SPECTRA, factor=st.sampled_from([1e-200, 1e-3, 1e200]))
def test_every_metric_counts_directions_whatever_the_size(name, s, factor):
    s_R = np.sort(s)[::-1]
    value = metrics[name](s_R)
    assert 1 - 1e-9 <= value <= len(s) + 1e-9
    assert metrics[name](s_R * factor) == pytest.approx(value)
    assert metrics[name](np.append(s_R, 0.0)) == pytest.approx(value)  # a rank that is not used


@pytest.mark.parametrize("name", list(metrics))
def test_no_metric_gives_nothing_a_rank(name):
    for s_R in (np.zeros(4), np.array([]), np.array([np.nan, 1.0]), np.array([np.inf, 1.0])):
        assert math.isnan(metrics[name](s_R))
    assert name == "effective_rank" or name in LoRAAdapterMetrics.__dataclass_fields__


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_kappa_says_what_the_stored_precision_can_show(dtype):
    q, _ = np.linalg.qr(random(512, 16))
    v, _ = np.linalg.qr(random(16, 16, seed=1))

    def stored(true: float) -> tuple[float | None, str]:
        factor = mx.array((q * np.geomspace(1, 1 / true, 16)) @ v).astype(dtype)
        b = mx.array(random(16, 32)).astype(dtype)
        (found,) = map(measure, pairs({"m.lora_a": factor, "m.lora_b": b}, 1.0))
        return found.kappa_A, found.kappa_A_status

    value, status = stored(300.0)
    assert status == "exact" and value == pytest.approx(300, rel=0.1)
    value, status = stored(1e9)
    assert status == "at_least" and value is not None and 1e3 < value < 1e9


def test_kappa_is_never_one_without_full_rank():
    assert kappa(np.array([1.0, 1.0, 0.0])) == (None, "rank_deficient")
    assert kappa(np.zeros(3)) == (None, "rank_deficient")
    assert kappa(np.array([np.nan, 1.0])) == (None, "non_finite")
    a = random(30, 4)
    a[:, 3] = a[:, 2]  # deficient up to rounding
    assert measure(pair(a, random(4, 20))).kappa_A_status == "rank_deficient"


def test_statuses():
    a, b = random(30, 4), random(4, 20)
    good = measure(pair(a, b))
    assert good.status == "trained" and good.alpha == 8 and good.effective_lr_scale == 2
    assert good.rank_utilization == good.effective_rank_BA / 4
    assert good.frobenius_BA == pytest.approx(np.linalg.norm(a @ b))
    idle = measure(pair(a, 0 * b))
    assert (idle.status, idle.effective_rank_BA, idle.rank_utilization) == ("untrained", None, None)
    assert (idle.sigma_max_BA, idle.kappa_B_status) == (0.0, "rank_deficient")
    assert idle.effective_rank_A is not None and idle.stable_rank is None and idle.k90 is None
    b[1, 1] = np.inf
    broken = measure(pair(a, b))
    assert broken.status == "non_finite" and broken.sigma_max_BA is None
    assert measure(pair(a, a.T, scale=math.nan)).status == "non_finite"


# The base


@pytest.mark.parametrize("small", [0, base.SMALL], ids=["packed", "dense copy"])
@pytest.mark.parametrize("bits", [None, 3, 4, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_lanczos_equals_svd(bits, dtype, small):
    mx.random.seed(0)
    layer = nn.Linear(64, 96, bias=False)
    layer.set_dtype(dtype)
    weight = layer.weight
    if bits:
        layer = nn.QuantizedLinear.from_linear(layer, 32, bits)
        # as the computation sees it: scales widened first, not the product rounded
        scales, biases = (m.astype(mx.float32) for m in (layer.scales, layer.biases))
        weight = mx.dequantize(layer.weight, scales, biases, 32, bits)
    dense = np.array(weight.astype(mx.float32)).astype(np.float64)
    found = base.matrix(layer, small=small)
    assert found.shape == dense.shape
    wanted = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(base.top_singular_values(found, 5), wanted[:5], rtol=1e-5)
    assert base.sigma_max(found) == base.sigma_max(found) == pytest.approx(wanted[0], rel=1e-6)
    assert base.frobenius(found) == pytest.approx(np.linalg.norm(dense), rel=1e-5)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_weight_packed_the_other_way_is_the_same_weight(group_size):
    layer = nn.Linear(384, 192, bias=False)
    layer.weight += 0.5 * (mx.arange(192) % 7 == 0)[:, None]
    found = base.matrix(nn.QuantizedLinear.from_linear(layer, group_size, 4), small=0)
    x = random(384)
    exact = np.array(found.rows(0, 192)).astype(np.float64) @ x
    assert found.turned if mx.default_device() == mx.cpu else not found.turned
    np.testing.assert_allclose(found.times(x), exact, atol=2e-5 * np.abs(exact).max())
    unusual = [(192, 3, "affine"), (96, 4, "affine"), (192, 4, "mxfp4")]
    for rows, bits, mode in unusual:
        linear = nn.Linear(384, rows, bias=False)
        layer = nn.QuantizedLinear.from_linear(linear, 32, bits, mode)
        assert not base.matrix(layer, small=0).turned


def test_lanczos_on_degenerate_weights():
    def matrix(weight: np.ndarray) -> base.Matrix:
        return base.dense(mx.array(weight.astype(np.float32)))

    one = np.outer(np.arange(1.0, 9), np.ones(5))
    np.testing.assert_allclose(
        base.top_singular_values(matrix(one), 2), [np.linalg.norm(one), 0], atol=1e-4
    )
    assert base.sigma_max(matrix(np.zeros((4, 3)))) == 0
    assert base.sigma_max(matrix(np.eye(6))) == pytest.approx(1)
    assert base.sigma_max(matrix(np.array([[2.0]]))) == pytest.approx(2)
    assert base.top_singular_values(matrix(np.diag([3.0, 2.0])), 5).tolist() == pytest.approx(
        [3, 2]
    )
    with pytest.raises(ModelError, match="not finite"):
        base.sigma_max(matrix(np.full((3, 3), np.nan)))


def test_lanczos_stops_on_the_residual_not_at_the_end(monkeypatch):
    products, product = [], base.Matrix.product
    monkeypatch.setattr(
        base.Matrix, "product", lambda *a, **k: products.append(1) or product(*a, **k)
    )

    def count(weight: np.ndarray) -> int:
        products.clear()
        base.sigma_max(base.dense(mx.array(weight.astype(np.float32))))
        return len(products)

    crowded = np.diag(1 - np.linspace(0, 1, 600) ** 1.1)  # the next value is 0.1 % below
    assert count(crowded) < 400  # all 600 steps would take 1201
    assert count(random(400, 600) + 9) < 20


def test_frobenius_by_chunks(monkeypatch):
    monkeypatch.setattr(base, "CHUNK", 100)
    layer = nn.Linear(30, 50, bias=False)
    wanted = np.linalg.norm(np.array(layer.weight))
    assert base.frobenius(base.matrix(layer)) == pytest.approx(wanted, rel=1e-6)


# The report


def test_report_of_an_attached_quantized_model(trained, report):
    assert set(report.adapters) == set(lora_layers(trained)) and len(report.adapters) == 14
    for name, layer in lora_layers(trained).items():
        m = report.adapters[name]
        linear = layer.linear
        w = mx.dequantize(linear.weight, linear.scales, linear.biases, 32, 4)
        top = np.linalg.norm(np.array(w), 2)
        delta = np.array(layer.lora_a) @ np.array(layer.lora_b)
        assert m.status == "trained" and m.nominal_rank == 4 and m.alpha == 8
        assert m.sigma_max_BA == pytest.approx(np.linalg.norm(delta, 2), rel=1e-5)
        ratio = m.sigma_max_BA / top
        assert report.structural.per_layer_dominance[name] == pytest.approx(ratio, rel=1e-5)
        assert report.structural.scaled_per_layer_dominance[name] == pytest.approx(2 * ratio)
        update = 2 * np.linalg.norm(delta) / np.linalg.norm(np.array(w))
        assert m.scaled_relative_update == pytest.approx(update, rel=1e-4)
    s = report.structural
    assert s.max_dominance == max(s.per_layer_dominance.values())
    assert s.scaled_mean_dominance == pytest.approx(2 * s.mean_dominance)
    assert s.is_dominating == (s.scaled_max_dominance > 0.30)
    assert report.suggested_rank in (4, 8)


def check_json(report) -> dict:
    document = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert document.keys() == TOP_KEYS
    assert document["structural"].keys() == STRUCTURAL_KEYS
    for found in document["adapters"].values():
        assert found.keys() >= ADAPTER_KEYS | set(metrics) - {"effective_rank"}
    assert all(a.keys() == {"name", "module", "message", "action"} for a in document["alerts"])
    return document


def test_json_and_pictures(report, tmp_path):
    check_json(report)
    written = write(report, tmp_path / "new" / "folder")
    assert {p.name for p in written} == PICTURES | {"spectrum.json"}
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {p.name for p in written}
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RunError, match="cannot write"):
        write(report, written[0])


def test_a_folder_without_a_model_invents_no_dominance(trained, tmp_path):
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "dropout": 0.0}}
    files.save(trained, {**config, "num_layers": 2}, tmp_path / "adapters")
    analyzer = LoRAAnalyzer(tmp_path)  # a run folder
    report = analyzer.analyze()
    assert report == LoRAAnalyzer(str(tmp_path / "adapters")).analyze()
    known = {"adapter_health", "is_ill_conditioned", "by_block", "by_kind"}
    known |= {"energy_top_tenth", "energy_concentration"}
    absent = dataclasses.asdict(report.structural).items()
    assert all(value is None for name, value in absent if name not in known)
    assert report.structural.adapter_health == 1.0
    assert check_json(report)["structural"]["max_dominance"] is None
    assert {p.name for p in write(report, tmp_path)} >= PICTURES
    assert set(analyzer.get_rank_utilization()) == set(report.adapters)
    assert analyzer.suggest_rank() == report.suggested_rank is not None
    with_base = LoRAAnalyzer(tmp_path, tiny()).analyze()
    attached = LoRAAnalyzer(trained).analyze()
    assert with_base == attached


def test_an_untrained_adapter_has_no_rank(tmp_path):
    report = LoRAAnalyzer(tiny(init="zero")).analyze()
    assert {m.status for m in report.adapters.values()} == {"untrained"}
    assert report.suggested_rank is None
    assert [a.name for a in report.alerts] == ["untrained"]
    assert report.structural.scaled_max_dominance is None and not report.structural.is_dominating
    assert report.structural.adapter_health is None and report.structural.is_ill_conditioned is None
    document = check_json(report)
    assert {m["effective_rank_BA"] for m in document["adapters"].values()} == {None}
    assert {p.name for p in write(report, tmp_path)} >= PICTURES


def test_a_module_with_nan_is_named_and_gives_no_advice(tmp_path):
    model = tiny(init="gaussian")
    name, layer = next(iter(lora_layers(model).items()))
    layer.lora_b[0, 0] = mx.nan
    report = LoRAAnalyzer(model).analyze()
    assert report.adapters[name].status == "non_finite" and report.suggested_rank is None
    assert [a.module for a in report.alerts if a.name == "non_finite"] == [name]
    assert report.structural.per_layer_dominance[name] is None
    assert report.structural.adapter_health < 1
    check_json(report)
    write(report, tmp_path)


def test_a_scale_of_zero_is_drawn_in_words(tmp_path):
    report = LoRAAnalyzer(tiny(init="gaussian", scale=0.0)).analyze()
    assert report.status == "switched_off" and report.suggested_rank is None
    (alert,) = report.alerts
    assert alert.name == "switched_off" and "in 14 of 14 modules" in alert.message
    assert report.structural.scaled_max_dominance is None
    assert report.structural.adapter_health is None
    assert summary(report)[0] == "The adapter is switched off: its scale is 0."
    assert summary(report)[-1].strip() == alert.action, "what to do stands below the alert"
    write(report, tmp_path)


def test_a_base_that_does_not_match_is_an_error(trained, tmp_path):
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4}, "num_layers": 2}
    files.save(trained, config, tmp_path)
    other = tiny(quantized=False)
    other.model.layers[0].mlp.up_proj = nn.Linear(32, 96, bias=False)
    other.model.layers.pop()
    with pytest.raises(AdapterError, match="8 of 14 modules do not fit") as error:
        LoRAAnalyzer(tmp_path, other).analyze()
    assert "the adapter is for (96, 64), the base is (96, 32)" in str(error.value)
    assert "layers.1.mlp.up_proj is not in the model. Did you mean" in str(error.value)
    with pytest.raises(AdapterError, match="no LoRA layers"):
        LoRAAnalyzer(other).analyze()


def test_another_base_of_the_same_shape_is_refused(tmp_path):
    folder = adapter(tmp_path / "a", tiny_loaded(bits=4), init="gaussian")
    assert not LoRAAnalyzer(folder, tiny_loaded(bits=4)).analyze().notices
    for other in (tiny_loaded(seed=5), tiny_loaded(seed=5).model):
        with pytest.raises(AdapterError, match="the base's weights are others"):
            LoRAAnalyzer(folder, other).analyze()
    report = LoRAAnalyzer(folder, tiny_loaded(bits=8)).analyze()
    assert "in their last digits" in " ".join(to_json(report)["notices"])


def test_a_base_is_quantized_as_it_was(tmp_path):
    wanted = models.load("demo", quantize={"bits": 8})
    folder = adapter(tmp_path / "a", wanted, keys=["q_proj"])
    report = LoRAAnalyzer(folder, "demo").analyze()
    assert not report.notices
    assert report.structural == LoRAAnalyzer(wanted.model).analyze().structural
    other = adapter(tmp_path / "b", models.load("demo"), keys=["q_proj"])
    compared = compare([folder, other], "demo")
    (notice,) = compared.notices
    assert notice.startswith("b: the adapter was trained on 4-bit") and "8-bit" in notice


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "no tensors"),
        ({"m.lora_a": (4, 2)}, "m has no lora_b"),
        ({"m.lora_a": (4, 2), "m.lora_b": (3, 4)}, "do not multiply"),
        ({"m.lora_a": (4, 0), "m.lora_b": (0, 4)}, "do not multiply"),
        ({"m.lora_A.weight": (2, 4), "m.lora_B.weight": (4, 2)}, "is not a LoRA factor"),
    ],
)
def test_foreign_tensors_are_named(tensors, message):
    with pytest.raises(AdapterError, match=message):
        list(pairs({name: mx.zeros(shape) for name, shape in tensors.items()}, 1.0))


class Experts(nn.Module):
    """One block with three experts and an embedding, all adapted."""

    def __init__(self):
        super().__init__()
        switch, embed = SwitchLinear(64, 32, 3, bias=False), nn.Embedding(80, 64)
        self.layers = [nn.Module()]
        self.layers[0].up_proj = LoRASwitchLinear.from_base(switch.to_quantized(32, 4), r=4)
        self.embed_tokens = LoRAEmbedding.from_base(embed.to_quantized(32, 4), r=4)
        for layer in (self.layers[0].up_proj, self.embed_tokens):
            layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))


def test_experts_and_embeddings():
    model = Experts()
    report = LoRAAnalyzer(model).analyze()
    assert set(report.adapters) == {*(f"layers.0.up_proj[{e}]" for e in range(3)), "embed_tokens"}
    switch = model.layers[0].up_proj
    for e in range(3):
        delta = np.array(switch.lora_b[e]) @ np.array(switch.lora_a[e])
        linear = switch.linear
        w = mx.dequantize(linear.weight[e], linear.scales[e], linear.biases[e], 32, 4)
        ratio = np.linalg.norm(delta, 2) / np.linalg.norm(np.array(w), 2)
        found = report.structural.per_layer_dominance[f"layers.0.up_proj[{e}]"]
        assert found == pytest.approx(ratio, rel=1e-5)
    assert report.adapters["embed_tokens"].nominal_rank == 4
    assert places(report.adapters)["layers.0.up_proj[2]"] == (0, "up_proj")
    table(report)


def test_the_base_is_measured_once(trained, monkeypatch):
    analyzer = LoRAAnalyzer(trained)
    first = analyzer.analyze()
    monkeypatch.setattr(remembered, "sigma_max", lambda weight: pytest.fail("measured again"))
    assert analyzer.analyze() == first


# The whole adapter


def test_health_and_flags():
    a, b = random(30, 4), random(4, 20)
    good, sick = measure(pair(a, b)), measure(pair(a, b * np.array([[1e5], [1], [1], [1]])))
    idle = measure(pair(a, 0 * b))
    found = structure(
        {"good": good, "sick": sick, "idle": idle}, dict.fromkeys(("good", "sick", "idle"), 1e9)
    )
    assert found.adapter_health == 0.5 and found.is_ill_conditioned and not found.is_dominating
    alone = structure({"good": good}, {"good": 1e9})
    assert found.by_kind["good"].scaled_dominance_mean == alone.scaled_mean_dominance
    with_idle = structure({"good": good, "idle": idle}, {"good": 1e9, "idle": 1e9})
    assert with_idle.scaled_mean_dominance == alone.scaled_mean_dominance, "idle ones do not count"
    assert with_idle.mean_dominance == alone.mean_dominance
    assert with_idle.scaled_per_layer_dominance["idle"] == 0
    loud = structure({"good": good}, {"good": good.sigma_max_BA * 2 / 0.31})
    assert loud.is_dominating and loud.scaled_max_dominance == pytest.approx(0.31)
    assert loud.adapter_health == 0.0
    calm = structure({"good": good}, {"good": good.sigma_max_BA * 2 / 0.30})
    assert not calm.is_dominating and calm.adapter_health == 1.0
    assert set(dataclasses.asdict(calm)) == set(LoRAStructuralMetrics.__dataclass_fields__)


def test_suggested_rank():
    def used(spectrum) -> LoRAAdapterMetrics:
        return measure(pair(np.eye(40)[:, : len(spectrum)], np.diag(spectrum)))

    assert suggested_rank({"m": used(np.r_[1.0, 1.0, np.full(30, 1e-9)])}) == 4
    assert suggested_rank({"m": used(np.r_[np.ones(6), np.full(26, 1e-9)])}) == 16
    assert suggested_rank({"m": used([1.0, 1.0])}) == 4  # all of it is in use
    assert (
        suggested_rank({"m": used([1.0, 0.1])}) == 2
    )  # never more than there is, unless it is full
    assert suggested_rank({"m": used(np.ones(32))}) == 64
    wide = dataclasses.replace(used(np.ones(32)), effective_rank_BA=90.0, rank_utilization=0.95)
    assert suggested_rank({"m": wide}) is None  # 128 would be less than 1.5 times of it
    assert suggested_rank({"m": used(np.zeros(4))}) is None


def test_table_is_readable(report, capsys):
    from rich.console import Console

    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(table(report))
    text = capture.get()
    assert "effective rank, of 4" in text and "The adapter uses" in text
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
