"""The CPU fast path. Nothing here has any effect where MLX runs on a GPU.

The Linux wheel of MLX carries the reference BLAS; its quantized matmul is as slow. Two ways out:

- `numpy`: the products of frozen layers, LoRA layers and the output head, and whole transformer
  blocks of the usual kind, run in NumPy, whose wheel brings its own OpenBLAS, inside
  `mx.custom_function` with a hand-written vjp. Frozen quantized layers multiply by a dense copy.
- `openblas`: the same, and a system OpenBLAS is loaded before MLX, whose own products then resolve
  to it: what is not of the usual kind is quick too.
- `plain`: MLX as it comes.

`MLX_LORA_CPU` picks one; unset or `auto` takes `openblas` if there is one, else `numpy`. Logits and
gradients equal the plain path to 1e-5. Layers keep their class hierarchy, parameters and packed
weights: the dense copy is a private attribute that is neither trained nor saved.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

from mlx_lora.errors import ConfigError, near

MODES = ("openblas", "numpy", "plain")
LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas64_.so.0")
MEMORY_SHARE = 0.25  # the dense copies may take this much of the machine's memory

_mode = "plain"
_problem: ConfigError | None = None


def choose() -> None:
    """`prepare` at import time, when a bad MLX_LORA_CPU must not be a traceback yet."""
    global _problem
    try:
        prepare()
    except ConfigError as error:
        _problem = error


def refuse() -> None:
    """Raise what `choose` found wrong."""
    if _problem:
        raise _problem


def prepare() -> str:
    """Choose the mode. Call before `mlx.core` is imported (the package's `__init__` does)."""
    global _mode
    wanted = os.environ.get("MLX_LORA_CPU", "auto") or "auto"
    if wanted not in (*MODES, "auto"):
        raise ConfigError(f"MLX_LORA_CPU={wanted!r}", near(wanted, [*MODES, "auto"]))
    if not sys.platform.startswith("linux") or wanted == "plain":
        return "plain"
    if wanted != "numpy" and "mlx.core" not in sys.modules and load_openblas():
        _mode = "openblas"
    elif wanted == "openblas":
        raise ConfigError(
            "MLX_LORA_CPU=openblas, but there is no system OpenBLAS or MLX was imported first",
            "Install libopenblas (Debian: libopenblas0-pthread), or unset MLX_LORA_CPU.",
        )
    else:
        _mode = "numpy"
    return _mode


def load_openblas() -> bool:
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return True
        except OSError:
            continue
    return False


def active() -> bool:
    """True where MLX computes on the CPU."""
    import mlx.core as mx

    return mx.default_device() == mx.Device(mx.cpu)


def fast() -> bool:
    """True where NumPy's vectorised functions should stand in for MLX's."""
    return _mode != "plain" and active()


def mode() -> str:
    """The path in use: `gpu`, or one of MODES."""
    return _mode if active() else "gpu"


def settle() -> None:
    """Process-wide MLX settings for the CPU: no run-time C++ compilation, about 1 s a kernel."""
    import mlx.core as mx

    refuse()
    if active():
        mx.disable_compile()


def follow(model: Any) -> None:
    """Give newly attached LoRA layers the fast product where the layers under them have it."""
    if fast():
        for _, module in model.named_modules():
            if hasattr(module, "lora_a") and type(module) in fast_classes():
                module.__class__ = fast_classes()[type(module)]


def accelerate(model: Any) -> int:
    """Give a frozen model's layers the fast products, before anything is measured on it.

    Returns how many layers changed: none on a GPU, in low precision, or where the dense copies
    would take too much memory.
    """
    if not fast():
        return 0
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_lora.cpu_attention import hasten_attention
    from mlx_lora.cpu_block import hasten_blocks
    from mlx_lora.cpu_layers import hasten_mlp

    layers = [m for _, m in model.named_modules() if type(m) in fast_classes()]
    packed = [m for m in layers if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding))]
    dense_bytes = sum(4 * m.weight.size * 32 // m.bits for m in packed)
    floats = all(m.scales.dtype == mx.float32 for m in packed)
    if dense_bytes > MEMORY_SHARE * memory_bytes() or not floats:
        return 0
    for layer in layers:
        layer.__class__ = fast_classes()[type(layer)]
    gated = [m for _, m in model.named_modules() if "gate_proj" in m]
    attentive = [m for _, m in model.named_modules() if "q_proj" in m]
    hastened = [*map(hasten_mlp, gated), *map(hasten_attention, attentive)]
    hasten_blocks(model)
    return len(layers) + sum(hastened)


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Inside, adapters are merged into dense copies and blocks take one step where that is known.

    No gradient flows.
    """
    if not fast():
        yield
        return
    from mlx_lora.cpu_block import stacked
    from mlx_lora.cpu_layers import across, merged
    from mlx_lora.cpu_spline import standing_beside

    with across(model), merged(model), standing_beside(model), stacked(model):
        yield


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fast_classes() -> dict[type, type]:
    """The layer classes that have a fast twin, for the mode in use."""
    from mlx_lora import cpu_layers

    return cpu_layers.TWINS if _mode != "plain" else {}
