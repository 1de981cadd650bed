"""Is this machine sound? Small tests that run where the user is, not where we developed."""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_lora import cpu, models
from mlx_lora.adapter.attach import attach, blocks
from mlx_lora.caches import prefill
from mlx_lora.check.machine import machine
from mlx_lora.generate import generate
from mlx_lora.models import logits
from mlx_lora.registry import Table, first_line

PROMPTS = ["What is 3 + 5 ?", "Which day comes after Monday?", "Numbers: 2 9. Target: 11."]
TOLERANCE = 1e-4
UPDATE = "Update MLX (pip install -U mlx mlx-lm); if it stays, report it with this output."
Found = tuple[bool, str]  # sound, and a detail with the numbers

examinations: Table[Callable[[models.Loaded], Found]] = Table("examination")


def examine() -> dict[str, Any]:
    """Versions, devices and memory, and what every examination found, with what to do."""
    tests = []
    for name in examinations:
        loaded = models.load(models.DEMO)  # fresh: some attach an adapter
        sound, detail = examinations[name](loaded)
        tests.append(
            {
                "name": name.replace("_", " "),
                "ok": sound,
                "detail": detail,
                "action": "" if sound else UPDATE,
                "about": first_line(examinations[name]),
            }
        )
    return {
        "sound": all(t["ok"] for t in tests),
        "environment": machine() | {"memory_gb": memory_gb()},
        "advice": advice(),
        "tests": tests,
    }


def memory_gb() -> float | None:
    """What MLX may use: the GPU's working set, or the machine's memory."""
    if cpu.active():
        return round(cpu.memory_bytes() / 1e9, 1)
    size: Any = mx.device_info().get("max_recommended_working_set_size")
    return round(size / 1e9, 1) if size else None


def advice() -> list[str]:
    """What would make this machine better, though nothing is wrong."""
    found = {
        "numpy": "Install OpenBLAS (Debian: libopenblas0-pthread): unusual models are quicker.",
        "plain": "MLX_LORA_CPU=plain is set: unset it, this is the slow path.",
    }
    return [found[cpu.mode()]] if cpu.mode() in found else []


@examinations.add
def harmless_start(loaded: models.Loaded) -> Found:
    """Logits with a fresh zero-B adapter are the base's to the bit."""
    ids = mx.array([models.encode_prompt(loaded.tokenizer, PROMPTS[0])])
    before = np.array(logits(loaded.model, ids))
    attach(loaded)
    same = np.array_equal(before, np.array(logits(loaded.model, ids)))
    return same, "logits are equal to the bit" if same else "attaching moved the logits"


@examinations.add
def batched_row_equals_single_row(loaded: models.Loaded) -> Found:
    """A row of a batched decode is the row alone: RoPE was once wrong for all but row 0."""
    options: dict[str, Any] = {"purpose": "doctor", "max_tokens": 12, "temperature": 0.0}
    together = generate(loaded, PROMPTS, **options)
    alone = [generate(loaded, [p], **options)[0] for p in PROMPTS]
    same = [a[0].ids == b[0].ids for a, b in zip(together, alone, strict=True)]
    return all(same), f"{sum(same)} of {len(same)} rows decode the same alone and in a batch"


@examinations.add
def forked_cache_equals_full_prefill(loaded: models.Loaded) -> Found:
    """Rows forked from one prefilled prompt go on as if each had been computed in full."""
    ids = list(models.encode_prompt(loaded.tokenizer, PROMPTS[2]))
    more = [[5], [7]]
    split = models.split_head(loaded.model)
    _, cache = prefill(loaded.model, [ids], [0, 0])
    forked = split.head(split.body(mx.array(more), cache=cache))[:, -1]
    full = logits(loaded.model, mx.array([[*ids, *m] for m in more]))[:, -1]
    error = cast(float, mx.abs(forked - full).max().item())
    limit = TOLERANCE if cpu.active() else 0.05
    return error < limit, f"largest difference of a logit {error:.1e}, limit {limit:g}"


@examinations.add
def compiled_equals_plain(loaded: models.Loaded) -> Found:
    """A compiled function computes what the plain one does."""
    if cpu.active():
        return True, "not in use: on a CPU compiling calls a C++ compiler for every kernel"
    layer = blocks(loaded.model)[0].mlp
    x = mx.random.normal((4, loaded.config["hidden_size"]), key=mx.random.key(0))
    error = cast(float, mx.abs(mx.compile(layer)(x) - layer(x)).max().item())
    return error < 0.01, f"largest difference {error:.1e}"


@examinations.add
def quantized_product(loaded: models.Loaded) -> Found:
    """One layer's product against NumPy in double precision."""
    layer = blocks(loaded.model)[0].mlp.down_proj
    weight = np.array(models.dense_weight(layer), np.float64)
    x = mx.random.normal((16, weight.shape[1]), key=mx.random.key(0))
    exact = np.array(x, np.float64) @ weight.T
    error = float(np.abs(np.array(layer(x).astype(mx.float32)) - exact).max() / np.abs(exact).max())
    limit = TOLERANCE if cpu.active() else 0.02
    return error < limit, f"largest relative error {error:.1e}, limit {limit:g}"


@examinations.add
def softmax_sums_to_1(loaded: models.Loaded) -> Found:
    """float32 softmax sums to one."""
    total = mx.softmax(mx.random.normal((4, 50_000), key=mx.random.key(1)), axis=-1).sum(axis=-1)
    error = cast(float, mx.abs(total - 1).max().item())
    return error < TOLERANCE, f"off by {error:.1e}"
