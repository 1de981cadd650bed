"""What is measured of base and adapted model on the same tokens. No thresholds here."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_lora.adapter.attach import lora_layers, switched_off
from mlx_lora.check.probes import Probes
from mlx_lora.generate import generate, log_softmax
from mlx_lora.models import Loaded, logits
from mlx_lora.types import Rollout


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
    samples: Sequence[SamplePair] = field(default_factory=list)


def fingerprint(loaded: Loaded, probes: Probes) -> list[str]:
    """A hash of the logits of every text: taken before attaching, compared after."""
    return [digest(logits(loaded.model, mx.array([ids]))) for ids, _ in probes.texts]


def digest(array: mx.array) -> str:
    mx.eval(array)
    return hashlib.blake2b(np.array(array, copy=False).tobytes(), digest_size=16).hexdigest()


def measure(
    loaded: Loaded, probes: Probes, base_prints: Sequence[str], *, sample_tokens: int, seed: int
) -> Measured:
    """Everything the gates look at. `base_prints`: the model's fingerprint before attaching."""
    kls, nlls, entropies, agree, identical, restored = [], [], [], [], [], []
    vocabulary = 0
    for (ids, start), base_print in zip(probes.texts, base_prints, strict=True):
        ids_1T = mx.array([ids])
        with switched_off(loaded.model):
            base_TV = logits(loaded.model, ids_1T)
            mx.eval(base_TV)
        adapted_TV = logits(loaded.model, ids_1T)
        restored.append(digest(base_TV) == base_print)
        identical.append(digest(adapted_TV) == base_print)
        vocabulary = base_TV.shape[-1]
        scored = slice(start - 1, len(ids) - 1)
        p, q = log_softmax(base_TV[0, scored]), log_softmax(adapted_TV[0, scored])
        kls.append(np.array((mx.exp(p) * (p - q)).sum(axis=-1)))
        agree.append(np.array(mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)))
        targets = mx.array(ids[start:])[:, None]
        nlls.append([-np.array(mx.take_along_axis(x, targets, axis=-1))[:, 0] for x in (p, q)])
        entropies.append([np.array(-(mx.exp(x) * x).sum(axis=-1)) for x in (p, q)])
    kl = np.concatenate(kls)
    nll = [np.concatenate([n[side] for n in nlls]).mean() for side in (0, 1)]
    entropy = [np.concatenate([e[side] for e in entropies]).mean() for side in (0, 1)]
    layers = lora_layers(loaded.model)
    return Measured(
        bitwise_identical=all(identical),
        off_restores_base=all(restored),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(np.concatenate(agree).mean()),
        perplexity_base=perplexity(nll[0]),
        perplexity_adapted=perplexity(nll[1]),
        entropy_base=float(entropy[0]),
        entropy_adapted=float(entropy[1]),
        vocabulary=vocabulary,
        b_norm=float(np.sqrt(sum((m.lora_b**2).sum().item() for m in layers.values()))),
        non_finite=[n for n, m in layers.items() if not is_finite(m)],
        dropout=max((1 - m.dropout._p_1 for m in layers.values()), default=0.0),
        **sampling(loaded, probes.prompts, sample_tokens, seed),
    )


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
    total, count = 0.0, 0
    for r in rollouts:
        ids = [*r.prompt_ids, *r.ids]
        logps_TV = log_softmax(logits(loaded.model, mx.array([ids]))[0, len(r.prompt_ids) - 1 : -1])
        picked_T1 = mx.take_along_axis(logps_TV, mx.array(r.ids)[:, None], axis=-1)
        total -= cast(float, picked_T1.sum().item())
        count += len(r.ids)
    return total / max(count, 1)


def distinct(rollouts: Sequence[Rollout]) -> float:
    """Distinct bigrams over bigrams in each completion: 1 = no repetition. 1 when too short."""
    pairs = [list(zip(r.ids, r.ids[1:], strict=False)) for r in rollouts]
    return sum(len(set(p)) for p in pairs) / max(sum(map(len, pairs)), 1) if any(pairs) else 1.0
