"""What shipping came to, for a person."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mlx_lora.ship.talk import printable

FEW, MANY = 8, 40  # layers shown


def out() -> Console:
    return Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A sentence; at a terminal broken between words, and what is longer than a line is whole."""
    screen = out()
    if screen.is_terminal:
        text = "\n".join(
            textwrap.fill(line, screen.width, break_long_words=False, break_on_hyphens=False)
            for line in text.splitlines()
        )
    screen.print(text, markup=False)


def print_shipped(found: Mapping[str, Any]) -> None:
    """An export or import: files, the check, what to know."""
    say(f"{found['adapter']} as {found['format']}, {found['modules']} modules of rank "
        f"{found['rank']}: {found['out']}")  # fmt: skip
    for name in found["files"]:
        say(f"  {name}")
    print_check(found["check"])
    print_notices(found["notices"])
    print_page(found["out"])


def print_page(folder: Any) -> None:
    say(f"On one page: mlx-lora report {quote(str(folder))} --open")


def print_check(check: Mapping[str, Any] | None, sides: str = "trained against shipped") -> None:
    if check is None:
        say("Check:  not run, name the base with --model to have it run")
        return
    kl = check["kl_mean"]
    same = "logits are equal to the bit" if check["bitwise_identical"] else f"KL {kl:.2g} nats"
    say(f"Check:  {check['verdict']}, {sides}: {same}")
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
        print_page(found["out"])
    else:
        say("Nothing was written. --bits plan stores each layer at as many bits as its update "
            "needs (--plan shows them), --dequantize all of it unquantized; --force writes it as "
            "it is.")  # fmt: skip


def print_plan(found: Mapping[str, Any], folder: Path | None) -> None:
    """What survives at which width, in all and in the layers that need most; what was chosen."""
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title="adapted layers at one width")
    for heading in ("bits", "survives", "noise / update", "model"):
        table.add_column(heading, justify="right")
    for row in found["uniform"]:
        table.add_row(str(row["bits"] or "none"), *totals(row))
    table.add_row("plan", *totals(found["planned"]), style="bold")
    out().print(table)
    widths = [row["bits"] for row in found["uniform"]]
    table = Table(
        box=box.SIMPLE_HEAD, title_justify="left", title="what survives at which bits", padding=0
    )
    table.add_column("layer", no_wrap=True)
    for heading in ("size", *(str(bits or "none") for bits in widths), "plan"):
        table.add_column(heading, justify="right", min_width=5)
    rows = [layer for layer in found["layers"] if layer["widths"][0]["kept"] is not None]
    for layer in sorted(rows, key=lambda x: (-(x["bits"] or math.inf), x["size"]))[:MANY]:
        at = {width["bits"]: f"{width['kept']:.0%}" for width in layer["widths"]}
        cells = [at.get(bits, "") for bits in widths]
        name = layer["module"].removeprefix("model.layers.")
        table.add_row(name, f"{layer['size']:.2g}", *cells, str(layer["bits"] or "none"))
    out().print(table)
    if len(rows) > MANY:
        say(f"... and {len(rows) - MANY} layers that need no more bits than these.")
    say(f"Planned are the fewest bits that keep {found['keep']:.0%} of an update, and no more than "
        f"{2 - found['keep']:.0%}, with noise of at most {found['noise_limit']:g} times its size."
    )  # fmt: skip
    unmet = sum(layer["bits"] is None for layer in found["layers"])
    if unmet:
        say(f"{unmet} layers reach that at no width and stay unquantized.")
    print_notices(found["notices"])
    say(f"Written to {folder}." if folder else "--out keeps this as files.")
    say("`--bits plan` in place of --plan writes the model.")
    if folder:
        print_page(folder)


def totals(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{row['kept']:.1%}", f"{row['noise']:.2g}", f"{row['bytes'] / 1e6:,.1f} MB"


def print_repaired(found: Mapping[str, Any]) -> None:
    """Every intruder before and after, and what the texts say."""
    if not found["modules"]:
        say(f"No intruder dimension in {found['looked_at']} modules: there is nothing to repair, "
            "and nothing was written.")  # fmt: skip
        print_notices(found["notices"])
        return
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title="intruder dimensions")
    table.add_column("module", no_wrap=True)
    for heading in ("σ / W's", "cosine", "adapter's", "after", "Δ moved"):
        table.add_column(heading)
    for module in found["modules"]:
        for d in module["intruders"]:
            size, after = (f"{d[key] / module['base']:.2g}" for key in ("sigma", "after"))
            share, moved = f"{d['share']:.0%}", f"{module['moved']:.1%}"
            name = module["module"].removeprefix("model.layers.")
            table.add_row(name, size, f"{d['cosine']:.2f}", share, after, moved)
    out().print(table)
    say(f"{found['intruders_before']} intruders before, {found['intruders_after']} after, in "
        f"{found['looked_at']} modules")  # fmt: skip
    base, before, after = (found[f"perplexity_{side}"] for side in ("base", "before", "after"))
    say(f"Known-good text: perplexity {before:.4g} before, {after:.4g} after, base {base:.4g}; "
        f"KL to the base {found['kl_base_before']:.3g} before, {found['kl_base_after']:.3g} after"
    )  # fmt: skip
    print_check(found["check"], "as it was against repaired")
    print_notices(found["notices"])
    if found["out"]:
        say(f"Written to {found['out']}.")
        print_page(found["out"])
    else:
        say("Nothing was written: it is no longer sound. A larger --lambda changes less.")


def print_merged(found: Mapping[str, Any]) -> None:
    say(f"{found['method']} of {len(found['adapters'])} adapters: {found['out'] or 'none'}, "
        f"{found['modules']} modules of rank up to {found['rank']}, which hold "
        f"{found['kept']:.1%} of the merged update")  # fmt: skip
    for pair in found["pairs"]:
        say(f"  {pair['a']} and {pair['b']}: cosine of their updates {pair['cosine']:.3f}, "
            f"shared inputs {pair['overlap_inputs']:.1%}, outputs {pair['overlap_outputs']:.1%}"
        )  # fmt: skip
    print_check(found["check"], "base against merged")
    print_notices(found["notices"])
    if found["out"]:
        print_page(found["out"])
    else:
        say("Nothing was written: it is not sound. Smaller --weights change less.")


def print_answers(found: Mapping[str, Any]) -> None:
    """The texts alone, for pipes; several are parted by an empty line."""
    texts = "\n\n".join(printable(c["text"]) for c in found["completions"])
    out().print(texts, markup=False)
