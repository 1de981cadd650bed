"""Attach LoRA through mlx-lm's `linear_to_lora_layers`, with our own start, asserted."""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_lora import cpu
from mlx_lora.adapter.inits import HARMLESS, inits
from mlx_lora.errors import AdapterError, near
from mlx_lora.types import Factors, Site

LORA_LAYERS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding)
LINEARS = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def attach(
    model: nn.Module,
    *,
    rank: int = 8,
    scale: float = 2.0,
    keys: Sequence[str] | None = None,
    num_layers: int = -1,
    init: str = "zero",
    init_options: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Give the model LoRA layers and return the adapter's config (mlx-lm's adapter_config.json).

    `scale` multiplies the update (alpha / rank in PEFT's terms). `keys` are module names inside a
    block, full (`self_attn.q_proj`) or short (`q_proj`); None means every linear layer of every
    block. `num_layers` counts blocks from the end, <= 0 or more than there are means all. Raises
    AdapterError for keys that match nothing and for a model that has an adapter already.
    """
    if rank < 1:
        raise AdapterError(f"rank is at least 1, got {rank}")
    if not (math.isfinite(scale) and scale >= 0):
        raise AdapterError(f"scale is a finite number, 0 or more, got {scale}")
    start = inits.bind(init, init_options or {})
    if lora_layers(model):
        raise AdapterError("this model has LoRA layers already", "Load the model afresh.")
    found = expand_keys(model, keys)
    depth = len(blocks(model))
    num_layers = depth if not 0 < num_layers <= depth else num_layers
    parameters = {"rank": rank, "scale": scale, "dropout": dropout, "keys": found}
    model.freeze()
    linear_to_lora_layers(model, num_layers, parameters)
    for name, layer in lora_layers(model).items():
        factors = start(site_of(name, layer, rank), module_key(seed, name))
        place(layer, factors, name)
        if init in HARMLESS and not isinstance(layer, LoRALinear):
            layer.lora_b = mx.zeros_like(layer.lora_b)
    if init == "zero":
        assert_zero_b(model)
    cpu.follow(model)
    mx.eval(model.parameters())
    return {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters,
        "init": {"name": init, **(init_options or {})},
        "seed": seed,
    }


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Every LoRA layer by its full name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LORA_LAYERS)}


def blocks(model: nn.Module) -> Sequence[Any]:
    """The model's blocks, first to last: every model of mlx-lm has them as `layers`."""
    layers = model.layers
    assert layers is not None
    return layers


def linear_keys(model: nn.Module) -> list[str]:
    """Names, inside a block, of every linear layer of any block."""
    found: dict[str, None] = {}
    for block in blocks(model):
        for name, module in block.named_modules():
            if isinstance(module, LINEARS):
                found[name] = None
    return sorted(found)


def expand_keys(model: nn.Module, keys: Sequence[str] | None) -> list[str]:
    """Full names for short ones. AdapterError lists every key that matches nothing."""
    inside = linear_keys(model)
    if keys is None:
        return inside
    outside = [
        n
        for n, m in model.named_modules()
        if isinstance(m, (*LINEARS, *EMBEDDINGS)) and ".layers." not in f".{n}"
    ]
    found: dict[str, None] = {}
    problems = []
    for key in keys:
        matches = [k for k in (*inside, *outside) if k == key or k.endswith(f".{key}")]
        if not matches:
            short = {k.rpartition(".")[2] for k in (*inside, *outside)}
            known = [*inside, *outside] if "." in key else short
            problems.append(f"the key {key!r} matches no layer. {near(key, known)}")
        found |= dict.fromkeys(matches)
    if problems or not found:
        raise AdapterError("\n".join(problems) or "no keys given: nothing would be trained")
    return sorted(found)


def site_of(name: str, layer: Any, rank: int) -> Site:
    base = layer.embedding if isinstance(layer, LoRAEmbedding) else layer.linear
    *_, in_dims, out_dims = (layer.lora_a.shape[0], layer.lora_b.shape[-1])
    return Site(name, in_dims, out_dims, rank, layer.scale, base)


def place(layer: Any, factors: Factors, name: str) -> None:
    """Put factors into a LoRALinear. Experts and embeddings keep mlx-lm's own A."""
    if not isinstance(layer, LoRALinear):
        return
    a, b = factors.lora_a_IR, factors.lora_b_RO
    if a.shape != layer.lora_a.shape or b.shape != layer.lora_b.shape:
        raise AdapterError(
            f"{name}: the init made {a.shape} and {b.shape}, the layer holds {layer.lora_a.shape} "
            f"and {layer.lora_b.shape}"
        )
    layer.lora_a, layer.lora_b = a, b


def assert_zero_b(model: nn.Module) -> None:
    """Every lora_b is exactly zero, whatever mlx-lm's default has become."""
    moved = [n for n, m in lora_layers(model).items() if mx.any(m.lora_b != 0).item()]
    assert not moved, f"lora_b is not zero after a zero init: {moved}"


def module_key(seed: int, name: str) -> mx.array:
    """A random key per (seed, module), the same on every machine and in any order of modules."""
    digest = hashlib.blake2s(f"{seed}/{name}".encode(), digest_size=8).digest()
    return mx.random.key(int.from_bytes(digest, "big"))


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: every scale is 0, bitwise the base if factors are finite."""
    layers = list(lora_layers(model).values())
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
