"""From hidden states to log-probabilities, the vocabulary met by a few tokens at a time.

All that a loss needs of the logits is one slope of the log-probability per token and hidden unit.
It is taken in the forward pass, chunk by chunk, and the logits are let go: neither pass holds more
of them than one chunk, and nothing is computed twice.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_lora import cpu
from mlx_lora.numerics import token_scores
from mlx_lora.recompute import untraced

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
    gradient: bool = True,
) -> tuple[mx.array, mx.array]:
    """Log-probabilities [N] of the targets and entropies [N] there, in nats.

    Differentiable in `hidden_ND` through the log-probabilities, unless told that nobody asks. What
    trains inside the head itself gets no gradient.
    """
    still_ND, rows = mx.stop_gradient(hidden_ND), rows_of_a_chunk(vocabulary)
    found: list[tuple[mx.array, ...]] = []
    for start in range(0, len(targets_N), rows):
        part = slice(start, start + rows)
        made = chunk(head, still_ND[part], targets_N[part], temperature, gradient)
        found.append(tuple(map(untraced, made)))
        del made  # and with it the logits
    # what is evaluated inside a trace, and computed from what it follows, stays until it ends:
    # hence copies, of the few numbers that are needed
    logps_N, entropy_N, *slopes = (mx.concatenate(parts) for parts in zip(*found, strict=True))
    if slopes:  # zero in value, and its gradient is the slope
        logps_N = logps_N + ((hidden_ND - still_ND) * slopes[0]).sum(axis=-1)
    return logps_N, entropy_N


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

        return summed(logits_NV), (logps_N, entropy_N)

    if not gradient:
        return token_scores(logits_of(hidden_ND), targets_N)[:2]
    (_, found), slopes_ND = mx.value_and_grad(total)(hidden_ND)
    return *found, slopes_ND
