"""The pairs of factors in a folder, mlx-lm's or PEFT's, or in a model: read, never copied."""

from pathlib import Path
from typing import Any

from mlx_lora.adapter import peft
from mlx_lora.adapter.mapped import mapped
from mlx_lora.adapter.tensors import CONFIG, described, folder_of, place_of, unpadded
from mlx_lora.errors import AdapterError
from mlx_lora.spectral.spectrum import Pair, pairs


def adapter_folder(given: str | Path) -> Path:
    """The folder of an adapter or of its file, the `adapters` folder of a run, or a checkpoint."""
    folder = folder_of(str(Path(given).expanduser()))
    if not (folder / CONFIG).is_file() and (folder / "adapters" / CONFIG).is_file():
        return folder / "adapters"
    return folder


def of_folder(given: str | Path) -> list[Pair]:
    """The pairs of an adapter, its file or its run, each with the scale and rank it is used at."""
    folder = adapter_folder(given)
    if peft.is_peft(folder):
        return of_peft(folder)
    folder, weights = place_of(folder)
    config = described(folder, weights)
    tensors = unpadded(config, mapped(folder / weights))
    return list(pairs(tensors, float(config["lora_parameters"]["scale"])))


def of_peft(folder: Path) -> list[Pair]:
    """PEFT's factors as mlx-lm lays them out, at the scale of each module: nothing is folded."""
    about = peft.described(folder)
    return list(pairs(*peft.factors_of(about, mapped(folder / peft.WEIGHTS), folder)))


def of_model(model: Any) -> list[Pair]:
    """The pairs in the LoRA layers of a model. AdapterError where it has none."""
    from mlx_lora.adapter.attach import lora_layers

    layers = lora_layers(model)
    if not layers:
        raise AdapterError("this model has no LoRA layers", "Attach or load an adapter first.")
    factors = ("lora_a", "lora_b", "m")
    tensors = {f"{n}.{f}": m[f] for n, m in layers.items() for f in factors if f in m}
    return list(pairs(tensors, {n: float(m.scale) for n, m in layers.items()}))
