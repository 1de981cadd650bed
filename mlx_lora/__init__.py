"""Attach LoRA harmlessly, check for corruption, train with RL, and see what the adapter learned."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_lora import cpu

cpu.choose()  # before anything imports mlx.core

__version__ = "0.1.0"

PUBLIC = {
    "Adapters": "mlx_lora.ship.switch",
    "attach": "mlx_lora.adapter.attach",
    "LoRAAnalyzer": "mlx_lora.spectral.report",
}
__all__ = ["Adapters", "LoRAAnalyzer", "__version__", "attach", "check"]

if TYPE_CHECKING:
    from mlx_lora.adapter.attach import attach
    from mlx_lora.check.gate import check
    from mlx_lora.ship.switch import Adapters
    from mlx_lora.spectral.report import LoRAAnalyzer


def __getattr__(name: str) -> Any:
    if name == "check":  # a folder that can be called
        return import_module("mlx_lora.check")
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
