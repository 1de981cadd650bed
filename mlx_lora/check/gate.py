"""The check: attach or compare, measure, let every gate speak. The worst of them decides."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lora.adapter import attach as attaching
from mlx_lora.adapter import files
from mlx_lora.adapter.inits import is_rebased, label
from mlx_lora.adapter.strength import weaken_all
from mlx_lora.adapter.tensors import intact
from mlx_lora.check.gates import Gate, gates, ratio
from mlx_lora.check.metrics import Measured, measure
from mlx_lora.check.probes import ROOM, Probes, read
from mlx_lora.check.reading import Reading
from mlx_lora.check.reading import fingerprint as fingerprint_of
from mlx_lora.check.sides import Side, refuse_other_tokens
from mlx_lora.errors import ConfigError, UserError, near
from mlx_lora.models import Loaded
from mlx_lora.runlog import json_safe

if TYPE_CHECKING:
    from mlx_lora.schema import Stage

EXPECTATIONS = ("same", "healthy", "changed")
ORDER = ("pass", "warn", "fail")
Limits = Mapping[str, Mapping[str, float]]  # gate -> its thresholds, where not the defaults


@dataclass(frozen=True)
class Report:
    """A finished check. `to_json` is the contract of the command line."""

    verdict: str
    reasons: Sequence[str]
    gates: Sequence[Gate]
    measured: Measured
    expect: str
    seconds: float
    config: Mapping[str, Any] | None = None  # the adapter's, as attach or files.load returned it
    certificate: Mapping[str, Any] | None = None  # what --certify or --verify came to
    reading: Reading | None = None  # every token, for the picture
    layers: Sequence[Mapping[str, Any]] = ()  # how far each block's output moved
    sides: tuple[str, str] = "base", "with adapter"  # what a person calls them

    @property
    def exit_code(self) -> int:
        """1 when the check failed, or its certificate was refused or is invalid."""
        status = (self.certificate or {}).get("status")
        return 1 if self.verdict == "fail" or status in ("refused", "invalid") else 0

    @property
    def init_measured(self) -> Mapping[str, float]:
        """What the init found out on the way, when it was one that looks."""
        return ((self.config or {}).get("init") or {}).get("measured") or {}

    def to_json(self) -> dict[str, Any]:
        m = asdict(self.measured)
        m["perplexity_ratio"] = ratio(
            self.measured.perplexity_adapted, self.measured.perplexity_base
        )
        return json_safe(
            {
                "verdict": self.verdict,
                "reasons": list(self.reasons),
                "expect": self.expect,
                **m,
                "gates": [asdict(g) for g in self.gates],
                "init_measured": self.init_measured,
                "seconds": round(self.seconds, 3),
                **({"layers": self.layers} if self.layers else {}),
                **({"certificate": self.certificate} if self.certificate else {}),
            }
        )


def check(
    loaded: Loaded,
    *,
    adapter: Path | None = None,
    strength: float = 1.0,
    stage: "Stage | None" = None,
    init: str = "zero",
    init_options: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    expect: str | None = None,
    prompts: Path | None = None,
    samples: int | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> Report:
    """Attach an adapter (from `adapter`, else a fresh one started by `init`) and judge it.

    `lora` holds rank, scale, keys, num_layers. `expect` is same, healthy or changed; None means
    healthy for an adapter from disk and same for a fresh one. `samples` prompts are continued at
    most. `strength` is of an adapter from disk; with `stage` it is attached as that training would
    begin with it, at its scale. The model keeps the adapter.
    """
    begin = time.perf_counter()
    refuse_expectation(expect)
    check_limits(limits)
    probes = read(loaded, prompts, samples=samples)
    prints = fingerprint(loaded, probes)
    if adapter is not None:
        config = from_disk(loaded, adapter, stage)
        weaken_all(loaded.model, strength)
        expect, start = expect or "healthy", None
    else:
        options = dict(init_options or {})
        config = attaching.attach(
            loaded, init=init, init_options=options, seed=seed, **dict(lora or {})
        )
        loaded.model.eval()  # new layers drop inputs until they are told not to
        expect, start = expect or "same", label(init, options)
    record = {
        "about": config.get("base"),
        "rebased": is_rebased(config),
        "file_intact": intact(adapter) if adapter else None,
    }
    report = judge(loaded, probes, prints, expect, start, begin, seed, limits=limits, **record)
    return replace(report, config=config)


def from_disk(loaded: Loaded, adapter: Path, stage: "Stage | None") -> dict[str, Any]:
    """Attach an adapter as it was saved, or as a training stage would. Returns its config."""
    if stage is None:
        return files.load(loaded.model, adapter)
    from mlx_lora.adapter import warm

    return warm.attach(loaded, stage, stage.dropout)[0]


def compare(
    loaded: Loaded,
    against: Loaded,
    *,
    expect: str | None = None,
    prompts: Path | None = None,
    samples: int | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> Report:
    """Judge one model, with its adapter if it has one, against another. `same` unless told."""
    begin = time.perf_counter()
    refuse_expectation(expect)
    check_limits(limits)
    base, adapted = Side(against), Side(loaded)
    refuse_other_tokens(base, adapted)
    probes, expect = read(against, prompts, samples=samples), expect or "same"
    report = judged(base, adapted, probes, None, expect, None, begin, seed, limits=limits)
    return replace(report, sides=(f"{against.name} (the base here)", loaded.name))


def fingerprint(loaded: Loaded, probes: Probes) -> list[str]:
    """Hashes of the logits of every text, as the model stands."""
    return fingerprint_of(Side(loaded), probes)


def judge(
    loaded: Loaded,
    probes: Probes,
    prints: Sequence[str],
    expect: str,
    init: str | None,
    begin: float,
    seed: int,
    *,
    limits: Limits | None = None,
    **record: Any,
) -> Report:
    """Measure the attached model against its base and let every gate speak.

    `record` goes to `measure`: what the adapter on disk says of its base, and of itself.
    """
    sides = Side(loaded, off=True), Side(loaded)
    return judged(*sides, probes, prints, expect, init, begin, seed, limits=limits, **record)


def judged(
    base: Side,
    adapted: Side,
    probes: Probes,
    prints: Sequence[str] | None,
    expect: str,
    init: str | None,
    begin: float,
    seed: int,
    *,
    limits: Limits | None = None,
    **record: Any,
) -> Report:
    measured, reading = measure(
        base, adapted, probes, prints, sample_tokens=ROOM, seed=seed, **record
    )
    bound = [gates.bind(name, (limits or {}).get(name, {})) for name in gates]
    said = [g for gate in bound if (g := gate(measured, expect, init)) is not None]
    verdict = max((g.verdict for g in said), key=ORDER.index, default="pass")
    worst_first = sorted(said, key=lambda g: -ORDER.index(g.verdict))
    reasons = [g.sentence for g in worst_first if g.verdict != "pass" or g.near]
    reasons = reasons or [g.sentence for g in said if g.name == "identity"]
    seconds = time.perf_counter() - begin
    return Report(verdict, reasons, said, measured, expect, seconds, reading=reading)


def refuse_expectation(expect: str | None) -> None:
    if expect is not None and expect not in EXPECTATIONS:
        raise ConfigError(f"unknown expectation {expect!r}", near(expect, EXPECTATIONS))


def check_limits(limits: Limits | None) -> None:
    """Raise for gates and thresholds that do not exist, all at once."""
    problems = []
    for name, given in (limits or {}).items():
        try:
            gates.bind(name, given)
        except UserError as error:
            problems.append(f"{error}. {error.hint}" if error.hint else str(error))
    if problems:
        raise ConfigError("\n".join(problems), "`mlx-lora ls gates` shows them.")
