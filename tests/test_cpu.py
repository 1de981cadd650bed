"""The CPU fast path computes what the plain path computes, forward and backward, and can be off."""

import json
import subprocess
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora import cpu, cpu_layers, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers, switched_off
from mlx_lora.errors import ConfigError
from tests.tiny import IDS, tiny

pytestmark = pytest.mark.skipif(not cpu.active(), reason="the fast path is for CPUs")


def loss(model):
    logits = model(mx.array(IDS)[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, mx.array(IDS)[:, 1:]).mean()


def run(monkeypatch, mode: str, bits: int | None):
    """Logits, loss and gradients of one attached model on one path."""
    monkeypatch.setattr(cpu, "_mode", mode)
    model = tiny(bits=bits)
    changed = cpu.accelerate(model)
    attach(model, init="gaussian", init_options={"std": 0.1}, rank=4)
    assert (changed > 0) == (mode != "plain"), "nothing was made fast"
    value, grads = nn.value_and_grad(model, loss)(model)
    mx.eval(value, grads)
    return np.array(model(mx.array(IDS))), value.item(), dict(tree_flatten(grads))


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("mode", ["numpy", "openblas"])
def test_fast_path_equals_plain_path(monkeypatch, mode, bits):
    logits, value, grads = run(monkeypatch, mode, bits)
    plain_logits, plain_value, plain_grads = run(monkeypatch, "plain", bits)
    assert np.abs(logits - plain_logits).max() < 1e-5
    assert abs(value - plain_value) < 1e-6
    assert grads.keys() == plain_grads.keys() and grads
    for name, grad in grads.items():
        assert mx.abs(grad - plain_grads[name]).max().item() < 1e-5, name
        assert mx.abs(grad).max().item() > 0, f"{name}: nothing flowed back"


def test_fast_layers_keep_their_parameters_and_class_hierarchy(monkeypatch):
    monkeypatch.setattr(cpu, "_mode", "numpy")
    model, plain = tiny(bits=4), tiny(bits=4)
    cpu.accelerate(model)
    model(mx.array(IDS))  # makes the dense copies
    ours, theirs = (dict(tree_flatten(m.parameters())) for m in (model, plain))
    assert ours.keys() == theirs.keys()
    assert isinstance(model.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    attach(model)
    assert all(type(m).__name__ == "NumpyLoRALinear" for m in lora_layers(model).values())


def test_functions_equal_mlx_forward_and_backward():
    x = 5 * mx.random.normal((4, 7, 33), key=mx.random.key(0))
    y = mx.random.normal((4, 7, 33), key=mx.random.key(1))
    pairs = [
        (cpu_layers.log_softmax, nn.log_softmax, (x,)),
        (cpu_layers.swiglu, lambda a, b: nn.silu(a) * b, (x, y)),
    ]
    for fast, plain, inputs in pairs:
        assert mx.allclose(fast(*inputs), plain(*inputs), atol=1e-5)
        for arg in range(len(inputs)):
            a, b = (mx.grad(lambda *z, f=f: (f(*z) * y).sum(), arg)(*inputs) for f in (fast, plain))
            assert mx.allclose(a, b, atol=1e-5)
            assert mx.abs(b).max().item() > 0.1
    ends = mx.array([[-1e4, 0.0, 1e4, -mx.inf]])
    assert np.allclose(cpu_layers.swiglu(ends[:, :3], mx.ones((1, 3))), [[0.0, 0.0, 1e4]])
    assert cpu_layers.log_softmax(ends).tolist() == [[-2e4, -1e4, 0.0, -mx.inf]]


def test_only_an_mlp_that_computes_swiglu_is_made_fast(monkeypatch):
    monkeypatch.setattr(cpu, "_mode", "openblas")
    for architecture, fast in (("llama", True), ("qwen3", True), ("gemma", False)):
        model = tiny(architecture, bits=4)
        cpu.accelerate(model)
        assert (type(model.layers[0].mlp).__name__ == "FastMLP") == fast, architecture


def test_an_mlp_that_clamps_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "_mode", "numpy")
    model = tiny("llama", bits=4)
    kind = type(model.layers[0].mlp)

    class Clamped(kind):
        def __call__(self, x):
            gate = mx.minimum(self.gate_proj(x), 10)
            return self.down_proj(nn.silu(gate) * mx.clip(self.up_proj(x), -10, 10))

    model.layers[0].mlp.__class__ = Clamped
    cpu.accelerate(model)
    assert type(model.layers[0].mlp) is Clamped
    assert type(model.layers[1].mlp).__name__ == "FastMLP"


def test_low_precision_stays_on_the_plain_path(monkeypatch):
    monkeypatch.setattr(cpu, "_mode", "numpy")
    model, plain = tiny(bits=4, dtype=mx.bfloat16), tiny(bits=4, dtype=mx.bfloat16)
    assert cpu.accelerate(model) == 0
    assert mx.array_equal(model(mx.array(IDS)), plain(mx.array(IDS)))


def test_too_large_a_model_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "_mode", "numpy")
    monkeypatch.setattr(cpu, "MEMORY_SHARE", 0.0)
    assert cpu.accelerate(tiny(bits=4)) == 0


def test_attaching_to_a_plain_base_keeps_it_plain(monkeypatch):
    """A model loaded elsewhere must not change its products by being given an adapter."""
    monkeypatch.setattr(cpu, "_mode", "numpy")
    model = tiny(bits=4)
    before = np.array(model(mx.array(IDS)))
    attach(model)
    assert np.array_equal(before, np.array(model(mx.array(IDS))))


def test_a_changed_scale_takes_effect(monkeypatch):
    monkeypatch.setattr(cpu, "_mode", "numpy")
    model = tiny(bits=4)
    cpu.accelerate(model)
    attach(model, init="gaussian", init_options={"std": 0.1}, keys=["q_proj"])
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    x = mx.ones((1, 3, 128))
    base = layer.linear(x)
    one = layer(x) - base
    layer.scale = mx.array(2 * layer.scale)
    assert mx.allclose(layer(x) - base, 2 * one, atol=1e-5)


def low_precision(folder) -> None:
    """A PEFT adapter in bfloat16, as most are, of two kinds of layers."""
    tensors = {}
    for at, (name, out) in enumerate((("self_attn.q_proj", 128), ("mlp.up_proj", 192))):
        for block in (0, 1):
            module = f"base_model.model.model.layers.{block}.{name}"
            for part, shape in (("A", (4, 128)), ("B", (out, 4))):
                key = mx.random.key(4 * at + 2 * block + (part == "B"))
                value = 0.1 * mx.random.normal(shape, key=key)
                tensors[f"{module}.lora_{part}.weight"] = value.astype(mx.bfloat16)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def test_an_adapter_in_low_precision_runs_on_a_float32_base(monkeypatch, tmp_path):
    low_precision(tmp_path)
    found = {}
    for mode in ("numpy", "plain"):
        monkeypatch.setattr(cpu, "_mode", mode)
        model = tiny(bits=4)
        cpu.accelerate(model)
        files.load(model, tmp_path)
        layers = lora_layers(model).values()
        assert {layer.lora_a.dtype for layer in layers} == {mx.bfloat16}
        assert any("Numpy" in type(layer).__name__ for layer in layers) == (mode == "numpy")
        _, grads = nn.value_and_grad(model, loss)(model)
        with cpu.decoding(model):
            inside = np.array(model(mx.array(IDS)))
        flat = {n: np.array(g.astype(mx.float32)) for n, g in tree_flatten(grads)}
        found[mode] = np.array(model(mx.array(IDS))), inside, flat
    (logits, inside, grads), (plain, plain_inside, plain_grads) = found["numpy"], found["plain"]
    np.testing.assert_allclose(logits, plain, atol=1e-5)
    np.testing.assert_allclose(inside, plain_inside, atol=1e-5)
    assert grads.keys() == plain_grads.keys() and grads
    for name, grad in plain_grads.items():
        np.testing.assert_allclose(grads[name], grad, rtol=2e-2, atol=1e-5, err_msg=name)


def test_the_switch_is_checked_and_obeyed(monkeypatch):
    monkeypatch.setenv("MLX_LORA_CPU", "opnblas")
    with pytest.raises(ConfigError) as caught:
        cpu.prepare()
    assert "openblas" in caught.value.hint
    for mode in ("plain", "numpy"):
        code = "from mlx_lora import cpu; print(cpu.mode())"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"MLX_LORA_CPU": mode, "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == mode, done.stderr


def adapted(**lora):
    loaded = models.load("demo")
    attach(loaded, init="gaussian", init_options={"std": 0.05}, rank=4, **lora)
    return loaded


@pytest.mark.skipif(cpu.mode() not in ("openblas", "numpy"), reason="nothing is merged there")
class TestMerged:
    def test_a_merged_adapter_computes_the_same_and_is_gone_afterwards(self):
        loaded, ids = adapted(), mx.array([[1, 2, 3, 4]])
        before = models.logits(loaded.model, ids)
        with cpu.decoding(loaded.model):
            held = [m for _, m in loaded.model.named_modules() if "_merged" in m.__dict__]
            inside = models.logits(loaded.model, ids)
            mx.eval(inside)
        assert len(held) == len(lora_layers(loaded.model))
        np.testing.assert_allclose(np.array(inside), np.array(before), atol=2e-4)
        assert not any("_merged" in m.__dict__ for _, m in loaded.model.named_modules())
        assert mx.array_equal(models.logits(loaded.model, ids), before)

    def test_a_zero_adapter_stays_bitwise_the_base(self):
        base, loaded = models.load("demo"), models.load("demo")
        attach(loaded)
        ids = mx.array([[1, 2, 3, 4]])
        found = []
        for model in (loaded.model, base.model):
            with cpu.decoding(model):
                found.append(models.logits(model, ids))
                mx.eval(found)
        assert mx.array_equal(*found)

    def test_weights_laid_out_for_few_rows_give_the_same_and_are_gone_afterwards(self):
        loaded, ids = adapted(), mx.array([[1, 2, 3, 4]])
        head: Any = loaded.model.model.embed_tokens
        before = models.logits(loaded.model, ids)
        with cpu.decoding(loaded.model):
            mx.eval(models.logits(loaded.model, ids))
            laid = head.__dict__["_across"]
        assert laid.T.flags.c_contiguous and np.array_equal(laid, np.array(cpu_layers.dense(head)))
        assert not any("_across" in m.__dict__ for m in loaded.model.modules())
        assert mx.array_equal(models.logits(loaded.model, ids), before)

    def test_a_packed_embedding_reads_its_unpacked_copy(self):
        loaded, ids = models.load("demo"), mx.array([[1, 5], [1023, 0]])
        table: Any = loaded.model.model.embed_tokens
        packed = table(ids)
        cpu_layers.dense(table)
        assert "_dense" in table.__dict__ and mx.array_equal(table(ids), packed)

    def test_what_is_too_large_or_drops_or_is_off_is_not_merged(self, monkeypatch):
        def merged(loaded):
            with cpu.decoding(loaded.model):
                return sum("_merged" in m.__dict__ for _, m in loaded.model.named_modules())

        dropping = adapted(dropout=0.5)
        dropping.model.train()
        assert merged(dropping) == 0
        loaded = adapted()
        with switched_off(loaded.model):
            assert merged(loaded) == 0
        monkeypatch.setattr("mlx_lora.cpu_layers.MERGED_BYTES", 1)
        assert merged(loaded) == 0
