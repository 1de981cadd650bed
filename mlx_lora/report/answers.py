"""What a person asks first: is it finished, did it learn, is it harmless, which rank is in use."""

import math
from dataclasses import dataclass
from typing import Any

from mlx_lora import curves
from mlx_lora.report.about import by_name, raised
from mlx_lora.report.folder import Folder, mapping, word
from mlx_lora.report.markup import number, percent, shown
from mlx_lora.spectral.metrics import LOW_UTILIZATION, LoRAReport
from mlx_lora.spectral.structure import finding

TONES = {"pass": "good", "warn": "warn", "fail": "bad"}


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
    step = number(status.get("step"))
    steps = "" if step is None else f"{step + 1:,.0f} steps were logged"
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


def learned(run: Folder) -> Answer:
    """From the best evidence there is: held-out accuracy, held-out loss, then the training."""
    before, after = accuracies(run)
    if before and after:
        gain = difference(before, after)
        points = f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f} points"
        said = (
            f"accuracy on held-out problems from {percent(before.value)} to {percent(after.value)}"
        )
        if gain.low > 0:
            return Answer("yes", "good", f"It learned: {said}", f"Gain {points}, 95 % interval")
        if gain.high < 0:
            return Answer("worse", "bad", f"It got worse: {said}", f"{points}, 95 % interval")
        why = f"The change is {points}, 95 % interval: it may be nothing"
        return Answer("unclear", "warn", f"Not shown to have learned: {said}", why)
    return by_loss(run) or by_reward(run) or by_training(run)


def accuracies(run: Folder) -> tuple[Share | None, Share | None]:
    """Before, and after: at the end, else at the last evaluation on the way."""
    summary = run.one("summary.json")
    before = Share.of(summary, "accuracy_before") or Share.of(run.one("eval_before.json"))
    after = Share.of(summary, "accuracy_after")
    if after is None:
        rows = [
            s for _, loop in run.loops for row in loop.rows("evals.jsonl") if (s := Share.of(row))
        ]
        after = rows[-1] if rows else None
    return before, after


def by_loss(run: Folder) -> Answer | None:
    found = [mapping(run.one("summary.json")), *(s.one("summary.json") for _, s in run.loops)]
    pairs = [(number(s.get("valid_loss_before")), number(s.get("valid_loss"))) for s in found]
    for first, last in pairs:
        if first is not None and last is not None:
            moved = "fell" if last < first else "did not fall"
            said = f"Held-out loss {moved}: {shown(first)} to {shown(last)} nats per token"
            verdict, tone = ("yes", "good") if last < first else ("no", "warn")
            return Answer(verdict, tone, said, "One measurement each: no interval")
    return None


def by_reward(run: Folder) -> Answer | None:
    summary = run.one("summary.json")
    first, last = (number(summary.get(f"reward_mean_{when}")) for when in ("before", "after"))
    if first is None or last is None:
        return None
    said = f"Mean reward on held-out problems went from {shown(first)} to {shown(last)}"
    return Answer("unclear", "plain", said, "Nothing is called correct here: no interval")


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


def harmless(run: Folder) -> Answer:
    """The verdict of the check, and what was seen since."""
    check = run.one("check.json")
    verdict = word(check.get("verdict"))
    failures = [a for _, loop in run.loops for a in loop.rows("alerts.jsonl")]
    unhealthy = sum(a.get("name") == "unhealthy" for a in failures)
    certified = next((run.one(n) for n in run.documents if n.endswith("harmless.json")), {})
    if verdict not in TONES:
        verdict = word(certified.get("verdict"))
        if verdict in TONES:
            said = f"Certified at its start: {verdict}"
            return Answer(verdict, TONES[verdict], said, reason(certified))
        advice = "mlx-lora check MODEL --adapter DIR tells"
        return Answer("unknown", "plain", "Not known: there is no check", advice)
    begun = "Before training" if run.kind == "run" else "The check says"
    if unhealthy:
        said = f"{begun}: {verdict}. In training the check failed"
        times = "once" if unhealthy == 1 else f"{unhealthy} times"
        return Answer("fail", "bad", said, f"It was told {times}, see the alerts")
    details = [reason(check)]
    every = number(mapping(run.config.get("monitor")).get("check_every"))
    if run.kind == "run" and every:
        details.append(f"while training it was to look every {shown(every)} steps: no failure told")
    drifted = number(run.one("summary.json").get("kl_to_base_after"))
    if drifted is not None:
        details.append(f"KL to the base is {shown(drifted)} nats a token now")
    return Answer(verdict, TONES[verdict], f"{begun}: {verdict}", "; ".join(filter(None, details)))


def watched(run: Folder, report: LoRAReport | None) -> Answer:
    """What the alerts come to."""
    names = [word(row.get("name")) for _, row in raised(run)]
    kinds = {name: len(some) for name, some in by_name(report).items()}
    if not names and not kinds:
        return Answer("none", "good", "Nothing that is watched stood out")
    said = [*names, *(f"{name} in {n} modules" if n > 1 else name for name, n in kinds.items())]
    count = len(names) + len(kinds)
    return Answer("some", "warn", f"{count} alert{'s' * (count > 1)}", "; ".join(said))


def reason(check: dict[str, Any]) -> str:
    """The first sentence of what a check says."""
    reasons = check.get("reasons")
    return word(reasons[0]) if isinstance(reasons, list) and reasons else ""


def rank(report: LoRAReport | None) -> Answer:
    """What the adapter does with the rank that was paid for."""
    if report is None or not report.adapters:
        return Answer("unknown", "plain", "Not known: there is no spectrum", "")
    used = [m.rank_utilization for m in report.adapters.values() if m.rank_utilization is not None]
    mean = sum(used) / len(used) if used else 0.0
    sound = report.status == "trained" and mean >= LOW_UTILIZATION
    tone = "bad" if report.status == "non_finite" else "good" if sound else "warn"
    more = report.suggested_rank
    detail = "" if more is None else f"Rank {more} would hold what every module uses"
    return Answer(report.status, tone, f"It {finding(report)}", detail)
