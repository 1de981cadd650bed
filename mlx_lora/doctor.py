"""Is this machine sound? Small tests that run where the user is, not where we developed."""

from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_lora import cpu, models
from mlx_lora.adapter.attach import blocks
from mlx_lora.generate import generate
from mlx_lora.runlog import environment

PROMPTS = ["What is 3 + 5 ?", "Which day comes after Monday?", "Numbers: 2 9. Target: 11."]
TOLERANCE = 1e-4


def examine() -> dict[str, Any]:
    """Versions and devices, and whether batched decoding equals decoding one row at a time."""
    loaded = models.load(models.DEMO)
    tests = [rows_agree(loaded), products_agree(loaded), softmax_sums()]
    return {
        "sound": all(t["ok"] for t in tests),
        "environment": environment(blas=cpu.mode()) | {"device": str(mx.default_device())},
        "tests": tests,
    }


def rows_agree(loaded: models.Loaded) -> dict[str, Any]:
    """A row of a batched decode against the row alone: RoPE was once wrong for all but row 0."""
    together = generate(loaded, PROMPTS, max_tokens=12, temperature=0.0)
    alone = [generate(loaded, [p], max_tokens=12, temperature=0.0)[0] for p in PROMPTS]
    same = [a[0].ids == b[0].ids for a, b in zip(together, alone, strict=True)]
    text = f"{sum(same)} of {len(same)} rows decode the same alone and in a batch"
    return {"name": "batched row equals single row", "ok": all(same), "detail": text}


def products_agree(loaded: models.Loaded) -> dict[str, Any]:
    """One layer's product against NumPy in double precision."""
    layer = blocks(loaded.model)[0].mlp.down_proj
    weight = mx.dequantize(
        layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits
    ).astype(mx.float32)
    x = mx.random.normal((16, weight.shape[1]), key=mx.random.key(0))
    exact = np.array(x, np.float64) @ np.array(weight, np.float64).T
    error = float(np.abs(np.array(layer(x).astype(mx.float32)) - exact).max() / np.abs(exact).max())
    limit = TOLERANCE if cpu.active() else 0.02
    text = f"largest relative error {error:.1e}, limit {limit:g}"
    return {"name": "quantized product", "ok": error < limit, "detail": text}


def softmax_sums() -> dict[str, Any]:
    """float32 softmax sums to one."""
    total = mx.softmax(mx.random.normal((4, 50_000), key=mx.random.key(1)), axis=-1).sum(axis=-1)
    error = cast(float, mx.abs(total - 1).max().item())
    return {"name": "softmax sums to 1", "ok": error < TOLERANCE, "detail": f"off by {error:.1e}"}
