"""The commands that explain: report, and spectra side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

Others = Annotated[
    list[Path] | None, typer.Option("--compare", help="Another adapter or run; repeatable.")
]
More = Annotated[list[Path] | None, typer.Argument(help="More adapters to compare with.")]
States = Annotated[bool, typer.Option("--states", help="Compare what the run kept on its way.")]


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, an adapter, a check.")],
    out: Annotated[Path | None, typer.Option(help="Page to write [RUN/report.html].")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """One HTML page on a run: did it learn, is it harmless, which rank does it use, and why."""
    from mlx_lora.cli import print_json
    from mlx_lora.report import page

    found = page.of(run)
    path = out or run / page.FILE
    page.write(found, path)
    if as_json:
        print_json(found.to_json() | {"out": str(path)})
    else:
        for answer in found.answers.values():
            typer.echo(f"{answer.sentence}.")
        typer.echo(f"Wrote {path}.")
    if open_:
        typer.launch(str(path))


def others(
    adapter: Path,
    compare: Sequence[Path] | None,
    more: Sequence[Path] | None,
    states: bool,
    *,
    deep: bool,
    option: Sequence[str] | None,
) -> list[Path]:
    """All adapters of a comparison; none where one adapter is asked about."""
    from mlx_lora.errors import ConfigError

    found = [*(compare or ()), *(more or ())]
    if not found and not states:
        return []
    if deep or option:
        raise ConfigError("--deep and -o are of one adapter, and --compare is of several")
    if states:
        from mlx_lora.report.compare import states as kept

        return [*kept(adapter), *found]
    return [adapter, *found]


def side_by_side(
    adapters: Sequence[Path], model: str | None, out: Path | None, *, plots: bool, as_json: bool
) -> None:
    """`spectrum A --compare B`: print what lies between adapters; with `out` also write it."""
    from mlx_lora.cli import print_json
    from mlx_lora.report import compare
    from mlx_lora.spectral.request import Bars

    with Bars() as bars:
        found = compare.compare(adapters, model, tell=bars.tell)
    if out:
        compare.write(found, out, picture=plots)
    if as_json:
        print_json(found.to_json())
    else:
        from rich.console import Console

        from mlx_lora.report.compare_show import tables

        Console().print(tables(found))
