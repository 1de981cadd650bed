"""The parts of the page on what happened around: alerts, time, the file, versions, certificate."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from shlex import quote

from mlx_lora.report.folder import CONFIG, Folder, Row, mapping, records, word
from mlx_lora.report.markup import Html, joined, number, percent, prose, shown, table, tag
from mlx_lora.report.missing import Missing
from mlx_lora.runlog import gathered, in_words
from mlx_lora.spectral.metrics import LoRAReport
from mlx_lora.types import Finding

KEYS = {  # a key of the config -> what a person calls it
    "model": "model",
    "method": "method",
    "task": "task",
    "init": "start of the adapter",
    "iters": "steps",
    "batch_size": "batch size",
    "learning_rate": "learning rate",
    "optimizer": "optimizer",
    "seed": "seed",
}
NOT_OF_ES = ("batch_size", "learning_rate")
OF_A_STAGE = ("method", "iters", "batch_size", "learning_rate", "optimizer")
BAR = 120  # units of a bar's picture


def alerts(run: Folder, report: LoRAReport | None, nevertheless: str) -> Html | Missing:
    """What was noticed: on the run with its step, on the adapter by kind, each with what to do.

    `nevertheless` is what speaks for the adapter, said where alerts are on it alone.
    """
    parts = [box(f"step {shown(row.get('step'))}", row, name) for name, row in raised(run)]
    beside = "" if parts else nevertheless
    parts += [on_adapter(name, some) for name, some in by_name(report).items()]
    if parts:
        limits = f"Whether the model forgot anything else, that does not say: {command(run)}"
        return joined(tag("p", prose(f"{beside}. {limits}")) if beside else None, parts)
    if watched_at_all(run, report):
        return tag("p", "None: nothing that is watched went beyond its threshold.")
    return Missing("nothing was watched")


def command(run: Folder) -> str:
    """The check of a trained adapter, in backticks; to paste where its base is known."""
    model, path = word(run.config.get("model")), run.path.resolve()
    adapter = path / "adapters" if run.kind == "run" else path
    known = model and (adapter / "adapter_config.json").is_file()
    given = (quote(model), quote(str(adapter))) if known else ("MODEL", "DIR")
    return f"`mlx-lora check {given[0]} --adapter {given[1]}`"


def watched_at_all(run: Folder, report: LoRAReport | None) -> bool:
    """Whether there is a spectrum, or a step, look or alert that was logged."""
    logs = ("metrics.jsonl", "spectra.jsonl", "alerts.jsonl")
    return report is not None or any(loop.rows(log) for _, loop in run.loops for log in logs)


def raised(run: Folder) -> list[tuple[str, Row]]:
    """The alerts on the run and its stages, each with its stage."""
    return [(name, row) for name, loop in run.loops for row in loop.rows("alerts.jsonl")]


def by_name(report: LoRAReport | None) -> Mapping[str, list[Finding]]:
    """The alerts on the adapter, those of one kind together."""
    found = defaultdict(list)
    for alert in () if report is None else report.alerts:
        found[alert.name].append(alert)
    return found


def box(when: str, alert: Row, stage: str = "", more: Html | None = None) -> Html:
    tone = "bad" if word(alert.get("severity")) == "fail" else "warn"
    place = ", ".join(x for x in (stage, when, word(alert.get("module"))) if x)
    return tag(
        "div",
        tag("p", tag("strong", word(alert.get("name"))), f" ({place})"),
        tag("p", word(alert.get("message")), ".") if alert.get("message") else None,
        tag("p", "What to do: ", prose(word(alert.get("action")))),
        more,
        class_=f"box {tone}",
    )


def on_adapter(name: str, some: Sequence[Finding]) -> Html:
    """One box for all modules that an alert is about."""
    first = some[0]
    about: Row = {"name": name, "action": first.action, "severity": first.severity}
    if len(some) == 1:
        return box("the adapter", about | {"module": first.module, "message": first.message})
    about["message"] = f"Such as {first.module}: {first.message}"
    each = tag("ul", [tag("li", f"{f.module}: {f.message}") for f in some])
    where = f"{len(some)} modules of the adapter"
    return box(where, about, more=tag("details", tag("summary", "Each of them"), each))


def time(run: Folder) -> Html | Missing:
    """Where the time went, longest first."""
    breakdown = run.one("time_breakdown.json")
    total, parts = number(breakdown.get("total")), number(breakdown.get("parts")) or 1
    rows = [clean(row) for row in records(breakdown.get("rows"))]
    if not total or total <= 0 or not rows:
        return Missing("there is no time_breakdown.json")
    rows = gathered({"total": total, "rows": rows})
    longest = max(row["seconds"] for row in rows) or 1.0
    said = [
        [
            row["name"],
            bar(row["kind"], row["seconds"] / longest),
            tag("td", in_words(row["seconds"]), class_="n"),
            tag("td", percent(row["seconds"] / total), class_="n"),
            tag("td", {"once": "once", "step": "each step"}.get(row["kind"], "not measured")),
        ]
        for row in rows
    ]
    resumed = f", in {parts:.0f} parts" if parts > 1 else ""
    return table(
        ["work", "size", "time", "share", "when"], said, f"{in_words(total)} in all{resumed}"
    )


def clean(row: Row) -> Row:
    kind = word(row.get("kind"))
    return {
        "name": word(row.get("name")) or "?",
        "kind": kind if kind in ("once", "step", "unaccounted") else "unaccounted",
        "seconds": max(number(row.get("seconds")) or 0.0, 0.0),
        "count": number(row.get("count")) or 0,
    }


def bar(kind: str, share: float) -> Html:
    rect = tag("rect", width=f"{BAR * share:.1f}", height=12, class_=f"bar {kind}")
    view = f"0 0 {BAR} 12"
    return tag("td", tag("svg", rect, viewBox=view, width=BAR, height=12, aria_hidden="true"))


def config(run: Folder) -> Html | Missing:
    """The keys that matter most, and the whole file behind a fold."""
    text = run.texts.get(CONFIG)
    adapter = run.one("adapter_config.json") or run.one("adapters/adapter_config.json")
    if text is None and not adapter:
        return Missing(f"there is no {CONFIG} and no adapter_config.json")
    fold = (
        tag("details", tag("summary", f"All of {CONFIG}"), tag("pre", text, class_="text"))
        if text is not None
        else None
    )
    pairs = settings(run.config or adapter)
    return joined(tag("dl", [(tag("dt", k), tag("dd", v)) for k, v in pairs.items()]), fold)


def settings(found: Row) -> dict[str, str]:
    """What a person asks for first, of a config.yaml or an adapter_config.json."""
    lora, packed = mapping(found.get("lora_parameters")), mapping(found.get("quantize"))
    stages = [word(s.get("method")) for s in records(found.get("stages"))]
    es = found.get("method") == "es" and not stages
    left_out = OF_A_STAGE if stages else NOT_OF_ES if es else ()
    said = {name: brief(found.get(key)) for key, name in KEYS.items() if key not in left_out}
    said["population"] = brief(mapping(found.get("es")).get("population")) if es else ""
    said["rank and scale"] = f"{brief(lora.get('rank'))}, {brief(lora.get('scale'))}"
    said["quantized on load"] = f"to {brief(packed.get('bits'))} bits" if packed else ""
    said["stages"] = ", ".join(stages)
    return {key: value for key, value in said.items() if value and value != ", "}


def brief(value: object) -> str:
    if isinstance(value, dict):
        return word(value.get("name"))
    if isinstance(value, bool) or value is None or isinstance(value, list):
        return ""
    return str(value)


def environment(run: Folder) -> Html | Missing:
    """Versions and machine."""
    about = run.one("environment.json")
    if not about:
        return Missing("there is no environment.json")
    flat = {k: v for k, v in about.items() if not isinstance(v, dict)}
    flat |= mapping(about.get("versions"))
    said = [(tag("dt", k), tag("dd", str(v))) for k, v in flat.items() if v is not None]
    return tag("dl", said)


def certificate(run: Folder) -> Html | Missing:
    """The proof that the adapter, as it began, left its base's logits as they were."""
    names = [name for name in run.documents if name.endswith("harmless.json")]
    if not names:
        return Missing("there is no harmless.json: mlx-lora check MODEL --certify --out DIR")
    return joined(one_certificate(name, run.one(name)) for name in names)


def one_certificate(name: str, found: Row) -> Html:
    base, adapter = mapping(found.get("base")), mapping(found.get("adapter"))
    bitwise = "equal to the bit" if found.get("bitwise_identical") is True else "not equal"
    said = {
        "file": name,
        "verdict": word(found.get("verdict")),
        "logits": bitwise,
        "base": f"{brief(base.get('model'))} {brief(base.get('revision'))}",
        "base's weights": brief(base.get("weights_hash")),
        "adapter's weights": brief(adapter.get("weights_hash")),
        "computed in": brief(found.get("dtype")),
        "texts and prompts": brief(found.get("probes_hash")),
    }
    return tag("dl", [(tag("dt", k), tag("dd", v)) for k, v in said.items() if v.strip()])
