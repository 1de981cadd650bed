"""The commands that explain: report."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


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
