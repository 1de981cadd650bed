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

from mlx_lora.adapter.tensors import padded
from mlx_lora.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
UNFIT = (  # what changes the computation and has no counterpart in mlx-lm
    "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
)  # fmt: skip
REBASED = ("pissa", "olora", "corda", "loftq")
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
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        stored: dict[str, mx.array] = mx.load(str(folder / WEIGHTS))  # type: ignore[assignment]
        mx.eval(stored)
    except Exception as error:
        raise AdapterError(f"the PEFT adapter in {folder} does not load: {error}") from error
    refuse(about, folder)
    tensors: dict[str, mx.array] = {}
    unknown = [n for n in stored if not split(n)[1] and ".base_layer." not in n]
    if unknown:
        raise AdapterError(
            f"{folder}: {len(unknown)} tensors are no LoRA factors, like {', '.join(unknown[:3])}",
            "mlx-lm's LoRA layers have no place for them.",
        )
    for name, value in stored.items():
        module, factor = split(name)
        if factor:
            tensors[f"{module}.{factor}"] = value if factor == "m" else value.T
    modules = sorted({n.rpartition(".")[0] for n in tensors})
    incomplete = [m for m in modules if not {f"{m}.lora_a", f"{m}.lora_b"} <= tensors.keys()]
    if incomplete or not modules:
        named = ", ".join(incomplete[:3])
        raise AdapterError(f"{folder}: {f'half a pair at {named}' if named else 'no LoRA tensors'}")
    scales = {m: scale_of(about, m, tensors[f"{m}.lora_a"].shape[1]) for m in modules}
    scale = scales[modules[0]]
    for module in modules:
        if scales[module] != scale:
            ratio = scales[module] / scale
            tensors[f"{module}.lora_b"] = tensors[f"{module}.lora_b"] * ratio
    rank = max(tensors[f"{m}.lora_a"].shape[1] for m in modules)
    tensors, pattern = padded(tensors, rank)
    keys = sorted({re.sub(r"^.*?\blayers\.\d+\.", "", m) for m in modules})
    config = {
        "fine_tune_type": "dora" if about.get("use_dora") else "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
        "partial": True,  # layers without tensors keep B = 0
        "base": {"model": about.get("base_model_name_or_path")},
    }
    return config | ({"rank_pattern": pattern} if pattern else {}), tensors


def refuse(about: Any, folder: Path) -> None:
    """AdapterError for what mlx-lm's layers cannot compute."""
    if not isinstance(about, dict) or about.get("peft_type") != "LORA":
        kind = about.get("peft_type") if isinstance(about, dict) else None
        raise AdapterError(
            f"{folder} holds a PEFT adapter of type {kind}, only LORA is read",
            "Merge it into its base with PEFT (merge_and_unload), and convert that.",
        )
    unfit = [k for k in UNFIT if about.get(k)]
    if about.get("bias", "none") != "none":
        unfit.append("bias")
    start = about.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(REBASED):
        raise AdapterError(
            f"{folder}: the init {start} put other frozen weights under this adapter",
            "Save it in PEFT with path_initial_model_for_weight_conversion, which undoes that.",
        )
    if unfit:
        raise AdapterError(
            f"{folder}: mlx-lm's LoRA layers have no place for {', '.join(unfit)}",
            "Merge the adapter into its base with PEFT, and convert that.",
        )


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
    fits = (value for pattern, value in patterns if re.search(rf"(^|.*\.){pattern}$", module))
    alpha = next(fits, about.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)
