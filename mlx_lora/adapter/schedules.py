"""How the adapter's scale moves in training: functions of progress in [0, 1] giving a factor."""

from collections.abc import Callable

import mlx.nn as nn

from mlx_lora.adapter.attach import lora_layers
from mlx_lora.registry import Table

schedules: Table[Callable[..., float]] = Table("scale schedule")


@schedules.add
def constant(progress: float) -> float:
    """The configured scale throughout.

    >>> constant(0.3)
    1.0
    """
    return 1.0


@schedules.add
def linear(progress: float, *, start: float = 0.1, until: float = 0.2) -> float:
    """From `start` times the scale to the whole of it over the first `until` of the run.

    >>> linear(0.0), linear(1.0)
    (0.1, 1.0)
    """
    return start + (1 - start) * min(1.0, progress / until) if until > 0 else 1.0


def set_scale(model: nn.Module, scale: float) -> None:
    """Put one scale in force in every LoRA layer. Saving the adapter records it."""
    for layer in lora_layers(model).values():
        layer.scale = scale
