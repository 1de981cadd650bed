"""The check works on many kinds of model: a harmless start passes, a ruined one does not."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora import models
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.check import gate
from mlx_lora.check.probes import Probes
from tests.tiny import ByteTokenizer
from tests.zoo import build, known

NAMES = [
    "llama", "llama untied", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2",
    "cohere2", "starcoder2", "gpt2", "gpt_neox", "granite", "mixtral", "qwen3_moe", "olmoe",
    "mamba2", "lfm2", "falcon_h1", "jamba",
]  # fmt: skip
PROBES = Probes([([5, 17, 3, 44, 60, 2, 9, 31], 1), ([8, 1, 70, 12, 77, 4], 2)], ["abc", "xyz"])


@pytest.mark.parametrize("name", NAMES)
def test_a_start_passes_and_ruin_fails(name):
    if not known(name):
        pytest.skip(f"this mlx-lm has no {name}")
    model = build(name)
    config = {"max_position_embeddings": 64}
    loaded = models.Loaded(model, ByteTokenizer(), config, name, Path(name), False)
    prints = gate.fingerprint(loaded, PROBES)
    attach(model, rank=2)
    sound = gate.judge(loaded, PROBES, prints, "same", "zero", 0.0, 0)
    assert sound.verdict == "pass", sound.reasons
    assert sound.measured.bitwise_identical and sound.measured.sensitive
    for layer in lora_layers(model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(0))
        layer.scale = 50.0
    ruined = gate.judge(loaded, PROBES, prints, "same", "gaussian (loud)", 0.0, 0)
    assert ruined.verdict == "fail"
    assert ruined.measured.off_restores_base
