"""What both sides of bench_rl.py work on: a random model, its tokenizer, prompts and a reward.

Imports nothing of ours, so that it runs in the peer's environment too.
"""

import json
import random
import zlib
from pathlib import Path
from typing import Any

OUTPUTS, RANK, SCALE, RATE = 1280, 8, 10.0, 1e-5
END, NEVER = OUTPUTS - 1, 4.0  # the end of a text, and how far its logit is pushed down
PROBLEMS, PROMPT_TOKENS = 256, 32
BITS = (4, 32)
ARGS = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": OUTPUTS,
    "rope_theta": 1e6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": END,
}
ROWS = "rows.jsonl"


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A hash of the text in [0, 1]: cheap, and no group has equal rewards."""
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


def prompts(count: int = PROBLEMS) -> list[str]:
    """Distinct prompts of PROMPT_TOKENS words."""
    rng = random.Random(0)
    return [" ".join(f"w{rng.randrange(END)}" for _ in range(PROMPT_TOKENS)) for _ in range(count)]


def save(folder: Path) -> dict[str, Any]:
    """A model folder for each of BITS (32: float32, not packed) and ROWS. Returns what it is."""
    about: dict[str, Any] = {}
    for bits in BITS:
        about[str(bits)] = save_model(model_folder(folder, bits), bits)
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts())
    (folder / ROWS).write_text(rows)
    return {"model": ARGS, "parameters": about, "prompt_tokens": PROMPT_TOKENS}


def model_folder(folder: Path, bits: int) -> Path:
    return folder / f"bits{bits}"


def save_model(folder: Path, bits: int) -> int:
    """Weights, config and tokenizer as mlx-lm reads them. Returns the number of weights.

    Every hidden state has a large first channel, in which the embedding of END has the other sign:
    it is never drawn, and every completion has its full length.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models.qwen3 import Model, ModelArgs

    folder.mkdir(parents=True)
    mx.random.seed(0)
    model, config = Model(ModelArgs.from_dict(ARGS)), dict(ARGS)
    e_VD = model.model.embed_tokens.weight
    e_VD[:, 0] = mx.where(mx.arange(OUTPUTS) == END, -NEVER, NEVER)
    model.model.embed_tokens.weight = e_VD
    count = sum(value.size for _, value in tree_flatten(model.parameters()))
    if bits < 32:
        nn.quantize(model, group_size=64, bits=bits)
        config["quantization"] = {"group_size": 64, "bits": bits}
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    return count


def save_tokenizer(folder: Path) -> None:
    """One token a word: w0, w1 ..., the last one ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(END)} | {"<end>": END}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
