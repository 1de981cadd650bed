"""Adapter files as tensors and settings, without a model. The format is mlx-lm's.

Where layers have different ranks, the file holds them all at the largest, filled up with zeros, and
`rank_pattern` in the config has the ranks in use: stock mlx-lm computes the same from it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.adapter.mapped import AGAIN
from mlx_lora.errors import AdapterError

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
KINDS = ("lora", "dora", "spline")
EXPECTED = (
    'Expected is what mlx-lm writes: {"fine_tune_type": "lora", "num_layers": 16, '
    '"lora_parameters": {"rank": 8, "scale": 2.0}}, where scale is alpha / rank.'
)


def folder_of(given: str) -> Path:
    """mlx-lm names the file, people name the folder: both are understood.

    One of mlx-lm's checkpoints beside the adapter, 0000100_adapters.safetensors, stays itself.
    """
    path = Path(given)
    return path.parent if path.name in (WEIGHTS, "adapter_model.safetensors") else path


def place_of(given: Path) -> tuple[Path, str]:
    """Folder and weights of an adapter; a file beside adapter_config.json may stand for both."""
    named = given.suffix == ".safetensors"
    return (given.parent, given.name) if named else (given, WEIGHTS)


def labels(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the adapters apart: the last part of each path that differs."""
    for depth in range(1, max(len(f.parts) for f in folders) + 1):
        short = ["/".join(f.parts[-depth:]) for f in folders]
        if len(set(short)) == len(short):
            return short
    return [f"{i + 1}:{f}" for i, f in enumerate(folders)]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Config and tensors of an adapter folder, without a model. AdapterError when it is none.

    A folder that PEFT wrote is read as if mlx-lm had written it.
    """
    from mlx_lora.adapter import peft

    folder, weights = place_of(folder)
    if peft.is_peft(folder):
        return peft.read_peft(folder)
    refuse_missing(folder, weights)
    try:
        tensors: dict[str, mx.array] = mx.load(str(folder / weights))  # type: ignore[assignment]
        mx.eval(tensors)
    except Exception as error:
        raise AdapterError(f"the adapter in {folder} does not load: {error}", AGAIN) from error
    return described(folder, weights), tensors


def refuse_missing(folder: Path, weights: str = WEIGHTS) -> None:
    missing = [f for f in (CONFIG, weights) if not (folder / f).is_file()]
    if missing:
        hint = "Give the folder that holds both files, for a run its `adapters` folder."
        if folder.is_dir() and (folder / "adapters" / CONFIG).is_file():
            hint = f"Did you mean {folder / 'adapters'}?"
        raise AdapterError(f"{folder} is no adapter folder: no {' and no '.join(missing)}", hint)


def described(folder: Path, weights: str = WEIGHTS) -> dict[str, Any]:
    """The config of an adapter folder; AdapterError says what it lacks."""
    refuse_missing(folder, weights)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except Exception as error:
        raise AdapterError(f"{folder / CONFIG} is not JSON: {error}", AGAIN) from error
    if problems := unsound(config):
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise AdapterError(f"{folder / CONFIG} describes no LoRA adapter:{listed}", EXPECTED)
    return config


def unsound(config: Any) -> list[str]:
    """Why this is no adapter's config; nothing where it is one.

    >>> unsound({"lora_parameters": {"scale": math.nan}})
    ['lora_parameters has no rank', 'lora_parameters.scale is nan']
    """
    if not isinstance(config, dict):
        return [f"it holds {config!r:.80}"]
    kind, found = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    problems = [] if kind in KINDS else [f"fine_tune_type is {kind!r}: {', '.join(KINDS)} are read"]
    if not is_whole(config.get("num_layers", -1)):
        problems.append(f"num_layers is {config['num_layers']!r}")
    if not isinstance(found, dict):
        return [
            *problems,
            f"lora_parameters is {found!r}" if found else "it has no lora_parameters",
        ]
    problems += [f"lora_parameters has no {k}" for k in ("rank", "scale") if k not in found]
    shape, bends = found.get("type", "lora"), kind == "spline"
    if shape not in ("lora", "spline") or (bends and shape == "lora"):
        problems.append(f"lora_parameters.type is {shape!r} under fine_tune_type {kind!r}")
    forms: dict[str, Callable[[Any], bool]] = {
        "rank": is_rank,
        "scale": lambda x: is_number(x) and math.isfinite(x),
        "dropout": lambda x: is_number(x) and 0 <= x < 1,
        "keys": lambda x: x is None or (isinstance(x, list) and all(isinstance(k, str) for k in x)),
    }
    problems += [
        f"lora_parameters.{name} is {found[name]!r:.80}"
        for name, fits in forms.items()
        if name in found and not fits(found[name])
    ]
    pattern, base = config.get("rank_pattern") or {}, config.get("base") or {}
    if not isinstance(pattern, dict) or not all(map(is_rank, pattern.values())):
        problems.append(f"rank_pattern is {pattern!r:.80}")
    if not isinstance(base, dict):
        problems.append(f"base is {base!r:.80}")
    return problems


def is_number(value: Any) -> bool:
    """True for numbers, of which Python holds true and false to be some."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return is_number(value) and isinstance(value, int)


def is_rank(value: Any) -> bool:
    return is_whole(value) and value >= 1


def digest(tensors: Mapping[str, mx.array]) -> str:
    """A hash of the factors: names, shapes, types and numbers."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.shape} {value.dtype}\n".encode())
        found.update(np.array(value.view(mx.uint8), copy=False).data)
    return found.hexdigest()


def intact(folder: Path) -> bool | None:
    """Whether the factors are those that were saved with the config; None where it does not say."""
    config, tensors = read(folder)
    recorded = config.get("tensors_hash")
    return None if recorded is None else recorded == digest(tensors)


def padded(
    tensors: Mapping[str, mx.array], rank: int
) -> tuple[dict[str, mx.array], dict[str, int]]:
    """The factors at one rank, and the ranks of the modules that needed it."""
    found, pattern = dict(tensors), {}
    for name, a in tensors.items():
        module, _, factor = name.rpartition(".")
        if factor != "lora_a" or a.shape[1] == rank:
            continue
        b, more = tensors[f"{module}.lora_b"], (0, rank - a.shape[1])
        pattern[module] = a.shape[1]
        experts = a.ndim == 3  # [E, R, I] and [E, O, R]
        found[name] = mx.pad(a, [(0, 0), more, *([(0, 0)] if experts else [])])
        found[f"{module}.lora_b"] = mx.pad(b, [(0, 0), (0, 0), more] if experts else [more, (0, 0)])
    return found, pattern


def unpadded(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The factors, of MLX or NumPy, at the ranks in use."""
    found = dict(tensors)
    for module, rank in (config.get("rank_pattern") or {}).items():
        a, b = (found.get(f"{module}.{f}") for f in ("lora_a", "lora_b"))
        if a is not None and b is not None:
            found[f"{module}.lora_a"] = a[:, :rank]
            found[f"{module}.lora_b"] = b[..., :rank] if b.ndim == 3 else b[:rank]
    return found
