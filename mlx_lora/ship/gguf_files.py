"""llama.cpp's layout of an adapter: one GGUF file, factors as PEFT has them, names of its own.

llama.cpp multiplies by alpha / (rank of the tensor), and takes an alpha of 0 for none given.
Source: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.runlog import atomically
from mlx_lora.ship.trained import Trained, rank_of
from mlx_lora.types import Factors

WEIGHTS = "adapter.gguf"
ALPHA = "adapter.lora.alpha"
ALIGNMENT = 32


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a kind of model, and whether it reorders the rows of its q and k."""

    name: str
    reordered: bool = False


ARCHITECTURES = {  # by mlx-lm's model_type
    "llama": Architecture("llama", reordered=True),
    "mistral": Architecture("llama", reordered=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"lm_head": "output"}


def tensor_name(module: str) -> str | None:
    """llama.cpp's name of a module; None where there is none.

    >>> tensor_name("model.layers.3.mlp.up_proj"), tensor_name("model.norm")
    ('blk.3.ffn_up', None)
    """
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if found and found[2] in NAMES:
        return f"blk.{found[1]}.{NAMES[found[2]]}"
    return OUTSIDE.get(module)


def module_name(tensor: str) -> str:
    """The module of a tensor.

    >>> module_name("blk.3.ffn_up"), module_name("output")
    ('model.layers.3.mlp.up_proj', 'lm_head')
    """
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", tensor)
    if block:
        inside = {theirs: ours for ours, theirs in NAMES.items()}[block[2]]
        return f"model.layers.{block[1]}.{inside}"
    return {theirs: ours for ours, theirs in OUTSIDE.items()}[tensor]


def heads_of(config: Mapping[str, Any]) -> dict[str, int]:
    """How many heads the rows of q and of k belong to."""
    queries = config["num_attention_heads"]
    keys = config.get("num_key_value_heads") or queries
    return {"self_attn.q_proj": queries, "self_attn.k_proj": keys}


def reordered(rows_OR: mx.array, heads: int) -> mx.array:
    """Rows in llama.cpp's order: it rotates neighbours, where mlx-lm rotates halves of a head."""
    out, rank = rows_OR.shape
    return rows_OR.reshape(heads, 2, out // heads // 2, rank).swapaxes(1, 2).reshape(out, rank)


def restored(rows_OR: mx.array, heads: int) -> mx.array:
    """The inverse of `reordered`."""
    out, rank = rows_OR.shape
    return rows_OR.reshape(heads, out // heads // 2, 2, rank).swapaxes(1, 2).reshape(out, rank)


def turned(b_OR: mx.array, module: str, config: Mapping[str, Any], turn: Any) -> mx.array:
    """lora_B with its rows turned where the architecture wants it."""
    inside = re.sub(r"^model\.layers\.\d+\.", "", module)
    heads = heads_of(config).get(inside)
    if heads is None or not ARCHITECTURES[config["model_type"]].reordered:
        return b_OR
    return turn(b_OR, heads)


def write(trained: Trained, path: Path, config: Mapping[str, Any]) -> None:
    """The adapter as one GGUF file. `config` is the base's config.json.

    One alpha serves all: where a module's rank is smaller, its lora_B is made smaller to match.
    """
    tensors = {}
    for module, factors in trained.modules.items():
        name = tensor_name(module)
        b_OR = turned(factors.lora_b_RO.T, module, config, reordered)
        tensors[f"{name}.weight.lora_a"] = mx.contiguous(factors.lora_a_IR.T.astype(mx.float32))
        fitted = b_OR.astype(mx.float32) * (rank_of(factors) / trained.rank)
        tensors[f"{name}.weight.lora_b"] = mx.contiguous(fitted)
    metadata: dict[str, Any] = {
        "general.architecture": ARCHITECTURES[config["model_type"]].name,
        "general.type": "adapter",
        "general.alignment": mx.array(ALIGNMENT, mx.uint32),
        "adapter.type": "lora",
        ALPHA: mx.array(trained.scale * trained.rank, mx.float32),
    }
    with atomically(path) as part:
        mx.save_gguf(str(part), tensors, metadata)


def read(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Factors], float]:
    """What llama.cpp would compute from the file: factors by module, with their scale, and 1."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    stored, metadata = loaded
    alpha = float(metadata[ALPHA].item())
    found = {}
    for name in stored:
        tensor, _, factor = name.rpartition(".weight.")
        if factor != "lora_a":
            continue
        module, a_RI = module_name(tensor), stored[name]
        b_OR = turned(stored[f"{tensor}.weight.lora_b"], module, config, restored)
        scale = alpha / a_RI.shape[0] if alpha else 1.0
        found[module] = Factors(a_RI.T, scale * b_OR.T)
    return found, 1.0
