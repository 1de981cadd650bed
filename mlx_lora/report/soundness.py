"""Whether the start was harmless, how far the adapter has moved, and what other checks say."""

import math

from mlx_lora.report.about import command
from mlx_lora.report.answers import TONES, Answer, history_of
from mlx_lora.report.folder import Folder, Row, mapping, records, word
from mlx_lora.report.markup import number, shown
from mlx_lora.spectral.metrics import LoRAReport

SIDES = {  # what the check of a folder has compared
    "exported adapter": "As written against as trained",
    "fused model": "Fused against the adapter on its base",
    "repaired adapter": "Repaired against as it was",
}


def harmless(run: Folder) -> Answer:
    """What was proven before the first step, the worst of the checks: no more than that."""
    stage, check = worst_check(run)
    verdict = word(check.get("verdict"))
    if not check:
        return certified(run)
    begun = f"Before {stage}" if stage else "Before training"
    expected = {
        "same": "It was to leave the base's outputs as they are",
        "healthy": "The adapter was trained before: it was to be healthy",
    }.get(word(check.get("expect")), "")
    said = [reason(check), expected, "Of what training made of it this says nothing"]
    return Answer(verdict, TONES[verdict], f"{begun}: {verdict}", sentences(said))


def certified(run: Folder) -> Answer:
    """Of an adapter without a check: what its certificate says."""
    found = next((run.one(n) for n in run.documents if n.endswith("harmless.json")), {})
    verdict = word(found.get("verdict"))
    if verdict not in TONES:
        return Answer("unknown", "plain", "Not known: there is no check", tells(run))
    return Answer(verdict, TONES[verdict], f"Certified at its start: {verdict}", reason(found))


def judged(run: Folder) -> Answer:
    """What a check says that is not of a run's start."""
    check = run.one("check.json")
    verdict = word(check.get("verdict"))
    if verdict not in TONES:
        return certified(run)
    said = f"{SIDES.get(run.kind, 'The check says')}: {verdict}"
    return Answer(verdict, TONES[verdict], said, capital(reason(check)))


def now(run: Folder, report: LoRAReport | None) -> Answer:
    """How far from the base it is, by what was measured; green only where nothing moved at all."""
    alerts = [a for _, loop in run.loops for a in loop.rows("alerts.jsonl")]
    unhealthy = sum(a.get("name") == "unhealthy" for a in alerts)
    moved, details = distances(run, report)
    if unhealthy:
        times = "once" if unhealthy == 1 else f"{unhealthy} times"
        told = f"It was told {times}, see the alerts"
        return Answer("fail", "bad", "The check in training failed", sentences([told, *details]))
    if report is not None and report.status == "untrained":
        said = "Not at all: the adapter changes nothing"
        return Answer("unmoved", "plain", said, sentences(details))
    looks = looked(run)
    if not moved:
        return Answer("unknown", "plain", "Not measured", sentences([looks, tells(run)]))
    why = "That it moves is what training does"
    return Answer("moved", "plain", moved, sentences([*details, why, looks, tells(run)]))


def tells(run: Folder) -> str:
    return f"How it reads and writes now tells: {command(run)}"


def distances(run: Folder, report: LoRAReport | None) -> tuple[str, list[str]]:
    """The best measure of how far the model has moved, and the others with what they are of."""
    found: list[tuple[str, str]] = []
    drifted = number(run.one("summary.json").get("kl_to_base_after"))
    if drifted is not None:
        found.append((f"KL to the base: {shown(drifted)} nats a token", "On what it writes itself"))
    name, loop = run.loops[-1]
    rows = loop.rows("metrics.jsonl")
    if seen := [(row, kl) for row in rows if (kl := number(row.get("kl"))) is not None]:
        row, kl = seen[-1]
        said = f"KL to where {name or 'it'} began: {shown(kl)} nats a token"
        found.append((said, f"In the rollouts of step {shown(row.get('step'))}"))
    texts = [h["perplexity"] for h in history_of(loop) if "perplexity" in h]
    if texts:
        said = f"Perplexity of plain text: {shown(texts[0])}, then {shown(texts[-1])}"
        found.append((said, "After the first step and at the last look"))
    loudest = None if report is None else report.structural.scaled_max_dominance
    if loudest is not None:
        said = f"Largest singular value of an update: {shown(loudest)} of the base's"
        found.append((said, "In the module where it is most"))
    if not found:
        return "", []
    (best, about), *others = found
    return best, [about, *(said for said, _ in others)]


def sentences(parts: list[str]) -> str:
    """Clauses as sentences, without a last full stop."""
    return ". ".join(capital(part) for part in parts if part)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def worst_check(run: Folder) -> tuple[str, Row]:
    """Of the run's check and those before its stages, with the stage; of equals the first."""
    every = [("", run), *((s.path.name, s) for s in run.stages)]
    found = [(name, folder.one("check.json")) for name, folder in every]
    judged = [(name, check) for name, check in found if word(check.get("verdict")) in TONES]
    order = list(TONES)
    return max(judged, key=lambda one: order.index(one[1]["verdict"]), default=("", {}))


def looked(run: Folder) -> str:
    """At which step of the last loop the check looked last (see `guard.Guard.due`), in words."""
    settings = records(run.config.get("stages")) if run.stages else [run.config]
    logged = [
        (name, max(number(row.get("step")) or 0.0 for row in rows) + 1, e)
        for (name, loop), e in zip(run.loops, settings, strict=False)
        if (rows := loop.rows("metrics.jsonl"))
    ]
    if not logged:
        return ""
    name, done, e = logged[-1]
    last, steps = last_look(e, done), f"{shown(done)} steps" + (f" of {name}" if name else "")
    if not last:
        return f"the check did not look in {steps}"
    return f"the check looked in training, last after {shown(last)} of {steps}: no failure"


def last_look(e: Row, done: float) -> float:
    """The last of `done` steps after which the guard looked; 0 where it never did."""
    every, saved = number(mapping(e.get("monitor")).get("check_every")), number(e.get("save_every"))
    if not every:
        return 0
    return max(done // step * step for step in (every, saved or math.inf) if step > 0)


def reason(check: Row) -> str:
    """The first sentence of what a check says."""
    reasons = check.get("reasons")
    return word(reasons[0]) if isinstance(reasons, list) and reasons else ""
