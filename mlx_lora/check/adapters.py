"""What an adapter's factors say without reading text, and whether they reach the outputs at all."""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_lora.check.probes import Probes
from mlx_lora.models import dense_weight, logits

ROWS = 64  # of a weight, spread over it: enough to estimate its norm within some percent
PUSH = 1e-3  # the learning rate of the tiny step, which is Adam's first: rate · sign(gradient)
PROBE_TOKENS = 64


def largest_update(layers: Mapping[str, Any]) -> tuple[str, float | None]:
    """The module whose weight changes most, and ‖change‖_F / ‖W‖_F there.

    The change is scale·BA, its norm exact, from two R×R Gram matrices; the weight's is estimated
    from some of its rows. Where an init put other weights under the adapter it is what both make of
    the base's; where that base is gone, there is none to tell.
    """
    sizes: dict[str, mx.array] = {}
    for name, layer in layers.items():
        if layer.lora_a.ndim != 2 or "linear" not in layer or "_remainder" in layer.__dict__:
            continue  # experts and embeddings
        if (base := layer.__dict__.get("_base")) is not None:
            sizes[name] = rebased_change(layer, base)
            continue
        a_IR, b_RO = layer.lora_a.astype(mx.float32), layer.lora_b.astype(mx.float32)
        squared = mx.sum((a_IR.T @ a_IR) * (b_RO @ b_RO.T))
        sizes[name] = mx.sqrt(mx.maximum(squared, 0)) * abs(float(layer.scale)) / norm(layer.linear)
    if not sizes:
        return "", None
    values: list[float] = mx.stack(list(sizes.values())).tolist()  # type: ignore[assignment]
    worst = max(range(len(values)), key=lambda i: math.inf if math.isnan(values[i]) else values[i])
    return list(sizes)[worst], values[worst]


def rebased_change(layer: Any, base: Any) -> mx.array:
    """‖W' + scale·BA - W‖_F / ‖W‖_F with W the base's weight and W' that which replaced it."""
    pick = spread_rows(base)
    update_OI = float(layer.scale) * (layer.lora_a @ layer.lora_b[:, pick]).T.astype(mx.float32)
    w_OI = dense_weight(base, pick)
    change_OI = dense_weight(layer.linear, pick) + update_OI - w_OI
    return mx.linalg.norm(change_OI) / (mx.linalg.norm(w_OI) + 1e-30)


def spread_rows(linear: Any) -> mx.array:
    """Indices of some rows of a weight, evenly spread."""
    rows = linear.weight.shape[0]
    return mx.array([i * rows // min(ROWS, rows) for i in range(min(ROWS, rows))])


def norm(linear: Any) -> mx.array:
    """‖W‖_F of a frozen layer, estimated from evenly spread rows."""
    pick = spread_rows(linear)
    part = dense_weight(linear, pick)
    return mx.sqrt(mx.square(part).sum() * (linear.weight.shape[0] / len(pick))) + 1e-30


def dropout_of(layers: Mapping[str, Any]) -> float:
    """The largest LoRA dropout."""
    return max((1 - m.dropout._p_1 for m in layers.values() if "dropout" in m), default=0.0)


def moves_outputs(model: nn.Module, probes: Probes) -> bool:
    """True where one tiny step of Adam changes the logits of a text; undone after.

    An adapter at scale 0, cut off from the outputs, or lost in rounding does not move them, and
    would not learn.
    """
    ids, start = min(probes.texts, key=lambda text: len(text[0]))
    ids_1T = mx.array([ids[: max(PROBE_TOKENS, start + 1)]])

    def loss(model: nn.Module) -> mx.array:
        found = logits(model, ids_1T[:, :-1])
        return nn.losses.cross_entropy(found, ids_1T[:, 1:], reduction="mean")

    before = logits(model, ids_1T)
    kept = model.trainable_parameters()
    grads = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))

    def pushed(name: str, value: mx.array) -> mx.array:
        return value - PUSH * mx.sign(grads[name])

    try:
        model.update(tree_map_with_path(pushed, kept))
        return bool(mx.any(logits(model, ids_1T) != before).item())
    finally:
        model.update(kept)
