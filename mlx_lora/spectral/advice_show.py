"""Advice on a terminal: a table of blocks and kinds, what it saves, and lines to paste."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_lora.spectral.canvas import CARDS
from mlx_lora.spectral.names import kinds


def print_advice(document: Mapping[str, Any], grain: str) -> None:
    """The table and the sentences, then YAML as it stands."""
    from rich.console import Console

    console = Console(highlight=False)
    if not document["blocks"]:
        console.print("\n".join(silence(document)), markup=False)
        return
    console.print(table(document))
    console.print("\n".join(summary(document, grain)), markup=False)
    console.print(f"\n{document['blocks'][grain]['yaml']}", markup=False, soft_wrap=True, end="")


def silence(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Why there is no advice."""
    reasons = {
        "no_gradient": "No gradient reaches the adapter: there is no advice on its rank.",
        "not_measured": "Only embeddings or experts are adapted, which are not measured.",
    }
    if document["status"] in reasons:
        return (reasons[document["status"]],)
    why = CARDS[document["status"]]
    return (f"{document['finding']}: there is no advice on its rank.", why[-1])


def headline(document: Mapping[str, Any]) -> str:
    """The overall rank in a sentence."""
    count, before = document["predicted_rank"], document["kind"] == "before_training"
    if count is None:
        return "No module could be measured"
    if document["cannot_tell"]:
        modules = document["modules"].values()
        more = "gradients show more directions than" if before else "modules fill the rank that"
        counted = "were counted" if before else "they have"
        return f"{sum(m['cannot_tell'] for m in modules)} of {len(modules)} {more} {counted}"
    what = "halves of the data agree on" if before else "the rule keeps"
    return f"In nine modules of ten {what} at most {count} directions"


def unsettled(document: Mapping[str, Any]) -> Iterator[str]:
    """Where the rank cannot be told, why, and what would tell more."""
    why = Counter(m["cannot_tell_why"] for m in document["modules"].values())
    texts = {
        "too_few_texts": "share more between halves than was found (try more --batches)",
        "all_agree": "agree on all directions that were measured (try more --directions)",
        "full": "use their whole rank: more may be of use",
        "not_measured": "are no plain linear layers and keep their rank",
    }
    for reason, text in texts.items():
        if why[reason]:
            yield f"{why[reason]} of {len(document['modules'])} modules {text}."
    if why.keys() - {None, "not_measured"}:
        yield "Such modules get no less than they have."


def table(document: Mapping[str, Any]) -> Any:
    """Directions of each module, blocks × kinds: what was found, and in grey the rank now."""
    from rich.table import Table

    modules = document["modules"]
    columns = kinds({n: (m["block"], m["kind"]) for n, m in modules.items()})
    cells = {(m["block"], m["kind"]): m for m in modules.values()}
    blocks = sorted({m["block"] for m in modules.values()}, key=lambda b: (b is None, b))
    before = document["kind"] == "before_training"
    title = "directions of the gradient" if before else "directions in use"
    grid = Table(title=f"{title} / rank now", title_justify="left", pad_edge=False)
    grid.add_column("block", justify="right", min_width=5)
    short = Counter(kind.removesuffix("_proj") for kind in columns)
    for kind in columns:
        name = kind.removesuffix("_proj")
        grid.add_column(name if short[name] == 1 else kind, justify="right", min_width=6)
    for block in blocks:
        here = [cells.get((block, kind)) for kind in columns]
        texts = [f"{m['predicted_rank_text']}[dim]/{m['rank_now']}[/]" if m else "" for m in here]
        grid.add_row("–" if block is None else str(block), *texts)
    return grid


def summary(document: Mapping[str, Any], grain: str) -> Iterator[str]:
    """What it amounts to, in sentences."""
    found, idle = document["blocks"][grain], document.get("idle_modules")
    yield f"{headline(document)}."
    if "data" in document:
        d = document["data"]
        yield f"Measured on {d['texts']} texts ({d['tokens']:,} tokens to learn) of {d['source']}."
    else:
        yield f"{document['finding']}."
    for note in document.get("notes", ()):
        yield f"Note: {note}."
    yield from unsettled(document)
    if idle:
        named = ", ".join(map(str, document["idle_blocks"]))
        all_of = f", among them all of block {named}" if named else ""
        yield f"{len(idle)} modules are idle{all_of}: below a hundredth of an equal share."
    for name, group in document["groups"].items():
        mean = group["predicted_rank_mean"]
        if mean is not None:
            yield f"  {name}: {mean:.1f} on average"
    saved, paid = found["parameters_saved"], document["parameters_now"]
    word = "fewer" if saved >= 0 else "more"
    yield (
        f"By {grain}: {found['parameters']:,} parameters, {abs(saved) / paid:.0%} {word} than "
        f"{paid:,}; {abs(found['bytes_saved']) / 1e6:,.2f} MB {word.replace('fewer', 'less')} of "
        "weights, gradients and optimizer."
    )
    yield f"Scale {found['scale']:g} for {document['scale_now']:g}: {document['scale_why']}."
