"""Tiny models that say something, and adapters of several ranks on them."""

import re
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map_with_path

from mlx_lora import models
from mlx_lora.adapter import files
from tests.tiny import COMMON, tiny

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALIKE = {"mistral": "llama"}  # mlx-lm runs the one as the other
LOUD = 6.0  # a tied model of small random weights only repeats what it was told


def lively(architecture: str) -> models.Loaded:
    """A tiny model whose layers outweigh its embeddings, and whose norms are no ones."""
    model = tiny(ALIKE.get(architecture, architecture))
    mx.random.seed(1)

    def louder(name: str, value: mx.array) -> mx.array:
        if "norm" in name:
            return value + 0.3 * mx.random.normal(value.shape)
        return value if "embed" in name else LOUD * value

    model.update(tree_map_with_path(louder, model.parameters()))
    mx.eval(model.parameters())
    config = {"model_type": architecture, **COMMON}
    return models.Loaded(model, None, config, architecture, Path(architecture), False)


def adapter(
    loaded: models.Loaded,
    folder: Path,
    *,
    last_rank: int = 4,
    dora: bool = False,
    outside: tuple[str, ...] = (),
) -> Path:
    """Random factors on every projection of the model, of another rank in the last one.

    `outside`: on the output head or the embeddings too.
    """
    mx.random.seed(2)
    tensors, keys = {}, {}
    for name, layer in loaded.model.named_modules():
        short = name.rpartition(".")[2]
        if short not in (*PROJECTIONS, *outside):
            continue
        out, width = layer.weight.shape[0], models.in_dims(layer)
        if short == "embed_tokens":
            out, width = width, out
        rank = last_rank if short == PROJECTIONS[-1] else 4
        tensors[f"{name}.lora_a"] = mx.random.normal((width, rank)) / width**0.5
        tensors[f"{name}.lora_b"] = mx.random.normal((rank, out)) / 2
        if dora:
            m = mx.linalg.norm(models.dense_weight(layer), axis=1)
            tensors[f"{name}.m"] = m * (1 + 0.2 * mx.random.normal(m.shape))
        keys[re.sub(r"^model\.layers\.\d+\.", "", name)] = None
    parameters = {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": list(keys)}
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}
    files.write(config, tensors, folder)
    return folder
