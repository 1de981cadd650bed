"""A plan stores each layer at the fewest bits at which its update survives, and mlx-lm loads it."""

import io
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from typer.testing import CliRunner

from mlx_lora import bases, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.cli import app
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.progress import console
from mlx_lora.ship.fuse import Refused, fuse, plan
from mlx_lora.ship.fuse_plan import WIDTHS, Standard, one_width, plan_layer, planned, widths_of
from mlx_lora.ship.requantize import Form, Survival, fused
from tests.test_metrics_doc import documented, emitted
from tests.tiny import IDS, tiny_loaded

QUIET = console(quiet=True)


def layer(size: float, mode: str = "affine", bits: int = 4, group: int = 64) -> LoRALinear:
    """A packed layer with an update of this size against its weight."""
    mx.random.seed(0)
    packed = nn.QuantizedLinear.from_linear(nn.Linear(256, 128, bias=False), group, bits, mode=mode)
    found = LoRALinear.from_base(packed, r=4, scale=1.0)
    found.lora_b = mx.random.normal(found.lora_b.shape)
    now = mx.linalg.norm(found.lora_a @ found.lora_b)
    found.lora_b = found.lora_b * (size * mx.linalg.norm(models.dense_weight(packed)) / now)
    return found


@pytest.mark.parametrize(("size", "bits"), [(0.5, 3), (0.15, 4), (0.03, 8), (0.003, None)])
def test_the_smaller_the_update_the_more_bits(size, bits):
    found = plan_layer("x", layer(size), Standard())
    assert found.chosen.bits == bits and found.chosen.size == pytest.approx(size, rel=1e-3)
    assert [s.bits for s in found.tried] == [*WIDTHS, None]
    assert found.at(None).kept == pytest.approx(1, abs=1e-3)


def test_what_4_bits_lose_8_bits_keep():
    found = plan_layer("x", layer(0.03), Standard())
    assert found.at(4).kept < 0.5 and found.at(8).kept == pytest.approx(1, abs=0.02)


def test_below_the_base_the_share_alone_would_choose_rubble():
    found = plan_layer("x", layer(0.03), Standard())
    rubble = found.at(2)
    assert rubble.noise > 5, "W itself is rounded away"
    share_alone = Standard(noise=1e9)
    assert found.chosen.bits == 8 and not Standard().met(rubble)
    for kept, met in ((0.96, True), (0.94, False), (1.04, True), (1.06, False)):
        assert share_alone.met(Survival("x", 2, 1.0, 1.0, kept, (1 - kept) ** 2)) is met


def test_the_standard_decides():
    at_6 = plan_layer("x", layer(0.03), Standard()).at(6)
    loose = Standard(keep=1 - 2 * abs(1 - at_6.kept), noise=1.1 * at_6.noise)
    assert plan_layer("x", layer(0.03), loose).chosen.bits == 6
    for wrong in ({"keep": 1.0}, {"keep": 0.0}, {"noise": 0.0}):
        with pytest.raises(ConfigError, match="got"):
            Standard(**wrong)


def test_other_packings_go_on_in_affine():
    assert widths_of(layer(0.1, "mxfp4", 4, 32).linear)[:2] == [Form(4, 32, "mxfp4"), Form(5, 32)]
    assert [f and f.bits for f in widths_of(layer(0.1, "mxfp8", 8, 32).linear)] == [8, None]
    assert widths_of(nn.Linear(64, 64)) == [None]
    assert plan_layer("x", layer(0.1, "mxfp4", 4, 32), Standard()).chosen.bits == 5


def test_experts_of_a_layer_share_a_width():
    mx.random.seed(0)
    packed = SwitchLinear(64, 96, 3, bias=False).to_quantized(64, 4)
    experts = LoRASwitchLinear.from_base(packed, r=2, scale=1.0)
    experts.lora_b = 0.2 * mx.random.normal(experts.lora_b.shape)
    found = plan_layer("x", experts, Standard())
    assert found.chosen.bits in WIDTHS and found.at(8).kept == pytest.approx(1, abs=0.05)
    ((survival, parts),) = fused({"x": experts}, {"x": found.form})
    assert survival == found.chosen and parts["weight"].shape[:2] == (3, 96)


def test_a_layer_without_an_update_stays():
    still = layer(0.1)
    still.lora_b = mx.zeros_like(still.lora_b)
    found = plan_layer("x", still, Standard())
    assert found.form == Form(4, 64) and found.chosen.kept is None


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """An adapter of the embedded model that is faint in one kind of layer and loud in another."""
    loaded = models.load("demo")
    config = attach(
        loaded,
        keys=["q_proj", "k_proj", "v_proj", "o_proj"],
        init="gaussian",
        init_options={"std": 0.02},
    )
    times = {"q_proj": 1.0, "k_proj": 0.02, "v_proj": 8.0, "o_proj": 0.0}
    for name, each in lora_layers(loaded.model).items():
        each.lora_b = each.lora_b * times[name.rpartition(".")[2]]
    folder = tmp_path_factory.mktemp("uneven")
    files.save(loaded.model, config | {"base": bases.identity(loaded)}, folder)
    return folder


def test_a_mixed_model_is_written_and_mlx_lm_loads_it(uneven, tmp_path):
    from mlx_lm.utils import load

    found = fuse(uneven, tmp_path / "out", bits="plan", console=QUIET)
    assert found.written and found.report.verdict == "pass"
    by_kind = {s.module.rpartition(".")[2]: s.bits for s in found.survivals}
    assert by_kind == {"q_proj": 8, "k_proj": None, "v_proj": 4, "o_proj": 4}
    told = json.loads((tmp_path / "out" / "fuse_plan.json").read_text())
    assert emitted(told) == documented("fuse_plan.json")
    assert (tmp_path / "out" / "fuse_plan.png").read_bytes()[:4] == b"\x89PNG"
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert told["planned"]["bytes"] == sum(value.nbytes for value in weights.values())
    stock, _ = load(str(tmp_path / "out"))
    layers = dict(stock.named_modules())
    assert all(getattr(layers[s.module], "bits", None) == s.bits for s in found.survivals)
    assert layers["model.embed_tokens"].bits == 4
    base = models.base_weights(models.load("demo").model)
    moved = {s.module for s in found.survivals if s.kept is not None}
    for name, value in base.items():
        if name.rpartition(".")[0] not in moved:
            assert mx.array_equal(value, weights[name]), name
    wearing = models.load("demo")
    files.load(wearing.model, uneven)
    ids, stock_logits = mx.array(IDS), np.array(models.logits(stock, mx.array(IDS)))
    ours = np.array(models.logits(models.load(str(tmp_path / "out")).model, ids))
    assert np.allclose(stock_logits, ours, atol=1e-3), "mlx-lm computes what was checked"
    meant = np.array(models.logits(wearing.model, ids))
    plain = np.array(models.logits(models.load("demo").model, ids))
    assert np.linalg.norm(ours - meant) < 0.3 * np.linalg.norm(plain - meant)


def test_rounding_noise_above_the_update_is_a_loss_too(uneven, tmp_path):
    with pytest.raises(Refused, match="rounding noise"):
        fuse(uneven, tmp_path / "out", bits="2", console=QUIET)
    assert not list(tmp_path.iterdir())


def test_the_plan_alone_writes_no_model(uneven, tmp_path):
    done = CliRunner().invoke(
        app, ["fuse", str(uneven), "--plan", "--out", str(tmp_path / "p"), "--json"]
    )
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "p" / "fuse_plan.json").read_text())
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"fuse_plan.json", "fuse_plan.png"}
    shown = CliRunner().invoke(app, ["fuse", str(uneven), "--plan"])
    assert shown.exit_code == 0 and "0.self_attn.q_proj" in shown.stdout
    assert plan(uneven, None, strength=4.0, console=QUIET).layers[0].chosen.bits < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "--bits", "4"], "no --bits"),
        (["--bits", "many", "--out", "o"], "number or `plan`"),
        (["--bits", "4", "--dequantize", "--out", "o"], "give one"),
        (["--bits", "7", "--out", "o"], "can have 2, 3, 4, 5, 6, 8 bits"),
        ([], "name it with --out"),
        (["--plan", "--keep", "2"], "between 0 and 1"),
        (["--keep", "0.9", "--out", "o"], "of a plan"),
    ],
)
def test_what_makes_no_sense_is_said(uneven, options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["fuse", str(uneven), *options])
    assert isinstance(done.exception, ConfigError) and message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_an_adapter_with_nan_is_refused(uneven, tmp_path):
    config, tensors = files.read(uneven)
    name = next(name for name in tensors if name.endswith("lora_b"))
    tensors[name] = tensors[name] * mx.nan
    files.write(config, tensors, tmp_path / "broken")
    with pytest.raises(AdapterError, match="1 modules hold NaN"):
        plan(tmp_path / "broken", None, console=QUIET)


def test_without_bits_or_an_update_there_is_no_plan():
    loaded = tiny_loaded()
    attach(loaded, init="gaussian")
    with pytest.raises(AdapterError, match="is quantized"):
        planned(loaded, Standard(), QUIET)
    with pytest.raises(AdapterError, match="is quantized"):
        one_width(loaded, 4)
    loaded = tiny_loaded(bits=4)
    attach(loaded)
    with pytest.raises(AdapterError, match="changes nothing"):
        planned(loaded, Standard(), QUIET)


def test_in_80_columns_no_word_is_cut_and_a_long_path_stays_whole(monkeypatch):
    from rich.console import Console

    from mlx_lora.ship import show

    seen, path = io.StringIO(), "runs/" + "a" * 100
    screen = Console(file=seen, force_terminal=True, width=80, color_system=None, soft_wrap=True)
    monkeypatch.setattr(show, "out", lambda: screen)
    show.say(f"Note: it learned on quantized weights; elsewhere it meets others, see {path}")
    lines = [line.rstrip() for line in seen.getvalue().splitlines()]
    assert path in lines and max(len(line) for line in lines if line != path) <= 80
    widths = [{"bits": b, "kept": 1.0} for b in (2, 3, 4, 5, 6, 8, None)]
    layer = {"module": "model.layers.27.self_attn.v_proj", "size": 0.123, "bits": 5}
    total = {"kept": 1.0, "noise": 0.5, "bytes": 10}
    found = {"uniform": [w | total for w in widths], "planned": total, "keep": 0.95}
    found |= {"layers": [layer | {"widths": widths}], "noise_limit": 0.5, "notices": []}
    show.print_plan(found, None)
    assert all(
        len(line.rstrip()) <= 80 for line in seen.getvalue().splitlines() if path not in line
    )
