"""What is asked of every architecture; tests/test_zoo.py asserts it, scripts/reach.py tells it."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.tuner.utils import load_adapters

from mlx_lora import cpu
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, blocks, lora_layers, switched_off
from mlx_lora.caches import prefill
from mlx_lora.models import split_head
from tests.tiny import IDS
from tests.zoo import KEYS, VOCABULARY, build

X = mx.array(IDS)
ONE_LENGTH, TWO_LENGTHS = [[5, 17, 3], [8, 1, 90]], [[5, 17, 3], [8, 1, 90, 12, 77]]
CONTINUED = [[44, 44, 60], [12, 9, 77], [2, 5, 31]]  # a row a step, beyond the zoo's windows
NARROW = ("shared_expert_gate", "coefficient", "coefs", "modality_router")  # below rank 4
CLOSE = 1e-3  # of a standard deviation of the logits


def logits(model: nn.Module, ids_BT: mx.array = X) -> np.ndarray:
    """Logits [B, T, V] in float32."""
    return np.array(model(ids_BT)[..., :VOCABULARY].astype(mx.float32))


def start(model: nn.Module, name: str) -> dict[str, Any]:
    """The adapter that every check has in mind."""
    return attach(model, rank=4, scale=2.0, keys=KEYS.get(name), init="zero")


def changed(found: np.ndarray, wanted: np.ndarray) -> str:
    """What is wrong with logits that should be the same to the bit; nothing if they are."""
    return "" if np.array_equal(found, wanted) else f"differs by {distance(found, wanted):.2g} sd"


def far(error: float) -> str:
    """What is wrong with logits that should be close."""
    return "" if error < CLOSE else f"differs by {error:.2g} sd"


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference of logits, in standard deviations of the wanted ones."""
    return float(np.abs(found - wanted).max() / wanted.std())


def shake(model: nn.Module) -> None:
    """Noise into all that trains and is called lora_b, a fifth of the weights in size."""
    found = [(n, v) for n, v in tree_flatten(model.trainable_parameters()) if ".lora_b" in n]
    keys = mx.random.split(mx.random.key(7), len(found))
    noise = [
        (n, 0.05 * mx.random.normal(v.shape, key=k)) for (n, v), k in zip(found, keys, strict=True)
    ]
    model.update(tree_unflatten(noise))


def off(model: nn.Module) -> np.ndarray:
    """Logits with the adapter switched off."""
    with switched_off(model):
        return logits(model)


def deaf(model: nn.Module) -> list[str]:
    """Every lora_b that the gradient of a next-token loss does not reach."""

    def loss(model: nn.Module) -> mx.array:
        out_BTV = model(X[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(out_BTV, X[:, 1:], reduction="mean")

    value, gradients = nn.value_and_grad(model, loss)(model)
    assert np.isfinite(value.item())
    found = {n: g for n, g in dict(tree_flatten(gradients)).items() if ".lora_b" in n}
    assert found, "nothing trains"
    return [n for n, g in found.items() if not mx.any(g).item()]


def unheard(model: nn.Module) -> str:
    """What is wrong with the gradients."""
    names = deaf(model)
    total = len(lora_layers(model))
    return f"none in {len(names)} of {total} layers: {', '.join(names[:3])}" if names else ""


def saved_and_loaded(model: nn.Module, config: dict[str, Any], fresh: nn.Module, at: Path) -> float:
    """Distance of the logits after a round through files and stock mlx-lm."""
    files.save(model, config, at)
    return distance(logits(load_adapters(fresh, str(at))), logits(model))


def decoded(model: nn.Module, prompts: Sequence[Sequence[int]]) -> float:
    """Largest distance of prefill and three decode steps from full forward passes."""
    split = split_head(model)
    rows = [list(prompts[p]) for p in (0, 0, 1)]
    hidden_BD, cache = prefill(model, prompts, [0, 0, 1])
    errors = []
    for ids_B in [*CONTINUED, None]:
        full_BV = np.stack([logits(model, mx.array([row]))[0, -1] for row in rows])
        got_BV = np.array(split.head(hidden_BD)[:, :VOCABULARY].astype(mx.float32))
        errors.append(distance(got_BV, full_BV))
        if ids_B:
            rows = [[*row, i] for row, i in zip(rows, ids_B, strict=True)]
            hidden_BD = split.body(mx.array(ids_B)[:, None], cache=cache)[:, -1, :]
    return max(errors)


def hastened(name: str, bits: int | None) -> str:
    """What is wrong on the CPU's fast path, as models.load() makes a model there."""
    plain, model = build(name, bits), build(name, bits)
    cpu.accelerate(model)
    before = logits(model)
    start(model, name)
    return far(distance(before, logits(plain))) or changed(logits(model), before)


def packing(name: str, bits: int | None, mode: str, dtype: Any) -> str:
    """What is wrong with the start and the switching off of one kind of packed weights."""
    model = build(name, bits, dtype, mode=mode)
    try:
        before = logits(model)
    except RuntimeError as error:
        return f"the base itself does not run: {error}"
    start(model, name)
    attached = logits(model)
    shake(model)
    return changed(attached, before) or changed(off(model), before)


def shortened(name: str, bits: int | None, attached: set[str]) -> str:
    """What is wrong when layers are asked for by the last part of their names."""
    model = build(name, bits)
    short = {n.rpartition(".")[2] for n in attached if not n.endswith(NARROW)}
    attach(model, rank=4, keys=sorted(short))
    missed = {n for n in attached if n.rpartition(".")[2] in short} ^ set(lora_layers(model))
    return f"{len(missed)} layers too many or too few" if missed else ""


def left_out(model: nn.Module) -> list[str]:
    """Classes of modules with a weight matrix, inside the blocks, that carry no adapter."""
    found = {
        type(m).__name__
        for block in blocks(model)
        for n, m in block.named_modules()
        if "weight" in m and m.weight.ndim > 1 and not n.endswith(".linear")
    }
    return sorted(c for c in found if "Norm" not in c)


def told(check: Callable[[], str]) -> str:
    """What a check says is wrong, or the exception it ends in."""
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def examine(name: str, bits: int | None, folder: Path) -> dict[str, Any]:
    """Every check of one architecture: its layers, and what is wrong by check ("" is right)."""
    model: Any = None
    before = np.empty(0)
    config: dict[str, Any] = {}

    def runs() -> str:
        nonlocal model, before
        model = build(name, bits)
        before = logits(model)
        return "" if np.isfinite(before).all() else "logits are not finite"

    def attaches() -> str:
        config.update(start(model, name))
        return "" if lora_layers(model) else "nothing was attached, and nothing said so"

    found: dict[str, str] = {"4 bit" if bits else "runs": told(runs)}
    if not any(found.values()):
        found["attaches"] = told(attaches)
    if any(found.values()):
        return {"name": name, "bits": bits, "problems": found, "layers": {}, "left_out": []}
    found["short keys"] = told(lambda: shortened(name, bits, set(lora_layers(model))))
    found["harmless"] = told(lambda: changed(logits(model), before))
    found["gradients"] = told(lambda: unheard(model))
    shake(model)
    found["switched off"] = told(lambda: changed(off(model), before))
    fresh = build(name, bits)
    found["loads"] = told(lambda: far(saved_and_loaded(model, config, fresh, folder)))
    found["decodes"] = told(lambda: far(decoded(model, ONE_LENGTH)))
    found["padded"] = told(lambda: far(decoded(model, TWO_LENGTHS)))
    found["fast path"] = told(lambda: hastened(name, bits))
    kinds = Counter(
        "experts" if isinstance(m, LoRASwitchLinear) else "linear"
        for m in lora_layers(model).values()
    )
    return {
        "name": name,
        "bits": bits,
        "problems": found,
        "layers": dict(kinds),
        "left_out": left_out(model),
    }
