"""Fusing: the fused model is the adapter's, and where rounding would eat the update it says so."""

import json
from io import StringIO
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from rich.console import Console
from typer.testing import CliRunner

from mlx_lora import models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.cli import app
from mlx_lora.errors import AdapterError
from mlx_lora.progress import console
from mlx_lora.ship.fuse import Refused, fuse, unpacked
from mlx_lora.ship.requantize import Survival, fused, own_forms, together, update_of
from mlx_lora.ship.show import print_fused
from tests.test_ship import adapter
from tests.tiny import IDS, tiny_loaded

QUIET = console(quiet=True)


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    return adapter(tmp_path_factory.mktemp("fuse") / "loud", models.load("demo"))


@pytest.fixture(scope="module")
def faint(tmp_path_factory):
    options = {"init": "gaussian", "init_options": {"std": 0.01}}
    return adapter(tmp_path_factory.mktemp("fuse") / "faint", models.load("demo"), **options)


def test_dequantized_it_is_the_same_model(faint, tmp_path):
    found = fuse(faint, tmp_path / "out", dequantize=True, console=QUIET)
    assert found.written and found.report.verdict == "pass"
    assert found.to_json()["kept"] == pytest.approx(1, abs=1e-4)
    assert "quantization" not in models.read_json(tmp_path / "out" / "config.json")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"fuse.json", "fuse.png", "check.json", "model.safetensors"} <= names
    told = json.loads((tmp_path / "out" / "fuse.json").read_text())
    assert told["written"] and len(told["layers"]) == 35


def test_an_update_that_rounding_eats_is_refused_unless_forced(faint, tmp_path):
    with pytest.raises(Refused) as refused:
        fuse(faint, tmp_path / "out", console=QUIET)
    assert not list(tmp_path.iterdir())
    assert refused.value.found.report is None, "before anything is written"
    assert 0 < refused.value.found.to_json()["kept"] < 0.5
    assert "survives in 4-bit affine" in refused.value.found.reasons[0]
    assert "`fuse --plan`" in refused.value.found.reasons[0]
    found = fuse(faint, tmp_path / "out", force=True, console=QUIET)
    assert found.written and found.reasons and (tmp_path / "out" / "check.json").is_file()


def test_a_fused_model_that_the_check_refuses_is_not_left(tmp_path):
    options = {"init": "gaussian", "init_options": {"std": 0.1}}
    garbled = adapter(tmp_path / "a", models.load("demo"), **options)
    with pytest.raises(Refused) as refused:
        fuse(garbled, tmp_path / "out", console=QUIET)
    found = refused.value.found
    assert found.report.verdict == "fail" and found.to_json()["kept"] > 0.9
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_command_exits_with_1_and_one_document(faint, tmp_path):
    options = ["--out", str(tmp_path / "o"), "--model", "demo", "--json"]
    done = CliRunner().invoke(app, ["fuse", str(faint), *options])
    assert done.exit_code == 1
    assert not json.loads(done.stdout)["written"]


def test_what_was_written_is_named_with_its_page(capsys):
    found = {"layers": [], "kept": 1.0, "noise": 0.1, "check": None, "notices": [], "reasons": []}
    found |= {"written": True, "out": "my model"}
    print_fused(found)
    assert "mlx-lora report 'my model' --open" in capsys.readouterr().out
    print_fused(found | {"written": False})
    assert "mlx-lora report" not in capsys.readouterr().out


def test_strength_goes_into_the_weights(loud, tmp_path):
    found = fuse(loud, tmp_path / "none", dequantize=True, strength=0.5, console=QUIET)
    assert found.report.verdict == "pass"
    loaded = models.load("demo")
    files.load(loaded.model, loud)
    layers = lora_layers(loaded.model)
    full = [survival for survival, _ in fused(layers, dict.fromkeys(layers))]
    pairs = zip(found.survivals, full, strict=True)
    assert all(half.size == pytest.approx(whole.size / 2) for half, whole in pairs)


def test_a_layer_that_is_called_linear_is_unpacked_too():
    """As the layer under an adapter is; its name stays."""
    model = nn.Module()
    model.mixer = nn.Module()
    model.mixer.linear, model.q = nn.Linear(64, 64), nn.Linear(64, 64)
    nn.quantize(model, group_size=64, bits=4)
    model.q = LoRALinear.from_base(model.q, r=2)
    weights = models.base_weights(model)
    found = unpacked(SimpleNamespace(model=model), weights)  # type: ignore[arg-type]
    assert found.keys() == {"mixer.linear.weight", "q.weight"}
    assert weights.keys() & {"mixer.linear.scales", "q.scales"} == set()


def test_a_model_brings_its_code_and_tables_from_its_own_folder_alone(tmp_path):
    source, out = tmp_path / "models" / "base", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    out.mkdir()
    kept = {
        "modeling_x.py", "tokenization_x.py", "added_tokens.json", "spiece.model",
        "tokenizer.model", "generation_config.json",
    }  # fmt: skip
    for name in (*kept, "README.md", "model-00001.safetensors", "sub/other.py", "../beside.py"):
        (source / name).write_text("")
    models.save_model({"w": mx.zeros(1)}, {"model_type": "x"}, source, out)
    assert {p.name for p in out.rglob("*")} == {"model.safetensors", "config.json", *kept}


@pytest.mark.parametrize("dora", [False, True])
def test_updates_are_those_that_the_layers_add(dora):
    loaded = tiny_loaded("qwen2")  # with biases
    attach(loaded, init="gaussian", init_options={"std": 0.05}, dora=dora)
    for layer in lora_layers(loaded.model).values():
        if dora:
            layer.m = layer.m * 1.2
    x = mx.random.normal((5, 128))
    for name, layer in lora_layers(loaded.model).items():
        if layer.lora_a.shape[0] == 128:
            moved = layer(x) - layer.linear(x)
            assert mx.allclose(x @ update_of(layer).T, moved, atol=1e-4), name
    logits = np.array(models.logits(loaded.model, mx.array(IDS)))
    weights = dict(models.base_weights(loaded.model))
    layers = lora_layers(loaded.model)
    for survival, parts in fused(layers, own_forms(layers)):
        assert survival.kept == pytest.approx(1, abs=1e-4)
        weights |= {f"{survival.module}.{part}": value for part, value in parts.items()}
    plain = tiny_loaded("qwen2")
    plain.model.load_weights(list(weights.items()))
    assert np.allclose(np.array(models.logits(plain.model, mx.array(IDS))), logits, atol=1e-4)


def test_embeddings_and_experts_add_what_mlx_lm_would_fuse():
    mx.random.seed(0)
    table = LoRAEmbedding.from_base(nn.Embedding(16, 32), r=2, scale=3.0)
    experts = LoRASwitchLinear.from_base(SwitchLinear(32, 64, 4), r=2, scale=3.0)
    linear = LoRALinear.from_base(nn.Linear(32, 64), r=2, scale=3.0)
    for layer in (table, experts, linear):
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
        inner = layer.embedding if "embedding" in layer else layer.linear
        assert mx.allclose(layer.fuse().weight, inner.weight + update_of(layer), atol=1e-5)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_kept_is_the_projection_on_what_was_meant(mode):
    mx.random.seed(0)
    form = {"affine": (64, 4), "mxfp4": (32, 4)}[mode]
    packed = nn.QuantizedLinear.from_linear(nn.Linear(128, 64, bias=False), *form, mode=mode)
    layer = LoRALinear.from_base(packed, r=4, scale=1.0)
    layer.lora_b = 0.2 * mx.random.normal(layer.lora_b.shape)
    ((survival, parts),) = fused({"x": layer}, own_forms({"x": layer}))
    back = mx.dequantize(
        parts["weight"], parts["scales"], parts.get("biases"), *form, mode=mode
    ).astype(mx.float32)
    moved, meant = np.array(back - models.dense_weight(packed)), np.array(update_of(layer))
    assert survival.kept == pytest.approx((moved * meant).sum() / (meant**2).sum(), rel=1e-4)
    rest = moved - survival.kept * meant
    assert abs((rest * meant).sum()) < 1e-3 * (meant**2).sum()
    assert survival.noise == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(meant), rel=1e-4)
    assert survival.bytes == sum(part.nbytes for part in parts.values())
    ((whole, _),) = fused({"x": layer}, {"x": None})
    assert whole.kept == pytest.approx(1, abs=1e-2) and whole.bits is None


def test_all_layers_weigh_by_their_updates():
    big = Survival("a", 4, 1.0, energy=9.0, product=9.0, error=0.0)
    none = Survival("b", 4, 1.0, energy=1.0, product=0.0, error=1.0)
    assert together([big, none]) == (pytest.approx(0.9), pytest.approx(0.09**0.5))
    assert together([Survival("c", 4, 0.0, 0.0, 0.0, 0.0)]) == (None, None)


def test_an_adapter_of_nothing_is_an_error(tmp_path):
    loaded = models.load("demo")
    config = attach(loaded)
    files.save(loaded.model, config | {"base": {"model": "demo"}}, tmp_path / "a")
    said = StringIO()
    with pytest.raises(AdapterError, match="changes nothing"):
        fuse(tmp_path / "a", tmp_path / "out", console=Console(file=said))
    assert not said.getvalue(), "no layer is fused before that is said"
