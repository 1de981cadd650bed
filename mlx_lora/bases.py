"""What an adapter remembers of its base, and by what the base is known again."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_lora.models import Loaded, dense_weight

SKETCHED, SKETCH_ROWS, SKETCH_SUMS = 8, 16, 4
SAME_BASE = 0.7  # correlation of two sketches: above 0.95 across bits, about 0 for another model


def identity(loaded: Loaded) -> dict[str, Any]:
    """What an adapter records about its base."""
    quantization = loaded.config.get("quantization")
    return {
        "model": loaded.name,
        "model_type": loaded.config.get("model_type"),
        "quantization": {
            k: quantization[k] for k in ("bits", "group_size", "mode") if k in quantization
        }
        if quantization
        else None,
        "sketch": sketch(loaded.model),
    }


def sketch(model: nn.Module) -> list[float]:
    """Some numbers by which a base is known again at any quantization, without an adapter on it.

    Of a few layers, a few random signed sums over some rows, in units of what chance gives.
    """
    names = {name.removesuffix(".linear"): m for name, m in model.named_modules() if is_matrix(m)}
    chosen = [sorted(names)[i * len(names) // SKETCHED] for i in range(SKETCHED)] if names else []
    found: list[float] = []
    for index, name in enumerate(chosen):
        w = np.array(dense_weight(names[name], slice(SKETCH_ROWS)), np.float64)
        signs = np.random.default_rng(index).choice([-1.0, 1.0], (SKETCH_SUMS, *w.shape))
        sums = (signs * w).sum(axis=(1, 2)) / max(float(np.linalg.norm(w)), 1e-30)
        found += [round(float(x), 4) for x in sums]
    return found


def is_matrix(module: Any) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear)


def same_base(recorded: Sequence[float], found: Sequence[float]) -> bool:
    """Whether two sketches are of one base, at whatever quantization."""
    if len(recorded) != len(found) or not found:
        return False
    return float(np.corrcoef(recorded, found)[0, 1]) > SAME_BASE
