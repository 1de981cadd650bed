"""The formats: what each can hold, how it is written, and how MLX reads it back for the proof."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora import bases
from mlx_lora.adapter import files, peft
from mlx_lora.adapter.attach import EMBEDDINGS, heads_in
from mlx_lora.errors import AdapterError, few
from mlx_lora.models import Loaded
from mlx_lora.ship import gguf_files, peft_files
from mlx_lora.ship.switch import Layers, layers_of, layers_with
from mlx_lora.ship.trained import Trained


@dataclass(frozen=True)
class Target:
    """Where an adapter goes: its base in memory, the folder to fill, and what to call the base."""

    loaded: Loaded
    folder: Path
    base: str | None


@dataclass(frozen=True)
class Format:
    about: str
    refusals: Callable[[Trained, Mapping[str, Any]], list[str]]
    write: Callable[[Trained, Target], None]
    read_back: Callable[[Target], list[Layers]]  # by everything that is meant to read it


def mlx_config(trained: Trained, target: Target) -> dict[str, Any]:
    """adapter_config.json for mlx-lm, whatever the adapter came from.

    Of the base it records what the adapter did, and else that of the base it is proven on.
    """
    about = {**(bases.identity(target.loaded) if target.loaded else {}), **trained.about_base}
    about |= {"model": target.base} if target.base else {}
    parameters = {"dropout": 0.0, **trained.config["lora_parameters"], "rank": trained.rank}
    return {**trained.config, "lora_parameters": parameters, "base": about}


def mlx_tensors(trained: Trained) -> dict[str, Any]:
    """The factors under mlx-lm's names, at the ranks in use."""
    parts = [("lora_a", {n: f.lora_a_IR for n, f in trained.modules.items()})]
    parts += [("lora_b", {n: f.lora_b_RO for n, f in trained.modules.items()})]
    parts += [("m", trained.magnitudes_O)]
    return {f"{name}.{part}": value for part, values in parts for name, value in values.items()}


def write_mlx(trained: Trained, target: Target) -> None:
    files.write(mlx_config(trained, target), mlx_tensors(trained), target.folder)


def write_peft(trained: Trained, target: Target) -> None:
    peft_files.write(trained, target.folder, target.base, embeddings(trained, target.loaded))


def write_universal(trained: Trained, target: Target) -> None:
    """Both tensors files, and one config that both read. `rank_pattern` means the same to both."""
    write_mlx(trained, target)
    about = json.loads((target.folder / files.CONFIG).read_text(encoding="utf-8"))
    names = embeddings(trained, target.loaded)
    peft_files.write(trained, target.folder, target.base, names, about)


def write_gguf(trained: Trained, target: Target) -> None:
    gguf_files.write(trained, target.folder / gguf_files.WEIGHTS, target.loaded.config)


def read_mlx(target: Target) -> list[Layers]:
    return [layers_of(target.loaded.model, target.folder)]


def read_peft(target: Target) -> list[Layers]:
    return [layers_of(target.loaded.model, target.folder, peft.read_peft)]


def read_universal(target: Target) -> list[Layers]:
    return read_mlx(target) + read_peft(target)


def read_gguf(target: Target) -> list[Layers]:
    found = gguf_files.read(target.folder / gguf_files.WEIGHTS, target.loaded.config)
    return [layers_with(target.loaded.model, *found)]


def embeddings(trained: Trained, loaded: Loaded) -> frozenset[str]:
    """Modules of the adapter that are embeddings in this model. AdapterError where one is the head.

    Configs need not say so: mlx-lm has models that always share the two.
    """
    if shared := heads_in(loaded.model, trained.modules):
        raise AdapterError(f"PEFT cannot hold {trained.folder}: {unlike_tied(shared)}")
    there = {n for n, m in loaded.model.named_modules() if isinstance(m, EMBEDDINGS)}
    return frozenset(there & trained.modules.keys())


def unlike_plain_lora(trained: Trained) -> list[str]:
    """What PEFT and llama.cpp lack alike: mlx-lm's stacks of experts, bases of our own."""
    problems = []
    if trained.experts:
        problems.append(
            f"{few(trained.experts)}: factors of stacked experts have a layout that only mlx-lm has"
        )
    if trained.rebased:
        problems.append(
            f"the init {trained.config['init']['name']} put other frozen weights under the "
            "adapter: on the original base, which is the one others have, it is wrong"
        )
    return problems


def unfit_for_peft(trained: Trained, config: Mapping[str, Any]) -> list[str]:
    problems = unlike_plain_lora(trained)
    text = config.get("text_config") or config
    if embedded(trained) and text.get("tie_word_embeddings"):
        problems.append(unlike_tied(embedded(trained)))
    return problems


def unlike_tied(modules: list[str]) -> str:
    return f"{few(modules)}: mlx-lm adapts the tied output head with it, PEFT does not"


def unfit_for_gguf(trained: Trained, config: Mapping[str, Any]) -> list[str]:
    problems = unlike_plain_lora(trained)
    if trained.magnitudes_O:
        problems.append("it is a DoRA adapter, and GGUF adapters hold no magnitudes")
    kind = config.get("model_type")
    if kind not in gguf_files.ARCHITECTURES:
        known = ", ".join(gguf_files.ARCHITECTURES)
        problems.append(f"no mapping to llama.cpp's names for a {kind}; there is one for {known}")
    elif nameless := [m for m in trained.modules if gguf_files.tensor_name(m) is None]:
        problems.append(f"{few(nameless)}: no name in llama.cpp that was verified")
    if trained.scale == 0:
        problems.append("its scale is 0, which a GGUF adapter would read as 1")
    return problems


def embedded(trained: Trained) -> list[str]:
    """Modules that are embeddings by their name, as far as that can be known without the model."""
    return [n for n in trained.modules if re.search(r"embed|\bwte\b", n.rpartition(".")[2])]


FORMATS = {
    "mlx": Format("mlx-lm's own, plain", lambda *_: [], write_mlx, read_mlx),
    "peft": Format("for PEFT and transformers", unfit_for_peft, write_peft, read_peft),
    "gguf": Format("one file for llama.cpp", unfit_for_gguf, write_gguf, read_gguf),
    "universal": Format(
        "one folder for mlx-lm, PEFT and transformers",
        unfit_for_peft,
        write_universal,
        read_universal,
    ),
}
