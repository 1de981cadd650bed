"""The pairs of factors in a folder, mlx-lm's or PEFT's, or in a model: read, never copied."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora.adapter import peft
from mlx_lora.adapter.mapped import mapped
from mlx_lora.adapter.tensors import CONFIG, WEIGHTS, described, unpadded
from mlx_lora.errors import AdapterError
from mlx_lora.spectral.spectrum import Pair, pairs


def adapter_folder(given: str | Path) -> Path:
    """The folder itself, or the `adapters` folder of a run."""
    folder = Path(given).expanduser()
    if not (folder / CONFIG).is_file() and (folder / "adapters" / CONFIG).is_file():
        return folder / "adapters"
    return folder


def of_folder(given: str | Path) -> list[Pair]:
    """The pairs of an adapter or run folder, each with the scale and rank it is used at."""
    folder = adapter_folder(given)
    if peft.is_peft(folder):
        return of_peft(folder)
    config = described(folder)
    tensors = unpadded(config, mapped(folder / WEIGHTS))
    return list(pairs(tensors, float(config["lora_parameters"]["scale"])))


def of_peft(folder: Path) -> list[Pair]:
    """PEFT's factors as mlx-lm lays them out, at the scale of each module: nothing is folded."""
    try:
        about = json.loads((folder / peft.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"the PEFT adapter in {folder} does not load: {error}") from error
    peft.refuse(about, folder)
    if about.get("target_parameters"):
        raise AdapterError(
            f"{folder} adapts parameters (target_parameters): their layout is not read",
            "Adapters of modules (target_modules) are.",
        )
    tensors: dict[str, np.ndarray] = {}
    for name, value in mapped(folder / peft.WEIGHTS).items():
        module, factor = peft.split(name)
        turned = value.T if value.ndim == 2 else value  # experts lie as mlx-lm's do
        tensors[f"{module}.{factor}" if factor else name] = turned
    ranks = {
        name.rpartition(".")[0]: value.shape[1]
        for name, value in tensors.items()
        if name.endswith(".lora_a") and value.ndim > 1 and 0 not in value.shape
    }
    scales = {module: float(peft.scale_of(about, module, rank)) for module, rank in ranks.items()}
    return list(pairs(tensors, scales))


def of_model(model: Any) -> list[Pair]:
    """The pairs in the LoRA layers of a model. AdapterError where it has none."""
    from mlx_lora.adapter.attach import lora_layers

    layers = lora_layers(model)
    if not layers:
        raise AdapterError("this model has no LoRA layers", "Attach or load an adapter first.")
    tensors = {f"{n}.{f}": m[f] for n, m in layers.items() for f in ("lora_a", "lora_b")}
    return list(pairs(tensors, {n: float(m.scale) for n, m in layers.items()}))
