"""The two sides of a comparison: the same model with its adapter off and on, or two models."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapter.attach import switched_off
from mlx_lora.errors import ConfigError
from mlx_lora.models import Loaded, encode_prompt, new_cache, split_head, vocabulary_size

CHUNK = 256  # positions of a long text that run at a time


@dataclass(frozen=True)
class Side:
    """A model as one side of the comparison sees it."""

    loaded: Loaded
    off: bool = False  # its adapter switched off

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @contextlib.contextmanager
    def entered(self) -> Iterator[nn.Module]:
        """Inside, the model computes this side."""
        with switched_off(self.model) if self.off else contextlib.nullcontext():
            yield self.model


def refuse_other_tokens(a: Side, b: Side) -> None:
    """ConfigError unless both sides read text as the same tokens and have as many of them."""
    if a.loaded is b.loaded:
        return
    problems = []
    if (v := vocabulary_size(a.model)) != (w := vocabulary_size(b.model)):
        problems.append(f"their logits are {v} and {w} tokens wide")
    text = "The answer is 42 = 7 * 6.\nNaïve café, 東京, {}()"
    if a.loaded.tokenizer.encode(text) != b.loaded.tokenizer.encode(text):
        problems.append("their tokenizers cut the same text differently")
    if problems:
        raise ConfigError(
            f"{a.loaded.name} and {b.loaded.name} cannot be compared token by token: "
            + ", ".join(problems),
            "Compare a model with its own fused, quantized or fine-tuned versions.",
        )


def same_prompts(a: Side, b: Side) -> bool:
    """True where a prompt reaches both sides as the same tokens, chat template included."""
    if a.loaded is b.loaded:
        return True
    prompt = "What is 7 * 6 ?"
    return encode_prompt(a.loaded.tokenizer, prompt) == encode_prompt(b.loaded.tokenizer, prompt)


class Reader:
    """Logits of a block of texts for one side, CHUNK positions after CHUNK, in float32.

    A text of more positions than CHUNK runs through a cache, so that its logits are never all
    there. Nothing is kept: the caller holds the only reference.
    """

    def __init__(self, side: Side, ids_NT: mx.array) -> None:
        self.side, self.ids_NT = side, ids_NT
        self.cache: list[Any] | None = new_cache(side.model) if ids_NT.shape[1] > CHUNK else None

    def at(self, start: int) -> mx.array:
        """[N, t, V] of the positions from `start` on. Call with 0, CHUNK, 2·CHUNK ... in order."""
        part_Nt = self.ids_NT[:, start : start + CHUNK]
        with self.side.entered() as model:
            if self.cache is None:
                found = model(part_Nt)
            else:
                split = split_head(model)
                found = split.head(split.body(part_Nt, cache=self.cache))
            found = found.astype(mx.float32)
            mx.eval(found)
        return found
