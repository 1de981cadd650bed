"""The run folder, and where the time went.

Every file appears whole: it is written beside its target and renamed. Logs grow by one line at a
time. What cannot be a JSON number becomes null beside a status that says what it was.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mlx_lora import __version__, yamlfile
from mlx_lora.errors import RunError

PACKAGES = ("mlx", "mlx-lm", "transformers", "numpy")
METRICS, STATUS, TIMES = "metrics.jsonl", "status.json", "time_breakdown.json"
Row = dict[str, Any]
State = Literal["running", "finished", "interrupted", "failed"]


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it at the end, removed if something fails."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_all(contents: Mapping[str, bytes], folder: Path, what: str) -> list[Path]:
    """Files by name in a folder, made where needed, each whole or not there. RunError says what."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            with atomically(folder / name) as part:
                part.write_bytes(data)
    except OSError as error:
        raise RunError(f"cannot write {what} to {folder}: {error}") from error
    return [folder / name for name in contents]


def json_safe(thing: Any) -> Any:
    """Plain JSON data. NaN and infinities become null, in a mapping beside `<key>_status`.

    >>> json_safe({"loss": float("nan"), "sizes": (1, float("inf"))})
    {'loss': None, 'sizes': [1, None], 'loss_status': 'nan'}
    """
    if thing is None or isinstance(thing, str | bool | int):
        return thing
    if isinstance(thing, float):
        return float(thing) if math.isfinite(thing) else None
    if isinstance(thing, Mapping):
        safe = {str(key): json_safe(value) for key, value in thing.items()}
        return safe | {
            f"{key}_status": s for key, value in thing.items() if (s := status_of(value))
        }
    if isinstance(thing, set | frozenset):
        return json_safe(sorted(thing))
    if isinstance(thing, list | tuple):
        return [json_safe(item) for item in thing]
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return json_safe(dataclasses.asdict(thing))
    if isinstance(thing, os.PathLike):
        return os.fspath(thing)
    if hasattr(thing, "tolist"):  # NumPy and MLX, scalars and arrays
        return json_safe(thing.tolist())
    raise TypeError(f"{type(thing).__name__} has no JSON form: {thing!r:.80}")


def status_of(value: Any) -> str:
    """nan, inf, or nothing for what is finite or no number at all."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, float) or math.isfinite(value):
        return ""
    return "nan" if math.isnan(value) else "inf"


class RunLog:
    """A folder that one run writes and nobody else does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step: int | None = None  # of the last metrics line

    @classmethod
    def create(cls, path: Path | None, *, name: str) -> "RunLog":
        """A new folder: `path`, or a timestamped one under ./runs. Never one that holds files."""
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
        run = cls(path or unused(Path("runs") / stamp))
        try:
            if occupied(run.folder):
                raise RunError(
                    f"{run.folder} exists already and is not an empty folder",
                    f"Nothing was overwritten. Choose another, like {unused(run.folder)}.",
                )
            run.folder.mkdir(parents=True, exist_ok=True)
            run.status("running")
        except OSError as error:
            raise RunError(
                f"the run folder {run.folder} cannot be written: {error.strerror}",
                "Give a folder you may write to with --run-dir.",
            ) from error
        return run

    @classmethod
    def resume(cls, path: Path, *, step: int) -> "RunLog":
        """The folder of a run that stopped. Log lines after `step`, or torn ones, are dropped."""
        if not (path / STATUS).is_file():
            raise RunError(
                f"{path} is no run folder: it has no {STATUS}", "Nothing to resume there."
            )
        run = cls(path)
        for log in path.glob("*.jsonl"):
            lines = log.read_text(encoding="utf-8").splitlines()
            run.write_text(log.name, "".join(f"{x}\n" for x in lines if step_of(x) <= step))
        run.step = step
        run.status("running")
        return run

    def write_text(self, name: str, text: str) -> None:
        with atomically(self.folder / name) as part:
            part.write_text(text, encoding="utf-8")

    def write_json(self, name: str, data: Any) -> None:
        self.write_text(name, json.dumps(json_safe(data), indent=2, allow_nan=False) + "\n")

    def write_yaml(self, name: str, data: Any) -> None:
        self.write_text(name, yamlfile.dump(data))

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """One line more in a .jsonl file. It is on disk when this returns."""
        line = json.dumps(json_safe(record), allow_nan=False)
        with open(self.folder / name, "a", encoding="utf-8") as log:
            log.write(line + "\n")

    def metric(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of one step: a flat line in metrics.jsonl."""
        record = json_safe({"step": step, **values})
        nested = [key for key, value in record.items() if isinstance(value, list | dict)]
        if nested:
            raise TypeError(f"metrics are single numbers, unlike {', '.join(nested)}")
        self.append(METRICS, record)
        self.step = step

    def status(self, state: State, detail: str = "") -> None:
        self.write_json(STATUS, {"state": state, "detail": detail, "step": self.step})


def occupied(path: Path) -> bool:
    """Anything but nothing or an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def refuse_occupied(out: Path) -> None:
    """RunError where the folder to make would hide or mix with what is there."""
    if occupied(out):
        raise RunError(
            f"--out {out} exists already and is not an empty folder",
            "Nothing was overwritten. Choose another.",
        )


def refuse_unwritable(out: Path) -> None:
    """RunError, before any work, for a folder that cannot be made or written to. Makes nothing."""
    try:
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RunError(
            f"--out {out} cannot be written: {error.strerror}", "Choose another folder."
        ) from error


def unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 ... that does not exist."""
    candidates = (path.with_name(f"{path.name}-{n}") for n in range(2, 1000))
    return path if not path.exists() else next(p for p in candidates if not p.exists())


def step_of(line: str) -> float:
    """The step of a log line: before all others when it has none, after them when it is torn."""
    try:
        return json.loads(line).get("step", -math.inf)
    except (ValueError, AttributeError):
        return math.inf


def environment(blas: str | None = None) -> dict[str, Any]:
    """What a run ran on. `blas` is what the CPU path uses, where it matters."""
    return {
        "mlx_lora": __version__,
        "commit": commit(),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "blas": blas,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def commit() -> str | None:
    """The commit of a checkout of this project, with -dirty; None when installed otherwise."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*", "--abbrev=40"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


COLOURS = {  # kind -> colour, legend
    "once": ("steelblue", "once"),
    "step": ("coral", "per step"),
    "unaccounted": ("lightgrey", "unaccounted"),
}
SMALL = 0.005  # of the time: rows below it are shown as one
SUMMED = ("once", "step")
NO_PASS = {"count": 0, "p50": None, "p95": None}


class Clock:
    """Where the time goes: named blocks, nested as you like, each second booked once.

    MLX is lazy: an operation takes its time when it is evaluated, so a block that leaves work
    behind books it on whoever evaluates next. End blocks with `mx.eval` or `mx.synchronize`.
    Not for several threads.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, *, start: float | None = None
    ) -> None:
        """`start`: when it began, on the same clock, if earlier than now."""
        self.now, self.start = now, now() if start is None else start
        self.seconds: dict[tuple[str, str], list[float]] = {}  # own time of each pass
        self.inner: list[float] = []  # per open block: the time of the blocks inside it
        self.before: Mapping[str, Any] = {"total": 0.0, "parts": 0, "rows": []}
        self.log: RunLog | None = None  # where `save` writes

    @contextlib.contextmanager
    def measure(
        self, name: str, kind: Literal["once", "step"] = "once", *, since: float | None = None
    ) -> Iterator[None]:
        """Book the time of the block, less that of blocks inside it. `step`: runs every step.

        `since`: when it really began, before there was a clock.
        """
        assert kind in ("once", "step"), f"kind is once or step, not {kind}"
        begin = self.now() if since is None else since
        self.inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self.now() - begin
            self.seconds.setdefault((name, kind), []).append(elapsed - self.inner.pop())
            if self.inner:
                self.inner[-1] += elapsed

    def carry(self, log: "RunLog") -> None:
        """Write into this run's folder, and go on from what an earlier part of it has left there.

        A part that was killed left what it had at its last checkpoint.
        """
        self.log = log
        if (log.folder / TIMES).is_file():
            self.before = json.loads((log.folder / TIMES).read_text(encoding="utf-8"))

    def save(self) -> dict[str, Any]:
        """The report so far, also in time_breakdown.json."""
        found = self.report()
        if self.log:
            self.log.write_json(TIMES, found)
        return found

    def report(self) -> dict[str, Any]:
        """Rows, longest first, that add up to `total` with the row `unaccounted`. Seconds.

        Of a resumed run, over all its parts; p50 and p95, of one pass through the block, are those
        of the last part that went through it.
        """
        total = self.now() - self.start
        rows = [row(name, kind, own) for (name, kind), own in self.seconds.items()]
        rest = total - math.fsum(r["seconds"] for r in rows)
        rows.append(row("unaccounted", "unaccounted", [rest]) | NO_PASS)
        rows = merged(self.before["rows"], rows)
        return {
            "total": self.before["total"] + total,
            "parts": self.before["parts"] + 1,
            "rows": sorted(rows, key=lambda r: -r["seconds"]),
        }


def merged(before: Sequence[Row], now: Sequence[Row]) -> list[Row]:
    """The rows of two parts: seconds and counts add up, the rest is the later one's."""
    found = {(r["name"], r["kind"]): r for r in before}
    for r in now:
        old = found.get((r["name"], r["kind"]))
        sums = {k: r[k] + old[k] for k in ("seconds", "count")} if old else {}
        found[r["name"], r["kind"]] = {**r, **sums}
    return list(found.values())


def row(name: str, kind: str, own: list[float]) -> dict[str, Any]:
    ordered = sorted(own)

    def at(share: float) -> float:  # nearest rank
        return ordered[math.ceil(share * len(ordered)) - 1]

    numbers = {"seconds": math.fsum(own), "count": len(own), "p50": at(0.5), "p95": at(0.95)}
    return {"name": name, "kind": kind, **numbers}


def in_words(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def gathered(report: Mapping[str, Any]) -> list[Row]:
    """The rows for a person, longest first; those below SMALL of the time make one of each kind."""
    total = report["total"]
    found = [r for r in report["rows"] if r["seconds"] >= SMALL * total or r["kind"] not in SUMMED]
    for kind in SUMMED:
        rest = [r for r in report["rows"] if r["kind"] == kind and r not in found]
        if len(rest) == 1:
            found += rest
        elif rest:
            sums = {k: sum(r[k] for r in rest) for k in ("seconds", "count")}
            found.append({"name": f"{len(rest)} more", "kind": kind, **sums})
    return sorted(found, key=lambda r: -r["seconds"])


def shared(seconds: float, total: float) -> str:
    """
    >>> shared(1, 3), shared(0.001, 3), shared(0, 0)
    ('33%', '<1%', '0%')
    """
    share = seconds / total if total > 0 else 0.0
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """The rows as one bar chart, 1000 pixels wide, longest on top. Needs no display."""
    from matplotlib.figure import Figure  # without pyplot: no backend, no global state
    from matplotlib.patches import Patch

    rows, total = gathered(report)[::-1], report["total"]
    seconds = [max(r["seconds"], 0.0) for r in rows]
    figure = Figure(figsize=(10, 1.5 + 0.36 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots()
    names = [r["name"].replace("$", r"\$") for r in rows]
    bars = axes.barh(range(len(rows)), seconds, color=[COLOURS[r["kind"]][0] for r in rows])
    axes.set_yticks(range(len(rows)), names)
    labels = [f"{in_words(s)} · {shared(s, total)}" for s in seconds]
    axes.bar_label(bars, labels, padding=5, fontsize=12)
    axes.set_xlim(0, max([*seconds, 1e-9]) * 1.2)  # room for the labels
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("seconds", fontsize=12)
    axes.tick_params(labelsize=12)
    axes.tick_params(axis="y", length=0)
    stepping = math.fsum(r["seconds"] for r in rows if r["kind"] == "step")
    parts = f", in {report['parts']} parts" if report["parts"] > 1 else ""
    headline = f"Where {in_words(total)} went{parts}: {shared(stepping, total)} of it in steps"
    axes.set_title(headline, fontsize=14, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    kinds = [kind for kind in COLOURS if any(r["kind"] == kind for r in rows)]
    handles = [Patch(color=COLOURS[kind][0], label=COLOURS[kind][1]) for kind in kinds]
    axes.legend(handles=handles, loc="lower right", fontsize=12, frameon=False)
    with atomically(path) as part:
        figure.savefig(part, format="png")
