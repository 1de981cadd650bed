"""Shrinking: exact truncation, what each rule keeps, and folders that load and compute the same."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear

from mlx_lora import bases, cli, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.adapter.tensors import unpadded
from mlx_lora.errors import AdapterError, ConfigError, RunError, UnknownNameError
from mlx_lora.ship import shrink as shrinking
from mlx_lora.ship.ranks import Spent, rules
from mlx_lora.ship.shrink import cut, decomposed, shrink, write
from mlx_lora.spectral.report import LoRAAnalyzer
from mlx_lora.spectral.spectrum import Pair, pairs
from tests.test_metrics_doc import documented, emitted


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def pair(name: str = "m") -> Pair:
    b = random(6, 20, seed=1) * np.geomspace(1, 1e-3, 6)[:, None]
    return Pair(name, random(30, 6), b, 2.0, 2.0**-23)


def no_drift(ranks) -> float:
    pytest.fail("this rule needs no forward pass")


# Truncation


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_cut_is_the_best_of_its_rank(rank):
    p = pair()
    u, s, v = np.linalg.svd(p.a_IR @ p.b_RO, full_matrices=False)
    a, b = decomposed(p).cut(rank, rank)
    assert a.shape == (30, rank) and b.shape == (rank, 20)
    np.testing.assert_allclose(a @ b, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-12 * s[0])
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_with_inputs_the_outputs_are_approximated(rank):
    p = pair()
    x = random(200, 30, seed=4) * np.geomspace(1, 1e-2, 30)
    plain, heard = decomposed(p).cut(rank, rank), decomposed(p, x).cut(rank, rank)
    whole = p.a_IR @ p.b_RO

    def off(factors) -> float:
        return float(np.linalg.norm(x @ (whole - factors[0] @ factors[1])))

    best = np.linalg.svd(x @ whole, compute_uv=False)
    bound = math.sqrt((best[rank:20] ** 2).sum())
    assert off(heard) <= 1.05 * bound + 1e-9 * best[0]
    assert rank == 6 or off(heard) < off(plain)


def test_what_the_texts_do_not_show_is_kept_too():
    p = pair()
    a, b = decomposed(p, random(2, 30, seed=4)).cut(6, 6)  # two inputs, six directions
    np.testing.assert_allclose(a @ b, p.a_IR @ p.b_RO, atol=1e-9)


def test_zeros_fill_up():
    a, b = decomposed(pair()).cut(2, 5)
    assert a.shape == (30, 5) and not a[:, 2:].any() and not b[2:].any()


def test_a_rank_that_is_not_used_costs_nothing():
    p = pair()
    p.b_RO[4:] = 0
    taken = decomposed(p)
    assert (taken.s_R > 0).sum() == 4 and np.isfinite(taken.left_IR).all()
    a, b = taken.cut(4, 4)
    np.testing.assert_allclose(a @ b, p.a_IR @ p.b_RO, atol=1e-12)


def test_experts_share_a_rank():
    layer = LoRASwitchLinear.from_base(SwitchLinear(16, 12, 3, bias=False), r=4)
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(0))
    original = {"up": (layer.lora_a, layer.lora_b)}
    held = list(pairs({"up.lora_a": layer.lora_a, "up.lora_b": layer.lora_b}, 1.0))
    taken = {p.name: decomposed(p) for p in held}
    a, b = cut(original, taken, {"up[0]": 4, "up[1]": 1, "up[2]": 3})["up"]
    assert a.shape == (3, 4, 16) and b.shape == (3, 12, 4) and a.dtype == layer.lora_a.dtype
    for e, rank in enumerate((4, 1, 3)):
        found = np.array(b[e]) @ np.array(a[e])
        assert np.linalg.matrix_rank(found, tol=1e-5) == rank
    np.testing.assert_allclose(
        np.array(b[0]) @ np.array(a[0]),
        np.array(layer.lora_b[0]) @ np.array(layer.lora_a[0]),
        atol=1e-5,
    )


def test_the_ranks_of_experts_are_written_down(tmp_path):
    up, q = "model.layers.0.mlp.up", "model.layers.0.self_attn.q"
    shapes = {up: ((3, 2, 16), (3, 12, 2)), q: ((8, 4), (4, 8))}
    shrunk = {n: (mx.random.normal(a), mx.random.normal(b)) for n, (a, b) in shapes.items()}
    about = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 2.0}}
    write({}, about, shrunk, tmp_path)
    config, tensors = files.read(tmp_path)
    assert config["rank_pattern"] == {up: 2} and config["lora_parameters"]["rank"] == 4
    assert tensors[f"{up}.lora_a"].shape == (3, 4, 16)
    for name, value in unpadded(config, tensors).items():
        module, _, factor = name.rpartition(".")
        assert mx.array_equal(value, shrunk[module][factor == "lora_b"]), name


# Rules


def spent(*spectra) -> list[Spent]:
    return [Spent(f"m{i}", np.array(s, float), len(s)) for i, s in enumerate(spectra)]


RULES = {  # rule, options -> ranks of these three
    ("energy", ()): [2, 4, 1],
    ("energy", (("share", 0.9),)): [1, 4, 1],
    ("knee", ()): [1, 1, 1],
    ("effective", ()): [4, 4, 1],
    ("effective", (("times", 0.1),)): [1, 1, 1],
    ("size", ()): [2, 2, 1],
    ("size", (("share", 0.75),)): [3, 3, 1],
}


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_what_a_rule_keeps(rule, options):
    modules = spent([3, 0.9, 0.2, 0.1], [1, 1, 1, 1], [0, 0, 0, 0])
    found = rules.bind(rule, dict(options))(modules, no_drift)
    assert list(found.values()) == RULES[rule, options]


def test_the_knee_is_where_the_curve_bends():
    (found,) = rules["knee"](spent([10, 9, 8, 0.3, 0.2, 0.1]), no_drift).values()
    assert found == 3


def test_kl_finds_the_lowest_rank_within_the_budget():
    asked = []

    def drift(ranks) -> float:
        asked.append(max(ranks.values()))
        return 1e-3 if max(ranks.values()) >= 11 else 1.1e-3

    modules = spent(np.ones(64), np.r_[np.ones(5), np.zeros(59)])
    assert list(rules["kl"](modules, drift).values()) == [11, 5]
    assert len(asked) <= 6
    assert list(rules["kl"](modules, lambda ranks: 1.0).values()) == [64, 5]  # nothing to spare


@pytest.mark.parametrize(
    ("rule", "options"),
    [("energy", {"share": 0.0}), ("size", {"share": 1.5}), ("kl", {"budget": 0})],
)
def test_a_rule_refuses_what_makes_no_sense(rule, options):
    with pytest.raises(AdapterError, match="got"):
        rules.bind(rule, options)(spent([1, 1]), no_drift)


# Folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter on the embedded model whose modules use 3 and 6 of 8 ranks."""
    folder = tmp_path_factory.mktemp("trained")
    loaded = models.load("demo")
    config = attach(loaded, rank=8, keys=["q_proj", "up_proj"], init="gaussian")
    for name, layer in lora_layers(loaded.model).items():
        used = 3 if "q_proj" in name else 6
        strong = mx.array([1.0] * used + [1e-4] * (8 - used))
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1)) * strong[:, None]
        layer.lora_b = layer.lora_b * 0.02
    files.save(loaded.model, config | {"base": {"model": "demo"}}, folder)
    return folder


def logits(folder) -> np.ndarray:
    loaded = models.load("demo")
    files.load(loaded.model, folder)
    return np.array(models.logits(loaded.model, mx.array([[5, 17, 3, 44, 60, 2, 9, 31]])))


def test_a_shrunk_adapter_loads_and_computes_the_same(trained, tmp_path, capsys):
    done = cli.app(
        ["shrink", str(trained), "--out", str(tmp_path / "small"), "--by", "energy", "--plain",
         "-o", "share=0.999999", "--json"],
        standalone_mode=False,
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert done in (0, None)
    assert emitted(found) == documented("shrink --json")
    kept = {name.rpartition(".")[2]: m["after"] for name, m in found["ranks"].items()}
    assert kept == {"q_proj": 3, "up_proj": 6}
    assert (found["rank_before"], found["rank_after"]) == (8, 6)
    assert found["parameters_after"] < found["parameters_before"] * 0.75
    assert found["bytes_after"] < found["bytes_before"]
    assert found["check"]["verdict"] == "pass" and found["kl_mean"] < 1e-6
    check = json.loads((tmp_path / "small" / "check.json").read_text())
    assert (check["verdict"], check["expect"], check["kl_mean"]) == (
        "pass",
        "same",
        found["kl_mean"],
    )
    np.testing.assert_allclose(logits(tmp_path / "small"), logits(trained), atol=1e-3)
    config, _ = files.read(tmp_path / "small")
    assert set(config["rank_pattern"].values()) == {3} and config["lora_parameters"]["rank"] == 6
    report = LoRAAnalyzer(tmp_path / "small").analyze()
    assert {m.nominal_rank for m in report.adapters.values()} == {3, 6}


def test_stock_mlx_lm_computes_the_same_from_it(trained, tmp_path):
    from mlx_lm.tuner.utils import load_adapters

    shrink(trained, tmp_path / "small", by="energy", options={"share": 0.99999})
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    config["num_layers"] = 5
    (tmp_path / "small" / "adapter_config.json").write_text(json.dumps(config))
    model = load_adapters(models.load("demo").model, str(tmp_path / "small"))
    ours = logits(tmp_path / "small")
    stock = np.array(models.logits(model, mx.array([[5, 17, 3, 44, 60, 2, 9, 31]])))
    np.testing.assert_allclose(stock, ours, atol=1e-4)


def test_a_budget_of_kl_is_kept(trained, tmp_path):
    said = []
    found = shrink(trained, tmp_path / "small", options={"budget": 1e-4}, tell=said.append)
    assert found["rank_after"] <= 7 and found["kl_mean"] <= 1e-4 and said
    assert found["rule"] == {"name": "kl", "budget": 1e-4}


def test_weighing_by_text_costs_less(trained, tmp_path):
    half = {"by": "size", "options": {"share": 0.25}}
    heard = shrink(trained, tmp_path / "heard", **half)
    plain = shrink(trained, tmp_path / "plain", **half, weigh=False)
    assert heard["weighed"] and not plain["weighed"]
    assert heard["bytes_after"] == plain["bytes_after"]
    assert heard["kl_mean"] < 0.9 * plain["kl_mean"]


def test_a_cut_that_the_check_fails_is_not_written(trained, tmp_path):
    out = tmp_path / "small"
    loaded = models.load("demo")
    config = files.load(loaded.model, trained)
    for layer in lora_layers(loaded.model).values():
        layer.lora_b = layer.lora_b * 50
    files.save(loaded.model, config, tmp_path / "loud")
    found = shrink(tmp_path / "loud", out, by="size", options={"share": 0.13})
    assert found["check"]["verdict"] == "fail" and found["out"] is None
    assert found["bytes_after"] is None and not out.exists()


def test_the_base_is_quantized_as_it_was_recorded(trained, tmp_path, monkeypatch):
    load, asked = models.load, []
    monkeypatch.setattr(models, "load", lambda *a, **k: asked.append((a, k)) or load(*a, **k))
    loaded = load("demo")
    config = files.load(loaded.model, trained)
    eight = {"bits": 8, "group_size": 64, "mode": "affine"}
    about = config | {"base": {"model": "demo", "quantization": eight}}
    files.save(loaded.model, about, tmp_path / "eight")
    shrink(tmp_path / "eight", tmp_path / "small", by="energy")
    assert asked == [(("demo",), {"rebuild": eight, "trust_remote_code": False})]
    kept, _ = files.read(tmp_path / "small")
    assert kept["base"] == about["base"]


def test_a_run_on_a_base_of_its_own_is_judged_on_that(tmp_path):
    loaded = models.load("demo")
    config = attach(loaded, rank=4, keys=["q_proj"], init="pissa")
    models.save_base(loaded, tmp_path / "run" / "base")
    config |= {"base": bases.identity(loaded)}
    files.save(loaded.model, config, tmp_path / "run" / "adapters")
    found = shrink(tmp_path / "run", tmp_path / "small", by="size", options={"share": 1.0})
    assert found["check"]["verdict"] == "pass" and found["kl_mean"] < 1e-6 and not found["notices"]
    with pytest.raises(AdapterError, match="give that run's base folder"):
        shrink(tmp_path / "run", tmp_path / "small2", model="demo")


def test_a_file_may_stand_for_its_folder(trained, tmp_path):
    file = trained / "adapters.safetensors"
    found = shrink(file, tmp_path / "small", by="size", options={"share": 1.0}, weigh=False)
    assert found["bytes_before"] == file.stat().st_size
    checkpoint = tmp_path / "0000100_adapters.safetensors"
    checkpoint.write_bytes(b"123")
    assert shrinking.size_on_disk(checkpoint) == 3


def test_nothing_is_overwritten_or_guessed(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="not an empty folder"):
        shrink(trained, tmp_path)
    with pytest.raises(UnknownNameError, match="energi"):
        shrink(trained, tmp_path / "x", by="energi")
    with pytest.raises(ConfigError, match="shar"):
        shrink(trained, tmp_path / "x", by="energy", options={"shar": 1})
    config = json.loads((trained / "adapter_config.json").read_text())
    del config["base"]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "adapter_config.json").write_text(json.dumps(config))
    (bare / "adapters.safetensors").write_bytes((trained / "adapters.safetensors").read_bytes())
    with pytest.raises(AdapterError, match="does not say which base"):
        shrink(bare, tmp_path / "x")


@pytest.mark.parametrize(("value", "message"), [(0.0, "untrained"), (math.nan, "NaN")])
def test_what_cannot_be_cut_is_said(trained, tmp_path, value, message):
    loaded = models.load("demo")
    config = files.load(loaded.model, trained)
    for layer in lora_layers(loaded.model).values():
        layer.lora_b = layer.lora_b * value
    files.save(loaded.model, config, tmp_path / "bad")
    with pytest.raises(AdapterError, match=message):
        shrink(tmp_path / "bad", tmp_path / "x")


def test_a_version_puts_its_factors_back(trained):
    loaded = models.load("demo")
    files.load(loaded.model, trained)
    layers = lora_layers(loaded.model)
    before = {name: m.lora_a for name, m in layers.items()}
    zero = {n: (mx.zeros_like(m.lora_a), mx.zeros_like(m.lora_b)) for n, m in layers.items()}
    with shrinking.Version(loaded, factors=zero).entered() as model:
        assert isinstance(model, nn.Module)
        assert not any(m.lora_b.any().item() for m in layers.values())
    assert all(layers[name].lora_a is a for name, a in before.items())
