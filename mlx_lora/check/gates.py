"""The gates: what a number means. One function each; thresholds are their options.

Thresholds were chosen from measured behaviour, see docs/check.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_lora.adapter.inits import HARMLESS
from mlx_lora.check.metrics import Measured
from mlx_lora.registry import Table


@dataclass(frozen=True)
class Gate:
    """What one gate says. `sentence` has the numbers in it."""

    name: str
    verdict: str  # pass | warn | fail
    value: float | None
    sentence: str
    near: bool = False  # the 95 % interval of its value holds one of its limits


gates: Table[Callable[..., Gate | None]] = Table("gate")


def ratio(a: float, b: float) -> float:
    return a / b if b else float("inf")


def graded(value: float, warn: float, fail: float) -> str:
    """Verdict of a number that should be small. NaN fails."""
    return "pass" if value <= warn else "warn" if value <= fail else "fail"


def worded(
    m: Measured, name: str, verdict: str, value: float, text: str, key: str, limits: Sequence[float]
) -> Gate:
    """The gate's word, with a remark where the interval of its value holds one of its limits."""
    low, high = m.intervals[key]
    held = [x for x in limits if low < x < high]
    if held:
        text += (
            f"; its 95 % interval, {low:.3g} to {high:.3g}, includes the limit {held[0]:g}: "
            "other texts could decide otherwise"
        )
    return Gate(name, verdict, value, text, bool(held))


@gates.add
def structure(m: Measured, expect: str, init: str | None) -> Gate:
    """Factors are finite, dropout is off, and the adapter switched off is bitwise the base."""
    if m.non_finite:
        shown = ", ".join(m.non_finite[:3])
        return Gate("structure", "fail", len(m.non_finite), f"NaN or Inf in the factors of {shown}")
    if not m.same_prompts:
        text = "the chat templates differ: the same prompt reaches the two models as other tokens"
        return Gate("structure", "fail", None, text)
    if not m.off_restores_base:
        text = "with the adapter switched off the logits are not the base's: no sound KL reference"
        return Gate("structure", "fail", None, text)
    if m.base_recorded is False:
        text = "the adapter was trained on another base: its record and these weights do not agree"
        return Gate("structure", "fail", None, text)
    if m.file_intact is False:
        text = "the factors are not those that were saved with this adapter_config.json"
        return Gate("structure", "warn", None, text)
    if m.zeroed and init is None:  # a start leaves experts and embeddings at B = 0
        shown = ", ".join(m.zeroed[:3])
        text = f"{len(m.zeroed)} modules have B = 0 while others have learned: {shown}"
        return Gate("structure", "warn", len(m.zeroed), text)
    if m.dropout > 0:
        text = f"LoRA dropout is {m.dropout:g}; RL needs 0, or sampler and learner disagree"
        return Gate("structure", "warn", m.dropout, text)
    return Gate("structure", "pass", None, "factors are finite, the adapter switches off cleanly")


@gates.add
def identity(m: Measured, expect: str, init: str | None) -> Gate:
    """Whether the outputs are the base's bit for bit, against what was expected."""
    if m.bitwise_identical:
        text = "logits are bitwise equal to the base's"
        if expect == "same" and init is not None and init not in HARMLESS and m.b_norm:
            text = (
                f"{text}, but the init {init} does not promise it: its update is lost in rounding"
            )
            return Gate("identity", "warn", 0.0, text)
        if expect == "same":
            return Gate("identity", "pass", 0.0, text)
        verdict = "fail" if expect == "changed" else "warn"
        cause = "lora_b is zero: it is untrained" if m.b_norm == 0 else "its update has no effect"
        if m.b_norm is None:
            return Gate("identity", verdict, 0.0, f"nothing differs: {text}")
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
def sensitivity(m: Measured, expect: str, init: str | None) -> Gate | None:
    """Whether a tiny step of the adapter moves the outputs: one that cannot will not learn."""
    if m.sensitive is None:
        return None
    if m.sensitive:
        return Gate("sensitivity", "pass", 1.0, "a tiny step of the adapter moves the outputs")
    text = "a step of the adapter along its gradient moves no output: it is cut off, or its scale 0"
    return Gate("sensitivity", "fail", 0.0, text)


@gates.add
def size(
    m: Measured,
    expect: str,
    init: str | None,
    *,
    warn: float = 0.1,
    fail: float = 1.0,
    trained_warn: float = 1.0,
    trained_fail: float = 4.0,
) -> Gate | None:
    """The largest update over its weight, by Frobenius norms: known before any text is read."""
    if m.update_size is None:
        return None
    warn, fail = (warn, fail) if init is not None else (trained_warn, trained_fail)
    text = f"the largest update, at {m.update_largest}, is {m.update_size:.3g} times its weight"
    return Gate("size", graded(m.update_size, warn, fail), m.update_size, text)


@gates.add
def divergence(
    m: Measured,
    expect: str,
    init: str | None,
    *,
    warn: float = 1e-3,
    fail: float = 0.1,
    p99_fail: float = 1.0,
) -> Gate | None:
    """KL(base || adapted) per token, mean and 99th percentile, where outputs should be the same.

    Equality is what has to be shown: the whole 95 % interval lies below the limit, or it is a warn.
    """
    if expect != "same":
        return None
    text = f"KL is {m.kl_mean:.3g} nats per token (p99 {m.kl_p99:.3g}); fine up to {warn:g}"
    verdict = graded(m.kl_mean, warn, fail)
    if verdict == "pass" and m.intervals["kl_mean"][1] > warn:
        verdict = "warn"
    if not m.kl_p99 <= p99_fail:
        verdict, text = "fail", f"{text}, and up to {p99_fail:g} for the p99"
    return worded(m, "divergence", verdict, m.kl_mean, text, "kl_mean", (warn, fail))


@gates.add
def agreement(
    m: Measured, expect: str, init: str | None, *, warn: float = 0.05, fail: float = 0.10
) -> Gate | None:
    """Share of tokens whose most likely successor changed."""
    if expect != "same":
        return None
    lost = 1 - m.top1_agreement
    text = f"the most likely next token agrees on {m.top1_agreement:.1%} of tokens"
    verdict = graded(lost, warn, fail)
    limits = (1 - warn, 1 - fail)
    return worded(m, "agreement", verdict, m.top1_agreement, text, "top1_agreement", limits)


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
    verdict = graded(change, warn, fail)
    return worded(m, "reading", verdict, change, text, "perplexity_ratio", (warn, fail))


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
    uniform = noise * math.log(m.vocabulary)
    if not m.entropy_adapted < uniform and m.entropy_base < uniform:  # else it was noise before
        return Gate("uncertainty", "fail", change, f"{text}, close to uniform noise")
    low, high = (low, high) if expect == "same" else (trained_low, trained_high)
    verdict = "pass" if low <= change <= high else "warn" if math.isfinite(change) else "fail"
    return worded(m, "uncertainty", verdict, change, text, "entropy_ratio", (low, high))


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
    endless: float = 0.25,
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
    elif verdict != "fail" and m.distinct_adapted < repetitive_warn * m.distinct_base:
        verdict = "fail" if m.distinct_adapted < repetitive_fail * m.distinct_base else "warn"
        text = (
            f"samples repeat themselves: {m.distinct_adapted:.0%} distinct bigrams, "
            f"base {m.distinct_base:.0%}"
        )
    elif m.ended_adapted < endless * m.ended_base and verdict == "pass":
        verdict = "warn"
        text = f"{m.ended_adapted:.0%} of the samples end by themselves, {m.ended_base:.0%} before"
    return Gate("writing", verdict, excess, text)


@gates.add
def sampler(
    m: Measured, expect: str, init: str | None, *, warn: float = 1e-3, fail: float = 0.1
) -> Gate:
    """Cached decode against one full forward on the sampled tokens: RL trusts that they agree."""
    text = (
        f"cached decode and full forward differ by {m.mismatch_kl:.2g} nats per sampled token "
        f"(at most {m.mismatch_max:.2g})"
    )
    return Gate("sampler", graded(m.mismatch_kl, warn, fail), m.mismatch_kl, text)
