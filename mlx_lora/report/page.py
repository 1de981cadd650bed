"""The whole page: what a folder says, in the order in which a person asks."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_lora import __version__
from mlx_lora.errors import RunError
from mlx_lora.report import (
    about,
    answers,
    beside,
    checked,
    measured,
    shipped,
    soundness,
    spectra,
    training,
)
from mlx_lora.report.answers import Answer
from mlx_lora.report.folder import KINDS, Folder, read
from mlx_lora.report.markup import Html, prose, tag
from mlx_lora.report.missing import Missing
from mlx_lora.report.style import sheet
from mlx_lora.runlog import atomically
from mlx_lora.spectral.metrics import LoRAReport

FILE = "report.html"
NOTHING = "base-uri 'none'; form-action 'none'"
SCHEMA = 2  # of to_json


@dataclass(frozen=True)
class Page:
    """A page before it is written: the questions answered, the parts, what is not there."""

    folder: Folder
    answers: Mapping[str, Answer]
    parts: Mapping[str, tuple[str, Html]]  # id -> title, content
    missing: Mapping[str, str]  # title -> why
    facts: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "folder": str(self.folder.path),
            "kind": self.folder.kind,
            "answers": {name: asdict(answer) for name, answer in self.answers.items()},
            "parts": [title for title, _ in self.parts.values()],
            "missing": [{"part": title, "why": why} for title, why in self.missing.items()],
            "problems": problems(self.folder),
        }


def of(given: Path) -> Page:
    """The page of a folder. RunError where it is no run, adapter, check or spectrum."""
    folder = read(given)
    report, why = spectra.of(folder)
    parts, missing = {}, {}
    run = folder.kind == "run"
    looked_for = report is not None or folder.kind not in (*KINDS.values(), "exported adapter")
    for name, (title, part) in PARTS.items():
        found = part(folder, report, why)
        if isinstance(found, Html):
            parts[name] = (title, found)
        elif found is not None and (run or (name not in OF_RUNS and looked_for)):
            missing[title] = found.why
    facts = about.settings(folder.config) or spectra.totals(report)
    return Page(folder, asked(folder, report), parts, missing, facts)


def asked(folder: Folder, report: LoRAReport | None) -> dict[str, Answer]:
    """The questions that a folder of its kind can answer."""
    run, told = folder.kind == "run", {}
    if run:
        told |= {"finished": answers.finished(folder), "learned": answers.learned(folder)}
    if run or folder.kind == "adapter":
        told["harmless"] = soundness.harmless(folder)
    elif {"check.json", "harmless.json"} & folder.documents.keys():
        told["check"] = soundness.judged(folder)
    if run:
        told["moved"] = soundness.now(folder, report)
    if run or report is not None:
        told["rank"] = answers.rank(report)
        told["alerts"] = answers.watched(folder, report)
    return told


# None: there is nothing that a reader would look for
Part = Callable[[Folder, LoRAReport | None, str], Html | Missing | None]
PARTS: Mapping[str, tuple[str, Part]] = {
    "shipped": ("What it is", lambda run, report, why: shipped.shipped(run)),
    "compare": ("Side by side", lambda run, report, why: beside.comparison(run)),
    "advice": ("Advice on ranks", lambda run, report, why: beside.advice(run)),
    "alerts": (
        "Alerts",
        lambda run, report, why: about.alerts(run, report, answers.nevertheless(run)),
    ),
    "held-out": ("Held out", lambda run, report, why: measured.held_out(run)),
    "training": ("Training", lambda run, report, why: training.training(run)),
    "lessons": ("What it learned from", lambda run, report, why: beside.lessons(run)),
    "samples": ("Samples", lambda run, report, why: training.samples(run)),
    "check": ("The check", lambda run, report, why: checked.check(run)),
    "ranks": ("The adapter", lambda run, report, why: spectra.ranks(report, why)),
    "dominance": ("Against the base", lambda run, report, why: spectra.dominance(report, why)),
    "weights": ("The base's weights", lambda run, report, why: beside.weights(run)),
    "dynamics": ("How it moved", lambda run, report, why: spectra.dynamics(run)),
    "time": ("Time", lambda run, report, why: about.time(run)),
    "config": ("Settings", lambda run, report, why: about.config(run)),
    "versions": ("Versions", lambda run, report, why: about.environment(run)),
    "certificate": ("Certificate", lambda run, report, why: about.certificate(run)),
}
OF_RUNS = ("held-out", "training", "samples", "dynamics", "time", "versions")
QUESTIONS = {
    "finished": "Is it finished?",
    "learned": "Did it learn?",
    "harmless": "Was its start harmless?",
    "check": "Is it what it should be?",
    "moved": "How far is it from its start?",
    "rank": "Which rank does it use?",
    "alerts": "Did anything stand out?",
}


def problems(folder: Folder) -> list[str]:
    """Files that are there and do not read, of the folder and its stages."""
    return [
        *folder.problems,
        *(f"stages/{s.path.name}: {problem}" for s in folder.stages for problem in s.problems),
    ]


def render(page: Page) -> str:
    """The document. Nothing in it is fetched, and no script can run."""
    style = sheet()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; {NOTHING}"
    title = f"{page.folder.path.resolve().name}: {page.folder.kind}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(style)),
    )
    links = [tag("li", tag("a", title, href=f"#{name}")) for name, (title, _) in page.parts.items()]
    sections = [
        tag("section", tag("h2", title), content, id=name)
        for name, (title, content) in page.parts.items()
    ]
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("p", said(page.facts), class_="quiet")),
        tag("nav", tag("ul", links), aria_label="Parts of this page"),
        tag("main", first(page), *sections, last(page)),
        tag("footer", tag("p", f"mlx-lora {__version__}. {page.folder.path.resolve()}")),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def said(facts: Mapping[str, str]) -> str:
    return " · ".join(f"{name} {value}" for name, value in facts.items())


def first(page: Page) -> Html | None:
    """The answers, and a warning where a file does not read. None where there is neither."""
    cards = [
        tag(
            "div",
            tag("h3", QUESTIONS[name]),
            tag("p", answer.sentence, class_="big"),
            tag("p", prose(answer.detail), class_="quiet") if answer.detail else None,
            class_=f"answer {answer.tone}",
        )
        for name, answer in page.answers.items()
    ]
    wrong = problems(page.folder)
    if not cards and not wrong:
        return None
    warning = tag("div", [tag("p", p) for p in wrong], class_="box warn") if wrong else None
    return tag(
        "section", tag("h2", "In short"), tag("div", cards, class_="answers"), warning, id="short"
    )


def last(page: Page) -> Html | None:
    """What this page does not show, and why."""
    if not page.missing:
        return None
    rows = [(tag("dt", title), tag("dd", why)) for title, why in page.missing.items()]
    return tag("section", tag("h2", "Not in this report"), tag("dl", rows), id="missing")


def place(run: Path, out: Path | None) -> Path:
    """The file to write: `out`, or FILE in the folder that is given."""
    path = (out or run).expanduser()
    return path / FILE if path.is_dir() else path


def write(page: Page, path: Path) -> None:
    """The page as a file, whole or not there. RunError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as part:
            part.write_text(render(page), encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"the report cannot be written to {path}: {error.strerror}",
            "Give another file with --out.",
        ) from error
