"""The commands that ship an adapter: export, import, merge, fuse, repair, generate, chat."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Adapter = Annotated[Path, typer.Argument(help="Adapter folder, mlx-lm's or PEFT's.")]
Adapters = Annotated[
    list[Path] | None, typer.Option("--adapter", help="Adapter folder; repeatable.")
]
Out = Annotated[Path, typer.Option(help="Folder to make.")]
Base = Annotated[str | None, typer.Option("--model", help="Its base [as it recorded].")]
Model = Annotated[str, typer.Argument(help="A model folder, a hub id, or `demo`.")]
Strength = Annotated[float, typer.Option(help="0 is the base, 1 the adapter as trained.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]


@app.command()
def export(
    adapter: Adapter,
    to: Annotated[str, typer.Option(help="mlx, peft, gguf or universal.")],
    out: Out,
    model: Base = None,
    base: Annotated[
        str | None, typer.Option(help="What the file calls its base, such as a hub id.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another format, read back and compared."""
    from mlx_lora.ship import export as exporting

    def write() -> Any:
        return exporting.export(
            adapter, to, out, model=model, base=base, trust_remote_code=trust_remote_code
        )

    shipped(write, as_json)


@app.command("import")
def import_peft(
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT adapter.")],
    out: Out,
    model: Annotated[str | None, typer.Option(help="Its base, to check it on.")] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write a PEFT adapter as a folder for mlx-lm. With --model it is checked."""
    from mlx_lora.ship import export as exporting

    def write() -> Any:
        return exporting.import_peft(adapter, out, model=model, trust_remote_code=trust_remote_code)

    shipped(write, as_json)


def shipped(write: Any, as_json: bool) -> None:
    """Print what was written; exit code 1 where the check said that it is not the same."""
    from mlx_lora.cli import print_json
    from mlx_lora.ship.export import NotSame
    from mlx_lora.ship.show import print_shipped

    try:
        found = write().to_json()
    except NotSame as different:
        from mlx_lora.check.show import print_report

        if as_json:
            about = {"type": "NotSame", "message": str(different), "hint": ""}
            print_json({"error": about, "check": different.report.to_json()})
        else:
            print_report(different.report)
            typer.echo("Nothing was written: it is not what was trained.", err=True)
        raise typer.Exit(1) from None
    if as_json:
        print_json(found)
    else:
        print_shipped(found)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(help="Two adapter folders or more.")],
    out: Out,
    model: Base = None,
    method: Annotated[str, typer.Option(help="linear, ties or orthogonal.")] = "linear",
    weights: Annotated[str | None, typer.Option(help="Comma-separated [linear: the mean].")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the result [what it takes].")] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="Of the method: density=0.2")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """One adapter from several on one base.

    It says the angles between them. Exit code 1 where the check finds the merged adapter broken.
    """
    from mlx_lora.cli import print_json
    from mlx_lora.config import parse_options
    from mlx_lora.ship import merge as merging
    from mlx_lora.ship.show import print_merged

    try:
        merged = merging.merge(
            adapters,
            out,
            model=model,
            method=method,
            weights=numbers(weights),
            rank=rank,
            options=parse_options(option or []),
            trust_remote_code=trust_remote_code,
        )
    except merging.Unsound as unsound:
        merged = unsound.found
    found = merged.to_json()
    if as_json:
        print_json(found)
    else:
        print_merged(found)
    raise typer.Exit(0 if found["out"] else 1)


def numbers(text: str | None) -> list[float] | None:
    """--weights "0.5, 0.5" as numbers."""
    from mlx_lora.errors import ConfigError

    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise ConfigError(f"--weights {text}: should be numbers, like 0.5,0.5") from None


@app.command()
def fuse(
    adapter: Adapter,
    out: Annotated[Path | None, typer.Option(help="Folder to make; --plan needs none.")] = None,
    model: Base = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what survives at which bits.")] = (
        False
    ),
    bits: Annotated[str | None, typer.Option(help="Of adapted layers: a number, or plan.")] = None,
    keep: Annotated[float | None, typer.Option(help="Least share, for a plan [0.95].")] = None,
    noise: Annotated[float | None, typer.Option(help="Most noise, for a plan [0.5].")] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Write it unquantized.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write it even if it is lost.")] = False,
    strength: Strength = 1.0,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write the base with the adapter in its weights.

    Exit code 1 where that would lose it.

    --plan says what would survive at 2 to 8 bits; --bits plan writes each layer at the fewest that
    keep it.
    """
    from mlx_lora.cli import print_json
    from mlx_lora.errors import ConfigError
    from mlx_lora.progress import console
    from mlx_lora.ship import fuse as fusing
    from mlx_lora.ship.fuse_plan import Standard
    from mlx_lora.ship.show import print_fused, print_plan

    asked = {k: v for k, v in {"keep": keep, "noise": noise}.items() if v is not None}
    if asked and not plan and bits != fusing.PLANNED:
        raise ConfigError("--keep and --noise are of a plan: give --plan or --bits plan with them")
    common: dict[str, Any] = {
        "model": model,
        "standard": Standard(**asked),
        "strength": strength,
        "trust_remote_code": trust_remote_code,
        "console": console(),
    }
    if plan:
        if bits or dequantize or force:
            raise ConfigError(
                "--plan writes no model: it takes no --bits, --dequantize or --force",
                "`--bits plan` without --plan writes the planned model.",
            )
        proposed = fusing.plan(adapter, out, **common).to_json()
        if as_json:
            print_json(proposed)
        else:
            print_plan(proposed, out)
        return
    if out is None:
        raise ConfigError("fuse writes a model folder: name it with --out")
    try:
        found = fusing.fuse(adapter, out, dequantize=dequantize, bits=bits, force=force, **common)
    except fusing.Refused as refused:
        found = refused.found
    if as_json:
        print_json(found.to_json())
    else:
        print_fused(found.to_json())
    raise typer.Exit(0 if found.written else 1)


@app.command()
def repair(
    adapter: Annotated[Path, typer.Argument(help="Adapter or run folder.")],
    out: Out,
    model: Base = None,
    times: Annotated[float, typer.Option("--lambda", help="Of an intruder, what stays.")] = 0.75,
    top: Annotated[int, typer.Option(help="Singular vectors of each layer to look at.")] = 10,
    cosine: Annotated[float, typer.Option(help="To the base's; below it is an intruder.")] = 0.5,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Turn down intruders: strong directions that the base lacks.

    The adapter keeps its rank; without intruders nothing is written. Exit code 1
    where the check finds the repaired adapter broken.
    """
    from mlx_lora.cli import print_json
    from mlx_lora.ship import repair as repairing
    from mlx_lora.ship.show import print_repaired
    from mlx_lora.spectral.request import Bars

    wanted = repairing.Wanted(times, top, cosine)
    with Bars() as bars:
        found = repairing.repair(
            adapter,
            out,
            model=model,
            wanted=wanted,
            trust_remote_code=trust_remote_code,
            tell=lambda done, total: bars.tell("looking for intruders", done, total),
        ).to_json()
    if as_json:
        print_json(found)
    else:
        print_repaired(found)
    raise typer.Exit(1 if found["modules"] and not found["out"] else 0)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option("-p", "--prompt", help="Repeatable.")],
    adapter: Annotated[list[Path] | None, typer.Option(help="Adapter folder.")] = None,
    strength: Strength = 1.0,
    n: Annotated[int, typer.Option("-n", min=1, help="Completions of each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Completion length.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: int = 0,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """What a model writes, with an adapter at any strength. The texts alone go to stdout."""
    from mlx_lora.cli import print_json
    from mlx_lora.errors import ConfigError
    from mlx_lora.ship import talk
    from mlx_lora.ship.show import print_answers

    if len(adapter or []) > 1:
        raise ConfigError(
            f"generate takes one adapter, got {len(adapter or [])}",
            "`mlx-lora chat` switches between several, `mlx-lora merge` makes one of them.",
        )
    manner = talk.Manner(max_tokens, temperature, top_p, seed)
    opened = talk.opened(model, adapter or [], strength, trust_remote_code=trust_remote_code)
    found = talk.answers(opened, prompt, n, manner)
    if as_json:
        print_json(found)
    else:
        for notice in found["notices"]:
            typer.echo(f"Note: {notice}.", err=True)
        print_answers(found)


@app.command()
def chat(
    model: Model,
    adapter: Adapters = None,
    strength: Strength = 1.0,
    system: Annotated[str, typer.Option(help="A system prompt.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Answer length.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: int = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to a model, with adapters at any strength.

    /help says how to switch between them.
    """
    from mlx_lora.ship import talk

    opened = talk.opened(model, adapter or [], strength, trust_remote_code=trust_remote_code)
    for notice in opened.notices:
        typer.echo(f"Note: {notice}.", err=True)
    manner = talk.Manner(max_tokens, temperature, top_p, seed)

    def say(text: str) -> None:
        typer.echo(text, nl=False)

    talk.Chat(opened, manner, say, system).run(typed())


def typed() -> Iterator[str]:
    """Lines from stdin, asked for with a prompt at a terminal."""
    asks = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(asks)
        except EOFError:
            return
