"""A comparison on a terminal: the adapters, their pairs, and the modules that changed most."""

from typing import TYPE_CHECKING

from mlx_lora.errors import few
from mlx_lora.report.compare import Comparison, Numbers, PairOf, whole
from mlx_lora.report.markup import ABSENT, percent, shown

if TYPE_CHECKING:
    from rich.console import RenderableType

FIRST = 12  # modules that are listed
WORDS = 8  # modules that a sentence names


def tables(found: Comparison) -> "RenderableType":
    """Each adapter, each pair, and what changed most from the first to the last."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [adapters(found), pairs(found), changed(found)]
    return Group(*parts, Text("\n".join(sentences(found))))


def adapters(found: Comparison) -> "RenderableType":
    grid = table("adapters", "", "modules", "rank used", "of rank", "size", "max. dominance")
    for name, report in zip(found.names, found.reports, strict=True):
        w = whole(report)
        used, sized = shown(w["effective_rank"]), shown(w["size"])
        known = shown(w["dominance"]) if w["dominance"] is not None else ABSENT
        grid.add_row(name, str(w["modules"]), used, str(w["rank"]), sized, known)
    return grid


def pairs(found: Comparison) -> "RenderableType":
    """Overlaps beside what chance gives."""
    title = "between them (overlap of inputs and outputs, chance in brackets)"
    grid = table(title, "", "cosine", "‖change‖", "inputs", "outputs")
    for pair in found.pairs:
        inputs, outputs = (overlap(pair, side) for side in ("inputs", "outputs"))
        row = [f"{pair.a} to {pair.b}", cosine(pair.cosine), shown(pair.change), inputs, outputs]
        grid.add_row(*row)
    return grid


def overlap(pair: PairOf, side: str) -> str:
    value, chance = (getattr(pair, f"{key}_{side}") for key in ("overlap", "chance"))
    return ABSENT if value is None else f"{percent(value)} ({percent(chance)})"


def changed(found: Comparison) -> "RenderableType":
    """The modules of the pair of first and last that moved most."""
    pair = ends(found)
    first = found.names.index(pair.a)
    count = min(FIRST, len(pair.modules))
    title = f"changed most from {pair.a} to {pair.b}: {count} of {len(pair.modules)} modules"
    heads = ("", "share", "rank used", "size", "cosine", "inputs", "outputs")
    grid = table(title, *heads)
    for row in pair.modules[:FIRST]:
        numbers = found.modules[row.module]
        grid.add_row(
            row.module.removeprefix("model.layers."),
            percent(row.change_share),
            from_to(numbers["effective_rank"], first),
            from_to(numbers["size"], first),
            cosine(row.cosine),
            *(
                ABSENT if x is None else f"{x:.0%}"
                for x in (row.overlap_inputs, row.overlap_outputs)
            ),
        )
    return grid


def from_to(values: Numbers, first: int) -> str:
    ends = (values[first], values[-1])
    return " → ".join(ABSENT if v is None else f"{v:.2g}" for v in ends)


def cosine(value: float | None) -> str:
    return ABSENT if value is None else f"{round(value, 2) + 0.0:.2f}"  # no -0.00


def ends(found: Comparison) -> PairOf:
    """The pair of the first adapter that holds an update, and the last."""
    with_last = [pair for pair in found.pairs if pair.b == found.names[-1]]
    return next((pair for pair in with_last if pair.cosine is not None), with_last[0])


def table(title: str, *heads: str):
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for i, head in enumerate(heads):
        grid.add_column(head, justify="right" if i else "left", overflow="fold")
    return grid


def sentences(found: Comparison) -> list[str]:
    """What the tables do not say: what is not common, what is of another base."""
    said = [f"Note: {notice}." for notice in found.notices]
    if found.misfits:
        sizes = [f"{m} ({', '.join(s)})" for m, s in found.misfits.items()]
        said.append(f"Of other sizes, left out: {few(sizes, WORDS)}.")
    if found.only:
        some = [f"{m} ({', '.join(n)})" for m, n in found.only.items()]
        said.append(f"Not in all, left out: {few(some, WORDS)}.")
    return said
