"""How far every block's output moved: the first that jumps is where it broke."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.adapter.attach import blocks
from mlx_lora.check.probes import Probes
from mlx_lora.check.sides import CHUNK, Side
from mlx_lora.models import pad_right

TEXTS = 16  # read for this; the shortest ones


def drift(base: Side, adapted: Side, probes: Probes) -> list[dict[str, Any]]:
    """‖difference‖ / ‖base‖ of every block's output over the tokens of some texts."""
    texts = sorted((ids[:CHUNK] for ids, _ in probes.texts), key=len)[:TEXTS]
    moved, size = 0.0, 0.0
    for ids in texts:
        ids_1T, _ = pad_right([ids])
        ours, theirs = outputs(base, ids_1T), outputs(adapted, ids_1T)
        pairs = list(zip(ours, theirs, strict=True))
        moved = moved + np.array([mx.square(b - a).sum().item() for a, b in pairs])
        size = size + np.array([mx.square(a).sum().item() for a, _ in pairs])
    relative = np.sqrt(np.asarray(moved) / np.maximum(size, 1e-30))
    return [{"block": i, "drift": float(x)} for i, x in enumerate(relative)]


def outputs(side: Side, ids_1T: mx.array) -> list[mx.array]:
    """Each block's output, in float32."""
    with side.entered() as model, overheard(list(blocks(model))) as heard:
        mx.eval(model(ids_1T))
    return [x.astype(mx.float32) for x in heard]


@contextlib.contextmanager
def overheard(layers: Sequence[Any]) -> Iterator[list[mx.array]]:
    """Inside, the outputs of these modules are appended as they are called."""
    heard: list[mx.array] = []
    kinds = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = speaking(kind, heard)
    try:
        yield heard
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


def speaking(kind: type, heard: list[mx.array]) -> type:
    def call(self: Any, *given: Any, **more: Any) -> Any:
        found = kind.__call__(self, *given, **more)  # type: ignore[operator]
        heard.append(found[0] if isinstance(found, tuple | list) else found)
        return found

    return type(kind.__name__, (kind,), {"__call__": call})
