"""Scores of tokens straight from hidden states, where the head is one product (see cpu.py).

Logits of a few tokens at a time stay in NumPy, in each thread's own cache, and are gone when their
scores and the gradient are known.
"""

from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora import cpu
from mlx_lora.cpu_layers import LARGE, SILENT, WEIGHTY, dense, joined, view
from mlx_lora.cpu_math import token_scores
from mlx_lora.cpu_threads import slices, spread
from mlx_lora.models import in_dims, new_cache, split_head, vocabulary_size

PIECE, ROWS = 1 << 20, 32  # bytes of logits that are made at once, and of how many tokens at least
SIZES = (1.0, 100.0)  # of the hidden states that a head is tried on: some cap what is large


def layer_of(model: nn.Module) -> Any | None:
    """The frozen layer whose product is all of the model's head; None if there is more to it.

    It is tried on a few hidden states, and the answer is remembered on the model.
    """
    if not cpu.fast():
        return None
    if "_head_layer" not in model.__dict__:
        model.__dict__["_head_layer"] = next(filter(None, map(tried(model), outputs(model))), None)
    layer = dict(model.named_modules()).get(model.__dict__["_head_layer"])
    return layer if type(layer) in WEIGHTY else None


def outputs(model: nn.Module) -> list[str]:
    """Names of layers from hidden states to as many as the vocabulary has, embeddings last."""
    size, split = vocabulary_size(model), split_head(model)
    if split.body is model:
        return []
    width = split.body(mx.array([[0]]), cache=new_cache(model)).shape[-1]
    found = [(n, m) for n, m in model.named_modules() if type(m) in WEIGHTY and "bias" not in m]
    wide = [(n, m) for n, m in found if (m.weight.shape[0], in_dims(m)) == (size, width)]
    return [name for name, _ in sorted(wide, key=lambda pair: hasattr(pair[1], "as_linear"))]


def tried(model: nn.Module) -> Any:
    """A function of a layer's name, that gives it back if that layer is the head."""
    split, modules = split_head(model), dict(model.named_modules())

    def name_if_head(name: str) -> str | None:
        layer, known = modules[name], "_dense" in modules[name].__dict__
        hidden_ND = mx.random.normal((3, in_dims(layer)), key=mx.random.key(0))
        weight_VD, asked = dense(layer), [size * hidden_ND for size in SIZES]
        if weight_VD.dtype == mx.float32 and all(
            mx.allclose(split.head(x), x @ weight_VD.T, rtol=1e-4, atol=1e-4 * size).item()
            for x, size in zip(asked, SIZES, strict=True)
        ):
            return name
        if not known:
            layer.__dict__.pop("_dense", None)
        return None

    return name_if_head


def scores(
    hidden_ND: mx.array, layer: Any, targets_N: mx.array, temperature: float, *, gradient: bool
) -> tuple[mx.array, mx.array]:
    """See vocabulary.score_tokens. Without `gradient` nothing is made for the way back."""
    weight_VD, all_N, kept = view(dense(layer)), view(targets_N), {}

    @mx.custom_function
    def scored(hidden_ND):
        x_ND = view(hidden_ND)
        count = max(ROWS, PIECE // (4 * len(weight_VD)))

        def part(rows: slice) -> list[tuple[np.ndarray, ...]]:
            starts = range(rows.start, rows.stop, count)
            pieces = [slice(start, min(start + count, rows.stop)) for start in starts]
            return [
                of_piece(x_ND[p], weight_VD, all_N[p], temperature, gradient=gradient)
                for p in pieces
            ]

        parts = spread(part, slices(len(x_ND), -(-LARGE // len(weight_VD))))
        logps_N, entropy_N, *slopes = map(joined, zip(*chain(*parts), strict=True))
        kept["slopes"] = slopes
        return mx.array(logps_N), mx.array(entropy_N)

    @scored.vjp
    def scored_vjp(primals, cotangents, outputs):
        (slopes_ND,) = kept.pop("slopes")
        return mx.array(slopes_ND * view(cotangents[0])[:, None])

    made: Any = scored(hidden_ND)
    return made[0], made[1]


@SILENT
def of_piece(
    x_ND: np.ndarray,
    weight_VD: np.ndarray,
    targets_N: np.ndarray,
    temperature: float,
    *,
    gradient: bool,
) -> tuple[np.ndarray, ...]:
    """Log-probabilities [N], entropies [N] and, if wanted, d logp / d hidden [N, D]."""
    logits_NV = x_ND @ weight_VD.T
    if temperature != 1:
        logits_NV /= np.float32(temperature)
    found = token_scores(logits_NV, targets_N, gradient=gradient)
    if not gradient:
        return found
    slopes_ND = found[2] @ weight_VD
    if temperature != 1:
        slopes_ND /= np.float32(temperature)
    return *found[:2], slopes_ND
