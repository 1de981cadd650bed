"""PEFT's layout: lora_A [R, I] and lora_B [O, R], scale = alpha / r, ranks by pattern."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.adapter.peft import CONFIG, PREFIX, WEIGHTS
from mlx_lora.runlog import atomically
from mlx_lora.ship.trained import Trained, rank_of

VERIFIED = ("llama", "qwen2", "qwen3", "gemma")  # logits compared in torch: docs/ship.md


def tensors_of(trained: Trained, embeddings: frozenset[str]) -> dict[str, mx.array]:
    """The factors under PEFT's names. `embeddings` are the modules that are no linear layer."""
    found = {}
    for name, factors in trained.modules.items():
        a_RI, b_OR = mx.contiguous(factors.lora_a_IR.T), mx.contiguous(factors.lora_b_RO.T)
        if name in embeddings:
            found[f"{PREFIX}{name}.lora_embedding_A"] = a_RI
            found[f"{PREFIX}{name}.lora_embedding_B"] = b_OR
        else:
            found[f"{PREFIX}{name}.lora_A.weight"] = a_RI
            found[f"{PREFIX}{name}.lora_B.weight"] = b_OR
    for name, m_O in trained.magnitudes_O.items():
        found[f"{PREFIX}{name}.lora_magnitude_vector"] = m_O
    return found


def config_of(trained: Trained, base: str | None) -> dict[str, Any]:
    """adapter_config.json for PEFT. Modules by their full names: they can match no other layer."""
    ranks = {name: rank_of(factors) for name, factors in trained.modules.items()}
    other = {name: r for name, r in ranks.items() if r != trained.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": trained.rank,
        "lora_alpha": trained.scale * trained.rank,
        "rank_pattern": other,
        "alpha_pattern": {name: trained.scale * r for name, r in other.items()},
        "target_modules": sorted(trained.modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": bool(trained.magnitudes_O),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def write(
    trained: Trained,
    folder: Path,
    base: str | None,
    embeddings: frozenset[str],
    more: Mapping[str, Any] | None = None,
) -> None:
    """The two files of a PEFT adapter; `more` are keys of the config for other readers."""
    with atomically(folder / WEIGHTS) as part:
        tensors = tensors_of(trained, embeddings)
        mx.save_safetensors(str(part), tensors, metadata={"format": "pt"})
    config = {**(more or {}), **config_of(trained, base)}
    with atomically(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
