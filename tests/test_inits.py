"""Every init against what it claims: harmless to the bit, or named for what it changes."""

import json
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import load_adapters

from mlx_lora import models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import (
    attach,
    lora_layers,
    reference,
    remembers_start,
    switched_off,
)
from mlx_lora.adapter.inits import HARMLESS, REBASING, inits, is_harmless
from mlx_lora.adapter.inits.gradient import summed_loss
from mlx_lora.adapter.linalg import complete, least_used, principal, randomized_svd
from mlx_lora.adapter.listen import layer_inputs
from mlx_lora.adapter.size import predicted_sigma_max
from mlx_lora.data import Text, read
from mlx_lora.errors import AdapterError, ConfigError, ModelError
from mlx_lora.registry import options
from mlx_lora.rl.learner import step
from tests.tiny import IDS, ByteTokenizer, tiny, tiny_loaded

X = mx.array(IDS)
ROWS = [{"text": f"the quick brown fox number {n} jumps over {7 * n} lazy dogs"} for n in range(8)]
SHORT = [{"text": "a fox"}]  # half precision is slow on a CPU
SQUARE = ["q_proj", "o_proj"]  # of the tiny model


def logits(model) -> np.ndarray:
    return np.array(model(X).astype(mx.float32))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter folder of rank 4 with something in it, for inits that need a reference."""
    folder = tmp_path_factory.mktemp("reference")
    model = tiny(bits=4)
    config = attach(model, rank=4, init="gaussian", init_options={"std": 0.1}, seed=7)
    files.save(model, config, folder)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The unquantized tiny model as a folder."""
    folder = tmp_path_factory.mktemp("full")
    model = tiny()
    arguments = {k: v for k, v in vars(model.args).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(arguments))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def given(init: str, trained, full) -> dict:
    """Options an init cannot do without."""
    needed = {"reference": str(trained), "full_precision": str(full)}
    return {k: v for k, v in needed.items() if (k in options(inits[init]) and k != "full_precision")
            or (k == "full_precision" and init in ("loftq", "pissa", "quant_repair")
                and k in needed)}  # fmt: skip


SELDOM = (2, 3, 5, 6)  # bits
FORMS = [
    pytest.param(dtype, bits, marks=[pytest.mark.slow] * (dtype != mx.float32 and bits in SELDOM))
    for dtype in (mx.float32, mx.float16, mx.bfloat16)
    for bits in (None, 2, 3, 4, 5, 6, 8)
]


@pytest.mark.parametrize("init", sorted(HARMLESS))
@pytest.mark.parametrize(("dtype", "bits"), FORMS, ids=str)
def test_harmless_inits_leave_logits_bitwise_equal(init, bits, dtype, trained, full):
    loaded = tiny_loaded(bits=bits, dtype=dtype)
    before = logits(loaded.model)
    attach(
        loaded, init=init, init_options=given(init, trained, full), rank=4, scale=10.0, rows=SHORT
    )
    assert lora_layers(loaded.model), "nothing was attached: the test would prove nothing"
    assert np.array_equal(before, logits(loaded.model))


@pytest.mark.parametrize("init", sorted(set(inits) - {"antisymmetric"}))
def test_every_init_makes_finite_float32_factors_and_repeats(init, trained, full):
    def made():
        loaded = tiny_loaded(bits=4)
        settings = given(init, trained, full)
        attach(loaded, init=init, init_options=settings, rank=4, rows=ROWS, keys=SQUARE, seed=3)
        return {
            f"{n}.{f}": m[f]
            for n, m in lora_layers(loaded.model).items()
            for f in ("lora_a", "lora_b")
        }

    one, two = made(), made()
    for name, value in one.items():
        assert value.dtype == mx.float32
        assert mx.isfinite(value).all().item(), name
        assert mx.array_equal(value, two[name]), f"{name} differs between two runs of one seed"
    assert any(mx.any(v != 0).item() for n, v in one.items() if n.endswith("lora_a"))


def test_orthonormal_has_condition_number_one():
    model = tiny(bits=4)
    attach(model, init="orthonormal", rank=4)
    for layer in lora_layers(model).values():
        s = np.linalg.svd(np.array(layer.lora_a), compute_uv=False)
        assert s[0] / s[-1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("init", ["split_support", "zero"])
def test_split_support_learns_in_both_factors_at_the_first_step(init):
    model = tiny(bits=4)
    attach(model, init=init, rank=4)
    grads = nn.value_and_grad(model, summed_loss)(model, [Text(tuple(IDS[0]), 1)])[1]
    norms = {"lora_a": 0.0, "lora_b": 0.0}
    for name, g in tree_flatten(grads):
        norms[name.rpartition(".")[2]] += mx.square(g).sum().item()
    assert norms["lora_b"] > 0
    assert (norms["lora_a"] > 0) == (init == "split_support")


def test_split_support_has_both_factors_and_a_product_of_exactly_zero():
    model = tiny(bits=4)
    attach(model, init="split_support", rank=4)
    for layer in lora_layers(model).values():
        a, b = (layer[f].astype(mx.bfloat16) for f in ("lora_a", "lora_b"))
        assert mx.any(a != 0).item()
        assert mx.any(b != 0).item()
        assert mx.abs(a @ b).max().item() == 0


@pytest.mark.parametrize(("width", "rank"), [(512, 8), (512, 32), (1024, 16), (2048, 16)])
def test_the_size_of_a_gaussian_start_is_predicted_within_a_fifth(width, rank):
    rng = np.random.default_rng(width + rank)
    for out in (width, width // 2):
        a = 0.01 * rng.standard_normal((width, rank))
        b = 0.02 * rng.standard_normal((rank, out))
        r = np.linalg.qr(a, mode="r") @ np.linalg.qr(b.T, mode="r").T
        truth = 10 * np.linalg.svd(r, compute_uv=False)[0]
        guess = predicted_sigma_max(10, 0.01, 0.02, width, out, rank)
        small = min(width, out) < 512
        assert 0.9 < guess / truth < (1.45 if small else 1.2)


def test_tiny_scale_hits_the_size_it_names_whatever_the_scale():
    for scale in (0.5, 20.0):
        model = tiny(bits=4)
        attach(model, init="tiny_scale", init_options={"size": 0.01}, rank=4, scale=scale)
        for layer in lora_layers(model).values():
            delta = scale * np.array(layer.lora_a) @ np.array(layer.lora_b)
            assert 0.006 < np.linalg.norm(delta, 2) < 0.011


def test_the_antisymmetric_trap_is_a_projector_and_not_harmless():
    model = tiny(bits=4)
    before = logits(model)
    attach(model, init="antisymmetric", rank=4, scale=7.0, keys=SQUARE)
    for layer in lora_layers(model).values():
        delta = 7.0 * np.array(layer.lora_a) @ np.array(layer.lora_b)
        assert np.linalg.norm(delta, 2) == pytest.approx(1, abs=1e-5)
        assert np.linalg.norm(delta) == pytest.approx(2, abs=1e-4), "√r"
    assert not np.allclose(before, logits(model), atol=1e-3)
    with pytest.raises(AdapterError, match=r"square layers, model\.layers\.0\.mlp"):
        attach(tiny(), init="antisymmetric", rank=4)


def test_svd_points_a_along_the_reference_and_keep_delta_keeps_it(trained):
    _, tensors = files.read(trained)
    name = "model.layers.1.mlp.up_proj"
    delta = 2.0 * np.array(tensors[f"{name}.lora_a"]) @ np.array(tensors[f"{name}.lora_b"])
    for keep, rank in ((False, 2), (True, 2), (True, 4), (True, 6)):
        model = tiny(bits=4)
        settings = {"reference": str(trained), "keep_delta": keep}
        config = attach(model, init="svd", init_options=settings, rank=rank, scale=0.5)
        layer = lora_layers(model)[name]
        a, b = np.array(layer.lora_a), np.array(layer.lora_b)
        s = np.linalg.svd(delta, compute_uv=False)
        measured = config["init"]["measured"]
        if keep:
            left = np.linalg.norm(delta - 0.5 * a @ b)
            assert left == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), abs=1e-4)
            if rank == 4:
                assert measured["delta_energy_captured"] == pytest.approx(1)
        else:
            assert np.linalg.norm(a.T @ delta) == pytest.approx(np.linalg.norm(s[:2]), rel=1e-4)
            assert 0.3 < measured["delta_energy_captured"] < 0.99


def test_svd_of_a_fine_tuned_model_finds_its_change(full, tmp_path):
    from shutil import copytree

    tuned = copytree(full, tmp_path / "tuned")
    weights = mx.load(str(tuned / "model.safetensors"))
    rng = np.random.default_rng(0)
    name = "model.layers.0.self_attn.q_proj"
    u, v = rng.standard_normal((2, 128))
    weights[f"{name}.weight"] = weights[f"{name}.weight"] + mx.array(np.outer(u, v), mx.float32)
    mx.save_safetensors(str(tuned / "model.safetensors"), weights)
    loaded = tiny_loaded(bits=4)
    settings = {"reference": str(tuned), "full_precision": str(full)}
    attach(loaded, init="svd", init_options=settings, rank=1, keys=["q_proj"])
    a = np.array(lora_layers(loaded.model)[name].lora_a)[:, 0]
    assert abs(a @ v) / np.linalg.norm(v) == pytest.approx(1, abs=1e-5)


def test_svd_does_not_guess_what_the_base_was(full, trained, tmp_path):
    """Against packed weights the change would be the rounding; DoRA's is not BA alone."""
    tuned = {"reference": str(full)}
    for more in ({}, {"full_precision": str(trained)}):
        with pytest.raises((AdapterError, ModelError), match=r"full_precision|not known|config"):
            attach(tiny_loaded(bits=4), init="svd", init_options=tuned | more, rank=2)
    with pytest.raises(AdapterError, match=r"Leave full_precision out|says by itself"):
        settings = {"reference": str(trained), "full_precision": str(full)}
        attach(tiny_loaded(bits=4), init="svd", init_options=settings, rank=2)
    with pytest.raises(AdapterError, match="divides by the scale"):
        settings = {"reference": str(trained), "keep_delta": True}
        attach(tiny_loaded(), init="svd", init_options=settings, rank=2, scale=0.0)
    model = tiny()
    files.save(model, attach(model, rank=4, dora=True), tmp_path)
    with pytest.raises(AdapterError, match="a dora adapter"):
        attach(tiny(), init="svd", init_options={"reference": str(tmp_path)}, rank=2)


def test_activations_are_the_principal_directions_of_the_inputs():
    loaded = tiny_loaded(bits=4)
    config = attach(loaded, init="activations", rank=4, rows=ROWS)
    texts = read(loaded, list(enumerate(ROWS)), "rows")
    layers = lora_layers(loaded.model)
    seen = layer_inputs(loaded.model, layers, [t for i, t in enumerate(texts) if i % 4 != 3], 10**6)
    shares = []
    for name, layer in layers.items():
        x, a = seen[name].astype(np.float64), np.array(layer.lora_a)
        best = np.linalg.svd(x, compute_uv=False)[:4]
        assert np.linalg.norm(x @ a) == pytest.approx(np.linalg.norm(best), rel=1e-3)
        shares.append((best**2).sum() / (x**2).sum())
    measured = config["init"]["measured"]
    assert measured["input_energy_captured"] == pytest.approx(np.mean(shares), rel=1e-3)
    assert measured["input_energy_captured"] > 3 * measured["input_energy_of_random"]


def test_redistributed_ranks_keep_the_total_and_load_in_stock_mlx_lm(tmp_path):
    loaded = tiny_loaded(bits=4)
    settings = {"max_rank_ratio": 2}
    config = attach(loaded, init="activations", init_options=settings, rank=4, rows=ROWS)
    layers = lora_layers(loaded.model)
    ranks = {n: m.lora_a.shape[1] for n, m in layers.items()}
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1
    assert 1 <= min(ranks.values()) <= max(ranks.values()) <= 8
    for n, layer in enumerate(layers.values()):
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(n))
    files.save(loaded.model, config, tmp_path)
    assert files.read(tmp_path)[0]["rank_pattern"]
    stock, ours = load_adapters(tiny(bits=4), str(tmp_path)), tiny(bits=4)
    files.load(ours, tmp_path)
    assert np.allclose(logits(loaded.model), logits(stock), atol=1e-5)
    assert np.array_equal(logits(loaded.model), logits(ours))
    assert {n: m.lora_a.shape[1] for n, m in lora_layers(ours).items()} == ranks


def test_gradient_captures_nearly_the_optimal_energy_of_the_true_gradient():
    """Against the gradient of an unquantized weight, formed in full."""
    loaded = tiny_loaded()
    config = attach(loaded, init="gradient", rank=4, rows=ROWS, keys=["o_proj", "up_proj"])
    texts = read(loaded, list(enumerate(ROWS)), "rows")
    dense = tiny()
    dense.unfreeze()
    grads = dict(tree_flatten(nn.value_and_grad(dense, summed_loss)(dense, texts)[1]))
    ours, best, chance, total = 0.0, 0.0, 0.0, 0.0
    for name, layer in lora_layers(loaded.model).items():
        g = np.array(grads[f"{name}.weight"], np.float64)
        ours += np.linalg.norm(g @ np.array(layer.lora_a, np.float64)) ** 2
        best += (np.linalg.svd(g, compute_uv=False)[:4] ** 2).sum()
        chance += np.linalg.norm(g) ** 2 * 4 / g.shape[1]
        total += np.linalg.norm(g) ** 2
    assert ours > 0.98 * best
    assert ours > 3 * chance
    measured = config["init"]["measured"]
    assert measured["gradient_energy_captured"] == pytest.approx(ours / total, rel=0.35)


def test_null_space_stays_within_its_limit_and_still_learns_in_both():
    loaded = tiny_loaded(bits=4)
    unseen = mx.array([list(ByteTokenizer().encode("the quick brown fox number 99 jumps"))])
    before = loaded.model(unseen)
    config = attach(loaded, init="null_space", init_options={"limit": 1e-3}, rank=4, rows=ROWS)
    assert 0 < config["init"]["measured"]["output_change_max"] <= 1.001e-3
    change = mx.abs(loaded.model(unseen) - before).max().item()
    assert 0 < change < 0.03 * mx.abs(before).max().item()
    careless = tiny_loaded(bits=4)
    settings = {"limit": 10.0}
    config = attach(careless, init="null_space", init_options=settings, rank=4, rows=ROWS)
    assert config["init"]["measured"]["layers_shrunk"] == 0
    model = loaded.model
    grads = nn.value_and_grad(model, summed_loss)(model, [Text(tuple(IDS[0]), 1)])[1]
    assert all(mx.any(g != 0).item() for _, g in tree_flatten(grads))


def test_output_match_lowers_the_change_on_texts_it_has_not_seen():
    loaded = tiny_loaded(bits=4)
    settings = {"std": 0.05, "steps": 60, "learning_rate": 5e-3}
    measured = attach(loaded, init="output_match", init_options=settings, rank=4, rows=ROWS)
    measured = measured["init"]["measured"]
    assert measured["output_change_after"] < 0.3 * measured["output_change_before"]
    none = tiny_loaded(bits=4)
    attach(none, init="output_match", init_options={**settings, "steps": 0}, rank=4, rows=ROWS)
    plain = tiny(bits=4)
    attach(plain, init="gaussian", init_options={"std": 0.05}, rank=4)
    assert np.array_equal(logits(none.model), logits(plain)), "zero steps are the gaussian start"


@pytest.mark.parametrize("weighting", ["exact", "channels", "none"])
def test_quant_repair_lowers_the_output_error(weighting, full):
    loaded = tiny_loaded(bits=3)
    settings = {"full_precision": str(full), "weighting": weighting}
    config = attach(loaded, init="quant_repair", init_options=settings, rank=8, rows=ROWS)
    measured = config["init"]["measured"]
    assert measured["output_error_repaired"] < measured["output_error_quantized"]
    assert measured["layers_repaired"] > 0
    if weighting == "exact":
        assert measured["output_error_repaired"] < 0.95 * measured["output_error_plain_svd"]
    if weighting == "none":
        assert measured["output_error_repaired"] == pytest.approx(
            measured["output_error_plain_svd"], rel=0.02
        )


@pytest.mark.parametrize("init", sorted(REBASING))
def test_rebasing_inits_come_closer_to_full_precision_and_switch_back(init, full):
    loaded = tiny_loaded(bits=4)
    before = logits(loaded.model)
    truth = logits(tiny())
    settings = {"full_precision": str(full)}
    config = attach(loaded, init=init, init_options=settings, rank=16)
    measured = config["init"]["measured"]
    assert measured["weight_error_after"] < measured["weight_error_quantized"]
    after = logits(loaded.model)
    assert np.linalg.norm(after - truth) < np.linalg.norm(before - truth)
    with switched_off(loaded.model):
        assert np.array_equal(before, logits(loaded.model)), "off is the base as it was"


@pytest.mark.parametrize("init", sorted(set(inits) - {"antisymmetric"}))
def test_the_reference_policy_is_the_base_or_the_adapter_as_initialised(init, trained, full):
    loaded = tiny_loaded(bits=4)
    model, settings = loaded.model, given(init, trained, full)
    base = logits(model)
    attach(loaded, init=init, init_options=settings, rank=4, rows=ROWS, scale=1.0)
    start = logits(model)
    assert remembers_start(model) != is_harmless(init, settings)
    for layer in lora_layers(model).values():
        layer.lora_b = layer.lora_b + 0.1
    assert not np.allclose(start, logits(model), atol=1e-3)
    with reference(model):
        assert np.array_equal(start, logits(model))
    with switched_off(model):
        assert np.array_equal(base, logits(model))


@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD, optim.Muon], ids=lambda m: m.__name__)
def test_weight_decay_pulls_towards_the_start_not_to_zero(make):
    """With a zero gradient, decay alone moves the weights: to the start, or not at all from it."""
    model = tiny(bits=4)
    attach(model, init="gaussian", rank=4, keys=["q_proj"])
    start = [m.lora_b for m in lora_layers(model).values()]
    grads = tree_map(mx.zeros_like, model.trainable_parameters())
    optimizer = make(learning_rate=0.1, weight_decay=0.5)
    step(model, optimizer, grads)
    for layer, b in zip(lora_layers(model).values(), start, strict=True):
        assert mx.allclose(layer.lora_b, b, atol=1e-7).item(), "at the start nothing pulls"
        layer.lora_b = b + 1
    step(model, optimizer, grads)
    for layer, b in zip(lora_layers(model).values(), start, strict=True):
        assert mx.all(layer.lora_b - b < 1).item(), "away from it, decay leads back"


@pytest.mark.parametrize("make", [optim.Adam, optim.SGD], ids=lambda m: m.__name__)
def test_lora_plus_makes_the_step_of_b_longer_and_leaves_a_alone(make):
    moves = {}
    for ratio in (1.0, 16.0):
        model = tiny(bits=4)
        attach(model, init="split_support", rank=4, keys=["q_proj"])
        before = dict(tree_flatten(model.trainable_parameters()))
        grads = nn.value_and_grad(model, summed_loss)(model, [Text(tuple(IDS[0]), 1)])[1]
        step(model, make(learning_rate=1e-3), grads, ratio)
        after = dict(tree_flatten(model.trainable_parameters()))
        moves[ratio] = {n: after[n] - before[n] for n in before}
    for name, move in moves[1.0].items():
        factor = 16 if name.endswith("lora_b") else 1
        assert mx.allclose(moves[16.0][name], factor * move, rtol=1e-3, atol=1e-7).item(), name


def test_small_changes_survive_in_bf16_from_every_start_that_moves(trained, full):
    """The branch carries a change of 0.1 % of the weight with under 2 % error, before W x."""
    for init in sorted(n for n in inits if not is_harmless(n, {}) and n != "antisymmetric"):
        loaded = tiny_loaded(bits=4, dtype=mx.bfloat16)
        settings = given(init, trained, full)
        attach(loaded, init=init, init_options=settings, rank=4, rows=ROWS, keys=["q_proj"])
        layer = lora_layers(loaded.model)["model.layers.0.self_attn.q_proj"]
        x = mx.random.normal((32, 128), key=mx.random.key(1)).astype(mx.bfloat16)
        w = np.array(models.dense_weight(layer.linear))
        push = mx.random.normal(layer.lora_b.shape, key=mx.random.key(2))
        delta = layer.scale * np.array(layer.lora_a) @ np.array(push)
        push = push * (1e-3 * np.linalg.norm(w) / max(np.linalg.norm(delta), 1e-12))

        def branch(b, layer=layer, x=x):
            return np.array(layer.scale * ((x @ layer.lora_a) @ b), np.float64)

        got = branch(layer.lora_b + push) - branch(layer.lora_b)
        exact = layer.scale * np.array(x.astype(mx.float32), np.float64)
        exact = exact @ np.array(layer.lora_a, np.float64) @ np.array(push, np.float64)
        assert np.linalg.norm(got - exact) < 0.02 * np.linalg.norm(exact), init


class TestBadInput:
    """One readable error each, before any long work."""

    def test_rank_above_a_layers_size(self):
        with pytest.raises(AdapterError, match="rank 100 is above the size of 4 layers") as caught:
            attach(tiny(), rank=100)
        assert "k_proj is 64 × 128" in str(caught.value)

    def test_odd_rank_for_split_support(self):
        with pytest.raises(AdapterError, match="5 is odd"):
            attach(tiny(), init="split_support", rank=5)

    @pytest.mark.parametrize("init", [n for n in inits if "data" in options(inits[n])])
    def test_an_init_that_needs_data_without_data(self, init):
        with pytest.raises(ConfigError, match=f"the init {init} looks at data") as caught:
            attach(tiny_loaded(), init=init)
        assert "data=" in caught.value.hint
        with pytest.raises(AdapterError, match="bare model has no tokenizer"):
            attach(tiny(), init=init, rows=ROWS)

    def test_data_that_is_empty_unknown_or_too_long(self, tmp_path):
        empty = tmp_path / "empty.jsonl"
        empty.write_text("\n")
        for data, words in (
            (str(empty), "is empty"),
            (str(tmp_path / "absent.jsonl"), "cannot read"),
            ("countdwn", "neither a .jsonl or .txt file nor a task"),
        ):
            with pytest.raises(ConfigError, match=words):
                attach(tiny_loaded(), init="activations", init_options={"data": data})
        rows = [{"text": "x" * 300}, {"text": "fine"}, {"prompt": "no completion"}]
        with pytest.raises(ConfigError) as caught:
            attach(tiny_loaded(), init="activations", rows=rows)
        assert "300 tokens, the context holds 256" in str(caught.value)
        assert "3: needs" in str(caught.value), "every problem at once"

    def test_nan_in_calibration_activations(self):
        loaded = tiny_loaded()
        layer = loaded.model.model.layers[0].self_attn.q_proj
        layer.weight = layer.weight * float("nan")
        with pytest.raises(ModelError, match=r"inputs of .*layers\.0.*are not finite"):
            attach(loaded, init="activations", rows=ROWS)
        with pytest.raises(ModelError, match="not finite"):
            attach(loaded_again(loaded), init="gradient", rows=ROWS)

    def test_a_reference_for_another_model(self, trained, tmp_path):
        other = tiny_loaded("gemma")
        other.model.model.layers = other.model.model.layers[:1]
        config, tensors = files.read(trained)
        wrong = {n: mx.zeros((4, 7) if n.endswith("b") else (9, 4)) for n in tensors}
        mx.save_safetensors(str(tmp_path / files.WEIGHTS), wrong)
        (tmp_path / files.CONFIG).write_text(json.dumps(config))
        with pytest.raises(AdapterError, match="made for another model"):
            attach(tiny(), init="svd", init_options={"reference": str(tmp_path)}, rank=4)
        with pytest.raises(ModelError):
            attach(tiny(), init="svd", init_options={"reference": "nowhere"}, rank=4)
        renamed = {n.replace("model.layers", "other.blocks"): v for n, v in tensors.items()}
        mx.save_safetensors(str(tmp_path / files.WEIGHTS), renamed)
        with pytest.raises(AdapterError, match="changes none of the layers"):
            attach(tiny(), init="svd", init_options={"reference": str(tmp_path)}, rank=4)

    def test_options_that_do_not_exist_or_make_no_sense(self):
        for settings, words in (({"sdt": 1}, "no option sdt"), ({"std": -1}, "greater than")):
            with pytest.raises(ConfigError, match=words):
                attach(tiny(), init="gaussian", init_options=settings)
        with pytest.raises(ConfigError, match="less than"):
            wide = {"max_rank_ratio": float("inf")}
            attach(tiny_loaded(), init="activations", init_options=wide, rows=ROWS)
        with pytest.raises(ConfigError, match="needs the option reference"):
            attach(tiny(), init="svd")

    def test_inits_for_quantized_models_on_others(self, full):
        with pytest.raises(AdapterError, match="not known here"):
            attach(tiny_loaded(bits=4), init="pissa", rank=4)
        for init in ("loftq", "quant_repair"):
            with pytest.raises(AdapterError, match="quantized layers, and none"):
                settings = {"full_precision": str(full)}
                attach(tiny_loaded(), init=init, init_options=settings, rank=4, rows=ROWS)


def loaded_again(loaded: models.Loaded) -> models.Loaded:
    """A fresh tiny model with the same broken weight."""
    fresh = tiny_loaded()
    layer = fresh.model.model.layers[0].self_attn.q_proj
    layer.weight = layer.weight * float("nan")
    return fresh


@pytest.mark.parametrize("init", sorted(REBASING))
def test_a_rebased_model_and_its_adapter_load_in_stock_mlx_lm(init, tmp_path):
    from mlx_lm import load as stock_load

    loaded = models.load("demo")
    config = attach(loaded, init=init, rank=4)
    models.save_base(loaded, tmp_path / "base")
    files.save(loaded.model, config, tmp_path / "adapters")
    stock, _ = stock_load(str(tmp_path / "base"), adapter_path=str(tmp_path / "adapters"))
    assert np.allclose(logits(loaded.model), logits(stock), atol=1e-3)
    plain = models.load("demo")
    assert not np.allclose(logits(plain.model), logits(stock), atol=1e-3)


@pytest.mark.parametrize("init", ["zero", "gradient", "activations", "null_space"])
def test_dora_starts_from_inits_too(init, tmp_path):
    """Harmless where the init is, at bits that stock DoRA refuses, and on file as `dora`."""
    loaded = tiny_loaded(bits=3, dtype=mx.bfloat16)
    before = logits(loaded.model)
    config = attach(loaded, init=init, rank=4, rows=SHORT, dora=True)
    assert np.array_equal(before, logits(loaded.model)) == is_harmless(init, {})
    for layer in lora_layers(loaded.model).values():
        layer.m = 1.1 * layer.m
    files.save(loaded.model, config, tmp_path)
    again = tiny(bits=3, dtype=mx.bfloat16)
    assert files.load(again, tmp_path)["fine_tune_type"] == "dora"
    assert np.array_equal(logits(loaded.model), logits(again))
    with switched_off(again):
        assert np.array_equal(before, logits(again))


def test_what_inits_measure_is_documented(trained, full):
    page = (Path(__file__).parents[1] / "docs/metrics.md").read_text(encoding="utf-8")
    section = page.partition("### What inits measured")[2].partition("###")[0]
    rows = re.findall(r"(?m)^\| `(\w+)` \| ([^|]+) \|", section)
    documented = {(init, key) for key, owners in rows for init in re.findall(r"`(\w+)`", owners)}
    found = set()
    for init in set(inits) - {"antisymmetric"}:
        settings = given(init, trained, full)
        config = attach(tiny_loaded(bits=4), init=init, init_options=settings, rank=4, rows=ROWS)
        found |= {(init, key) for key in config["init"].get("measured", {})}
    assert found == documented


def test_alternations_sharpen_a_sketch_without_spare_columns():
    """With no oversampling one pass is a rough guess; the next ones must start from its result."""
    energy = {}
    for alternations in (1, 3):
        loaded = tiny_loaded()
        settings = {"oversample": 0, "alternations": alternations}
        attach(
            loaded, init="gradient", init_options=settings, rank=1, rows=ROWS[:2], keys=["up_proj"]
        )
        dense = tiny()
        dense.unfreeze()
        texts = read(loaded, list(enumerate(ROWS[:2])), "rows")
        grads = dict(tree_flatten(nn.value_and_grad(dense, summed_loss)(dense, texts)[1]))
        shares = []
        for name, layer in lora_layers(loaded.model).items():
            g = np.array(grads[f"{name}.weight"], np.float64)
            best = np.linalg.svd(g, compute_uv=False)[0]
            shares.append(np.linalg.norm(g @ np.array(layer.lora_a, np.float64)) / best)
        energy[alternations] = min(shares)
    assert energy[1] < energy[3]
    assert energy[3] > 0.95


class TestLinearAlgebra:
    rng = np.random.default_rng(3)

    def test_completed_columns_are_orthonormal(self):
        v, _ = np.linalg.qr(self.rng.standard_normal((40, 5)))
        whole = complete(v, 7, np.random.default_rng(0))
        assert np.array_equal(whole[:, :5], v)
        assert np.allclose(whole.T @ whole, np.eye(12), atol=1e-10)

    def test_the_least_used_directions_are_those_nothing_flows_along(self):
        basis, _ = np.linalg.qr(self.rng.standard_normal((30, 30)))
        x = self.rng.standard_normal((200, 26)) @ basis[:, :26].T
        unused = least_used(x, 4, self.rng)
        assert np.abs(x @ unused).max() < 1e-6

    @pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
    def test_principal_directions_and_randomized_svd_are_the_svd(self, shape):
        u, _ = np.linalg.qr(self.rng.standard_normal((shape[0], 30)))
        v, _ = np.linalg.qr(self.rng.standard_normal((shape[1], 30)))
        values = 0.7 ** np.arange(30)
        w = (u * values) @ v.T
        s, directions = principal(w, 5)
        assert np.allclose(s, values[:5], rtol=1e-6)
        assert np.allclose(np.abs((directions * v[:, :5]).sum(axis=0)), 1, atol=1e-5)
        left, sigma, right = randomized_svd(w, 5, np.random.default_rng(0))
        assert np.allclose(sigma, values[:5], rtol=1e-2)
        rest = np.linalg.norm(w - (left * sigma) @ right.T)
        assert rest == pytest.approx(np.linalg.norm(values[5:]), rel=1e-2)
