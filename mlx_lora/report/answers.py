"""What a person asks first: is it finished, did it learn, which rank is in use, what stood out."""

import math
from dataclasses import dataclass, replace
from typing import Any

from mlx_lora import curves
from mlx_lora.report.about import by_name, raised, watched_at_all
from mlx_lora.report.folder import AFTER_STAGE, Folder, mapping, records, word
from mlx_lora.report.markup import number, percent, shown
from mlx_lora.spectral.metrics import LOW_UTILIZATION, LoRAReport
from mlx_lora.spectral.show import rank_to_take
from mlx_lora.spectral.structure import finding

TONES = {"pass": "good", "warn": "warn", "fail": "bad"}  # from the best verdict to the worst


@dataclass(frozen=True)
class Answer:
    """One answer: its tone, its sentence, and the small print."""

    verdict: str  # see `docs/metrics.md`
    tone: str  # good | warn | bad | plain
    sentence: str
    detail: str = ""


@dataclass(frozen=True)
class Share:
    """A share of n problems with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, row: Any, key: str = "accuracy") -> "Share | None":
        """Three numbers in [0, 1] of a row; None where one is missing or none of these."""
        found = [number(mapping(row).get(f"{key}{end}")) for end in ("", "_low", "_high")]
        known = [v for v in found if v is not None and 0 <= v <= 1]
        return cls(*known) if len(known) == 3 else None

    def __str__(self) -> str:
        return f"{percent(self.value)} ({percent(self.low)} to {percent(self.high)})"


def difference(before: Share, after: Share) -> Share:
    """After less before with its 95 % interval, from the two (Newcombe 1998, method 10).

    Both are taken as independent; on the same problems that makes it wider than need be.

    >>> d = difference(Share(0.37, 0.33, 0.41), Share(0.63, 0.58, 0.67))
    >>> round(d.value, 2), round(d.low, 2), round(d.high, 2)
    (0.26, 0.2, 0.32)
    """
    value = after.value - before.value
    down = math.hypot(after.value - after.low, before.high - before.value)
    up = math.hypot(after.high - after.value, before.value - before.low)
    return Share(value, value - down, value + up)


def finished(run: Folder) -> Answer:
    """Whether the run came to its end."""
    status = run.one("status.json")
    state, detail = word(status.get("state")), word(status.get("detail"))
    count = steps_logged(run)
    steps = f"{count:,.0f} step{' was' if count == 1 else 's were'} logged" if count else ""
    if state == "finished":
        return Answer("finished", "good", "It finished", detail)
    if state == "interrupted":
        return Answer(state, "warn", "It was stopped before its end", f"{detail}. {steps}".strip())
    if state == "failed":
        return Answer(state, "bad", "It failed", f"{detail}. {steps}".strip())
    if state == "running":
        return Answer(
            state, "warn", "It has not finished: it is running, or was killed", steps
        )  # nothing else is written when a process is killed
    return Answer("unknown", "warn", "Whether it finished is not known", "There is no status.json")


def steps_logged(run: Folder) -> float:
    """Of the run or all its stages; what the status says where no step is logged."""
    counts = [
        len({s for row in loop.rows("metrics.jsonl") if (s := number(row.get("step"))) is not None})
        for _, loop in run.loops
    ]
    last = number(run.one("status.json").get("step"))
    return sum(counts) or (0 if last is None else last + 1)


def learned(run: Folder) -> Answer:
    """From the best evidence there is: held-out accuracy, held-out loss, then the training."""
    if run.config.get("train") is False:
        return tested(run)
    before, after, when = accuracies(run)
    if before and after:
        found = gained(before, after, when)
        more = mean_rewards(run) if found.verdict == "unclear" else ""
        return replace(found, detail=". ".join(filter(None, [found.detail, more])))
    return by_loss(run) or by_reward(run) or by_training(run)


def gained(before: Share, after: Share, when: str = "") -> Answer:
    """What two accuracies on the same held-out problems show."""
    gain = difference(before, after)
    points = f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f} points"
    said = (
        f"accuracy on held-out problems from {percent(before.value)} to {percent(after.value)}"
        f" {when}"
    ).rstrip()
    if gain.low > 0:
        return Answer("yes", "good", f"It learned: {said}", f"Gain {points}, 95 % interval")
    if gain.high < 0:
        return Answer("worse", "bad", f"It got worse: {said}", f"{points}, 95 % interval")
    why = f"The change is {points}, 95 % interval: it may be nothing"
    return Answer("unclear", "warn", f"Not shown to have learned: {said}", why)


def tested(run: Folder) -> Answer:
    """Of a run that does not train (`train: false`)."""
    summary = run.one("summary.json")
    loss, adapter = number(summary.get("test_loss")), word(summary.get("adapter"))
    if loss is None:
        return Answer("unknown", "plain", "It was only to be tested, and no test loss is here")
    said = f"It was only tested: test loss {shown(loss)} nats per token"
    return Answer("tested", "plain", said, f"Adapter: {adapter}" if adapter else "Without adapter")


def accuracies(run: Folder) -> tuple[Share | None, Share | None, str]:
    """Before, after, and when that was where it was not at the end.

    Of stages only what was measured after one counts: on their way each measures its own task.
    """
    summary = run.one("summary.json")
    before = Share.of(summary, "accuracy_before") or Share.of(run.one("eval_before.json"))
    if after := Share.of(summary, "accuracy_after"):
        return before, after, ""
    if done := list(after_stages(run).items()):
        when, after = done[-1]
        return before, after, when
    rows = [(s, row) for row in run.rows("evals.jsonl") if (s := Share.of(row))]
    if not rows:
        return before, None, ""
    after, row = rows[-1]
    return before, after, f"at step {shown(row.get('step'))}"


def after_stages(run: Folder) -> dict[str, Share]:
    """Accuracy after each stage that is done, in order, on the one task the run is measured on."""
    found = {name: run.one(name) for name in run.documents if name.startswith(AFTER_STAGE)}
    files = {n.removeprefix(AFTER_STAGE).removesuffix(".json"): d for n, d in found.items()}
    told = {word(s.get("name")): s for s in records(run.one("summary.json").get("stages"))}
    return {f"after {name}": s for name, row in (files | told).items() if (s := Share.of(row))}


def by_loss(run: Folder) -> Answer | None:
    """Of the last stage that measured it before and after."""
    summary = run.one("summary.json")
    found = [("", summary), *((word(s.get("name")), s) for s in records(summary.get("stages")))]
    found += [(s.path.name, s.one("summary.json")) for s in run.stages]
    for name, row in reversed(found):
        first, last = number(row.get("valid_loss_before")), number(row.get("valid_loss"))
        if first is not None and last is not None:
            where = f"Held-out loss of {name}" if name else "Held-out loss"
            why = "One measurement each, no interval"
            said = curves.loss_moved(where, first, last)
            if shown(first) == shown(last):
                return Answer("unclear", "warn", said, why)
            verdict, tone = ("yes", "good") if last < first else ("no", "warn")
            return Answer(verdict, tone, said, why)
    return None


def mean_rewards(run: Folder) -> str:
    """On held-out problems, before and after, in words; empty where they are not known."""
    summary = run.one("summary.json")
    first, last = (number(summary.get(f"reward_mean_{when}")) for when in ("before", "after"))
    if first is None or last is None:
        return ""
    return f"Mean reward on held-out problems went from {shown(first)} to {shown(last)}"


def by_reward(run: Folder) -> Answer | None:
    said = mean_rewards(run)
    if not said:
        return None
    why = "This task gives rewards, not right or wrong, so there is no interval"
    return Answer("unclear", "plain", said, why)


def by_training(run: Folder) -> Answer:
    for _, loop in reversed(run.loops):
        history = history_of(loop)
        for name in curves.LEADING:
            if len(curves.column(history, name)[0]):
                said = f"In training: {curves.headline(history, name)}"
                why = "It was not measured on held-out problems, before and after"
                return Answer("unclear", "plain", said, why)
    return Answer("unknown", "plain", "Not measured", "No accuracy, no loss and no reward is here")


def history_of(run: Folder) -> list[dict[str, float]]:
    """The numbers of metrics.jsonl, without what is none."""
    return [
        {str(k): v for k, value in row.items() if (v := number(value)) is not None}
        for row in run.rows("metrics.jsonl")
    ]


def watched(run: Folder, report: LoRAReport | None) -> Answer:
    """What the alerts come to."""
    names = [word(row.get("name")) for _, row in raised(run)]
    kinds = {name: len(some) for name, some in by_name(report).items()}
    if not watched_at_all(run, report):
        return Answer("unknown", "plain", "Nothing was watched")
    if not names and not kinds:
        return Answer("none", "good", "Nothing that is watched stood out")
    said = [*names, *(f"{name} in {n} modules" if n > 1 else name for name, n in kinds.items())]
    count = len(names) + len(kinds)
    details = ["; ".join(said), nevertheless(run) if not names else ""]
    told = ". ".join(filter(None, details))
    return Answer("some", "warn", f"{count} alert{'s' * (count > 1)}", told)


def nevertheless(run: Folder) -> str:
    """What stands beside an alert on the adapter: that held-out accuracy rose, where it did."""
    before, after, _ = accuracies(run)
    if not before or not after:
        return ""
    gain = difference(before, after)
    if gain.low <= 0:
        return ""
    points = f"{100 * gain.low:.1f} to {100 * gain.high:.1f} points"
    return f"All the same held-out accuracy rose, by {points}"


def rank(report: LoRAReport | None) -> Answer:
    """What the adapter does with the rank that was paid for."""
    if report is None or not report.adapters:
        return Answer("unknown", "plain", "Not known: there is no spectrum", "")
    used = [m.rank_utilization for m in report.adapters.values() if m.rank_utilization is not None]
    mean = sum(used) / len(used) if used else 0.0
    sound = report.status == "trained" and mean >= LOW_UTILIZATION
    tone = "bad" if report.status == "non_finite" else "good" if sound else "warn"
    return Answer(report.status, tone, f"It {finding(report)}", rank_to_take(report).rstrip("."))
