"""An adapter to start from, under the settings of the YAML, as in mlx-lm; misfits are said."""

import io
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from rich.console import Console
from tiny import IDS, tiny, tiny_loaded

from mlx_lora import config, prepare
from mlx_lora.adapter import attach as attaching
from mlx_lora.adapter import files, warm
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.adapter.spline_math import Curve
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.rl.learner import Rule, apply, gradients
from mlx_lora.rl.logprobs import pack
from mlx_lora.rl.losses import losses
from mlx_lora.types import Rollout


def saved(folder: Path, **options) -> Path:
    """An adapter that moves the tiny model: q_proj and v_proj of the last layer unless told."""
    model = tiny()
    shape = {"rank": 4, "scale": 20.0, "num_layers": 1, "keys": ["q_proj", "v_proj"]}
    about = attaching.attach(model, **shape | options)
    for number, layer in enumerate(lora_layers(model).values()):
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    files.save(model, about, folder)
    return folder


def started(folder: Path, text: str):
    """The model and the config of its adapter as a run would begin with them; what was said."""
    said = io.StringIO()
    console = Console(file=said, width=500)
    e = config.from_text(f"model: demo\nresume_adapter_file: {folder}\n{text}")
    e = warm.adopted(e, console)
    loaded = tiny_loaded()
    about, expect, _ = prepare.attach(loaded, e, console)
    assert expect == "healthy"
    return loaded.model, about, e, said.getvalue()


@pytest.mark.parametrize("named", ["", "/adapters.safetensors"])
def test_the_settings_of_the_yaml_are_in_force_as_in_mlx_lm(named, tmp_path):
    folder = saved(tmp_path / "adapter")
    keys = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]
    parameters = {"rank": 4, "scale": 7.0, "dropout": 0.3, "keys": keys}
    text = yaml.safe_dump({"num_layers": 2, "lora_parameters": parameters})
    model, about, _, said = started(Path(f"{folder}{named}"), text)
    theirs = tiny()
    linear_to_lora_layers(theirs, 2, parameters)
    theirs.load_weights(str(folder / files.WEIGHTS), strict=False)
    theirs.eval()
    layers, expected = lora_layers(model), lora_layers(theirs)
    assert layers.keys() == expected.keys() and len(layers) == 6
    in_file = {name.rpartition(".")[0] for name in files.read(folder)[1]}
    for name, layer in layers.items():
        assert layer.scale == expected[name].scale == 7.0
        assert layer.dropout._p_1 == expected[name].dropout._p_1 == 0.7
        assert mx.array_equal(layer.lora_b, expected[name].lora_b)
        assert (name in in_file) == bool(mx.any(layer.lora_b).item())
    assert mx.array_equal(model(mx.array(IDS)), theirs(mx.array(IDS)))
    assert "4 of 6 layers are not in the adapter" in said and "0.35 times as strong" in said
    assert about["num_layers"] == 2 and about["lora_parameters"]["dropout"] == 0.3
    files.save(model, about, tmp_path / "again")  # what is saved is what trained
    again = tiny()
    files.load(again, tmp_path / "again")
    assert mx.array_equal(model(mx.array(IDS)), again(mx.array(IDS)))


def test_layers_that_the_adapter_lacks_start_alike_in_every_run(tmp_path):
    folder = saved(tmp_path / "adapter")
    text = "num_layers: 2\nlora_parameters: {rank: 4, scale: 20}\n"
    one, two = (lora_layers(started(folder, text)[0]) for _ in range(2))
    assert len(one) > 4 and all(mx.array_equal(one[n].lora_a, two[n].lora_a) for n in one)


KINDS = {
    "lora": {},
    "ranks": {"rank_pattern": {"v_proj": 2}},
    "dora": {"dora": True},
    "spline": {"curve": Curve(num_knots=7, k_max=2.0)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_yaml_leaves_out_is_the_adapters(kind, tmp_path):
    folder = saved(tmp_path / "adapter", scale=3.0, **KINDS[kind])
    plain = tiny()
    files.load(plain, folder)
    model, about, e, said = started(folder, "lora_parameters: {lora_plus_ratio: 2.0}\n")
    assert mx.array_equal(model(mx.array(IDS)), plain(mx.array(IDS)))
    recorded = files.read(folder)[0]
    assert about["lora_parameters"] == recorded["lora_parameters"]
    assert about["fine_tune_type"] == recorded["fine_tune_type"]
    assert "does not say" in said and "scale 3.0" in said and "are not in the adapter" not in said
    e = config.from_text(yaml.safe_dump(config.resolved(e)))  # what the run folder keeps
    assert config.resolved(warm.adopted(e, Console(quiet=True))) == config.resolved(e)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_factors_stored_in_half_precision_learn_in_float32(dtype, tmp_path):
    folder = saved(tmp_path / "adapter")
    about, tensors = files.read(folder)
    files.write(about, {name: value.astype(dtype) for name, value in tensors.items()}, folder)
    model = started(folder, "")[0]
    parts = dict(tree_flatten(model.trainable_parameters()))
    stored = files.read(folder)[1]
    assert all(mx.array_equal(value, stored[name]) for name, value in parts.items())
    optimizer = optim.Adam(learning_rate=1e-5)
    rows = [Rollout((1, 2), (5, 6), (-4.0, -4.0), "", True)]
    found = gradients(model, pack(rows, np.array([1e-3])), Rule(losses.bind("dapo", {})))
    assert apply(model, optimizer, *found, 1.0)[1]
    for name, value in tree_flatten(model.trainable_parameters()):
        moved = mx.abs(value - parts[name]) / 1e-5  # Adam's first step is 3.16 rates
        assert value.dtype == mx.float32 and mx.all(moved < 3.2).item(), name
        assert mx.mean(moved > 2).item() > 0.9, name


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    folder = saved(tmp_path / "adapter")
    text = "lora_parameters: {rank: 16, type: spline, scale: 7}\ninit: pissa\n"
    with pytest.raises(ConfigError) as caught:
        started(folder, text)
    lines = str(caught.value).split("\n")
    said = ("rank: 16 does not fit", "type: spline does not fit", "init: pissa does not go")
    assert len(lines) == 3 and all(any(s in line for line in lines) for s in said)
    assert all(line.startswith("config:") for line in lines)
    with pytest.raises(ConfigError, match=r"rank_pattern: rank 2 does not fit the adapter's 4"):
        started(folder, "lora_parameters: {rank_pattern: {q_proj: 2}}\n")
    with pytest.raises(ConfigError, match="fine_tune_type: dora"):
        started(folder, "fine_tune_type: dora\n")
    folder = saved(tmp_path / "bent", curve=Curve(num_knots=7))
    with pytest.raises(ConfigError, match="num_knots: 5 does not fit"):
        started(folder, "lora_parameters: {type: spline, num_knots: 5}\n")


def test_layers_that_the_yaml_leaves_out_are_listed(tmp_path):
    folder = saved(tmp_path / "adapter", num_layers=2)
    with pytest.raises(AdapterError) as caught:
        started(folder, "num_layers: 1\nlora_parameters: {rank: 4, scale: 20, keys: [q_proj]}\n")
    missing = [f"model.layers.{n}" for n in ("0.self_attn.q_proj", "0.self_attn.v_proj")]
    missing.append("model.layers.1.self_attn.v_proj")
    assert all(f"no layer    {name}\n" in f"{caught.value}\n" for name in missing)
    assert "1.self_attn.q_proj" not in str(caught.value)
