"""`mlx-lora export` and `import`: read, refuse, write, read back, prove."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora import models
from mlx_lora.adapter import files
from mlx_lora.check.gate import Report
from mlx_lora.errors import AdapterError, ConfigError, RunError, near
from mlx_lora.runlog import refuse_occupied
from mlx_lora.ship import peft_files, proof
from mlx_lora.ship.formats import FORMATS, Target
from mlx_lora.ship.switch import layers_of
from mlx_lora.ship.trained import Trained, base_name, left_out, load_base, read


class NotSame(Exception):
    """What was written is not what was trained, so nothing was left behind. Carries the report."""

    def __init__(self, report: Report) -> None:
        super().__init__("; ".join(report.reasons))
        self.report = report


@dataclass(frozen=True)
class Shipped:
    """What went out, and how it was proven."""

    trained: Trained
    folder: Path
    format: str
    base: str
    report: Report | None
    notices: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "adapter": str(self.trained.folder),
            "format": self.format,
            "out": str(self.folder),
            "files": sorted(p.name for p in self.folder.iterdir()),
            "modules": len(self.trained.modules),
            "rank": self.trained.rank,
            "scale": self.trained.scale,
            "base": self.base,
            "notices": self.notices,
            "check": proof.summary(self.report) if self.report else None,
        }


def export(
    adapter: Path,
    to: str,
    out: Path,
    *,
    model: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Shipped:
    """Write an adapter in another format, read it back onto its base, and check it.

    `model` is the base to prove it on, `base` what the file calls its base (the hub id that others
    load). Raises AdapterError before anything is loaded for what the format cannot hold, and
    NotSame, leaving nothing behind, where the check fails.
    """
    if to not in FORMATS:
        raise ConfigError(f"there is no format {to!r}", near(to, FORMATS))
    refuse_occupied(out)
    trained = read(adapter)
    name = base_name(trained, model)
    refuse(trained, to, name)
    loaded, notices = load_base(trained, name, trust_remote_code=trust_remote_code)
    called = base or trained.about_base.get("model") or name
    with whole(out) as folder:
        target = Target(loaded, folder, called)
        FORMATS[to].write(trained, target)
        layers = layers_of(loaded.model, trained.folder)
        report = proof.prove_adapter(loaded, layers, FORMATS[to].read_back(target))
        if proof.differs(report):
            raise NotSame(report)
        proof.write(report, folder)
    notices += remarks(to, loaded)
    return Shipped(trained, out, to, called, report, notices)


def import_peft(
    adapter: Path, out: Path, *, model: str | None = None, trust_remote_code: bool = False
) -> Shipped:
    """Write a PEFT adapter as a folder for mlx-lm; with `model`, proven on it."""
    refuse_occupied(out)
    if (files.folder_of(str(adapter)) / files.WEIGHTS).is_file():
        raise AdapterError(
            f"{adapter} is no PEFT folder but mlx-lm's own, and can be used as it is",
            "`mlx-lora export --to mlx` writes it anew.",
        )
    trained = read(adapter)
    loaded, report = None, None
    notices = [] if model else left_out(trained.folder, None)
    if model:
        loaded, notices = load_base(trained, model, trust_remote_code=trust_remote_code)
    called = model or trained.about_base.get("model") or ""
    with whole(out) as folder:
        target = Target(loaded, folder, called)  # type: ignore[arg-type]
        FORMATS["mlx"].write(trained, target)
        if loaded:
            layers = layers_of(loaded.model, trained.folder)
            shipped = FORMATS["mlx"].read_back(target)
            report = proof.prove_adapter(loaded, layers, shipped)
            if proof.differs(report):
                raise NotSame(report)
            proof.write(report, folder)
    return Shipped(trained, out, "mlx", called, report, notices)


def refuse(trained: Trained, to: str, base: str) -> None:
    """AdapterError that lists all that the format cannot hold."""
    problems = FORMATS[to].refusals(trained, models.read_json(models.resolve(base) / "config.json"))
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise AdapterError(
            f"the format {to} cannot hold {trained.folder}:\n{lines}",
            "`mlx-lora fuse` writes it into the weights; `--to mlx` keeps it as it is.",
        )


def remarks(to: str, loaded: models.Loaded) -> list[str]:
    """What a user of the exported file should know."""
    found = []
    kind = loaded.config.get("model_type")
    if to in ("peft", "universal") and kind not in peft_files.VERIFIED:
        found.append(
            f"module names are mlx-lm's, which for a {kind} nobody has compared with transformers'"
        )
    if to != "mlx" and "quantization" in loaded.config:
        found.append(
            "it learned on quantized weights; elsewhere it meets others (unquantized, or quantized "
            "in another way), and outputs there differ as much as these bases do"
        )
    return found


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end, or vanishes if something fails."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(out)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
