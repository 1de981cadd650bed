"""The part of the page on the check: its gates, and what both sides write."""

from typing import Any

from mlx_lora.report.answers import TONES
from mlx_lora.report.folder import Folder, Row, mapping, records, word
from mlx_lora.report.markup import Html, joined, percent, shown, table, tag
from mlx_lora.report.missing import Missing
from mlx_lora.report.training import passage

SIGNS = {"pass": "✓ pass", "warn": "! warn", "fail": "✗ fail"}


ADAPTED = ("the base", "with the adapter")
SIDES = {  # whose numbers a check holds, by what the folder is
    "exported adapter": ("the adapter as trained", "as written"),
    "fused model": ("the adapter on its base", "fused"),
    "repaired adapter": ("the adapter as it was", "repaired"),
}


def check(run: Folder) -> Html | Missing:
    """Every check that is in the folder: the run's, and those of its stages."""
    sides = SIDES.get(run.kind, ADAPTED)
    found = [(name, loop.one("check.json")) for name, loop in [("", run), *run.loops]]
    parts = []
    for i, (name, document) in enumerate(found):
        if document and not (i and document == found[0][1]):
            parts += [tag("h3", f"Before {name}") if name else None, one(document, sides)]
    return joined(parts) if parts else Missing("there is no check.json")


def one(document: Row, sides: tuple[str, str]) -> Html:
    """Its verdict, gates, numbers and samples; `sides` are the two that it compares."""
    verdict = word(document.get("verdict"))
    expected = {
        "same": "It was to leave the outputs as they are.",
        "healthy": "It was to be healthy, whatever it changed.",
        "changed": "It was to change the outputs.",
    }.get(word(document.get("expect")), "")
    gates = records(document.get("gates"))
    rows = [[word(g.get("name")), mark(g.get("verdict")), word(g.get("sentence"))] for g in gates]
    layers = records(document.get("layers"))
    return joined(
        tag("p", mark(verdict), f" {expected}"),
        table(["gate", "verdict", "finding"], rows, "The gates") if rows else None,
        numbers(document, *sides),
        drift(layers) if layers else None,
        both(records(document.get("samples")), *sides),
    )


def mark(verdict: Any) -> Html:
    """A verdict in words, with a sign and a colour."""
    known = word(verdict)
    return tag("span", SIGNS.get(known, known), class_=f"mark {TONES.get(known, '')}".strip())


def numbers(document: Row, first: str, second: str) -> Html:
    """What the gates judged, in a few numbers."""
    between = mapping(document.get("intervals")).get("kl_mean")
    low, high = between if isinstance(between, list) and len(between) == 2 else (None, None)
    found = {
        f"KL to {first}": f"{shown(document.get('kl_mean'))} nats a token "
        f"({shown(low)} to {shown(high)}), 99th percentile {shown(document.get('kl_p99'))}",
        "same likeliest next token": percent(document.get("top1_agreement")),
        "perplexity of known-good text": f"{shown(document.get('perplexity_base'))} ({first}), "
        f"{shown(document.get('perplexity_adapted'))} ({second})",
        "entropy of the next token": f"{shown(document.get('entropy_base'))} nats ({first}), "
        f"{shown(document.get('entropy_adapted'))} ({second})",
    }
    return tag("dl", [(tag("dt", key), tag("dd", value)) for key, value in found.items()])


def drift(layers: list[Row]) -> Html:
    rows = [[shown(i), shown(layer.get("drift"))] for i, layer in enumerate(layers)]
    whole = table(["block", "‖change‖ / ‖output‖"], rows, "How far each block's output moved")
    return tag("details", tag("summary", "How far each block's output moved"), whole)


def both(samples: list[Row], first: str, second: str) -> Html | None:
    """What the two write, side by side where they differ."""
    if not samples:
        return None
    same = sum(sample.get("base") == sample.get("adapted") for sample in samples)
    whole = [side_by_side(sample, first, second) for sample in samples]
    if same < len(samples):
        title = f"What both write, greedily: {same} of {len(samples)} are the same"
        return joined(tag("h3", title), whole)
    said = f"All {len(samples)} samples are equal to the letter"
    return tag("details", tag("summary", said), whole)


def side_by_side(sample: Row, first: str, second: str) -> Html:
    """A prompt, and under it what each side made of it; one text where they agree."""
    base, adapted = word(sample.get("base")), word(sample.get("adapted"))
    texts = {"both": base} if base == adapted else {first: base, second: adapted}
    sides = [
        tag("div", tag("p", whose, class_="whose"), passage(text)) for whose, text in texts.items()
    ]
    prompt = passage(word(sample.get("prompt")), "p", "prompt")
    return tag("div", prompt, tag("div", sides, class_="sides"), class_="problem")
