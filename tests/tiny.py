"""Tiny random models of several architectures, for mechanics; the embedded model is for meaning."""

import importlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import models

WIDTH = 128
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3")


def tiny(architecture: str = "llama", *, bits: int | None = None, dtype=mx.float32, seed: int = 0):
    """A frozen two-layer model, optionally packed."""
    mx.random.seed(seed)
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    extra = {"gemma2": {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 50.0}}
    arguments = {"model_type": architecture, **COMMON, **extra.get(architecture, {})}
    model = module.Model(module.ModelArgs.from_dict(arguments))
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


IDS = [[5, 17, 3, 44, 60, 2, 9, 31], [8, 1, 90, 12, 77, 4, 4, 50]]


class ByteTokenizer:
    """Bytes as tokens, folded into a tiny vocabulary: enough for calibration texts."""

    eos_token_ids = (1,)
    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [2 + byte % 90 for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def tiny_loaded(architecture: str = "llama", **options) -> models.Loaded:
    """A tiny model as `models.load` would return it."""
    config = {"model_type": architecture, "max_position_embeddings": 256}
    model = tiny(architecture, **options)
    return models.Loaded(model, ByteTokenizer(), config, "tiny", Path("tiny"), False)
