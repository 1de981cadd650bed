"""The verdict: gates over what was measured. A gate is one function; the worst of them decides.

Thresholds were chosen from measured behaviour, see docs/check.md.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lora.adapter import attach as attaching
from mlx_lora.adapter import files
from mlx_lora.adapter.inits import HARMLESS, label
from mlx_lora.check.metrics import Measured, fingerprint, measure
from mlx_lora.check.probes import Probes, read
from mlx_lora.errors import ConfigError, near
from mlx_lora.models import Loaded
from mlx_lora.registry import Table
from mlx_lora.runlog import json_safe

EXPECTATIONS = ("same", "healthy", "changed")
SAMPLE_TOKENS = 20
ORDER = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Gate:
    """What one gate says. `sentence` has the numbers in it."""

    name: str
    verdict: str  # pass | warn | fail
    value: float | None
    sentence: str


gates: Table[Callable[..., Gate | None]] = Table("gate")


@dataclass(frozen=True)
class Report:
    """A finished check. `to_json` is the contract of the command line."""

    verdict: str
    reasons: Sequence[str]
    gates: Sequence[Gate]
    measured: Measured
    expect: str
    seconds: float
    config: Mapping[str, Any] | None = None  # the adapter's, as attach or files.load returned it
    certificate: Mapping[str, Any] | None = None  # what --certify or --verify came to

    @property
    def exit_code(self) -> int:
        """1 when the check failed, or its certificate was refused or is invalid."""
        status = (self.certificate or {}).get("status")
        return 1 if self.verdict == "fail" or status in ("refused", "invalid") else 0

    @property
    def init_measured(self) -> Mapping[str, float]:
        """What the init found out on the way, when it was one that looks."""
        return ((self.config or {}).get("init") or {}).get("measured") or {}

    def to_json(self) -> dict[str, Any]:
        m = asdict(self.measured)
        m["perplexity_ratio"] = ratio(
            self.measured.perplexity_adapted, self.measured.perplexity_base
        )
        return json_safe(
            {
                "verdict": self.verdict,
                "reasons": list(self.reasons),
                "expect": self.expect,
                **m,
                "gates": [asdict(g) for g in self.gates],
                "init_measured": self.init_measured,
                "seconds": round(self.seconds, 3),
                **({"certificate": self.certificate} if self.certificate else {}),
            }
        )


def check(
    loaded: Loaded,
    *,
    adapter: Path | None = None,
    init: str = "zero",
    init_options: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    expect: str | None = None,
    prompts: Path | None = None,
    seed: int = 0,
) -> Report:
    """Attach an adapter (from `adapter`, else a fresh one started by `init`) and judge it.

    `lora` holds rank, scale, keys, num_layers. `expect` is same, healthy or changed; None means
    healthy for an adapter from disk and same for a fresh one. The model keeps the adapter.
    """
    begin = time.perf_counter()
    if expect is not None and expect not in EXPECTATIONS:
        raise ConfigError(f"unknown expectation {expect!r}", near(expect, EXPECTATIONS))
    probes = read(loaded, prompts)
    prints = fingerprint(loaded, probes)
    if adapter is not None:
        config = files.load(loaded.model, adapter)
        report = judge(loaded, probes, prints, expect or "healthy", None, begin, seed)
        return replace(report, config=config)
    options = dict(init_options or {})
    config = attaching.attach(
        loaded, init=init, init_options=options, seed=seed, **dict(lora or {})
    )
    start = label(init, options)
    report = judge(loaded, probes, prints, expect or "same", start, begin, seed)
    return replace(report, config=config)


def judge(
    loaded: Loaded,
    probes: Probes,
    prints: Sequence[str],
    expect: str,
    init: str | None,
    begin: float,
    seed: int,
) -> Report:
    """Measure the attached model and let every gate speak."""
    measured = measure(loaded, probes, prints, sample_tokens=SAMPLE_TOKENS, seed=seed)
    spoken = [gates[name](measured, expect, init) for name in gates]
    said = [g for g in spoken if g is not None]
    verdict = max((g.verdict for g in said), key=ORDER.index, default="pass")
    worst_first = sorted(said, key=lambda g: -ORDER.index(g.verdict))
    reasons = [g.sentence for g in worst_first if g.verdict != "pass"]
    reasons = reasons or [g.sentence for g in said if g.name == "identity"]
    return Report(verdict, reasons, said, measured, expect, time.perf_counter() - begin)


def ratio(a: float, b: float) -> float:
    return a / b if b else float("inf")


def graded(value: float, warn: float, fail: float) -> str:
    """Verdict of a number that should be small. NaN fails."""
    return "pass" if value <= warn else "warn" if value <= fail else "fail"


@gates.add
def structure(m: Measured, expect: str, init: str | None) -> Gate:
    """Factors are finite, dropout is off, and the adapter switched off is bitwise the base."""
    if m.non_finite:
        shown = ", ".join(m.non_finite[:3])
        return Gate("structure", "fail", len(m.non_finite), f"NaN or Inf in the factors of {shown}")
    if not m.off_restores_base:
        text = "with the adapter switched off the logits are not the base's: no sound KL reference"
        return Gate("structure", "fail", None, text)
    if m.dropout > 0:
        text = f"LoRA dropout is {m.dropout:g}; RL needs 0, or sampler and learner disagree"
        return Gate("structure", "warn", m.dropout, text)
    return Gate("structure", "pass", None, "factors are finite, the adapter switches off cleanly")


@gates.add
def identity(m: Measured, expect: str, init: str | None) -> Gate:
    """Whether the outputs are the base's bit for bit, against what was expected."""
    if m.bitwise_identical:
        text = "logits are bitwise equal to the base's"
        if expect == "same":
            return Gate("identity", "pass", 0.0, text)
        verdict = "fail" if expect == "changed" else "warn"
        cause = "lora_b is zero: it is untrained" if m.b_norm == 0 else "its update has no effect"
        return Gate("identity", verdict, 0.0, f"the adapter changes nothing: {text} ({cause})")
    if expect == "same" and init in HARMLESS:
        text = f"the init {init} claims bitwise equal logits, and they differ (KL {m.kl_mean:.2g})"
        return Gate("identity", "fail", m.kl_mean, text)
    if expect == "same" and init is not None:
        text = (
            f"the init {init} moves the model before training (KL {m.kl_mean:.2g} nats per token)"
        )
        return Gate("identity", "warn", m.kl_mean, text)
    return Gate(
        "identity", "pass", m.kl_mean, f"outputs differ from the base's, KL {m.kl_mean:.3g}"
    )


@gates.add
def divergence(
    m: Measured, expect: str, init: str | None, *, warn: float = 1e-3, fail: float = 0.1
) -> Gate | None:
    """Mean KL(base || adapted) per token; decides only where the outputs should be the same."""
    if expect != "same":
        return None
    text = f"KL to base is {m.kl_mean:.3g} nats per token (p99 {m.kl_p99:.3g}); fine up to {warn:g}"
    return Gate("divergence", graded(m.kl_mean, warn, fail), m.kl_mean, text)


@gates.add
def agreement(
    m: Measured, expect: str, init: str | None, *, warn: float = 0.02, fail: float = 0.10
) -> Gate | None:
    """Share of tokens whose most likely successor changed."""
    if expect != "same":
        return None
    lost = 1 - m.top1_agreement
    text = f"the most likely next token agrees on {m.top1_agreement:.1%} of tokens"
    return Gate("agreement", graded(lost, warn, fail), m.top1_agreement, text)


@gates.add
def reading(
    m: Measured,
    expect: str,
    init: str | None,
    *,
    warn: float = 1.02,
    fail: float = 1.10,
    trained_warn: float = 2.0,
    trained_fail: float = 10.0,
) -> Gate:
    """Perplexity on known-good text against the base's. A trained adapter is given more room."""
    warn, fail = (warn, fail) if expect == "same" else (trained_warn, trained_fail)
    change = ratio(m.perplexity_adapted, m.perplexity_base)
    text = (
        f"perplexity on known-good text went from {m.perplexity_base:.3g} to "
        f"{m.perplexity_adapted:.3g} ({change:.3g} times)"
    )
    return Gate("reading", graded(change, warn, fail), change, text)


@gates.add
def uncertainty(
    m: Measured,
    expect: str,
    init: str | None,
    *,
    low: float = 0.8,
    high: float = 1.25,
    trained_low: float = 0.25,
    trained_high: float = 2.0,
    noise: float = 0.8,
) -> Gate:
    """Entropy of the next-token distribution: near ln(vocabulary) is noise, near 0 is collapse."""
    change = ratio(m.entropy_adapted, m.entropy_base)
    text = f"entropy went from {m.entropy_base:.3g} to {m.entropy_adapted:.3g} nats"
    if not m.entropy_adapted < noise * math.log(m.vocabulary):
        return Gate("uncertainty", "fail", change, f"{text}, close to uniform noise")
    low, high = (low, high) if expect == "same" else (trained_low, trained_high)
    return Gate("uncertainty", "pass" if low <= change <= high else "warn", change, text)


@gates.add
def writing(
    m: Measured,
    expect: str,
    init: str | None,
    *,
    warn: float = 0.5,
    fail: float = 2.0,
    empty: float = 0.5,
    repetitive_warn: float = 0.5,
    repetitive_fail: float = 0.25,
) -> Gate:
    """Samples under the same random numbers: does the base still understand what is written?"""
    excess = m.sample_nll_adapted - m.sample_nll_base
    text = (
        f"the base finds the adapted model's samples {m.sample_nll_adapted:.2f} nats per token "
        f"surprising, its own {m.sample_nll_base:.2f}"
    )
    verdict = graded(excess, warn, fail)
    if m.empty_adapted > empty:
        verdict, text = "fail", f"{m.empty_adapted:.0%} of the samples are empty"
    elif m.distinct_adapted < repetitive_warn * m.distinct_base:
        verdict = "fail" if m.distinct_adapted < repetitive_fail * m.distinct_base else "warn"
        text = (
            f"samples repeat themselves: {m.distinct_adapted:.0%} distinct bigrams, "
            f"base {m.distinct_base:.0%}"
        )
    return Gate("writing", verdict, excess, text)
