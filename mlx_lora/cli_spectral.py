"""The commands that explain an adapter and act on it: spectrum, shrink, advise, report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from mlx_lora.cli_ship import Trust

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

Others = Annotated[
    list[Path] | None, typer.Option("--compare", help="Another adapter or run; repeatable.")
]
More = Annotated[list[Path] | None, typer.Argument(help="More adapters to compare with.")]
Options = Annotated[
    list[str] | None, typer.Option("-o", "--option", help="An option as key=value; repeatable.")
]
States = Annotated[bool, typer.Option("--states", help="Compare what the run kept on its way.")]


@app.command()
def spectrum(
    adapter: Annotated[Path, typer.Argument(help="Adapter, its file or its run.")],
    model: Annotated[str | None, typer.Option(help="Its base, for dominance.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write JSON and pictures.")] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw pictures.")] = True,
    deep: Annotated[bool, typer.Option("--deep", help="Intruders, dominance on text.")] = False,
    sarif: Annotated[Path | None, typer.Option(help="Write the alerts as SARIF.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the alerts as JUnit XML.")] = None,
    option: Options = None,
    compare: Others = None,
    more: More = None,
    states: States = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """What an adapter is: the rank it uses, its size, alerts.

    Effective rank, conditioning, with --model dominance over the base.

    -o sets thresholds of alerts, -o dominance_warning.threshold=0.2, and how the looks of a run are
    summed up, -o dynamics.window=3.
    """
    from mlx_lora.runlog import refuse_unwritable

    if out:
        refuse_unwritable(out)
    alone = {"--deep": deep, "-o": option, "--sarif": sarif, "--junit": junit}
    if several := others(adapter, compare, more, states, alone):
        return side_by_side(
            several, model, out, plots=plots, trust=trust_remote_code, as_json=as_json
        )
    from mlx_lora.cli import print_json
    from mlx_lora.spectral import ci_files
    from mlx_lora.spectral.report import to_json, write
    from mlx_lora.spectral.request import analyze_named

    ci_files.refuse(sarif, junit)
    report = analyze_named(
        adapter, model, deep=deep, option=option or [], trust_remote_code=trust_remote_code
    )
    if out:
        write(report, out, pictures=plots)
    ci_files.write_alerts(report, adapter, sarif, junit)
    if as_json:
        print_json(to_json(report))
    else:
        from rich.console import Console

        from mlx_lora.spectral.show import table

        Console().print(table(report))
        if out:
            wrote(out, "spectrum.json", "its pictures" if plots else "")


@app.command()
def shrink(
    adapter: Annotated[Path, typer.Argument(help="Adapter, its file or its run.")],
    out: Annotated[Path, typer.Option(help="Folder to make, of the smaller adapter.")],
    model: Annotated[str | None, typer.Option(help="Its base, if its config names none.")] = None,
    by: Annotated[str, typer.Option(help="What decides the ranks, see `ls rules`.")] = "kl",
    weigh: Annotated[bool, typer.Option("--weigh/--plain", help="By effect on text.")] = True,
    option: Options = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """The same adapter at the rank it uses, judged by the check. Exit code 1 when that fails.

    -o gives options of the rule: --by kl -o budget=0.01, --by energy -o share=0.9.
    """
    from mlx_lora.check.run import parse_options
    from mlx_lora.cli import print_json
    from mlx_lora.progress import console
    from mlx_lora.ship.shrink import shrink as run
    from mlx_lora.show import print_shrunk

    said = console(quiet=as_json)
    options = parse_options(option or [])
    found = run(
        adapter,
        out,
        model=model,
        by=by,
        options=options,
        weigh=weigh,
        trust_remote_code=trust_remote_code,
        tell=said.print,
    )
    if as_json:
        print_json(found)
    else:
        print_shrunk(found)
    raise typer.Exit(0 if found["out"] else 1)


@app.command()
def advise(
    given: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML experiment; adapter or run folder.")
    ],
    by: Annotated[str, typer.Option(help="Ranks by kind, layer or module.")] = "kind",
    batches: Annotated[
        int | None, typer.Option(min=2, help="Of 8 texts, for the gradient [16].")
    ] = None,
    directions: Annotated[
        int | None, typer.Option(min=2, help="To judge, in each module [16].")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="Of a trained one, see `ls rules`; else knee.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write JSON, YAML, picture.")] = None,
    option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Which ranks to train at, as YAML to paste.

    From the gradient before training, or from what was trained.
    """
    from mlx_lora import advise as advising
    from mlx_lora.cli import print_json
    from mlx_lora.runlog import refuse_unwritable

    if out:
        refuse_unwritable(out)
    found = advising.advise(
        given, by=by, batches=batches, directions=directions, rule=rule, option=option or []
    )
    if out:
        advising.write(found, out, by)
    if as_json:
        print_json(found)
    else:
        from mlx_lora.spectral.advice_show import print_advice

        print_advice(found, by)


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run or adapter, or what another command wrote.")
    ],
    out: Annotated[Path | None, typer.Option(help="Page, or its folder [RUN].")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """One HTML page on a run: did it learn, is it harmless, and why.

    Also on what merge, fuse, repair, export, advise and spectrum --compare wrote.
    """
    from mlx_lora.cli import print_json
    from mlx_lora.report import page

    found = page.of(run)
    path = page.place(run, out)
    page.write(found, path)
    if as_json:
        print_json(found.to_json() | {"out": str(path)})
    else:
        if found.folder.kind != "run":
            typer.echo(f"{run}: {found.folder.kind}.")
        for answer in found.answers.values():
            typer.echo(f"{answer.sentence}.")
        for problem in page.problems(found.folder):
            typer.echo(f"Broken: {problem}.", err=True)
        typer.echo(f"Wrote {path}.")
    if open_:
        typer.launch(str(path))


def others(
    adapter: Path,
    compare: Sequence[Path] | None,
    more: Sequence[Path] | None,
    states: bool,
    alone: Mapping[str, object],
) -> list[Path]:
    """All adapters of a comparison; none where one adapter is asked about."""
    from mlx_lora.errors import ConfigError

    found = [*(compare or ()), *(more or ())]
    if not found and not states:
        return []
    if wrong := [name for name, value in alone.items() if value]:
        raise ConfigError(f"{', '.join(wrong)}: of one adapter, and --compare is of several")
    if states:
        from mlx_lora.report.compare import states as kept

        return [*kept(adapter), *found]
    return [adapter, *found]


def side_by_side(
    adapters: Sequence[Path],
    model: str | None,
    out: Path | None,
    *,
    plots: bool,
    trust: bool,
    as_json: bool,
) -> None:
    """`spectrum A --compare B`: print what lies between adapters; with `out` also write it."""
    from mlx_lora.cli import print_json
    from mlx_lora.report import compare
    from mlx_lora.spectral.request import Bars

    with Bars() as bars:
        found = compare.compare(adapters, model, trust_remote_code=trust, tell=bars.tell)
    if out:
        compare.write(found, out, picture=plots)
    if as_json:
        print_json(found.to_json())
    else:
        from rich.console import Console

        from mlx_lora.report.compare_show import tables

        Console().print(tables(found))
        if out:
            wrote(out, "compare.json", "compare.png" if plots else "")


def wrote(out: Path, *names: str) -> None:
    typer.echo(f"Wrote {' and '.join(filter(None, names))} to {out}.")
