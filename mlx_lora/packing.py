"""Several texts in one row, each learnt as if it were alone.

mlx-lm's models ask a cache for their attention mask: this one answers with a mask that is causal
inside each text and empty between them. Positions run on over the row, which a model with rotary
positions does not see. Both are tried on real rows before training: `refuse_unfit`.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import _BaseCache

from mlx_lora.errors import ModelError
from mlx_lora.models import logits, plain_cache

TOLERANCE = 1e-3  # of logits, relative to their largest


class Apart(_BaseCache):
    """Stands for a layer's empty cache, and keeps the texts of a row apart."""

    offset = 0

    def __init__(self, mask_B1TT: mx.array) -> None:
        self.mask_B1TT = mask_B1TT

    def make_mask(self, *_: Any, window_size: int | None = None, **__: Any) -> mx.array:
        mask_B1TT = self.mask_B1TT
        if window_size is not None:
            at_T = mx.arange(mask_B1TT.shape[-1])
            mask_B1TT = mask_B1TT & (at_T[:, None] < at_T[None] + window_size)
        return mask_B1TT

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def __bool__(self) -> bool:
        return True


def apart(model: nn.Module, segments_BT: mx.array) -> list[Apart]:
    """A cache for each layer in which a token sees those before it of its own segment only."""
    same_B1TT = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    at_T = mx.arange(segments_BT.shape[1])
    mask_B1TT = same_B1TT & (at_T[:, None] >= at_T[None])
    return [Apart(mask_B1TT) for _ in range(layer_count(model))]


def layer_count(model: nn.Module) -> int:
    """How many caches the model wants."""
    from mlx_lora.models import new_cache

    return len(new_cache(model))


def refuse_unfit(model: nn.Module, ids: Sequence[Sequence[int]]) -> None:
    """ModelError unless these texts have the logits in one row that they have alone."""
    problem = "keeps other state than keys and values"
    if plain_cache(model):
        joined = [i for text in ids for i in text]
        numbers = [n for n, text in enumerate(ids) for _ in text]
        try:
            cache = apart(model, mx.array([numbers]))
            together = model(mx.array([joined]), cache=cache)[0].astype(mx.float32)
        except Exception as error:  # any signature we do not know
            problem = f"does not take an attention mask: {error}"
        else:
            alone = mx.concatenate([logits(model, mx.array([list(text)]))[0] for text in ids])
            far = float(mx.abs(together - alone).max() / mx.abs(alone).max())
            if far <= TOLERANCE:
                return
            problem = f"reads a text differently behind another (logits off by {far:.1%})"
    raise ModelError(f"sft.packing: this model {problem}", "Leave sft.packing out.")
