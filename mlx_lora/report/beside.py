"""The parts of the page on what else a folder may hold: lessons, weights, advice, a comparison."""

from collections.abc import Mapping
from typing import Any

from mlx_lora.report.folder import Folder, Row, mapping, records, word
from mlx_lora.report.grid import heat
from mlx_lora.report.markup import Html, joined, number, percent, shown, table, tag

FEW_CORRECT = 0.05  # of what was sampled: less and a warm start learns from a few problems alone


def lessons(run: Folder) -> Html | None:
    """What rejection sampling kept of the model's own completions, of each loop that had it."""
    parts = []
    for name, loop in run.loops:
        found = loop.one("rejection_sampling.json")
        counts = {key: number(found.get(key)) for key in COUNTS}
        if found:
            said = [(tag("dt", COUNTS[key]), tag("dd", shown(n))) for key, n in counts.items()]
            parts += [tag("h3", name) if name else None, tag("dl", said), yielded(counts)]
    if not parts:
        return None
    words = "The model's own completions that were correct are what supervised training learned on."
    return joined(tag("p", words), parts)


COUNTS = {
    "problems": "training problems",
    "sampled": "completions sampled",
    "correct": "of these correct",
    "distinct": "of these not cut, each text once a problem",
    "kept": "of these kept to learn from",
}


def yielded(counts: Mapping[str, float | None]) -> Html | None:
    """How often the model was right, and whether that is little."""
    sampled, correct = counts["sampled"], counts["correct"]
    if not sampled or correct is None:
        return None
    share = correct / sampled
    said = f"{percent(share)} of what it wrote was correct."
    if share >= FEW_CORRECT:
        return tag("p", said)
    more = " That is little: an easier task or more samples give it more to learn from."
    return tag("p", said, more, class_="box warn")


def weights(run: Folder) -> Html | None:
    """How large the frozen matrices are that ES moves around, and which have outliers."""
    found = run.one("weights.json")
    matrices = {str(k): mapping(v) for k, v in mapping(found.get("matrices")).items()}
    sizes, peaks = (column(matrices, key) for key in ("rms_robust", "peak"))
    if not sizes:
        return None
    outlying = [name for name in strings(found.get("outlying")) if name in peaks]
    most = shown(max(peaks.values(), default=None))
    said = f"No matrix has outliers: its largest weight is at most {most} times its size."
    if outlying:
        worst = f"{outlying[0]} ({shown(peaks[outlying[0]])} times its size)"
        more = f" and {len(outlying) - 1} more" if len(outlying) > 1 else ""
        said = f"Outliers in {worst}{more}: framed below."
    why = "A perturbation of method es is as large as es.perturb_scale of a matrix's size."
    caption = "Size of the frozen weights: root mean square, outliers cut"
    far = heat(peaks, "Largest weight over that size", framed=outlying) if peaks else None
    return joined(tag("p", said), tag("p", why, class_="quiet"), heat(sizes, caption), far)


def advice(run: Folder) -> Html | None:
    """Which ranks `mlx-lora advise` proposes, and the lines to paste."""
    found = run.one("advice.json")
    if not found:
        return None
    modules = {str(k): mapping(v) for k, v in mapping(found.get("modules")).items()}
    unsure = [name for name, m in modules.items() if m.get("cannot_tell") is True]
    ranks = column(modules, "predicted_rank")
    caption = f"Directions that count, of rank {shown(found.get('rank_now'))}"
    caption += "; framed: it may need more" if unsure else ""
    return joined(
        [tag("p", line) for line in advised(found, len(unsure), len(modules))],
        heat(ranks, caption, framed=unsure) if ranks else None,
        blocks(mapping(found.get("blocks")), number(found.get("parameters_now"))),
        [tag("p", line, class_="quiet") for line in strings(found.get("notes"))],
    )


def advised(found: Row, unsure: int, modules: int) -> list[str]:
    """What the advice rests on and comes to, in sentences."""
    data = mapping(found.get("data"))
    lines = []
    if found.get("kind") == "before_training":
        texts = f"{shown(data.get('texts'))} texts of {word(data.get('source'))}"
        lines.append(
            f"Before training, from the gradient on {texts} at {word(found.get('model'))}."
        )
    elif found.get("kind") == "after_training":
        lines.append(f"After training. {word(found.get('finding'))}.")
    rank, paid = word(found.get("predicted_rank_text")), shown(found.get("rank_now"))
    if rank and not unsure:
        lines.append(f"Nine of ten modules need {rank} directions or fewer; the rank is {paid}.")
    if unsure:
        many = f"{unsure} of {modules} modules"
        lines.append(
            f"Of {many} it cannot be told how many directions they need: they keep {paid}."
        )
    idle = strings(found.get("idle_modules"))
    if idle:
        lines.append(f"{len(idle)} modules do next to nothing, {idle[0]} for one.")
    return lines


def blocks(found: Row, now: float | None) -> Html | None:
    """What the proposals cost, and the first of them to paste."""
    rows = [
        [f"by {grain}", shown(b.get("rank")), shown(b.get("scale")), shown(b.get("parameters")),
         percent(spent(b, now))]
        for grain, b in found.items() if isinstance(b, dict)
    ]  # fmt: skip
    if not rows:
        return None
    heads = ["ranks", "most common", "scale", "parameters", "of now"]
    yaml = word(next(b for b in found.values() if isinstance(b, dict)).get("yaml"))
    fold = tag("details", tag("summary", "To paste, the first"), tag("pre", yaml, class_="text"))
    return joined(table(heads, rows, "What was proposed"), fold if yaml else None)


def spent(block: Row, now: float | None) -> float | None:
    parameters = number(block.get("parameters"))
    return parameters / now if parameters is not None and now else None


def comparison(run: Folder) -> Html | None:
    """Adapters side by side, and how each two lie to each other."""
    found = run.one("compare.json")
    adapters = records(found.get("adapters"))
    if not adapters:
        return None
    keys = ("modules", "rank", "effective_rank", "size", "dominance")
    rows = [[word(a.get("name")), *(shown(a.get(key)) for key in keys)] for a in adapters]
    heads = ["adapter", "modules", "rank", "rank in use", "size of the update", "dominance"]
    left = [(len(records(found.get(key))), why) for key, why in LEFT_OUT.items()]
    said = [tag("p", f"{n} modules are left out: {why}.") for n, why in left if n]
    said += [tag("p", line) for line in strings(found.get("notices"))]
    return joined(table(heads, rows, "The adapters"), pairs_of(records(found.get("pairs"))), said)


LEFT_OUT = {"only": "not all adapters have them", "misfits": "they are of different sizes"}


def pairs_of(pairs: list[Row]) -> Html | None:
    """Cosine of the updates of each two, and how much of the spaces they read and write is one."""
    rows = []
    for pair in pairs:
        name = f"{word(pair.get('a'))} and {word(pair.get('b'))}"
        spaces = [beside_chance(pair, side) for side in ("inputs", "outputs")]
        rows.append([name, shown(pair.get("cosine")), *spaces])
    heads = ["", "cosine of the updates", "shared inputs", "shared outputs"]
    caption = "How they lie to each other; in brackets what chance gives"
    return table(heads, rows, caption) if rows else None


def beside_chance(pair: Row, side: str) -> str:
    chance = number(pair.get(f"chance_{side}"))
    return percent(pair.get(f"overlap_{side}")) + (f" ({percent(chance)})" if chance else "")


def column(rows: Mapping[str, Row], key: str) -> dict[str, float]:
    """A number of each, where it is one."""
    return {name: v for name, row in rows.items() if (v := number(row.get(key))) is not None}


def strings(value: Any) -> list[str]:
    """The texts in a list."""
    return [x for x in value if isinstance(x, str)] if isinstance(value, list) else []
