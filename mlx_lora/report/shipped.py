"""The part of the page on what merge, fuse, repair and export wrote, and how it was proven."""

from mlx_lora.report.beside import column, pairs_of, strings
from mlx_lora.report.folder import Folder, Row, mapping, records, word
from mlx_lora.report.grid import heat
from mlx_lora.report.markup import Html, joined, number, percent, shown, table, tag


def shipped(run: Folder) -> Html | None:
    """What this folder is, of how it came about."""
    parts = [
        part(found)
        for name, part in (
            ("merge.json", merged),
            ("fuse.json", fused),
            ("fuse_plan.json", planned),
            ("repair.json", repaired),
        )
        if (found := run.one(name))
    ]
    if not parts and run.kind == "exported adapter":
        parts = [exported(run)]
    return joined(parts) if parts else None


def exported(run: Folder) -> Html:
    """A copy in another format: which, for which base, and that the check is its proof."""
    config = run.one("adapter_config.json")
    said = {
        "format": ", ".join(run.weights),
        "base": word(config.get("base_model_name_or_path")),
        "rank": shown(config.get("r")) if "r" in config else "",
        "modules": shown(len(strings(config.get("target_modules")))) if "r" in config else "",
    }
    words = "A copy of an adapter for other programs. The check compares it, read back from these "
    words += "files, with the adapter as it was trained."
    return joined(tag("p", words), entries(said))


def merged(found: Row) -> Html:
    """Of which adapters, how much of their sum the rank holds, and whether they get in the way."""
    names, weights = strings(found.get("adapters")), found.get("weights")
    shares = weights if isinstance(weights, list) else []
    said = {
        "method": word(found.get("method")),
        "adapters": ", ".join(
            f"{name} times {shown(w)}" for name, w in zip(names, shares, strict=False)
        ),
        "modules": shown(found.get("modules")),
        "rank": shown(found.get("rank")),
        "of the merged update the rank holds": percent(found.get("kept")),
    }
    words = f"One adapter of {len(names)}. Nothing was run to see whether it does what they did: "
    words += "mlx-lora eval MODEL --adapter DIR, on the task of each."
    pairs = pairs_of(records(found.get("pairs")))
    return joined(tag("p", words), entries(said), pairs, notices(found))


def fused(found: Row) -> Html:
    """How much of the update is in the stored weights, layer by layer."""
    layers = by_module(found)
    bits = word(found.get("bits"))
    stored = "unquantized" if found.get("dequantized") is True else bits or "as the base is"
    said = {
        "adapter": word(found.get("adapter")),
        "base": word(found.get("base")),
        "adapted layers are stored": {"plan": "as planned"}.get(bits, stored),
        "of the update survives": percent(found.get("kept")),
        "rounding noise": times(found.get("noise")),
        "KL of the adapter to its base": f"{shown(found.get('kl_adapter'))} nats a token",
    }
    kept = column(layers, "kept")
    forced = [tag("p", f"Forced: {reason}.") for reason in strings(found.get("reasons"))]
    words = "A model with its adapter in the weights: it runs without an adapter, at the base's "
    words += "speed. The check compares it with the adapter on its base."
    return joined(
        tag("p", words),
        tag("div", forced, class_="box warn") if forced else None,
        entries(said),
        heat(kept, "Share of each layer's update that survives", words=whole) if kept else None,
        notices(found),
    )


def planned(found: Row) -> Html:
    """What would survive at which width, in all; the bits that were chosen, layer by layer."""
    rows = [
        [name, percent(row.get("kept")), shown(row.get("noise")), megabytes(row)]
        for name, row in (
            *((width(row), row) for row in records(found.get("uniform"))),
            ("as planned", mapping(found.get("planned"))),
        )
    ]
    bits = column(by_module(found), "bits")
    standard = f"at least {percent(found.get('keep'))} of a layer's update and noise of at most "
    standard += f"{shown(found.get('noise_limit'))} times its size"
    heads = ["adapted layers at", "survives", "noise / update", "model"]
    chosen = "Planned bits; a layer without a number stays unquantized"
    about = f"At how many bits {word(found.get('adapter'))} survives in {word(found.get('base'))}"
    return joined(
        tag("p", f"{about}: planned are the fewest that keep {standard}."),
        table(heads, rows, "One width for all, and the plan"),
        heat(bits, chosen) if bits else None,
        notices(found),
    )


def width(row: Row) -> str:
    bits = number(row.get("bits"))
    return "unquantized" if bits is None else f"{shown(bits)} bits"


def megabytes(row: Row) -> str:
    size = number(row.get("bytes"))
    return "" if size is None else f"{size / 1e6:,.1f} MB"


def repaired(found: Row) -> Html:
    """Which intruder dimensions were turned down, and what plain text says of it."""
    before, after = (shown(found.get(f"intruders_{when}")) for when in ("before", "after"))
    said = {
        "adapter": word(found.get("adapter")),
        "intruder dimensions": f"{before} before, {after} after, "
        f"in {shown(found.get('looked_at'))} modules",
        "of an intruder stays": percent(found.get("lambda")),
        "perplexity of known-good text": f"{shown(found.get('perplexity_before'))} before, "
        f"{shown(found.get('perplexity_after'))} after, "
        f"{shown(found.get('perplexity_base'))} of the base",
        "KL to the base": f"{shown(found.get('kl_base_before'))} nats a token before, "
        f"{shown(found.get('kl_base_after'))} after",
    }
    rows = [
        [word(m.get("module")), shown(m.get("before")), shown(m.get("after")),
         percent(m.get("moved"))]
        for m in records(found.get("modules"))
    ]  # fmt: skip
    words = "An adapter whose strongest directions that its base did not have were turned down. "
    words += "The check compares it with the adapter as it was."
    heads = ["module", "intruders before", "after", "update moved"]
    modules = table(heads, rows, "Modules that had intruders") if rows else None
    return joined(tag("p", words), entries(said), modules, notices(found))


def by_module(found: Row) -> dict[str, Row]:
    return {word(layer.get("module")): layer for layer in records(found.get("layers"))}


def entries(said: dict[str, str]) -> Html:
    return tag("dl", [(tag("dt", key), tag("dd", value)) for key, value in said.items() if value])


def notices(found: Row) -> Html | None:
    lines = [tag("p", f"Note: {line}.") for line in strings(found.get("notices"))]
    return joined(lines) if lines else None


def whole(share: float) -> str:
    return f"{share:.0%}"


def times(value: object) -> str:
    return f"{shown(value)} times the update" if number(value) is not None else ""
