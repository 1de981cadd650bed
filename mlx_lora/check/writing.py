"""Both sides continue the same prompts with the same random numbers: can the model still write?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_lora.check.probes import Probes
from mlx_lora.check.reading import read_both
from mlx_lora.check.sides import Side
from mlx_lora.generate import generate
from mlx_lora.types import Prompt, Rollout


@dataclass(frozen=True)
class SamplePair:
    """One prompt continued twice with the same random numbers."""

    prompt: Any  # a text, or turns of (role, content)
    base: str
    adapted: str


def write_both(
    base: Side,
    adapted: Side,
    prompts: Sequence[Prompt],
    max_tokens: int,
    seed: int,
    *,
    idle: bool = False,
) -> dict[str, Any]:
    """Continuations of both sides and their looks: the fields of Measured that tell of samples.

    The base reads what both wrote: garble surprises it. The adapted side reads its own too, in one
    full forward, against the log-probabilities that the cached decode gave when it drew them.
    `idle`: the adapter adds exact zeros, so what it writes is what the base writes, decoded once.
    """
    own_texts = continuations(adapted, prompts, max_tokens, seed)
    wrote = [own_texts if idle else continuations(base, prompts, max_tokens, seed), own_texts]
    both = [*wrote[0], *wrote[1]]
    probes = Probes([([*r.prompt_ids, *r.ids], len(r.prompt_ids)) for r in both], [])
    reading = read_both(base, adapted, probes)
    own = reading.text_K >= len(prompts)
    surprise = reading.column("nll_base")
    mismatch = sampler_mismatch(wrote[1], reading, len(prompts))
    pairs = zip(prompts, *wrote, strict=True)
    return {
        "sample_nll_base": float(surprise[~own].mean()),
        "sample_nll_adapted": float(surprise[own].mean()),
        "distinct_base": distinct(wrote[0]),
        "distinct_adapted": distinct(wrote[1]),
        "ended_base": float(np.mean([r.finished for r in wrote[0]])),
        "ended_adapted": float(np.mean([r.finished for r in wrote[1]])),
        "empty_adapted": float(np.mean([not r.text.strip() for r in wrote[1]])),
        "mismatch_kl": float((np.exp(mismatch) - 1 - mismatch).mean()),
        "mismatch_max": float(np.abs(mismatch).max()),
        "samples": [SamplePair(p, b.text, a.text) for p, b, a in pairs],
    }


def continuations(
    side: Side, prompts: Sequence[Prompt], max_tokens: int, seed: int
) -> list[Rollout]:
    with side.entered():
        groups = generate(side.loaded, prompts, purpose="check", max_tokens=max_tokens, seed=seed)
    return [group[0] for group in groups]


def sampler_mismatch(rollouts: Sequence[Rollout], reading: Any, first: int) -> np.ndarray:
    """Full forward less cached decode, in nats, for every token that the adapted side drew."""
    gaps = []
    for index, rollout in enumerate(rollouts):
        mine = reading.text_K == first + index
        order = np.argsort(reading.position_K[mine])
        full = -reading.column("nll_adapted")[mine][order]
        gaps.append(full - np.array(rollout.logps))
    return np.concatenate(gaps)


def distinct(rollouts: Sequence[Rollout]) -> float:
    """Distinct bigrams over bigrams in each completion: 1 = no repetition. 1 when too short."""
    pairs = [list(zip(r.ids, r.ids[1:], strict=False)) for r in rollouts]
    return sum(len(set(p)) for p in pairs) / max(sum(map(len, pairs)), 1) if any(pairs) else 1.0
