"""How a token is drawn: its distribution, its log-probability, and the number that picks it."""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlx_lora.numerics import drawn, exp, log_softmax

BLOCK = 64  # uniform numbers drawn at once for a row
Drawer = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


def row_key(purpose: str, seed: int, step: int, prompt: int, member: int) -> str:
    """What a completion's randomness depends on, and all that it depends on."""
    return f"{purpose}/{seed}/{step}/{prompt}/{member}"


@lru_cache(maxsize=4096)  # asked for once a token by every row of a batch
def uniform_block(key: str, block: int) -> np.ndarray:
    """BLOCK numbers in [0, 1), float32, the same on any machine: 24 bits of a hash each.

    Blocks have keys of their own, so that no number depends on how many are drawn.
    """
    digest = hashlib.shake_128(f"{key}/{block}".encode()).digest(4 * BLOCK)
    return (np.frombuffer(digest, "<u4") >> 8).astype(np.float32) / np.float32(1 << 24)


def uniforms(keys: Sequence[str], places: Sequence[int]) -> np.ndarray:
    """The uniform number [B] of each row's next token, by its key and its place in the row."""
    pairs = zip(keys, places, strict=True)
    return np.array([uniform_block(k, t // BLOCK)[t % BLOCK] for k, t in pairs], np.float32)


def drawer_of(temperature: float, top_p: float = 1.0, top_k: int = 0) -> Drawer:
    """(logits [B, V], uniforms [B]) -> drawn ids [B] and their log-probabilities [B], in nats.

    Temperature 0 is greedy; its log-probabilities are those at temperature 1.
    """

    def greedy(logits_BV: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        ids_B = mx.argmax(logits_BV, axis=-1)
        return ids_B, pick(log_softmax(logits_BV), ids_B)

    def inverse_cdf(logits_BV: mx.array, uniform_B: mx.array) -> tuple[mx.array, mx.array]:
        if top_p == 1 and not top_k:
            return drawn(logits_BV if temperature == 1 else logits_BV / temperature, uniform_B)
        return drawn(sampling_logps(logits_BV, temperature, top_p, top_k), uniform_B)

    return greedy if temperature == 0 else inverse_cdf


def sampling_logps(
    logits_BV: mx.array, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> mx.array:
    """Log-probabilities of what is sampled: temperature, then top-k, then top-p."""
    logps_BV = log_softmax(logits_BV / temperature)
    if 0 < top_k < logits_BV.shape[-1]:
        floor_B1 = mx.sort(logps_BV, axis=-1)[:, -top_k][:, None]
        logps_BV = log_softmax(mx.where(logps_BV < floor_B1, -mx.inf, logps_BV))
    if top_p < 1:
        order = mx.argsort(-logps_BV, axis=-1)
        sorted_BV = mx.take_along_axis(exp(logps_BV), order, axis=-1)
        before_BV = mx.cumsum(sorted_BV, axis=-1) - sorted_BV
        out_BV = mx.put_along_axis(mx.zeros_like(before_BV), order, before_BV, axis=-1) >= top_p
        logps_BV = log_softmax(mx.where(out_BV, -mx.inf, logps_BV))
    return logps_BV


def pick(logps_BV: mx.array, ids_B: mx.array) -> mx.array:
    return mx.take_along_axis(logps_BV, ids_B[..., None], axis=-1)[..., 0]
