"""What a folder holds, read without trust: any file may be missing, torn or another's."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora import yamlfile
from mlx_lora.adapter.mapped import mapped
from mlx_lora.errors import RunError, UserError
from mlx_lora.spectral.names import natural

DOCUMENTS = (
    "status.json",
    "summary.json",
    "check.json",
    "environment.json",
    "time_breakdown.json",
    "eval_before.json",
    "spectrum.json",
    "harmless.json",
    "adapter_config.json",
    "adapters/adapter_config.json",
    "adapters/harmless.json",
    "adapters/initial/harmless.json",
    "rejection_sampling.json",
    "weights.json",
    "advice.json",
    "compare.json",
    "merge.json",
    "fuse.json",
    "fuse_plan.json",
    "repair.json",
)
KINDS = {  # a document that says what its folder is, unless that is a run
    "fuse.json": "fused model",
    "merge.json": "merged adapter",
    "repair.json": "repaired adapter",
    "fuse_plan.json": "fuse plan",
    "advice.json": "advice",
    "compare.json": "comparison",
}
WEIGHTS = {  # a file -> the format of the adapter that it holds
    "adapters.safetensors": "mlx-lm",
    "adapter_model.safetensors": "PEFT",
    "adapter.gguf": "GGUF",
}
SAFETENSORS = tuple(name for name in WEIGHTS if name.endswith(".safetensors"))
LOGS = ("metrics.jsonl", "samples.jsonl", "alerts.jsonl", "evals.jsonl", "spectra.jsonl")
AFTER_STAGE = "eval_after_"  # and the stage's name
CONFIG = "config.yaml"
RUN = ("status.json", "summary.json", "metrics.jsonl")  # one of them makes it a run
Row = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """The readable files of a folder, by name, and what is wrong with the others."""

    path: Path
    documents: Mapping[str, Row] = field(default_factory=dict)
    logs: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    problems: Sequence[str] = ()
    stages: Sequence["Folder"] = ()

    def one(self, name: str) -> Row:
        """A document; empty where there is none."""
        return self.documents.get(name, {})

    def rows(self, name: str) -> Sequence[Row]:
        """The lines of a log."""
        return self.logs.get(name, ())

    @property
    def kind(self) -> str:
        """What the folder is a folder of: run, adapter, check, spectrum, or one of KINDS."""
        if self.stages or any(name in self.documents or name in self.logs for name in RUN):
            return "run"
        if told := next((kind for name, kind in KINDS.items() if name in self.documents), ""):
            return told
        if self.weights and self.one("check.json").get("expect") == "same":
            return "exported adapter"
        if "adapter_config.json" in self.documents:
            return "adapter"
        return "check" if {"check.json", "harmless.json"} & self.documents.keys() else "spectrum"

    @property
    def weights(self) -> list[str]:
        """Formats in which an adapter lies in the folder itself."""
        return [form for name, form in WEIGHTS.items() if (self.path / name).is_file()]

    @property
    def loops(self) -> list[tuple[str, "Folder"]]:
        """What was trained, under its name: the run itself, or each of its stages."""
        return [(s.path.name, s) for s in self.stages] or [("", self)]


def read(given: Path) -> Folder:
    """The folder of a run, an adapter, a check or a spectrum. RunError where it is none."""
    path = given.expanduser()
    if not path.is_dir():
        raise RunError(f"{given} is no folder", "Give the folder of a run, or of an adapter.")
    found = contents(path)
    if not (found.documents or found.logs or found.stages) and (path / "config.json").is_file():
        raise RunError(
            f"{given} is a model, and nothing beside it says how it came about",
            "`mlx-lora check MODEL --against MODEL2` compares it with another.",
        )
    if not (found.documents or found.logs or found.stages):
        wrong = "\n".join(f"  {p}" for p in found.problems)
        raise RunError(
            f"{given} holds nothing to report on" + (f":\n{wrong}" if wrong else ""),
            f"Expected the folder of a run ({', '.join(RUN)}), of an adapter "
            "(adapter_config.json), of a check or a spectrum.",
        )
    return found


def contents(path: Path) -> Folder:
    problems: list[str] = []
    between = sorted((p.name for p in path.glob(f"{AFTER_STAGE}*.json")), key=natural)
    names = [*DOCUMENTS, *between]
    documents = {n: d for n in names if (d := document(path, n, problems)) is not None}
    logs = {n: rows for n in LOGS if (rows := log(path, n, problems)) is not None}
    texts = {n: text for n in (CONFIG,) if (text := raw(path, n, problems)) is not None}
    config: Row = {}
    if CONFIG in texts:
        try:
            config = mapping(yamlfile.parse(texts[CONFIG], CONFIG).value)
        except UserError as error:
            problems.append(f"{CONFIG} does not read: {error}")
    problems += broken_weights(path)
    return Folder(
        path,
        documents,
        logs,
        texts,
        config,
        problems,
        [contents(stage) for stage in stage_folders(path)],
    )


def broken_weights(path: Path) -> list[str]:
    """Adapters of the folder, or of the run, that are no whole files. Only headers are read."""
    found: list[str] = []
    for name in (*SAFETENSORS, *(f"adapters/{n}" for n in SAFETENSORS)):
        try:
            if (path / name).is_file():
                mapped(path / name)
        except UserError as error:
            found.append(str(error).replace(f"{path / name}", name))
    return found


def stage_folders(run: Path) -> list[Path]:
    """Of the run's stages, in their order."""
    found = sorted((run / "stages").glob("[0-9]*_*"), key=lambda p: natural(p.name))
    return [p for p in found if p.is_dir()]


def raw(path: Path, name: str, problems: list[str]) -> str | None:
    """A file's text; None where there is none, or where it does not read, which is noted."""
    file = path / name
    if not file.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{name} does not read: {error.strerror}")
        return None


def document(path: Path, name: str, problems: list[str]) -> Row | None:
    text = raw(path, name, problems)
    if text is None:
        return None
    found = parsed(text)
    if isinstance(found, dict):
        return found
    problems.append(f"{name} is no JSON object")
    return None


def log(path: Path, name: str, problems: list[str]) -> list[Row] | None:
    text = raw(path, name, problems)
    if text is None:
        return None
    lines = [line for line in text.split("\n") if line.strip()]
    rows = [row for line in lines if isinstance(row := parsed(line), dict)]
    if len(rows) < len(lines):
        count = len(lines) - len(rows)
        problems.append(f"{name}: {count} of {len(lines)} lines are torn and left out")
    return rows


def parsed(text: str) -> Any:
    """JSON data, without NaN and infinities; None where it is none."""
    try:
        return json.loads(text, parse_constant=lambda _: None, parse_float=finite)
    except (ValueError, RecursionError):
        return None


def finite(text: str) -> float | None:
    return found if math.isfinite(found := float(text)) else None


def mapping(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[Row]:
    """The mappings in a list."""
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def word(value: Any) -> str:
    """Text; empty for anything else."""
    return value if isinstance(value, str) else ""
