"""The command line: parse, one call, print. Everything heavy is imported inside a command.

Exit codes: 0 pass or warn, 1 failed on its merits or crashed, 2 bad input, 130 Ctrl-C. With
--json, stdout is exactly one JSON document.
"""

import gc
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_lora import __version__, cli_ship, cli_spectral, cpu
from mlx_lora.cli_ship import Strength, Trust
from mlx_lora.errors import UserError

BEGAN = time.perf_counter()
app = typer.Typer(
    name="mlx-lora",
    help="Attach LoRA harmlessly, check for corruption, train with RL, see what was learned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Options = Annotated[
    list[str] | None, typer.Option("-o", "--option", help="An option as key=value; repeatable.")
]
AdapterFolder = Annotated[Path | None, typer.Option(help="Adapter folder.")]
Model = Annotated[str, typer.Argument(help="A model folder, a hub id, or `demo`.")]


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlx-lora {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder to make.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of adapter, rollouts and problems.")] = 0,
    as_json: AsJson = False,
) -> None:
    """The main job on the embedded model, from check to report.

    Quantize, attach, check, GRPO on Countdown, evaluate, explain.
    """
    from mlx_lora import config

    run_experiment(config.load(config.find("demo"), [f"seed={seed}"]), out, as_json)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A model, or an experiment file (.yaml).")],
    adapter: AdapterFolder = None,
    init: Annotated[str, typer.Option(help="How a fresh adapter starts.")] = "zero",
    option: Options = None,
    rank: Annotated[int | None, typer.Option(help="Rank of a fresh adapter [8].")] = None,
    scale: Annotated[float | None, typer.Option(help="Its scale, alpha / rank [2].")] = None,
    keys: Annotated[str | None, typer.Option(help="Layers, comma-separated.")] = None,
    against: Annotated[str | None, typer.Option(help="Another model to compare with.")] = None,
    adapter2: Annotated[Path | None, typer.Option(help="The adapter of --against.")] = None,
    expect: Annotated[str | None, typer.Option(help="same, healthy or changed.")] = None,
    limit: Annotated[list[str] | None, typer.Option(help="gate.threshold=number")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL or text file of probes.")] = None,
    bits: Annotated[
        int | None, typer.Option(min=2, max=8, help="Quantize an unquantized model.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Which block moves first.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the check as a PNG.")] = None,
    certify: Annotated[bool, typer.Option("--certify", help="Write harmless.json.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check harmless.json again.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where --certify saves a fresh one.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the gates as JUnit XML.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of a fresh adapter and of samples [0].")
    ] = None,
    strength: Strength = 1.0,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Corruption check: base against attached model, or any two. Exit code 1 when it fails."""
    from mlx_lora.check.run import check_named, request

    asked = request(
        model,
        adapter=adapter,
        init=init,
        option=option or [],
        lora={"rank": rank, "scale": scale, "keys": layer_keys(keys)},
        bits=bits,
        limit=limit or [],
        expect=expect,
        prompts=prompts,
        seed=seed,
        against=against,
        adapter2=adapter2,
        strength=strength,
        trust_remote_code=trust_remote_code,
    )
    report = check_named(
        asked, certify=certify, verify=verify, out=out, layers=layers, picture=plot, junit=junit
    )
    if as_json:
        print_json(report.to_json())
    else:
        from mlx_lora.check.show import print_report

        print_report(report)
    raise typer.Exit(report.exit_code)


def layer_keys(text: str | None) -> list[str] | None:
    """--keys "q_proj, v_proj" as a list; not given means every linear layer."""
    return None if text is None else [k.strip() for k in text.split(",") if k.strip()]


@app.command()
def train(
    config_file: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML experiment.")],
    option: Options = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder to make.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --run-dir.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, try a step, plan.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run an experiment from a YAML file. -o sets dotted keys: -o learning_rate=1e-5."""
    from mlx_lora import config

    experiment = config.load(config.find(config_file), option or [])
    if dry_run:
        show_plan(experiment, as_json)
    else:
        run_experiment(experiment, run_dir, as_json, resume=resume)


def show_plan(experiment: Any, as_json: bool) -> None:
    from mlx_lora.plan import plan
    from mlx_lora.progress import console
    from mlx_lora.show import print_plan

    found = plan(experiment, console())
    if as_json:
        print_json(found)
    else:
        print_plan(found)


def run_experiment(
    experiment: Any, run_dir: Path | None, as_json: bool, *, resume: bool = False
) -> None:
    """Train, print the summary; exit code 1 when the check fails or the run diverges."""
    from mlx_lora.runlog import Clock

    clock = Clock(start=BEGAN)
    with clock.measure("import", since=BEGAN):
        from mlx_lora import experiment as experiments
        from mlx_lora.check.show import print_report
        from mlx_lora.distributed import leads
        from mlx_lora.guard import Unhealthy
        from mlx_lora.optimizers import Diverged
        from mlx_lora.progress import console

    try:
        voice = console(quiet=not leads())
        summary = experiments.run(experiment, run_dir, voice, clock=clock, resume=resume)
    except experiments.CheckFailed as failed:
        if as_json and leads():
            print_json(
                {"error": {"type": "CheckFailed", "message": str(failed), "hint": ""}}
                | {"check": failed.report.to_json()}
            )
        elif leads():
            print_report(failed.report)
        raise typer.Exit(1) from None
    except (Diverged, Unhealthy) as stopped:
        if as_json and leads():
            print_json(
                {"error": {"type": type(stopped).__name__, "message": str(stopped), "hint": ""}}
            )
        typer.echo(f"Stopped: {stopped}", err=True)
        raise typer.Exit(1) from None
    if as_json and leads():
        print_json(summary)
    elif leads():
        from mlx_lora.show import print_summary

        print_summary(summary)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model, or an experiment file (.yaml).")],
    task: Annotated[str | None, typer.Option(help="Task name, see `ls tasks`.")] = None,
    adapter: AdapterFolder = None,
    n: Annotated[int | None, typer.Option("-n", min=1, help="Held-out problems [512].")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Completion length [256].")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions sampled of each, pass@k.")] = 1,
    option: Options = None,
    out: Annotated[Path | None, typer.Option(help="Write every completion, as JSONL.")] = None,
    seed: int = 0,
    strength: Strength = 1.0,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Accuracy on held-out problems with its 95 % interval.

    Greedy, and sampled. -o gives options of the task (-o path=test.jsonl); with a file, its keys,
    as in `train`.
    """
    from mlx_lora.exam import evaluate_named, request
    from mlx_lora.progress import console

    asked = request(
        model,
        task,
        option or [],
        n=n,
        max_tokens=max_tokens,
        trust_remote_code=trust_remote_code,
    )
    result = evaluate_named(asked, adapter, samples, out, seed, console(), strength=strength)
    if as_json:
        print_json(result)
    else:
        from mlx_lora.show import print_evaluation

        print_evaluation(result)


@app.command("new")
def new_experiment(
    recipe: Annotated[str, typer.Argument(help="One of `mlx-lora ls configs`.")],
    out: Annotated[Path | None, typer.Option(help="File to write [RECIPE.yaml].")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented experiment file to start from."""
    from mlx_lora.recipes import write

    path = write(recipe, out)
    if as_json:
        print_json({"recipe": recipe, "file": str(path)})
    else:
        typer.echo(f"Wrote {path}. Try: mlx-lora train {path} --dry-run")


KINDS = (
    "configs",
    "inits",
    "schedules",
    "tasks",
    "rewards",
    "losses",
    "advantages",
    "fitness",
    "metrics",
    "alerts",
    "gates",
    "rules",
)


@app.command("ls")
def list_tables(
    kind: Annotated[str | None, typer.Argument(help=" | ".join(KINDS))] = None,
    as_json: AsJson = False,
) -> None:
    """What there is, a line each: configs, inits, tasks, alerts."""
    from mlx_lora.listing import listing
    from mlx_lora.show import print_listing

    found = listing(KINDS, kind)
    if as_json:
        print_json(found)
    else:
        print_listing(found)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Is this machine sound: versions, memory, small tests.

    Exit code 1 where one of them fails.
    """
    from mlx_lora.doctor import examine
    from mlx_lora.show import print_doctor

    findings = examine()
    if as_json:
        print_json(findings)
    else:
        print_doctor(findings)
    raise typer.Exit(0 if findings["sound"] else 1)


app.add_typer(cli_ship.app)
app.add_typer(cli_spectral.app)


def print_json(document: Any) -> None:
    """One document on stdout; non-finite numbers must have become null before this."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))


def main() -> None:
    """Run the command; turn a UserError into one readable message and exit code 2.

    With --json that message is a document, and so are a wrong word on the command line (2) and an
    exception that nobody foresaw (1), whose traceback goes to stderr.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):  # else a terminal without UTF-8 turns pass into a crash
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    gc.set_threshold(50_000, 20, 20)  # imports make objects that stay: 5 % of a short command
    try:
        refuse_platform()
        sys.exit(app(standalone_mode=not wants_json()))
    except UserError as error:
        report_error(error)
        sys.exit(2)
    except typer.TyperException as error:  # only with --json: Typer prints it otherwise
        command = getattr(getattr(error, "ctx", None), "command_path", "mlx-lora")
        print_error("UsageError", error.format_message(), f"Try `{command} --help`.")
        sys.exit(error.exit_code)
    except Exception as error:
        if wants_json():
            print_error(type(error).__name__, str(error), "The traceback is on stderr.")
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # a last look for garbage takes 0.2 s, and the process ends anyway


def wants_json() -> bool:
    return "--json" in sys.argv[1:]


def print_error(kind: str, message: str, hint: str) -> None:
    print_json({"error": {"type": kind, "message": message, "hint": hint}})


def refuse_platform() -> None:
    from mlx_lora.platform import problem

    if error := problem():
        raise error
    cpu.refuse()


def report_error(error: UserError) -> None:
    if wants_json():
        print_error(error.kind, str(error), error.hint)
        return
    typer.echo(f"Error: {error}", err=True)
    if error.hint:
        typer.echo(f"  {error.hint}", err=True)


if __name__ == "__main__":
    main()
