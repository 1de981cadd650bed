"""The part of the page on training: curves, and what the model wrote on the way."""

from collections.abc import Mapping, Sequence

import numpy as np

from mlx_lora import curves
from mlx_lora.report.answers import accuracies, after_stages, gained, history_of
from mlx_lora.report.chart import Line, chart
from mlx_lora.report.folder import Folder, Row, word
from mlx_lora.report.markup import Html, joined, number, shown, tag
from mlx_lora.report.missing import Missing

MAIN = {  # metric -> title; drawn first, in this order, where it was measured
    **{name: title for name, (title, _) in curves.PANELS.items()},
    "accuracy": "share of the step's rollouts that are correct",
    "entropy": "entropy of the next token, nats",
    "completion_tokens": "length of a completion, tokens",
    "groups_without_signal": "share of groups that teach nothing",
    "grad_norm": "norm of the gradient",
    "tokens_per_second": "tokens per second",
}
SHARES = ("accuracy", "groups_without_signal")
ASIDE = ("step", "valid_loss", "valid_loss_before", "fitness_min", "fitness_max")
CROWDED = 150  # points: beyond, a line through all of them is a band
SMOOTH = 40  # windows of a running mean in a long run
LONG = 1200  # letters of a text that are shown at once
OF_STEPS = (
    "A step's reward is of its own problems, sampled while the adapter changes: how hard they are "
    "moves it too, and over a few problems that come again it shows what was learned by heart."
)
WHOLE = 6000  # and behind a fold; more than that stays in the file


def training(run: Folder) -> Html | Missing:
    """Curves of every loop, the main ones first, led by what was held out."""
    parts = [
        joined(tag("h3", name) if name else None, drawn)
        for name, loop in run.loops
        if (drawn := loop_curves(loop, around(run, name)))
    ]
    return joined(*parts) if parts else Missing("no step is logged (metrics.jsonl)")


def around(run: Folder, name: str) -> str:
    """What the evaluations before and after a loop show; empty where one is not known."""
    before, after, when = accuracies(run)
    if run.stages:
        known = {"": before, **{k.removeprefix("after "): v for k, v in after_stages(run).items()}}
        order = list(known)
        if name not in known:
            return ""
        before, after, when = known[order[order.index(name) - 1]], known[name], ""
    if not before or not after:
        return ""
    found = gained(before, after, when)
    return f"{found.sentence}. {found.detail}."


def loop_curves(loop: Folder, held_out: str) -> Html | None:
    rows, history = loop.rows("metrics.jsonl"), history_of(loop)
    if not any(history):
        return None
    measured = {key for h in history for key in h} - set(ASIDE)
    told = next((n for n in curves.LEADING if n in measured), None)
    wanted = {n for n in MAIN if n == told or n not in curves.LEADING} & moving(history)
    main = [figure for name in MAIN if name in wanted and (figure := panel(rows, name))]
    others = [
        figure
        for name in sorted(measured - wanted)
        if (figure := chart(name, [Line("", pairs(rows, name))]))
    ]
    fold = (
        tag(
            "details",
            tag("summary", f"{len(others)} more, as they are called in metrics.jsonl"),
            tag("div", others, class_="charts"),
        )
        if others
        else None
    )
    return joined(leads(history, told, held_out), tag("div", main, class_="charts"), fold)


def leads(history: Sequence[Mapping[str, float]], told: str | None, held_out: str) -> list[Html]:
    """What was held out, which decides; then the trend of the steps, and what it can say."""
    lead = held_out or (f"{said}." if (said := curves.validated(history)) else "")
    trend = f"{curves.headline(history, told)}." if told else ""
    lines = [tag("p", tag("strong", line)) for line in (lead or trend,) if line]
    if lead and trend:
        lines.append(tag("p", trend, class_="quiet"))
    if told == "reward":
        lines.append(tag("p", OF_STEPS, class_="quiet"))
    return lines


def moving(history: Sequence[Mapping[str, float]]) -> set[str]:
    """The metrics that have more than one value: the others need no picture."""
    found: dict[str, set[float]] = {}
    for row in history:
        for name, value in row.items():
            found.setdefault(name, set()).add(value)
    return {name for name, values in found.items() if len(values) > 1 or len(history) == 1}


def panel(rows: Sequence[Row], name: str) -> Html | None:
    """One metric over the steps: as measured, and its running mean where it is noisy."""
    points = pairs(rows, name)
    lines = [Line("", points, "line" if len(points) > 8 else "both")]
    note = ""
    if name in curves.LEADING or len(points) > CROWDED:
        window = max(curves.WINDOW, len(points) // SMOOTH)
        smooth = curves.running_mean(np.array([y for _, y in points]), window)
        mean = [(x, float(y)) for (x, _), y in zip(points, smooth, strict=True)]
        lines = [Line("each step", points, "dots"), Line(f"mean of {window} steps", mean)]
    if name == "loss" and (valid := validations(rows)):
        lines.append(Line("held out", valid, "both", "c1"))
    if name == "reward":
        ends = (("fittest member", "fitness_max", "c2"), ("least fit", "fitness_min", "c7"))
        lines += [Line(word, pairs(rows, key), "line", colour) for word, key, colour in ends]
    ceiling = 1.0 if name in SHARES else None
    if name not in curves.LEADING and name not in curves.SIGNED and points:
        values = np.array([y for _, y in points])
        if values.min() >= 0 and not ceiling:
            ceiling, note = curves.ceiling(values), curves.beyond(values).strip(" ()")
    floor = None if name in (*curves.LEADING, *curves.SIGNED) else 0.0
    return chart(MAIN[name], lines, floor=floor, ceiling=ceiling, note=note)


def validations(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """The held-out loss, that before the first step half a step early."""
    begun = [(x - 0.5, y) for x, y in pairs(rows, "valid_loss_before")]
    return begun + pairs(rows, "valid_loss")


def pairs(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """(step, value) where both are numbers."""
    found = [(number(row.get("step")), number(row.get(name))) for row in rows]
    return [(x, y) for x, y in found if x is not None and y is not None]


def samples(run: Folder) -> Html | Missing:
    """Some completions of the first logged step beside some of the last."""
    parts = []
    for name, loop in run.loops:
        rows = [row for row in loop.rows("samples.jsonl") if number(row.get("step")) is not None]
        if rows:
            steps = sorted({number(row.get("step")) or 0.0 for row in rows})
            sides = [side(rows, step) for step in dict.fromkeys((steps[0], steps[-1]))]
            parts += [tag("h3", name) if name else None, tag("div", sides, class_="sides")]
    if not parts:
        return Missing(
            "no completion is logged (samples.jsonl), which is so for supervised training"
        )
    note = "Of up to four problems the best, the worst and another completion. All are in the file."
    return joined(tag("p", note, class_="quiet"), *parts)


def side(rows: Sequence[Row], step: float) -> Html:
    here = [row for row in rows if number(row.get("step")) == step]
    prompts = list(dict.fromkeys(word(row.get("prompt")) for row in here))
    problems = []
    for prompt in prompts:
        mine = [row for row in here if word(row.get("prompt")) == prompt]
        different = {word(row.get("completion")): row for row in reversed(mine)}
        completions = [completion(row) for row in reversed(different.values())]
        said = tag("div", passage(prompt, "p", "prompt"), *completions, class_="problem")
        problems.append(said)
    return tag("div", tag("h3", f"Step {shown(step)}"), *problems)


def completion(row: Row) -> Html:
    reward, right = shown(row.get("reward")), word(row.get("reason")) == "correct"
    mark = tag("span", f"reward {reward}", class_="mark good" if right else "mark")
    about = [mark, f" {word(row.get('pick'))}, {word(row.get('reason'))}"]
    about.append(", cut at the limit" if row.get("truncated") is True else None)
    return joined(
        tag("div", about, class_="quiet"), passage(word(row.get("completion")), "pre", "text")
    )


def passage(text: str, name: str = "pre", class_: str = "text") -> Html:
    """A model's text as it is; what is long behind a fold, what is very long cut, which is said."""
    if not text:
        return tag("p", "(empty)", class_="quiet")
    if len(text) <= LONG:
        return tag(name, text, class_=class_, dir="auto")
    more = f"\n[{len(text) - WHOLE:,} more letters are in the file]" if len(text) > WHOLE else ""
    return joined(
        tag(name, text[: LONG // 4] + " …", class_=class_, dir="auto"),
        tag(
            "details",
            tag(
                "summary", f"all {len(text):,} letters" if not more else f"{WHOLE:,} letters of it"
            ),
            tag("pre", text[:WHOLE] + more, class_="text", dir="auto"),
        ),
    )
