"""DoRA without unpacking: bitwise harmless, and equal to mlx-lm's own where that works."""

import copy
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.tuner.utils import load_adapters

from mlx_lora import cpu
from mlx_lora.adapter import dora
from mlx_lora.adapter.attach import attach
from mlx_lora.adapter.dora import DORA, frozen_norms, row_norms, to_dora
from mlx_lora.errors import AdapterError
from tests.tiny import IDS, tiny

INPUTS, OUTPUTS, RANK, SCALE = 192, 64, 6, 2.5
AFFINE = [None, 2, 3, 4, 5, 6, 8]
FP = [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
X = mx.random.normal((2, 9, INPUTS), key=mx.random.key(7))


def frozen(bits=4, *, bias=False, dtype=mx.float32, mode="affine", group_size=64):
    """A linear layer, packed unless bits is None."""
    mx.random.seed(3)
    layer = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    if bias:
        layer.bias = 10 * mx.random.normal((OUTPUTS,))
    layer.set_dtype(dtype)
    if bits:
        layer = nn.QuantizedLinear.from_linear(layer, group_size, bits, mode)
    layer.freeze()
    return layer


def dense(layer) -> mx.array:
    """The whole weight [O, I] in float32."""
    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    form = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **form).astype(mx.float32)


def unpacked(layer) -> nn.Linear:
    """The same layer with its weight dense: what mlx-lm's DoRA takes at any packing."""
    twin = nn.Linear(INPUTS, OUTPUTS, bias="bias" in layer)
    twin.weight = dense(layer)
    if "bias" in layer:
        twin.bias = layer.bias
    twin.freeze()
    return twin


def move(layer, seed=0, size=0.03):
    """Random factors and magnitudes, the same for every layer of this shape."""
    keys = mx.random.split(mx.random.key(seed), 3)
    layer.lora_a = mx.random.normal(layer.lora_a.shape, key=keys[0]) / INPUTS**0.5
    layer.lora_b = size * mx.random.normal(layer.lora_b.shape, key=keys[1])
    layer.m = layer.m * (1 + 0.2 * mx.random.normal(layer.m.shape, key=keys[2]))
    return layer


def stock_over(linear):
    return DoRALinear.from_base(unpacked(linear), RANK, scale=SCALE)


def apart(ours, theirs) -> float:
    """The largest difference, relative to the largest value."""
    return (mx.abs(ours - theirs).max() / mx.abs(theirs).max()).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", AFFINE)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_fresh_layer_is_bitwise_its_base(bits, dtype, bias):
    linear = frozen(bits, bias=bias, dtype=dtype)
    layer, x = DORA.from_base(linear, RANK, 0.0, SCALE), X.astype(dtype)
    assert isinstance(layer, DoRALinear)
    assert layer(x).dtype == linear(x).dtype == dtype
    assert mx.array_equal(layer(x), linear(x))
    assert mx.abs(layer.lora_a).max().item() > 0, "zero factors both: the test would prove nothing"
    layer.m = layer.m * 1.05
    assert not mx.array_equal(layer(x), linear(x)), "the test can fail"


def test_harmlessness_does_not_rest_on_the_devices_square_root(monkeypatch):
    monkeypatch.setattr(mx, "sqrt", lambda x, sqrt=mx.sqrt: sqrt(x) * (1 + 1e-6))
    layer = DORA.from_base(frozen(), RANK, 0.0, SCALE)
    assert mx.array_equal(layer(X), layer.linear(X))


def test_dropout_drops_from_the_branch_alone():
    layer = DORA.from_base(frozen(), RANK, 0.5, SCALE)
    assert mx.array_equal(layer(X), layer.linear(X)), "not from the base"
    move(layer)
    mx.random.seed(0)
    first = layer(X)
    assert not mx.array_equal(layer(X), first)
    layer.eval()
    assert apart(layer(X), move(stock_over(layer.linear))(X)) < 1e-5


@pytest.mark.parametrize("mode,bits,group_size", FP)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_floating_point_packings_are_harmless_too(mode, bits, group_size, dtype):
    linear = frozen(bits, dtype=dtype, mode=mode, group_size=group_size)
    layer, x = DORA.from_base(linear, RANK, 0.0, SCALE), X.astype(dtype)
    assert mx.array_equal(layer(x), linear(x))
    assert apart(move(layer)(X), move(stock_over(linear))(X)) < 1e-5


@pytest.mark.parametrize("bits", AFFINE)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_whole_model_stays_bitwise_equal(bits, dtype):
    model = tiny("qwen2", bits=bits, dtype=dtype)
    before = model(mx.array(IDS))
    attach(model, rank=4, scale=10.0)
    to_dora(model)
    assert sum(isinstance(m, DORA) for _, m in model.named_modules()) == 14
    assert mx.array_equal(before, model(mx.array(IDS)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_equals_mlx_lms_layer_where_that_works(bits, bias):
    linear = frozen(bits, bias=bias)
    mx.random.seed(1)
    ours = DORA.from_base(linear, RANK, 0.0, SCALE)
    stock = DoRALinear.from_base(linear, RANK, 0.0, SCALE)
    assert mx.array_equal(ours.m, stock.m)
    assert mx.abs(ours.lora_a).max().item() <= INPUTS**-0.5
    assert apart(move(ours)(X), move(stock)(X)) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", AFFINE)
def test_output_and_gradients_equal_the_unpacked_reference(bits, bias):
    linear = frozen(bits, bias=bias)
    layers = [move(DORA.from_base(linear, RANK, 0.0, SCALE)), move(stock_over(linear))]
    target = mx.random.normal((2, 9, OUTPUTS), key=mx.random.key(9))

    def loss(layer):
        return ((layer(X) - target) ** 2).sum()

    ours, theirs = (nn.value_and_grad(layer, loss)(layer) for layer in layers)
    assert apart(ours[0], theirs[0]) < 1e-5
    assert set(ours[1]) >= {"lora_a", "lora_b", "m"}
    for name in ("lora_a", "lora_b", "m"):
        assert apart(ours[1][name], theirs[1][name]) < 1e-4, name
    ours, theirs = (mx.grad(lambda x, f=layer: (f(x) * target).sum())(X) for layer in layers)
    assert apart(ours, theirs) < 1e-4, "through the layer to its input"


@pytest.mark.parametrize("bits", AFFINE)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 0.03, 1.0])
def test_norms_are_exact(bits, dtype, size):
    """Against float64, with a large bias, which must not enter. bf16 packs round when unpacked."""
    linear = frozen(bits, bias=True, dtype=dtype)
    layer = move(DORA.from_base(linear, RANK, 0.0, SCALE), size=size)
    update = np.array(layer.lora_a, np.float64) @ np.array(layer.lora_b, np.float64)
    exact = np.linalg.norm(np.array(dense(linear), np.float64) + SCALE * update.T, axis=1)
    error = np.abs(np.array(layer.norm_O()) - exact) / exact
    assert error.max() < (1e-5 if dtype == mx.float32 or not bits else 1e-3)


def test_norms_are_those_of_the_block_whatever_its_size(monkeypatch):
    linear = frozen(3)
    whole = row_norms(linear)
    monkeypatch.setattr(dora, "BLOCK", 5 * INPUTS)
    assert mx.array_equal(row_norms(linear), whole)
    assert apart(whole, mx.linalg.norm(dense(linear), axis=1)) < 1e-6


@pytest.mark.parametrize("off", [0, 0.0, mx.array(0.0)], ids=repr)
@pytest.mark.parametrize("bias", [False, True])
def test_scale_zero_is_the_base_even_with_trained_magnitudes(off, bias):
    linear = frozen(3, bias=bias, dtype=mx.bfloat16)
    layer = move(DORA.from_base(linear, RANK, 0.0, SCALE))
    x = X.astype(mx.bfloat16)
    assert not mx.array_equal(layer(x), linear(x))
    layer.scale = off
    assert mx.array_equal(layer(x), linear(x))
    if not isinstance(off, mx.array):
        layer.lora_b = layer.lora_b * mx.inf
        assert mx.array_equal(layer(x), linear(x)), "a number switches off without any arithmetic"


def test_a_scale_may_be_an_array():
    layer = move(DORA.from_base(frozen(), RANK, 0.0, SCALE))
    expected = layer(X)
    layer.scale = mx.array(SCALE)
    assert mx.array_equal(layer(X), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_row_of_zeros_is_left_alone_until_it_moves(bias):
    linear = frozen(None, bias=bias)
    linear.weight = linear.weight * (mx.arange(OUTPUTS) != 5)[:, None]
    layer = DORA.from_base(linear, RANK, 0.0, SCALE)
    assert mx.array_equal(layer(X), linear(X))
    layer.m = layer.m + 0.5
    grads = nn.value_and_grad(layer, lambda f: (f(X) ** 2).sum())(layer)[1]
    assert all(mx.isfinite(g).all().item() for _, g in tree_flatten(grads))
    assert mx.array_equal(layer(X)[..., 5], linear(X)[..., 5])
    stock = move(stock_over(linear))
    assert apart(move(DORA.from_base(linear, RANK, 0.0, SCALE))(X), stock(X)) < 1e-5


def test_a_row_that_the_update_cancels_stays_finite():
    linear = frozen(None)
    layer = DORA.from_base(linear, 1, 0.0, 1.0)
    layer.lora_a = linear.weight[3][:, None]
    layer.lora_b = -1.0 * (mx.arange(OUTPUTS) == 3)[None]
    assert mx.isfinite(layer(X)).all().item()
    assert layer.norm_O()[3].item() == pytest.approx(dora.FLOOR * layer.m[3].item())


def test_only_what_mlx_lm_trains_is_a_parameter():
    layer = DORA.from_base(frozen(bias=True), RANK, 0.0, SCALE)
    stock = DoRALinear.from_base(frozen(bias=True), RANK, 0.0, SCALE)
    names, theirs = (
        {n: (v.shape, v.dtype) for n, v in tree_flatten(f.parameters())} for f in (layer, stock)
    )
    assert names == theirs
    assert set(layer.trainable_parameters()) >= {"lora_a", "lora_b", "m"}
    assert not tree_flatten(layer.linear.trainable_parameters())
    layer.m[0] = 7.0
    assert layer.norm_O()[0].item() != 7.0, "the norms at the start are another array than m"


def dora_model(bits, seed):
    model = tiny("qwen2", bits=bits)
    config = attach(model, rank=4, scale=SCALE, keys=["q_proj", "down_proj"])
    to_dora(model)
    layers = [m for _, m in model.named_modules() if isinstance(m, DORA)]
    for n, layer in enumerate(layers):
        move(layer, 10 * seed + n)
    return model, {**config, "fine_tune_type": "dora"}


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_saved_adapter_runs_in_stock_mlx_lm_and_comes_back(bits, tmp_path):
    model, config = dora_model(bits, seed=1)
    tensors = dict(tree_flatten(model.trainable_parameters()))
    assert {n.rsplit(".", 1)[1] for n in tensors} == {"lora_a", "lora_b", "m"}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    logits = model(mx.array(IDS))
    stock = load_adapters(tiny("qwen2", bits=bits), str(tmp_path))
    assert mx.allclose(stock(mx.array(IDS)), logits, atol=1e-5)
    again, _ = dora_model(bits, seed=2)
    assert not mx.allclose(again(mx.array(IDS)), logits, atol=1e-2)
    again.load_weights(str(tmp_path / "adapters.safetensors"), strict=False)
    assert mx.array_equal(again(mx.array(IDS)), logits)


def test_factors_survive_the_change_from_lora():
    model = tiny(bits=3)
    attach(model, init="gaussian", rank=4, scale=1.5, dropout=0.25)
    was = dict(tree_flatten(model.trainable_parameters()))
    to_dora(model)
    now = dict(tree_flatten(model.trainable_parameters()))
    assert now.keys() - was.keys() == {n.replace("lora_a", "m") for n in was if "lora_a" in n}
    assert all(mx.array_equal(now[name], value) for name, value in was.items())
    layer = model.layers[0].self_attn.q_proj
    assert (layer.scale, layer.dropout._p_1) == (1.5, 0.75)


def test_layers_of_another_kind_are_named():
    model = tiny()
    attach(model, keys=["q_proj", "embed_tokens"])
    model.layers[0].mlp.up_proj = LoRASwitchLinear(8, 8, 2)
    with pytest.raises(AdapterError) as caught:
        to_dora(model)
    message = str(caught.value)
    assert "model.embed_tokens (LoRAEmbedding)" in message
    assert "model.layers.0.mlp.up_proj (LoRASwitchLinear)" in message
    assert "q_proj" not in message


def test_frozen_norms_are_computed_once_and_never_stale(monkeypatch):
    model, _ = dora_model(4, seed=1)
    layer = model.layers[0].self_attn.q_proj
    made = []
    monkeypatch.setattr(
        dora, "adapted_norms", lambda *a, f=dora.adapted_norms: made.append(1) or f(*a)
    )
    plain = model(mx.array(IDS))
    assert len(made) == 4
    with frozen_norms(model):
        made.clear()
        assert mx.array_equal(model(mx.array(IDS)), plain)
        assert not made
        layer.lora_b = 2 * layer.lora_b
        moved = model(mx.array(IDS))
        layer.scale = 2 * SCALE
        rescaled = model(mx.array(IDS))
        assert len(made) == 2, "the changed layer, and no other"
        other = model.layers[1].self_attn.q_proj
        other.linear = copy.copy(other.linear)
        model(mx.array(IDS))
        assert len(made) == 4, "the layer over another base too"
    layer.scale = SCALE
    assert mx.array_equal(model(mx.array(IDS)), moved)
    layer.scale = 2 * SCALE
    assert mx.array_equal(model(mx.array(IDS)), rescaled)
    assert "_kept" not in layer.__dict__


@pytest.mark.skipif(not cpu.active(), reason="the fast path is for CPUs")
@pytest.mark.parametrize("mode", ["numpy", "openblas"])
@pytest.mark.parametrize("bits", [None, 3])
def test_the_cpu_fast_path_carries_it(monkeypatch, mode, bits):
    plain, _ = dora_model(bits, seed=1)
    monkeypatch.setattr(cpu, "_mode", mode)
    model = tiny("qwen2", bits=bits)
    assert cpu.accelerate(model) > 0
    before = model(mx.array(IDS))
    attach(model, rank=4, scale=SCALE, keys=["q_proj", "down_proj"])
    to_dora(model)
    assert mx.array_equal(model(mx.array(IDS)), before)
    model.update(plain.trainable_parameters())

    def loss(model):
        return (model(mx.array(IDS)) ** 2).mean()

    ours, theirs = (nn.value_and_grad(m, loss)(m) for m in (model, plain))
    assert apart(ours[0], theirs[0]) < 1e-5
    grads = dict(tree_flatten(theirs[1]))
    for name, grad in tree_flatten(ours[1]):
        assert apart(grad, grads[name]) < 1e-4, name


def test_a_compiled_step_takes_the_kept_norms():
    layer = DORA.from_base(frozen(), RANK, 0.0, SCALE)
    norm_O = layer.first_norm_O()
    step = mx.compile(lambda: layer.m @ layer.first_norm_O(), inputs=layer.state)
    assert step().item() == pytest.approx((norm_O @ norm_O).item())


def test_another_frozen_layer_brings_its_own_norms():
    layer, stock = (
        move(f) for f in (DORA.from_base(frozen(), RANK, 0.0, SCALE), stock_over(frozen()))
    )
    layer(X)
    layer.linear, stock.linear = frozen(3, bias=True), unpacked(frozen(3, bias=True))
    assert apart(layer(X), stock(X)) < 1e-5
