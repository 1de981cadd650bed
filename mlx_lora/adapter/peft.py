"""Reads an adapter in PEFT's format as if it were mlx-lm's. Only safetensors: a pickle is refused.

PEFT holds lora_A [R, I] and lora_B [O, R], mlx-lm their transposes; PEFT's scale is alpha / r, or
alpha / sqrt(r) with rsLoRA, and may differ by module. The scales fold into lora_b where they do.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.adapter.patterns import fits
from mlx_lora.adapter.tensors import padded
from mlx_lora.errors import AdapterError, few

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
UNFIT = (  # what changes the computation and has no counterpart in mlx-lm
    "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # W -= scale BA; loftq: W is rounded
ALPHA = 8  # PEFT's, where the config has none
FROZEN = (".base_layer.weight", ".base_layer.bias")  # PEFT saves adapted embeddings whole
PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}


def is_peft(folder: Path) -> bool:
    """True for a folder that PEFT wrote. AdapterError where its weights are a pickle."""
    if (folder / WEIGHTS).is_file():
        return not (folder / "adapters.safetensors").is_file()
    if (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{folder}/adapter_model.bin is a pickle, which can run code when it is read",
            "Save it again with safe_serialization=True.",
        )
    return False


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Config and tensors in mlx-lm's layout, at one rank and one scale."""
    about = described(folder)
    try:
        stored: dict[str, mx.array] = mx.load(str(folder / WEIGHTS))  # type: ignore[assignment]
        mx.eval(stored)
    except Exception as error:
        raise AdapterError(f"the PEFT adapter in {folder} does not load: {error}") from error
    tensors, scales = factors_of(about, stored, folder)
    modules = sorted(scales)
    scale = next((scales[module] for module in modules if scales[module]), 0.0)
    for module in modules:
        if scales[module] != scale:
            ratio = scales[module] / scale
            tensors[f"{module}.lora_b"] = tensors[f"{module}.lora_b"] * ratio
    rank = max(tensors[f"{m}.lora_a"].shape[1] for m in modules)
    tensors, pattern = padded(tensors, rank)
    named = about.get("base_model_name_or_path")
    keys = sorted({re.sub(r"^.*?\blayers\.\d+\.", "", m) for m in modules})
    config = {
        "fine_tune_type": "dora" if about.get("use_dora") else "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
        "partial": True,  # layers without tensors keep B = 0
        "base": {"model": named} if named else {},
    }
    if any(".lora_embedding_" in name for name in stored):
        config["heads_apart"] = True  # an output head that shares the embedding is not adapted
    return config | ({"rank_pattern": pattern} if pattern else {}), tensors


def described(folder: Path) -> dict[str, Any]:
    """PEFT's config. AdapterError where it is of no LoRA."""
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"the PEFT adapter in {folder} does not load: {error}") from error
    if not isinstance(about, dict) or about.get("peft_type") != "LORA":
        kind = about.get("peft_type") if isinstance(about, dict) else None
        raise AdapterError(
            f"{folder} holds a PEFT adapter of type {kind}, only LORA is read",
            "Merge it into its base with PEFT (merge_and_unload), and convert that.",
        )
    return about


def factors_of(
    about: Mapping[str, Any], stored: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """Factors, of MLX or NumPy, as mlx-lm lays them out, and the scale of every module.

    AdapterError lists all that is wrong with the config and the tensors.
    """
    problems = [*unfit(about), *unsound_alphas(about)]
    found = {name: split(name) for name in stored if not name.endswith(FROZEN)}
    unknown = [name for name, (_, factor) in found.items() if not factor]
    if unknown:
        problems.append(f"{len(unknown)} tensors are no LoRA factors, like {few(unknown)}")
    tensors = {".".join(found[name]): stored[name] for name in found if found[name][1]}
    modules = sorted({module for module, factor in found.values() if factor})
    if not modules and not unknown:
        problems.append("there are no LoRA tensors")
    halves = [m for m in modules if not {f"{m}.lora_a", f"{m}.lora_b"} <= tensors.keys()]
    if halves:
        problems.append(f"half a pair at {few(halves)}")
    for module in modules:
        if module not in halves:
            shapes = (tuple(tensors[f"{module}.{factor}"].shape) for factor in ("lora_a", "lora_b"))
            problems += misshapen(module, *shapes)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise AdapterError(
            f"the PEFT adapter in {folder} is none that mlx-lm's LoRA layers can compute:\n{lines}",
            "PEFT can merge an adapter into its base, which mlx-lm then converts.",
        )
    scales = {m: scale_of(about, m, tensors[f"{m}.lora_a"].shape[0]) for m in modules}
    return {n: v if n.endswith(".m") else v.T for n, v in tensors.items()}, scales


def unfit(about: Mapping[str, Any]) -> list[str]:
    """What in the config mlx-lm's layers cannot compute."""
    keys = [key for key in UNFIT if about.get(key)]
    keys += ["bias"] if about.get("bias", "none") != "none" else []
    problems = [f"mlx-lm's LoRA layers have no place for {', '.join(keys)}"] if keys else []
    start = about.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REBASED):
        problems.append(f"the init {start} put other frozen weights under this adapter")
        if not start.lower().startswith("loftq"):
            problems[-1] += (
                ": save it in PEFT with path_initial_model_for_weight_conversion, which undoes that"
            )
    return problems


def unsound_alphas(about: Mapping[str, Any]) -> list[str]:
    """What in the config is no alpha, or no pattern of modules for one."""
    patterns = about.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        return [f"alpha_pattern is {patterns!r}, and should have an alpha for each pattern"]
    alphas = {"lora_alpha": about.get("lora_alpha", ALPHA)}
    alphas |= {f"alpha_pattern: {pattern}": alpha for pattern, alpha in patterns.items()}
    problems = [
        f"{name} is {alpha!r}, and should be a number"
        for name, alpha in alphas.items()
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha)
    ]
    for pattern in patterns:
        try:
            fits(pattern, "")
        except AdapterError as error:
            problems.append(f"alpha_pattern: {error}")
    return problems


def misshapen(module: str, a_RI: tuple[int, ...], b_OR: tuple[int, ...]) -> list[str]:
    """Why a pair of these shapes is none of PEFT's for a linear layer or an embedding."""
    shapes = f"{module}: lora_A {a_RI} and lora_B {b_OR}"
    if len(a_RI) != 2 or len(b_OR) != 2:
        return [f"{shapes} are no matrices"]
    if 0 in (*a_RI, *b_OR):
        return [f"{shapes} hold no numbers"]
    return [] if a_RI[0] == b_OR[1] else [f"{shapes} have different ranks"]


def split(name: str) -> tuple[str, str]:
    """Module and factor of a PEFT tensor; no factor for what is not LoRA.

    >>> split("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    ('model.layers.0.self_attn.q_proj', 'lora_a')
    """
    for ending, factor in PARTS.items():
        if name.endswith(f".{ending}"):
            return name.removeprefix(PREFIX).removesuffix(f".{ending}"), factor
    return name, ""


def scale_of(about: Mapping[str, Any], module: str, rank: int) -> float:
    """What multiplies this module's update. Of several patterns the first counts, as in PEFT."""
    patterns = (about.get("alpha_pattern") or {}).items()
    meant = (alpha for pattern, alpha in patterns if fits(pattern, module))
    alpha = next(meant, about.get("lora_alpha", ALPHA))
    return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)
