"""Adapters on disk, in mlx-lm's format: adapters.safetensors + adapter_config.json."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import cpu
from mlx_lora.adapter.attach import (
    FACTORS,
    expand_keys,
    heads_in,
    lora_layers,
    on_remainder,
    to_lora_layers,
)
from mlx_lora.adapter.inits import is_rebased
from mlx_lora.adapter.spline import refuse_unsound
from mlx_lora.adapter.tensors import CONFIG, WEIGHTS, digest, folder_of, padded, read, unpadded
from mlx_lora.errors import AdapterError, near

Reading = Callable[[Path], tuple[dict[str, Any], dict[str, mx.array]]]  # config and tensors

__all__ = ["CONFIG", "FACTORS", "WEIGHTS", "folder_of", "load", "put", "read", "save", "write"]


def save(model: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Write the adapter with the scale in force. Readers see the old files or the new ones."""
    layers = lora_layers(model)
    scales = {float(m.scale) for m in layers.values()}
    assert len(scales) == 1, f"one scale per adapter on disk, got {sorted(scales)}"
    tensors = {
        f"{name}.{factor}": layer[factor]
        for name, layer in layers.items()
        for factor in FACTORS
        if factor in layer
    }
    rank = max(config["lora_parameters"]["rank"], *(rank_of(m.lora_a) for m in layers.values()))
    parameters = {**config["lora_parameters"], "rank": rank, "scale": scales.pop()}
    write({**config, "lora_parameters": parameters}, tensors, folder)


def write(config: Mapping[str, Any], tensors: Mapping[str, mx.array], folder: Path) -> None:
    """Write factors of any ranks up to the config's, without a model."""
    tensors, pattern = padded(tensors, config["lora_parameters"]["rank"])
    about = {k: v for k, v in config.items() if k != "rank_pattern"}
    about |= {"rank_pattern": pattern} if pattern else {}
    about["tensors_hash"] = digest(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".adapters.part.safetensors"
    mx.save_safetensors(str(part), tensors, metadata={"format": "mlx"})
    text = folder / ".adapter_config.part.json"
    text.write_text(json.dumps(about, indent=2) + "\n")
    os.replace(part, folder / WEIGHTS)
    os.replace(text, folder / CONFIG)


def rank_of(a: mx.array) -> int:
    """The rank of a lora_a, an expert's or an embedding's too."""
    return a.shape[-2] if a.ndim == 3 else a.shape[-1]


def load(model: nn.Module, folder: Path, reading: Reading = read) -> dict[str, Any]:
    """Attach the adapter in `folder`. Unlike mlx-lm, missing tensors are an error too."""
    config, tensors = reading(folder)
    refuse_unsound(tensors, folder)
    parameters = {"dropout": 0.0, **config["lora_parameters"]}
    keys = parameters.get("keys")
    if keys is not None:
        expand_keys(model, keys)  # names every key that matches nothing
    model.freeze()
    dora = config.get("fine_tune_type") == "dora"
    to_lora_layers(model, config.get("num_layers", -1), parameters, dora=dora)
    shared = heads_in(model, {name.rpartition(".")[0] for name in tensors})
    if config.get("heads_apart") and shared:
        raise AdapterError(
            f"{folder}: PEFT adapted {', '.join(shared)} and not the output head that shares its "
            "weight, where mlx-lm's layer adapts both",
            "Merge the adapter into its base with PEFT, and convert that.",
        )
    wanted = {
        name: value.shape
        for name, value in tree_flatten(model.parameters())
        if name.rpartition(".")[2] in FACTORS
    }
    if config.pop("partial", False):  # PEFT may leave layers out
        modules = {name.rpartition(".")[0] for name in tensors}
        wanted = {k: v for k, v in wanted.items() if k.rpartition(".")[0] in modules}
    problems = mismatches({k: v.shape for k, v in tensors.items()}, wanted)
    if problems:
        raise AdapterError(
            f"{folder}: {len(problems)} tensors do not fit the model\n" + "\n".join(problems),
            "Was it trained on another base model, or with other keys or rank?",
        )
    put(model, config, tensors)
    held = {name.rpartition(".")[0] for name in tensors}
    for name, layer in lora_layers(model).items():
        layer.__dict__["_left_out"] = name not in held  # by PEFT: it was not to learn
    cpu.follow(model)
    model.eval()  # new layers drop inputs until they are told not to
    mx.eval(model.parameters())
    return config


def put(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> None:
    """Tensors into a model that has their layers, at the ranks in use."""
    layers = lora_layers(model)
    for name, value in unpadded(config, tensors).items():
        module, _, factor = name.rpartition(".")
        layers[module][factor] = mx.contiguous(value)  # one layout, or sums take another order
    if is_rebased(config):
        on_remainder(model)


def mismatches(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """A line for every tensor that is missing, unexpected, or of another shape."""
    lines = [f"  missing     {k} {tuple(wanted[k])}" for k in sorted(wanted.keys() - found.keys())]
    lines += [
        f"  unexpected  {k} {tuple(found[k])}. {near(k, wanted, 1)}"[:200]
        for k in sorted(found.keys() - wanted.keys())
    ]
    lines += [
        f"  shape       {k}: file {tuple(found[k])}, model {tuple(wanted[k])}"
        for k in sorted(found.keys() & wanted.keys())
        if tuple(found[k]) != tuple(wanted[k])
    ]
    return lines
