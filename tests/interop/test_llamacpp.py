"""The GGUF adapter in llama.cpp says what MLX says: same greedy tokens, at any strength."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora import models
from mlx_lora.ship.formats import FORMATS, Target
from mlx_lora.ship.switch import Adapters
from mlx_lora.ship.trained import read
from tests.interop import gguf_base, llama
from tests.interop.bases import adapter, lively
from tests.tiny import COMMON

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(llama.backend() is None, reason="no Python package of llama.cpp"),
]
COUNT = 12
GAPS = {"gemma": 2e-3}  # an input that is rounded the other way to 16 bits
PROMPTS = [[3 + (7 * p + 5 * i * i) % 90 for i in range(3 + p % 6)] for p in range(20)]
QUESTIONS = [f"Numbers: {a} {b} 5. Target: {a + b}." for a in range(7, 17) for b in (11, 23)]


def gelu_of_ggml(x: mx.array) -> mx.array:
    """GELU's tanh form through 16-bit floats; mlx-lm's gemma computes the exact one."""
    half = nn.gelu_approx(x.astype(mx.float16).astype(mx.float32))
    half = half.astype(mx.float16).astype(mx.float32)
    return mx.where(x <= -10, 0, mx.where(x >= 10, x, half))


def ours(loaded, prompts, count=COUNT):
    """Greedy by full forwards: no cache, no sampler."""

    def continued(ids):
        found = []
        for _ in range(count):
            logits = models.logits(loaded.model, mx.array([[*ids, *(t for t, _ in found)]]))
            found.append(llama.likeliest(np.array(logits[0, -1])))
        return found

    return [continued(ids) for ids in prompts]


def agree(theirs, mine, what, gap=1e-4):
    """Every token equal, and log-probabilities within a gap, which is said."""
    tokens = [[[t for t, _ in row] for row in side] for side in (theirs, mine)]
    assert tokens[0] == tokens[1]
    told = [np.array([[p for _, p in row] for row in side]) for side in (theirs, mine)]
    found = np.abs(told[0] - told[1]).max()
    print(
        f"{llama.backend()}: {what}: {len(theirs)} prompts equal, log-probabilities to {found:.1e}"
    )
    assert found < gap
    return tokens[0]


def shipped(loaded, folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The base and the adapter for llama.cpp."""
    base = tmp_path / "base.gguf"
    gguf_base.write(loaded.model, loaded.config, base)
    out = tmp_path / "gguf"
    out.mkdir()
    FORMATS["gguf"].write(read(folder), Target(loaded, out, None))
    return base, out / "adapter.gguf"


@pytest.mark.parametrize("last_rank", [4, 3])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_greedy_tokens_are_equal_at_every_strength(architecture, last_rank, tmp_path, monkeypatch):
    monkeypatch.setattr(nn, "gelu", gelu_of_ggml)
    loaded = lively(architecture)
    folder = adapter(loaded, tmp_path / "adapter", last_rank=last_rank)
    base, file = shipped(loaded, folder, tmp_path)
    adapters, said = Adapters(loaded), {}
    adapters.load(folder, "a")
    for strength in (None, 1.0, 0.5):
        adapters.use("a" if strength else None, strength or 1.0)
        given = file if strength else None
        what = f"{architecture}, strength {strength or 'none'}"
        theirs = llama.greedy(base, PROMPTS, COUNT, given, strength or 1.0)
        said[strength] = agree(theirs, ours(loaded, PROMPTS), what, GAPS.get(architecture, 1e-4))
    assert said[None] != said[1.0] != said[0.5], "the adapter is heard, and so is its strength"
    assert len({t for row in said[1.0] for t in row}) > 10, "it says more than one thing"


def test_an_output_head_of_its_own_is_adapted(tmp_path, monkeypatch):
    monkeypatch.setitem(COMMON, "tie_word_embeddings", False)
    loaded = lively("qwen3")
    folder = adapter(loaded, tmp_path / "adapter", outside=("lm_head",))
    base, file = shipped(loaded, folder, tmp_path)
    before = agree(llama.greedy(base, PROMPTS, COUNT, None, 1.0), ours(loaded, PROMPTS), "untied")
    adapters = Adapters(loaded)
    adapters.use(adapters.load(folder))
    theirs = llama.greedy(base, PROMPTS, COUNT, file, 1.0)
    assert agree(theirs, ours(loaded, PROMPTS), "untied, lm_head adapted") != before


def test_the_embedded_model_says_the_same(tmp_path):
    loaded = models.load("demo")
    folder = adapter(loaded, tmp_path / "adapter")
    base, file = shipped(loaded, folder, tmp_path)
    adapters = Adapters(loaded)
    adapters.use(adapters.load(folder), 0.1)
    prompts = [list(models.encode_prompt(loaded.tokenizer, q)) for q in QUESTIONS]
    agree(llama.greedy(base, prompts, COUNT, file, 0.1), ours(loaded, prompts), "demo")
