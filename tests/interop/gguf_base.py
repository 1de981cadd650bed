"""A tiny model of mlx-lm's as a GGUF file in float32: the base that llama.cpp runs in the tests.

Written from llama.cpp's own names, and not with the code under test.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.models import dense_weight

ARCHITECTURES = {"llama": "llama", "mistral": "llama"}  # others are called alike
END = 2  # the token that llama.cpp calls the end, and is told never to choose
INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def interleaved(rows: mx.array, heads: int) -> mx.array:
    """Row h + 2i of a head is row i of its first half, row h + 2i + 1 of its second."""
    half = rows.shape[0] // heads // 2
    order = [
        head * 2 * half + part * half + i
        for head in range(heads)
        for i in range(half)
        for part in (0, 1)
    ]
    return rows[mx.array(order)]


def write(model: Any, config: Mapping[str, Any], path: Path) -> None:
    """Weights, shapes and a vocabulary of words that no text needs: prompts are token ids."""
    name = ARCHITECTURES.get(config["model_type"], config["model_type"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for key, layer in model.named_modules():
        if "weight" not in layer:
            continue
        tensor = name_of(key.removeprefix("model."))
        for kind in {"weight", "bias"} & layer.keys():
            value = dense_weight(layer) if kind == "weight" else layer.bias
            if name == "llama" and (count := heads.get(tensor.rpartition(".")[2])):
                value = interleaved(value, count)
            if name == "gemma" and tensor.endswith("norm"):
                value = value + 1
            tensors[f"{tensor}.{kind}"] = mx.contiguous(value.astype(mx.float32))
    mx.save_gguf(str(path), tensors, metadata(name, config))


def name_of(module: str) -> str:
    if not module.startswith("layers."):
        return OUTSIDE[module]
    _, block, inside = module.split(".", 2)
    return f"blk.{block}.{INSIDE[inside]}"


def metadata(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    count, width = config["vocab_size"], config["hidden_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    numbers = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": width,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "vocab_size": count,
    }
    special = {"bos": 1, "eos": END, "unknown": 0}
    return {
        "general.architecture": name,
        "general.name": "tiny",
        "general.alignment": mx.array(32, mx.uint32),
        **{f"{name}.{k}": mx.array(v, mx.uint32) for k, v in numbers.items()},
        f"{name}.attention.layer_norm_rms_epsilon": mx.array(config["rms_norm_eps"], mx.float32),
        f"{name}.rope.freq_base": mx.array(config["rope_theta"], mx.float32),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, count))],
        "tokenizer.ggml.scores": mx.array([-float(i) for i in range(count)], mx.float32),
        "tokenizer.ggml.token_type": mx.array([2, 3, 3] + [1] * (count - 3), mx.int32),
        **{f"tokenizer.ggml.{k}_token_id": mx.array(v, mx.uint32) for k, v in special.items()},
        "tokenizer.ggml.add_bos_token": mx.array(False),
    }
