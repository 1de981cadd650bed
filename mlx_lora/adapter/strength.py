"""An adapter at another strength: 0 is the base, 1 as it was trained."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapter.attach import lora_layers
from mlx_lora.errors import ConfigError

Whole = tuple[float, mx.array | None]  # scale and m of a layer at strength 1


def refuse_strength(strength: float, *, adapted: bool = True) -> None:
    """ConfigError for what is no strength, and for another one than 1 where there is no adapter."""
    if not math.isfinite(strength):
        raise ConfigError(f"strength is a finite number, 1 for as trained, got {strength}")
    if strength != 1 and not adapted:
        raise ConfigError(
            f"a strength of {strength:g}, and no adapter that could have it",
            "Name the adapter with --adapter.",
        )


def whole_of(layer: Any) -> Whole:
    """What a layer is set back to, taken while it is at strength 1."""
    return float(layer.scale), layer.get("m")


def weaken(layer: Any, whole: Whole, strength: float) -> None:
    """Set a layer's scale, and DoRA's magnitudes as far from the base's as the strength says."""
    scale, m_O = whole
    layer.scale = strength * scale
    if m_O is None:
        return
    layer.m = m_O
    if strength != 1:
        start_O = layer.first_norm_O()
        layer.m = start_O + strength * (m_O - start_O)


def weaken_all(model: nn.Module, strength: float) -> None:
    """Every LoRA layer of a model that has its adapter as it was trained."""
    for layer in lora_layers(model).values():
        weaken(layer, whole_of(layer), strength)
