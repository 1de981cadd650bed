"""Adapters on disk, in mlx-lm's format: adapters.safetensors + adapter_config.json."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import cpu
from mlx_lora.adapter.attach import expand_keys, lora_layers
from mlx_lora.errors import AdapterError, near

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


def save(model: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Write the adapter with the scale in force. Readers see the old files or the new ones."""
    layers = lora_layers(model)
    scales = {float(m.scale) for m in layers.values()}
    assert len(scales) == 1, f"one scale per adapter on disk, got {sorted(scales)}"
    tensors = {
        f"{name}.{factor}": layer[factor]
        for name, layer in layers.items()
        for factor in ("lora_a", "lora_b")
    }
    parameters = {**config["lora_parameters"], "scale": scales.pop()}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".adapters.part.safetensors"
    mx.save_safetensors(str(part), tensors, metadata={"format": "mlx"})
    about = folder / ".adapter_config.part.json"
    about.write_text(json.dumps({**config, "lora_parameters": parameters}, indent=2) + "\n")
    os.replace(part, folder / WEIGHTS)
    os.replace(about, folder / CONFIG)


def folder_of(given: str) -> Path:
    """mlx-lm names the file, people name the folder: both are understood."""
    path = Path(given)
    return path.parent if path.suffix == ".safetensors" else path


def read(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Config and tensors of an adapter folder, without a model. AdapterError when it is none."""
    missing = [f for f in (CONFIG, WEIGHTS) if not (folder / f).is_file()]
    if missing:
        hint = "Give the folder that holds both files, for a run its `adapters` folder."
        if folder.is_dir() and (folder / "adapters" / CONFIG).is_file():
            hint = f"Did you mean {folder / 'adapters'}?"
        raise AdapterError(f"{folder} is no adapter folder: no {' and no '.join(missing)}", hint)
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors: dict[str, mx.array] = mx.load(str(folder / WEIGHTS))  # type: ignore[assignment]
        mx.eval(tensors)
    except Exception as error:
        raise AdapterError(f"the adapter in {folder} does not load: {error}") from error
    kind = config.get("fine_tune_type", "lora") if isinstance(config, dict) else None
    parameters = config.get("lora_parameters") if isinstance(config, dict) else None
    if kind != "lora" or not isinstance(parameters, dict):
        raise AdapterError(f"{folder / CONFIG} describes no LoRA adapter (fine_tune_type {kind!r})")
    absent = [k for k in ("rank", "scale") if k not in parameters]
    if absent:
        raise AdapterError(f"{folder / CONFIG}: lora_parameters has no {' and no '.join(absent)}")
    wrong = [
        f"{name} is {parameters.get(name)!r}"
        for name, kind in (("rank", int), ("scale", int | float), ("keys", list | None))
        if not isinstance(parameters.get(name), kind)
    ]
    if wrong or not isinstance(config.get("num_layers", -1), int):
        raise AdapterError(f"{folder / CONFIG} is not sound: {', '.join(wrong) or 'num_layers'}")
    return config, tensors


def load(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Attach the adapter in `folder`. Unlike mlx-lm, missing tensors are an error too."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    config, tensors = read(folder)
    parameters = {"dropout": 0.0, **config["lora_parameters"]}
    keys = parameters.get("keys")
    if keys is not None:
        expand_keys(model, keys)  # names every key that matches nothing
    model.freeze()
    linear_to_lora_layers(model, config.get("num_layers", -1), parameters)
    wanted = {
        name: value.shape
        for name, value in tree_flatten(model.parameters())
        if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b")
    }
    problems = mismatches({k: v.shape for k, v in tensors.items()}, wanted)
    if problems:
        raise AdapterError(
            f"{folder}: {len(problems)} tensors do not fit the model\n" + "\n".join(problems),
            "Was it trained on another base model, or with other keys or rank?",
        )
    model.load_weights(list(tensors.items()), strict=False)
    cpu.follow(model)
    mx.eval(model.parameters())
    return config


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
