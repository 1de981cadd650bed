"""What is measured of both sides on the same tokens. No thresholds here."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.adapter.attach import FACTORS, lora_layers
from mlx_lora.bases import same_base, sketch
from mlx_lora.check.adapters import dropout_of, largest_update, moves_outputs
from mlx_lora.check.probes import Probes
from mlx_lora.check.reading import Reading, intervals, read_both
from mlx_lora.check.sides import Side, same_prompts
from mlx_lora.check.writing import SamplePair, write_both
from mlx_lora.models import vocabulary_size


@dataclass(frozen=True)
class Measured:
    """One side against the other. Means are over scored tokens of the known-good texts."""

    bitwise_identical: bool  # logits of both sides, on every text
    same_prompts: bool  # both sides get a prompt as the same tokens, chat template included
    off_restores_base: bool  # the adapter switched off gives the base's logits, bitwise
    kl_mean: float  # KL(base || adapted) per token, nats, over the whole vocabulary
    kl_p99: float
    top1_agreement: float
    perplexity_base: float
    perplexity_adapted: float
    entropy_base: float  # of the next-token distribution, nats
    entropy_adapted: float
    intervals: Mapping[str, tuple[float, float]]  # 95 %, over texts
    vocabulary: int
    probes_hash: str  # of the texts' token ids and the prompts
    logits_base_hash: str  # of the float32 logits on every text
    logits_adapted_hash: str
    sample_nll_base: float  # the base's nats per token on its own samples ...
    sample_nll_adapted: float  # ... and on the adapted model's: garbled text is far more surprising
    distinct_base: float  # distinct bigrams over bigrams in the samples
    distinct_adapted: float
    ended_base: float  # share of samples that ended by themselves
    ended_adapted: float
    empty_adapted: float  # share of samples with no text at all
    mismatch_kl: float  # sampled tokens: cached decode against one full forward, k3, nats
    mismatch_max: float  # largest difference of one token's log-probability
    b_norm: float | None  # Frobenius norm of all lora_b together; 0 means an untrained adapter
    update_size: float | None  # ‖scale·BA‖ / ‖W‖ (Frobenius) of the module where it is largest
    update_largest: str  # that module
    sensitive: bool | None  # a tiny step of the adapter along its gradient moves the logits
    non_finite: Sequence[str]  # modules with NaN or Inf in their factors
    zeroed: Sequence[str]  # modules of the file whose B is zero while that of others is not
    base_recorded: bool | None  # the base is the one the adapter was trained on; None: not recorded
    file_intact: bool | None  # the factors are those saved with the config; None: not recorded
    dropout: float
    chat_template: bool  # prompts go through the tokenizer's chat template
    samples: Sequence[SamplePair] = field(default_factory=list)


def measure(
    base: Side,
    adapted: Side,
    probes: Probes,
    base_prints: Sequence[str] | None,
    *,
    sample_tokens: int,
    seed: int,
    about: Mapping[str, Any] | None = None,
    rebased: bool = False,
    file_intact: bool | None = None,
) -> tuple[Measured, Reading]:
    """Everything the gates look at, and the tokens it comes from.

    `base_prints` is the fingerprint of the model before attaching; None where there is no before.
    `about` is what the adapter's config records of its base, which has to be that very one where it
    is `rebased`, on weights that its init wrote; `file_intact` whether its file is what was saved
    with it.
    """
    reading = read_both(base, adapted, probes)
    kl = reading.column("kl")
    facts = adapter_facts(adapted, probes)
    identical = reading.base_prints == reading.adapted_prints
    identical = identical and base_prints in (None, reading.adapted_prints)
    idle = identical and facts["b_norm"] == 0 and not facts["non_finite"]
    measured = Measured(
        bitwise_identical=identical,
        same_prompts=same_prompts(base, adapted),
        off_restores_base=base_prints in (None, reading.base_prints),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=reading.mean("agree"),
        perplexity_base=perplexity(reading.mean("nll_base")),
        perplexity_adapted=perplexity(reading.mean("nll_adapted")),
        entropy_base=reading.mean("entropy_base"),
        entropy_adapted=reading.mean("entropy_adapted"),
        intervals=intervals(reading, seed),
        vocabulary=vocabulary_size(base.model),
        probes_hash=digest_text(json.dumps([probes.texts, probes.prompts])),
        logits_base_hash=digest_text(" ".join(base_prints or reading.base_prints)),
        logits_adapted_hash=digest_text(" ".join(reading.adapted_prints)),
        chat_template=bool(getattr(base.loaded.tokenizer, "chat_template", None)),
        file_intact=file_intact,
        base_recorded=knows_base(adapted, (about or {}).get("sketch"), exactly=rebased),
        **facts,
        **write_both(base, adapted, probes.prompts, sample_tokens, seed, idle=idle),
    )
    return measured, reading


def adapter_facts(side: Side, probes: Probes) -> dict[str, Any]:
    """What the factors themselves say; None where the side has no adapter."""
    layers = lora_layers(side.model)
    module, size = largest_update(layers)
    broken = [n for n, m in layers.items() if not is_finite(m)]
    squares: dict[str, Any] = {n: mx.square(m.lora_b).sum() for n, m in layers.items()}
    norms = {n: float(square) ** 0.5 for n, square in squares.items()}
    norm = float(np.sqrt(sum(x**2 for x in norms.values())))
    return {
        "b_norm": norm if layers else None,
        "zeroed": [n for n, x in norms.items() if x == 0 and meant(layers[n])] if norm > 0 else [],
        "update_size": size,
        "update_largest": module,
        "sensitive": moves_outputs(side.model, probes) if layers and not broken else None,
        "non_finite": broken,
        "dropout": dropout_of(layers),
    }


def meant(layer: Any) -> bool:
    """Whether the adapter's file has this layer: PEFT's may leave some out."""
    return not layer.__dict__.get("_left_out")


def knows_base(side: Side, recorded: Sequence[float] | None, *, exactly: bool) -> bool | None:
    """Whether this is the recorded base: at any quantization, or the very weights."""
    if not recorded:
        return None
    found = sketch(side.model)
    return recorded == found if exactly else same_base(recorded, found)


def digest_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def perplexity(nll: float) -> float:
    """exp of the mean negative log-likelihood; inf rather than an overflow.

    >>> perplexity(0.0), perplexity(1000.0)
    (1.0, inf)
    """
    return float(np.exp(nll)) if nll < 700 else float("inf")


def is_finite(layer) -> bool:
    return all(mx.isfinite(layer[f]).all().item() for f in FACTORS if f in layer)
