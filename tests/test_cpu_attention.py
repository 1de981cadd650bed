"""Attention of the CPU fast path against MLX's own: values, gradients, masks, when it is used."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import cpu, cpu_attention, cpu_block, models
from mlx_lora.cpu_attention import attention, inside, numpy_attention, stock

pytestmark = pytest.mark.skipif(not cpu.active(), reason="the CPU fast path")
B, T, S, D = 2, 5, 9, 8


def arrays(heads, groups, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, heads, T, D), (B, groups, S, D), (B, groups, S, D), (B, heads, T, D)
    return [mx.array(rng.normal(size=shape).astype("f")) for shape in shapes]


def masks(heads):
    rng = np.random.default_rng(1)
    some = rng.random((B, heads, T, S)) > 0.4
    some[..., 0] = True  # every query has a key
    return {
        "none": None,
        "causal": "causal",
        "rows": mx.array(some[:, :1]),
        "plain": mx.array(some[0, 0]),
        "heads": mx.array(some),
        "added": mx.array(rng.normal(size=(B, heads, T, S)).astype("f")),
        "shared": mx.array(rng.normal(size=(T, S)).astype("f")),
    }


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("kind", masks(1))
@pytest.mark.parametrize("kept", [0, cpu_attention.KEPT])
def test_values_and_gradients_are_those_of_mlx(heads, groups, kind, kept, monkeypatch):
    monkeypatch.setattr(cpu_attention, "KEPT", kept)
    mask = masks(heads)[kind]
    *given, weight = arrays(heads, groups)

    def of(function):
        def total(q, k, v):
            y = function(q, k, v)
            return (y * weight).sum(), y

        (_, y), grads = mx.value_and_grad(total, argnums=(0, 1, 2))(*given)
        return [y, *grads]

    found = of(lambda q, k, v: numpy_attention(q, k, v, 0.3, mask))
    wanted = of(lambda q, k, v: stock(q, k, v, scale=0.3, mask=mask))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-6, rtol=1e-5)


def test_a_query_without_a_key_is_uniform_as_in_mlx():
    q, k, v, _ = arrays(4, 2)
    mask = mx.zeros((B, 1, T, S), mx.bool_)
    found, wanted = numpy_attention(q, k, v, 0.3, mask), stock(q, k, v, scale=0.3, mask=mask)
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-6)


def test_only_an_accelerated_layer_and_only_float32_goes_this_way(monkeypatch):
    taken = []
    monkeypatch.setattr(cpu_attention, "numpy_attention", lambda *a: taken.append(a[4]))
    q, k, v, _ = arrays(4, 2)
    attention(q, k, v, scale=0.3)
    token = inside.set(True)
    try:
        attention(q, k, v, scale=0.3, sinks=mx.zeros(4))
        attention(*(x.astype(mx.float16) for x in (q, k, v)), scale=0.3, mask="causal")
        attention(q, k, v, scale=0.3, mask=mx.zeros((T, S), mx.float16).astype(mx.bool_))
        assert len(taken) == 1
        attention(q, k, v, scale=0.3, mask="causal")
        assert taken[1] == "causal"
    finally:
        inside.reset(token)


@pytest.mark.skipif(cpu.mode() == "plain", reason="nothing is fast there")
def test_a_model_whose_blocks_are_unusual_uses_it(monkeypatch):
    calls = []
    real = cpu_attention.numpy_attention
    monkeypatch.setattr(cpu_attention, "numpy_attention", lambda *a: calls.append(1) or real(*a))
    monkeypatch.setattr(cpu_block, "agrees", lambda *a: False)
    loaded = models.load("demo")
    ids = mx.array([[1, 2, 3, 4]])
    found = models.logits(loaded.model, ids)
    mx.eval(found)
    assert len(calls) == len(loaded.model.layers)
    monkeypatch.setattr(cpu_attention, "inside", cpu_attention.ContextVar("x", default=False))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", stock)
    np.testing.assert_allclose(
        np.array(models.logits(loaded.model, ids)), np.array(found), atol=1e-4
    )
