"""From hidden states to log-probabilities, the vocabulary met by a few tokens at a time.

All that a loss needs of the logits is one slope of the log-probability per token and hidden unit.
It is taken in the forward pass, chunk by chunk, and the logits are let go: neither pass holds more
of them than one chunk, and nothing is computed twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import cpu, cpu_head
from mlx_lora.models import vocabulary_size
from mlx_lora.numerics import entropy, log_softmax, token_scores
from mlx_lora.recompute import recomputed, untraced

# of float32 logits: on a CPU smaller ones cost no time; a GPU wants many rows at once
CHUNK_BYTES = {"cpu": 16 << 20, "gpu": 64 << 20}
Head = Callable[[mx.array], mx.array]  # hidden [N, D] -> logits [N, V]


def score_tokens(
    head: Head,
    hidden_ND: mx.array,
    targets_N: mx.array,
    temperature: float,
    vocabulary: int,
    *,
    layer: Any = None,
    gradient: bool = True,
) -> tuple[mx.array, mx.array]:
    """Log-probabilities [N] of the targets and entropies [N] there, in nats.

    Differentiable in `hidden_ND` through the log-probabilities, unless told that nobody asks; not
    in what learns inside the head. `layer` is what cpu_head.layer_of found.
    """
    if layer is not None and hidden_ND.dtype == mx.float32:
        return cpu_head.scores(hidden_ND, layer, targets_N, temperature, gradient=gradient)
    still_ND, rows = mx.stop_gradient(hidden_ND), rows_of_a_chunk(vocabulary)
    found: list[tuple[mx.array, ...]] = []
    for start in range(0, len(targets_N), rows):
        part = slice(start, start + rows)
        made = chunk(head, still_ND[part], targets_N[part], temperature, gradient)
        found.append(tuple(map(untraced, made)))
        del made  # and with it the logits
    # what is evaluated inside a trace, and computed from what it follows, stays until it ends:
    # hence copies, of the few numbers that are needed
    logps_N, entropy_N, *slopes = joined(found)
    if slopes:  # zero in value, and its gradient is the slope
        logps_N = logps_N + ((hidden_ND - still_ND) * slopes[0]).sum(axis=-1)
    return logps_N, entropy_N


def score_and_recompute(
    model: nn.Module, head: Head, hidden_ND: mx.array, targets_N: mx.array, temperature: float
) -> tuple[mx.array, mx.array]:
    """The same where the head itself learns: its chunks are made again on the way back."""

    def scored(hidden_ND: mx.array, targets_N: mx.array) -> tuple[mx.array, mx.array]:
        logps_NV = log_softmax(head(hidden_ND).astype(mx.float32) / temperature)
        logps_N1 = mx.take_along_axis(logps_NV, targets_N[:, None], axis=-1)
        return logps_N1[:, 0], entropy(logps_NV)

    rows = rows_of_a_chunk(vocabulary_size(model))
    found = [
        recomputed(model, scored, hidden_ND[start : start + rows], targets_N[start : start + rows])
        for start in range(0, len(targets_N), rows)
    ]
    logps_N, entropy_N = joined(found)
    return logps_N, entropy_N


def joined(found: Sequence[Sequence[mx.array]]) -> list[mx.array]:
    """What parts of the rows gave, as what all of them would have."""
    return [mx.concatenate(list(parts)) for parts in zip(*found, strict=True)]


def rows_of_a_chunk(vocabulary: int) -> int:
    """Tokens whose float32 logits fill CHUNK_BYTES."""
    return max(1, CHUNK_BYTES["cpu" if cpu.active() else "gpu"] // (4 * vocabulary))


def chunk(
    head: Head, hidden_ND: mx.array, targets_N: mx.array, temperature: float, gradient: bool
) -> tuple[mx.array, ...]:
    """Log-probabilities [N] and entropies [N]; with `gradient` also d logp / d hidden [N, D]."""

    def logits_of(hidden_ND: mx.array) -> mx.array:
        logits_NV = head(hidden_ND).astype(mx.float32)
        return logits_NV if temperature == 1 else logits_NV / temperature

    def total(hidden_ND: mx.array) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        logits_NV = logits_of(hidden_ND)
        logps_N, entropy_N, slopes_NV = token_scores(logits_NV, targets_N)

        @mx.custom_function
        def summed(logits_NV):
            return mx.zeros(())  # nobody reads it

        @summed.vjp
        def summed_vjp(primals, cotangent, output):
            return slopes_NV

        value: Any = summed(logits_NV)
        return value, (logps_N, entropy_N)

    if not gradient:
        return token_scores(logits_of(hidden_ND), targets_N)[:2]
    (_, (logps_N, entropy_N)), slopes_ND = mx.value_and_grad(total)(hidden_ND)
    return logps_N, entropy_N, slopes_ND
