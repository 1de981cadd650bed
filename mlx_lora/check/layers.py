"""How far every block's output moved: the first that jumps is where it broke."""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.adapter.attach import blocks
from mlx_lora.adapter.listen import its_output, listening
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
    layers = {str(i): block for i, block in enumerate(blocks(side.model))}
    with side.entered() as model, listening(layers, its_output) as heard:
        mx.eval(model(ids_1T))
    return [heard[name].astype(mx.float32) for name in layers if name in heard]
