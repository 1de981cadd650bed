"""Attaching changes nothing, files are mlx-lm's, and bad keys are named."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters

from mlx_lora.adapter import files, tensors
from mlx_lora.adapter.attach import (
    assert_no_update,
    attach,
    expand_keys,
    lora_layers,
    switched_off,
)
from mlx_lora.adapter.inits import inits
from mlx_lora.adapter.scene import module_key
from mlx_lora.errors import AdapterError, ConfigError, UnknownNameError
from mlx_lora.ship import trained
from tests.tiny import ARCHITECTURES, IDS, tiny

X = mx.array(IDS)


def logits(model) -> np.ndarray:
    return np.array(model(X).astype(mx.float32))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_attaches_harmlessly(architecture):
    model = tiny(architecture, bits=4)
    before = logits(model)
    attach(model)
    assert np.array_equal(before, logits(model))
    assert all(n.startswith("model.layers.") for n in lora_layers(model))


def test_the_bitwise_test_can_fail():
    model = tiny(bits=4)
    before = logits(model)
    attach(model, init="gaussian", init_options={"std": 0.05})
    assert not np.array_equal(before, logits(model))
    with switched_off(model):
        assert np.array_equal(before, logits(model)), "off must be the base"
    assert not np.array_equal(before, logits(model)), "and on again afterwards"


def test_zero_b_is_asserted_whatever_mlx_lm_does():
    model = tiny()
    attach(model)
    layer = next(iter(lora_layers(model).values()))
    layer.lora_b = layer.lora_b + 1e-30
    with pytest.raises(AssertionError, match="lora_b is not zero"):
        assert_no_update(model)


def test_a_is_within_mlx_lms_bound_and_depends_on_seed_and_module_alone():
    model, again, other = tiny(), tiny(seed=1), tiny()
    attach(model, seed=3)
    attach(again, seed=3, keys=["q_proj"])
    attach(other, seed=4)
    name = "model.layers.1.self_attn.q_proj"
    a = lora_layers(model)[name].lora_a
    assert mx.abs(a).max().item() <= 1 / np.sqrt(a.shape[0])
    assert mx.array_equal(a, lora_layers(again)[name].lora_a)
    assert not mx.array_equal(a, lora_layers(other)[name].lora_a)
    assert not mx.array_equal(module_key(0, "a"), module_key(0, "b"))


def test_only_lora_parameters_train():
    from mlx.utils import tree_flatten

    model = tiny(bits=4)
    attach(model)
    names = {n.rsplit(".", 1)[1] for n, _ in tree_flatten(model.trainable_parameters())}
    assert names == {"lora_a", "lora_b"}


def test_short_keys_and_layer_counts():
    model = tiny()
    config = attach(model, keys=["q_proj", "down_proj"], num_layers=1)
    assert config["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj"]
    assert set(lora_layers(model)) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert attach(tiny(), num_layers=99)["num_layers"] == 2


@pytest.mark.parametrize("rank", [0, -1, 10**20])
def test_a_rank_that_is_none(rank):
    with pytest.raises(AdapterError, match="rank is at least 1"):
        attach(tiny(), rank=rank)


def test_keys_of_blocks_that_are_not_adapted_are_named():
    """As in a mixture of experts whose first block alone is dense."""
    for keys in (["gate_proj"], ["q_proj", "gate_proj"]):
        with pytest.raises(AdapterError, match=r"no layer of .*gate_proj lies in the last 1 "):
            attach(tiny_without_gate(), keys=keys, num_layers=1)
    attach(tiny_without_gate(), keys=["q_proj", "gate_proj"], num_layers=2)


def tiny_without_gate():
    model = tiny()
    del model.model.layers[1].mlp["gate_proj"]
    return model


def test_keys_that_match_nothing_are_named_with_near_matches():
    with pytest.raises(AdapterError) as caught:
        expand_keys(tiny(), ["q_prj", "k_proj", "mlp.up_pro"])
    assert "'q_prj' matches no layer. Did you mean q_proj" in str(caught.value)
    assert "mlp.up_proj" in str(caught.value), "every problem at once"
    assert "'k_proj'" not in str(caught.value)


def test_attaching_twice_and_bad_options_are_errors():
    model = tiny()
    attach(model)
    with pytest.raises(AdapterError, match="already"):
        attach(model)
    with pytest.raises(ConfigError, match="no option sdt"):
        attach(tiny(), init="gaussian", init_options={"sdt": 1})
    with pytest.raises(UnknownNameError) as caught:
        inits["gausian"]
    assert caught.value.hint == "Did you mean gaussian?"


def test_small_changes_survive_in_bf16():
    """A change of 0.1 % of the weight's size comes through the branch with under 2 % error."""
    mx.random.seed(0)
    x = mx.random.normal((64, 512)).astype(mx.bfloat16)
    model = tiny()
    attach(model, keys=["q_proj"], rank=4, scale=1.0)
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    layer.linear.weight = mx.zeros((128, 512))  # the branch alone, before it meets W x
    layer.lora_a = mx.random.normal((512, 4)) / 512**0.5
    layer.lora_b = 1e-3 * mx.random.normal((4, 128))
    exact = np.array(x.astype(mx.float32), np.float64) @ np.array(layer.lora_a, np.float64)
    exact = exact @ np.array(layer.lora_b, np.float64)
    got = np.array(layer(x).astype(mx.float32), np.float64)
    assert np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.02


def test_saved_adapter_loads_in_stock_mlx_lm_with_the_same_logits(tmp_path):
    model = tiny(bits=4)
    config = attach(model, init="gaussian", keys=["q_proj", "up_proj"], num_layers=1)
    for layer in lora_layers(model).values():
        layer.scale = 3.5
    files.save(model, config, tmp_path)
    assert json.loads((tmp_path / files.CONFIG).read_text())["lora_parameters"]["scale"] == 3.5
    stock = load_adapters(tiny(bits=4), str(tmp_path))
    ours = tiny(bits=4)
    files.load(ours, tmp_path)
    assert np.array_equal(logits(model), logits(ours))
    assert np.allclose(logits(model), logits(stock), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [files.CONFIG, files.WEIGHTS]


def test_misfits_are_listed_all_at_once(tmp_path):
    model = tiny()
    files.save(model, attach(model, keys=["q_proj"]), tmp_path)
    _, tensors = files.read(tmp_path)
    del tensors["model.layers.0.self_attn.q_proj.lora_a"]
    tensors["model.layers.0.self_attn.q_proj.lora_b"] = mx.zeros((8, 7))
    tensors["model.layers.0.self_attn.x_proj.lora_b"] = mx.zeros((8, 7))
    mx.save_safetensors(str(tmp_path / files.WEIGHTS), tensors)
    with pytest.raises(AdapterError) as caught:
        files.load(tiny(), tmp_path)
    message = str(caught.value)
    assert "3 tensors" in message
    assert all(word in message for word in ("missing", "unexpected", "shape"))


def test_all_that_is_wrong_with_a_config_is_said_at_once(tmp_path):
    (tmp_path / files.WEIGHTS).write_bytes(b"")
    wrong = {"fine_tune_type": "full", "num_layers": "all", "lora_parameters": {"scale": "two"}}
    (tmp_path / files.CONFIG).write_text(json.dumps(wrong))
    with pytest.raises(AdapterError) as caught:
        tensors.described(tmp_path)
    words = ("'full'", "num_layers is 'all'", "no rank", "scale is 'two'")
    assert all(word in str(caught.value) for word in words)
    assert '"lora_parameters"' in caught.value.hint
    for text, word in (("", "not JSON"), ("[1]", "holds"), ("{}", "no lora_parameters")):
        (tmp_path / files.CONFIG).write_text(text)
        with pytest.raises(AdapterError, match=word):
            tensors.described(tmp_path)
    curved = {"rank": 4, "scale": float("nan"), "type": "wavelet"}
    assert len(tensors.unsound({"lora_parameters": curved})) == 2
    assert tensors.unsound({"fine_tune_type": "spline", "lora_parameters": {"rank": 4, "scale": 1}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora_parameters": {"rank": 0}},
        {"lora_parameters": {"rank": True}},
        {"lora_parameters": {"scale": True}},
        {"lora_parameters": {"keys": [1, 2]}},
        {"lora_parameters": {"dropout": "none"}},
        {"lora_parameters": {"dropout": 1.0}},
        {"num_layers": False},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": "4"}},
        {"base": "demo"},
    ],
)
def test_settings_of_another_form_are_named(wrong):
    """Each would end in a crash, or be read as something else: true as a scale of 1."""
    sound = {"rank": 4, "scale": 2, "dropout": 0, "keys": None}
    assert not tensors.unsound({"lora_parameters": sound, "num_layers": 0, "rank_pattern": {}})
    lora = {**sound, **wrong.get("lora_parameters", {})}
    (problem,) = tensors.unsound({**wrong, "lora_parameters": lora})
    name = next(iter(wrong.get("lora_parameters", wrong)))
    assert name in problem


def test_a_foreign_file_is_named_tensor_by_tensor(tmp_path):
    config = {"lora_parameters": {"rank": 4, "scale": 2.0}}
    (tmp_path / files.CONFIG).write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / files.WEIGHTS), {"conv.weight": mx.ones(3), "b": mx.ones(3)})
    with pytest.raises(AdapterError) as caught:
        trained.read(tmp_path)
    assert "conv.weight is no LoRA factor" in str(caught.value) and "  b is" in str(caught.value)


def test_unreadable_folders_are_errors_with_a_hint(tmp_path):
    with pytest.raises(AdapterError, match="no adapter folder"):
        files.read(tmp_path)
    (tmp_path / files.CONFIG).write_text("{}")
    (tmp_path / files.WEIGHTS).write_bytes(b"\x10\x00\x00")
    with pytest.raises(AdapterError, match="does not load"):
        files.read(tmp_path)
    run = tmp_path / "run"
    model = tiny()
    files.save(model, attach(model), run / "adapters")
    with pytest.raises(AdapterError) as caught:
        files.read(run)
    assert "adapters" in caught.value.hint
