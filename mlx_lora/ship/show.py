"""What shipping came to, for a person."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mlx_lora.ship.talk import printable

FEW = 8  # layers shown


def out() -> Console:
    return Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    out().print(text, markup=False)


def print_shipped(found: Mapping[str, Any]) -> None:
    """An export or import: files, the check, what to know."""
    say(f"{found['adapter']} as {found['format']}, {found['modules']} modules of rank "
        f"{found['rank']}: {found['out']}")  # fmt: skip
    for name in found["files"]:
        say(f"  {name}")
    print_check(found["check"])
    print_notices(found["notices"])


def print_check(check: Mapping[str, Any] | None) -> None:
    if check is None:
        say("Check:  not run, name the base with --model to have it run")
        return
    kl = check["kl_mean"]
    same = "logits are equal to the bit" if check["bitwise_identical"] else f"KL {kl:.2g} nats"
    say(f"Check:  {check['verdict']}, trained against shipped: {same}")
    if check["verdict"] != "pass":
        for reason in check["reasons"]:
            say(f"  {reason}")


def print_notices(notices: Sequence[str]) -> None:
    for notice in notices:
        say(f"Note: {notice}.")


def print_fused(found: Mapping[str, Any]) -> None:
    """How every layer fared, worst first, and whether there is a model."""
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title="what survived, least first")
    for heading in ("layer", "bits", "update / weight", "survives", "noise / update"):
        table.add_column(heading)
    rows = [layer for layer in found["layers"] if layer["kept"] is not None]
    for layer in sorted(rows, key=lambda layer: layer["kept"])[:FEW]:
        bits = layer["bits"] or "none"
        figures = f"{layer['size']:.3g}", f"{layer['kept']:.1%}", f"{layer['noise']:.2g}"
        table.add_row(layer["module"].removeprefix("model.layers."), str(bits), *figures)
    out().print(table)
    say(f"All layers: {found['kept']:.1%} of the update survives, noise {found['noise']:.2g}")
    if found["check"]:
        print_check(found["check"])
    print_notices(found["notices"])
    for reason in found["reasons"]:
        say(f"{'Forced' if found['written'] else 'Refused'}: {reason}.")
    if found["written"]:
        say(f"Written to {found['out']}.")
    else:
        say("Nothing was written. --dequantize keeps all of it in an unquantized model; --force "
            "writes it as it is.")  # fmt: skip


def print_merged(found: Mapping[str, Any]) -> None:
    say(f"{found['method']} of {len(found['adapters'])} adapters: {found['out']}, "
        f"{found['modules']} modules of rank up to {found['rank']}, which hold "
        f"{found['kept']:.1%} of the merged update")  # fmt: skip
    for pair in found["pairs"]:
        say(f"  {pair['a']} and {pair['b']}: cosine of their updates {pair['cosine']:.3f}, "
            f"shared inputs {pair['overlap_inputs']:.1%}, outputs {pair['overlap_outputs']:.1%}"
        )  # fmt: skip
    print_notices(found["notices"])


def print_answers(found: Mapping[str, Any]) -> None:
    """The texts alone, for pipes; several are parted by an empty line."""
    say("\n\n".join(printable(c["text"]) for c in found["completions"]))
