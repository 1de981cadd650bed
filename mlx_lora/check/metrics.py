"""What is measured of base and adapted model on the same tokens. No thresholds here."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_lora.adapter.attach import lora_layers, switched_off
from mlx_lora.check.probes import Probes
from mlx_lora.generate import generate
from mlx_lora.models import Loaded, logits, pad_right, vocabulary_size
from mlx_lora.numerics import entropy, exp, log_softmax
from mlx_lora.types import Rollout

BLOCK_ROWS = 16  # texts that run together ...
BLOCK_FLOATS = 64_000_000  # ... fewer where their logits would take more than a quarter of a GB


@dataclass(frozen=True)
class SamplePair:
    """One prompt continued twice with the same random numbers."""

    prompt: str
    base: str
    adapted: str


@dataclass(frozen=True)
class Measured:
    """Base against attached model. Means are over scored tokens of the known-good texts."""

    bitwise_identical: bool  # logits of base and attached, on every text
    off_restores_base: bool  # the adapter switched off gives the base's logits, bitwise
    kl_mean: float  # KL(base || adapted) per token, nats, over the whole vocabulary
    kl_p99: float
    top1_agreement: float
    perplexity_base: float
    perplexity_adapted: float
    entropy_base: float  # of the next-token distribution, nats
    entropy_adapted: float
    vocabulary: int
    sample_nll_base: float  # the base's nats per token on its own samples ...
    sample_nll_adapted: float  # ... and on the adapted model's: garbled text is far more surprising
    distinct_base: float  # distinct bigrams over bigrams in the samples
    distinct_adapted: float
    ended_base: float  # share of samples that ended by themselves
    ended_adapted: float
    empty_adapted: float  # share of samples with no text at all
    b_norm: float  # Frobenius norm of all lora_b together; 0 means an untrained adapter
    non_finite: Sequence[str]  # modules with NaN or Inf in their factors
    dropout: float
    probes_hash: str  # of the texts' token ids and the prompts
    logits_base_hash: str  # of the float32 logits on every text
    logits_adapted_hash: str
    samples: Sequence[SamplePair] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """Texts that run together. Shapes: N texts, T positions, right-padded."""

    ids_NT: mx.array
    targets_NT: mx.array  # the token after each position
    scored_NT: np.ndarray  # True where that token counts


def blocks(probes: Probes, vocabulary: int) -> list[Block]:
    """Texts of similar length together, so that logits [N, T, V] stay small and padding rare."""
    found: list[Block] = []
    texts = sorted(probes.texts, key=lambda t: len(t[0]))
    while texts:
        rows = max(1, min(BLOCK_ROWS, BLOCK_FLOATS // (vocabulary * len(texts[0][0]))))
        mine, texts = texts[:rows], texts[rows:]
        ids_NT, _ = pad_right([ids for ids, _ in mine])
        at_T = np.arange(ids_NT.shape[1])
        scored = [(at_T >= start - 1) & (at_T < len(ids) - 1) for ids, start in mine]
        found.append(Block(ids_NT, mx.roll(ids_NT, -1, 1), np.stack(scored)))
    return found


def fingerprint(loaded: Loaded, probes: Probes) -> list[str]:
    """Hashes of the logits of every text: taken before attaching, compared after."""
    vocabulary = vocabulary_size(loaded.model)
    return [digest(logits(loaded.model, b.ids_NT)) for b in blocks(probes, vocabulary)]


def digest(array: mx.array) -> str:
    mx.eval(array)
    return hashlib.blake2b(np.array(array, copy=False).tobytes(), digest_size=16).hexdigest()


def digest_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def measure(
    loaded: Loaded, probes: Probes, base_prints: Sequence[str], *, sample_tokens: int, seed: int
) -> Measured:
    """Everything the gates look at.

    `base_prints` is the fingerprint of the model before attaching.
    """
    vocabulary = vocabulary_size(loaded.model)
    prints, restored, rows = [], [], []
    for block, base_print in zip(blocks(probes, vocabulary), base_prints, strict=True):
        with switched_off(loaded.model):
            base_NTV = logits(loaded.model, block.ids_NT)
            restored.append(digest(base_NTV) == base_print)
        adapted_NTV = logits(loaded.model, block.ids_NT)
        prints.append(digest(adapted_NTV))
        rows.append(compared(block, log_softmax(base_NTV), log_softmax(adapted_NTV)))
    kl, agree, nll_base, nll_adapted, entropy_base, entropy_adapted = np.concatenate(rows, axis=1)
    layers = lora_layers(loaded.model)
    return Measured(
        bitwise_identical=prints == list(base_prints),
        off_restores_base=all(restored),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(agree.mean()),
        perplexity_base=perplexity(nll_base.mean()),
        perplexity_adapted=perplexity(nll_adapted.mean()),
        entropy_base=float(entropy_base.mean()),
        entropy_adapted=float(entropy_adapted.mean()),
        vocabulary=vocabulary,
        b_norm=float(np.sqrt(sum((m.lora_b**2).sum().item() for m in layers.values()))),
        non_finite=[n for n, m in layers.items() if not is_finite(m)],
        dropout=max((1 - m.dropout._p_1 for m in layers.values()), default=0.0),
        probes_hash=digest_text(json.dumps([probes.texts, probes.prompts])),
        logits_base_hash=digest_text(" ".join(base_prints)),
        logits_adapted_hash=digest_text(" ".join(prints)),
        **sampling(loaded, probes.prompts, sample_tokens, seed),
    )


def compared(block: Block, p_NTV: mx.array, q_NTV: mx.array) -> np.ndarray:
    """Six numbers per scored token: KL, same top token, and surprise and entropy of both sides."""
    targets_NT1 = block.targets_NT[..., None]
    columns = [
        (exp(p_NTV) * (p_NTV - q_NTV)).sum(axis=-1),
        mx.argmax(p_NTV, axis=-1) == mx.argmax(q_NTV, axis=-1),
        *(-mx.take_along_axis(x, targets_NT1, axis=-1)[..., 0] for x in (p_NTV, q_NTV)),
        *(entropy(x) for x in (p_NTV, q_NTV)),
    ]
    return np.stack([np.array(c)[block.scored_NT] for c in columns])


def perplexity(nll: float) -> float:
    """exp of the mean negative log-likelihood; inf rather than an overflow.

    >>> perplexity(0.0), perplexity(1000.0)
    (1.0, inf)
    """
    return float(np.exp(nll)) if nll < 700 else float("inf")


def is_finite(layer) -> bool:
    return all(mx.isfinite(layer[f]).all().item() for f in ("lora_a", "lora_b"))


def sampling(loaded: Loaded, prompts: Sequence[str], max_tokens: int, seed: int) -> dict:
    """Continuations by base and adapted model, with the same random numbers, and their looks."""
    with switched_off(loaded.model):
        base = flat(generate(loaded, prompts, max_tokens=max_tokens, seed=seed))
    adapted = flat(generate(loaded, prompts, max_tokens=max_tokens, seed=seed))
    with switched_off(loaded.model):
        surprise = [surprisal(loaded, rows) for rows in (base, adapted)]
    pairs = [SamplePair(p, b.text, a.text) for p, b, a in zip(prompts, base, adapted, strict=True)]
    return {
        "sample_nll_base": surprise[0],
        "sample_nll_adapted": surprise[1],
        "distinct_base": distinct(base),
        "distinct_adapted": distinct(adapted),
        "ended_base": float(np.mean([r.finished for r in base])),
        "ended_adapted": float(np.mean([r.finished for r in adapted])),
        "empty_adapted": float(np.mean([not r.text.strip() for r in adapted])),
        "samples": pairs,
    }


def flat(groups: Sequence[Sequence[Rollout]]) -> list[Rollout]:
    return [r for group in groups for r in group]


def surprisal(loaded: Loaded, rollouts: Sequence[Rollout]) -> float:
    """Mean nats per token of these completions under the model as it stands."""
    probes = Probes([([*r.prompt_ids, *r.ids], len(r.prompt_ids)) for r in rollouts], [])
    scored = []
    for block in blocks(probes, vocabulary_size(loaded.model)):
        logps_NTV = log_softmax(logits(loaded.model, block.ids_NT))
        picked = mx.take_along_axis(logps_NTV, block.targets_NT[..., None], axis=-1)[..., 0]
        scored.append(-np.array(picked)[block.scored_NT])
    return float(np.concatenate(scored).mean())


def distinct(rollouts: Sequence[Rollout]) -> float:
    """Distinct bigrams over bigrams in each completion: 1 = no repetition. 1 when too short."""
    pairs = [list(zip(r.ids, r.ids[1:], strict=False)) for r in rollouts]
    return sum(len(set(p)) for p in pairs) / max(sum(map(len, pairs)), 1) if any(pairs) else 1.0
