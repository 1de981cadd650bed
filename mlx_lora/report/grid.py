"""Numbers of modules as a table: blocks down, kinds of module across."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from mlx_lora.report.markup import Html, shown, table, tag
from mlx_lora.report.style import SHADES
from mlx_lora.spectral.names import kinds, places

Cell = Callable[[list[str]], Html]


def grid(names: Iterable[str], cell: Cell, caption: str) -> Html:
    """A cell for each block and kind, of its modules: experts of one kind share one."""
    where = places(names)
    columns, cells = kinds(where), defaultdict(list)
    for name, (layer, kind) in where.items():
        cells[layer, kind].append(name)
    layers = sorted({layer for layer, _ in where.values()}, key=lambda i: (i is None, i))
    rows = [
        ["none" if layer is None else str(layer), *(cell(cells[layer, kind]) for kind in columns)]
        for layer in layers
    ]
    heads = ["block", *(kind.removesuffix("_proj") for kind in columns)]
    return table(heads, rows, caption, class_="heat")


def heat(
    values: Mapping[str, float],
    caption: str,
    *,
    words: Callable[[float], str] = shown,
    framed: Iterable[str] = (),
) -> Html:
    """The means of a number, shaded from the least to the most; a module in `framed` is framed."""
    low, high = min(values.values()), max(values.values())
    marked = set(framed)

    def cell(names: list[str]) -> Html:
        some = [values[name] for name in names if name in values]
        if not some:
            return tag("td", "")
        mean = sum(some) / len(some)
        share = (mean - low) / (high - low) if high > low else 0.0
        frame = " low" if marked.intersection(names) else ""
        return tag("td", words(mean), class_=f"u{min(int(share * SHADES), SHADES - 1)}{frame}")

    return grid(values, cell, caption)
