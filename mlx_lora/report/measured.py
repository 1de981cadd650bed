"""The part of the page on what was held out: accuracy and losses, before, on the way and after."""

from collections.abc import Mapping

from mlx_lora.report.answers import Share, accuracies, after_stages
from mlx_lora.report.chart import Line, chart, interval_chart
from mlx_lora.report.folder import Folder, Row, mapping, records, word
from mlx_lora.report.markup import Html, joined, number, percent, shown, table, tag
from mlx_lora.report.missing import Missing
from mlx_lora.report.training import pairs

LOSSES = {  # key of a summary -> what it is called
    "valid_loss_before": "validation loss before",
    "valid_loss": "validation loss after",
    "test_loss": "test loss",
    "test_perplexity": "test perplexity",
}


def held_out(run: Folder) -> Html | Missing:
    """Accuracy with its intervals, losses, the best on the way, and why answers were wrong."""
    summary = run.one("summary.json")
    known = [(name, s.value, s.low, s.high) for name, s in shares(run).items() if s]
    figures = [interval_chart("accuracy, with 95 % interval", known)] if known else []
    figures += [figure for name, loop in run.loops if (figure := on_the_way(name, loop))]
    words = [entries for found in summaries(run) if (entries := losses(found))]
    why = reasons(summary)
    if not (figures or words or why):
        return Missing("nothing was measured on held-out problems or texts")
    sampled = [number(summary.get(f"accuracy_{when}_sampled")) for when in ("before", "after")]
    note = None
    if None not in sampled:
        before, after = map(percent, sampled)
        note = tag(
            "p", f"Sampled at temperature 1: {before} before, {after} after.", class_="quiet"
        )
    return joined(tag("div", figures, class_="charts") if figures else None, note, *words, why)


def shares(run: Folder) -> Mapping[str, Share | None]:
    """Accuracy before, after each stage but the last, and after, or when it was measured last."""
    before, after, when = accuracies(run)
    stages = records(run.one("summary.json").get("stages"))
    last = f"after {word(stages[-1].get('name'))}" if stages else ""
    between = {name: share for name, share in after_stages(run).items() if name != last}
    return {"before": before, **between, when or "after": after}


def on_the_way(name: str, loop: Folder) -> Html | None:
    rows = loop.rows("evals.jsonl")
    counts = [n for row in rows[-1:] if (n := number(row.get("n"))) is not None]
    of = f", of {shown(counts[0])} problems" if counts else ""
    title = f"held-out accuracy on the way, greedy{of} {name}".strip()
    return chart(title, [Line("", pairs(rows, "accuracy"), "both")], floor=0.0)


def summaries(run: Folder) -> list[Row]:
    """The run's summary, and what it says of each stage."""
    summary = run.one("summary.json")
    return [summary, *records(summary.get("stages"))]


def losses(found: Row) -> Html | None:
    """Losses on texts that were held out, and the best evaluation."""
    known = {name: v for key, name in LOSSES.items() if (v := number(found.get(key))) is not None}
    said = {name: shown(value) for name, value in known.items()}
    best = mapping(found.get("best"))
    if (value := number(best.get("value"))) is not None:
        metric = word(best.get("metric")).replace("_", " ")
        said["best on the way"] = f"{metric} {shown(value)} after step {shown(best.get('step'))}"
    if not said:
        return None
    stage = word(found.get("name"))
    entries = [(tag("dt", name), tag("dd", value)) for name, value in said.items()]
    return joined(tag("h3", stage) if stage else None, tag("dl", entries))


def reasons(summary: Row) -> Html | None:
    """How many completions had which reason, before and after."""
    before, after = (mapping(summary.get(f"reasons_{when}")) for when in ("before", "after"))
    counts = {k: (number(before.get(k)) or 0, number(after.get(k)) or 0) for k in before | after}
    if not counts:
        return None
    ordered = sorted(counts.items(), key=lambda item: -sum(item[1]))
    rows = [[name, count(b), count(a)] for name, (b, a) in ordered]
    return table(["reason", "before", "after"], rows, "Why completions earned what they earned")


def count(value: float) -> Html:
    return tag("td", shown(value), class_="n")
