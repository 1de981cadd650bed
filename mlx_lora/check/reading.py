"""Both sides read the same texts: six numbers for every token, and what they come to.

Logits are met one chunk at a time: the peak is two chunks [1, 256, V] and a few rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlx_lora.check.probes import Probes
from mlx_lora.check.sides import CHUNK, Reader, Side
from mlx_lora.models import pad_right, vocabulary_size
from mlx_lora.numerics import entropy, exp, log_softmax

BLOCK_FLOATS = 1 << 22  # logits of several short texts that run together: 16 MB, or one chunk
ROW_FLOATS, ROWS = 1 << 19, 8  # logits of the rows compared at a time: 2 MB, or so many rows
COLUMNS = ("kl", "agree", "nll_base", "nll_adapted", "entropy_base", "entropy_adapted")
RESAMPLES = 1000


@dataclass(frozen=True)
class Block:
    """Texts that run together. Shapes: N texts, T positions, right-padded."""

    ids_NT: mx.array
    targets_NT: np.ndarray  # the token after each position
    scored_NT: np.ndarray  # True where that token counts
    texts_N: np.ndarray  # which texts they are

    @property
    def starts(self) -> range:
        return range(0, self.ids_NT.shape[1], CHUNK)


@dataclass(frozen=True)
class Reading:
    """Every scored token: its text, its position there, and COLUMNS. K tokens."""

    text_K: np.ndarray
    position_K: np.ndarray
    columns_CK: np.ndarray
    base_prints: list[str]
    adapted_prints: list[str]

    def column(self, name: str) -> np.ndarray:
        return self.columns_CK[COLUMNS.index(name)]

    def mean(self, name: str) -> float:
        return float(self.column(name).mean())


def blocks_of(probes: Probes, vocabulary: int) -> list[Block]:
    """Texts of similar length together, so that logits stay small and padding rare."""
    found: list[Block] = []
    order = sorted(range(len(probes.texts)), key=lambda i: len(probes.texts[i][0]))
    positions = max(CHUNK, BLOCK_FLOATS // vocabulary)
    while order:
        longest = len(probes.texts[order[0]][0])
        count = 1
        while count < len(order):
            longest = len(probes.texts[order[count]][0])
            if longest * (count + 1) > positions:
                break
            count += 1
        mine, order = order[:count], order[count:]
        ids_NT, _ = pad_right([probes.texts[i][0] for i in mine])
        at_T = np.arange(ids_NT.shape[1])
        scored = [
            (at_T >= start - 1) & (at_T < len(ids) - 1)
            for ids, start in (probes.texts[i] for i in mine)
        ]
        targets_NT = np.roll(np.array(ids_NT), -1, 1)
        found.append(Block(ids_NT, targets_NT, np.stack(scored), np.array(mine)))
    return found


def fingerprint(side: Side, probes: Probes) -> list[str]:
    """Hashes of the logits of every chunk: taken before attaching, compared after."""
    vocabulary = vocabulary_size(side.model)
    prints = []
    for block in blocks_of(probes, vocabulary):
        reader = Reader(side, block.ids_NT)
        prints += [digest(reader.at(start)) for start in block.starts]
    return prints


def digest(array: mx.array) -> str:
    """Of the numbers in memory, without a copy where they lie in one piece."""
    array = mx.contiguous(array)
    mx.eval(array)
    return hashlib.blake2b(np.array(array, copy=False).data, digest_size=16).hexdigest()


def read_both(base: Side, adapted: Side, probes: Probes) -> Reading:
    """Both sides read every text, chunk by chunk in step."""
    vocabulary = vocabulary_size(base.model)
    texts, positions, columns, base_prints, adapted_prints = [], [], [], [], []
    for block in blocks_of(probes, vocabulary):
        readers = Reader(base, block.ids_NT), Reader(adapted, block.ids_NT)
        for start in block.starts:
            p_NtV, q_NtV = (reader.at(start) for reader in readers)
            base_prints.append(digest(p_NtV))
            adapted_prints.append(digest(q_NtV))
            row_K, at_K = np.nonzero(block.scored_NT[:, start : start + CHUNK])
            targets_K = block.targets_NT[row_K, at_K + start]
            places_K = row_K * p_NtV.shape[1] + at_K
            columns.append(compared(p_NtV, q_NtV, places_K, targets_K))
            texts.append(block.texts_N[row_K])
            positions.append(at_K + start)
            del p_NtV, q_NtV
    return Reading(
        np.concatenate(texts),
        np.concatenate(positions),
        np.concatenate(columns, axis=1),
        base_prints,
        adapted_prints,
    )


def surprise(side: Side, probes: Probes) -> dict[str, float]:
    """Means over the scored tokens for one side alone: `nll` and `entropy`, in nats."""
    nll, uncertainty = [], []
    for block in blocks_of(probes, vocabulary_size(side.model)):
        reader = Reader(side, block.ids_NT)
        for start in block.starts:
            logits_NtV = reader.at(start)
            row_K, at_K = np.nonzero(block.scored_NT[:, start : start + CHUNK])
            targets_K = mx.array(block.targets_NT[row_K, at_K + start])
            places_K = mx.array(row_K * logits_NtV.shape[1] + at_K)
            logps_KV = log_softmax(logits_NtV.reshape(-1, logits_NtV.shape[-1])[places_K])
            nll.append(-np.array(mx.take_along_axis(logps_KV, targets_K[:, None], axis=-1)[:, 0]))
            uncertainty.append(np.array(entropy(logps_KV)))
    return {
        "nll": float(np.concatenate(nll).mean()),
        "entropy": float(np.concatenate(uncertainty).mean()),
    }


def compared(
    p_NtV: mx.array, q_NtV: mx.array, places_K: np.ndarray, targets_K: np.ndarray
) -> np.ndarray:
    """COLUMNS at these places of the flattened chunk, a few rows at a time."""
    vocabulary = p_NtV.shape[-1]
    step = max(ROWS, ROW_FLOATS // vocabulary)
    edges = [*range(0, len(places_K), step), len(places_K)]
    flat = [x.reshape(-1, vocabulary) for x in (p_NtV, q_NtV)]
    found = []
    for start, stop in pairwise(edges):
        places, targets = mx.array(places_K[start:stop]), mx.array(targets_K[start:stop])
        p_kV, q_kV = (log_softmax(x[places]) for x in flat)
        rows = [
            mx.maximum((exp(p_kV) * (p_kV - q_kV)).sum(axis=-1), 0),  # below 0 by rounding alone
            (mx.argmax(p_kV, axis=-1) == mx.argmax(q_kV, axis=-1)).astype(mx.float32),
            *(-mx.take_along_axis(x, targets[:, None], axis=-1)[:, 0] for x in (p_kV, q_kV)),
            *(entropy(x) for x in (p_kV, q_kV)),
        ]
        found.append(np.array(mx.stack(rows)))
    return np.concatenate(found, axis=1) if found else np.empty((len(COLUMNS), 0))


def intervals(reading: Reading, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % intervals of the means over texts: a paired bootstrap that draws whole texts."""
    texts = np.unique(reading.text_K)
    sums_CN = np.stack([np.bincount(reading.text_K, row)[texts] for row in reading.columns_CK])
    counts_N = np.bincount(reading.text_K)[texts]
    rng = np.random.default_rng(seed)
    draws_SN = rng.multinomial(len(texts), np.full(len(texts), 1 / len(texts)), RESAMPLES)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        means_CS = (sums_CN @ draws_SN.T) / (counts_N @ draws_SN.T)
        kl, agree, nll_base, nll_adapted, entropy_base, entropy_adapted = means_CS
        found = {
            "kl_mean": kl,
            "top1_agreement": agree,
            "perplexity_ratio": np.exp(nll_adapted - nll_base),
            "entropy_ratio": entropy_adapted / entropy_base,
        }
        edges = {name: np.quantile(x, (0.025, 0.975)) for name, x in found.items()}
    return {name: (float(low), float(high)) for name, (low, high) in edges.items()}


def by_text(reading: Reading, texts: Sequence[object]) -> dict[str, list[float | None]]:
    """Mean of every column for each text; null for a text with no scored token."""
    counts = np.bincount(reading.text_K, minlength=len(texts))
    found: dict[str, list[float | None]] = {}
    for name in COLUMNS:
        sums = np.bincount(reading.text_K, reading.column(name), minlength=len(texts))
        found[name] = [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]
    return found
