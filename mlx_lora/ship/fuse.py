"""`mlx-lora fuse`: the adapter into the weights, measured layer by layer, proven at the end."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_lora import bases, models
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.check.gate import Report
from mlx_lora.check.probes import read as read_probes
from mlx_lora.check.reading import read_both
from mlx_lora.check.sides import Side
from mlx_lora.errors import AdapterError
from mlx_lora.models import Loaded, dense_weight
from mlx_lora.progress import watch
from mlx_lora.runlog import RunLog, atomically
from mlx_lora.ship import proof
from mlx_lora.ship.export import refuse_occupied, whole
from mlx_lora.ship.plots import LOST, survival_plot
from mlx_lora.ship.requantize import Survival, float_of, fused, together
from mlx_lora.ship.switch import Adapters
from mlx_lora.ship.trained import Trained, base_name, load_base, read

FUSED, PICTURE = "fuse.json", "fuse.png"
WORN = 0.95  # less is told


@dataclass(frozen=True)
class Fused:
    """A fused model, or why there is none."""

    trained: Trained
    folder: Path
    base: str
    dequantized: bool
    survivals: list[Survival]
    reasons: list[str]  # why it was refused, or written only because of --force
    notices: list[str]
    report: Report | None = None  # fused against adapter
    kl_adapter: float | None = None  # nats a token, base against adapter: what could be lost
    written: bool = False

    def to_json(self) -> dict[str, Any]:
        kept, noise = together(self.survivals)
        return {
            "adapter": str(self.trained.folder),
            "out": str(self.folder),
            "base": self.base,
            "dequantized": self.dequantized,
            "written": self.written,
            "kept": kept,
            "noise": noise,
            "kl_adapter": self.kl_adapter,
            "reasons": self.reasons,
            "notices": self.notices,
            "check": proof.summary(self.report) if self.report else None,
            "layers": [s.to_json() for s in self.survivals],
        }


def fuse(
    adapter: Path,
    out: Path,
    *,
    model: str | None = None,
    dequantize: bool = False,
    force: bool = False,
    strength: float = 1.0,
    trust_remote_code: bool = False,
    console: Console,
) -> Fused:
    """Write the base with the adapter in its weights, in the base's own packing.

    `dequantize` writes it unquantized. Raises Refused, leaving nothing behind, where less than half
    of the update would be in the stored weights or the fused model is not the adapter's to the
    check; `force` writes it all the same, with the reasons in fuse.json.
    """
    refuse_occupied(out)
    trained = read(adapter)
    name = base_name(trained, model)
    loaded, notices = load_base(trained, name, trust_remote_code=trust_remote_code)
    adapters = Adapters(loaded)
    adapters.use(adapters.load(trained.folder, "trained"), strength)
    weights, config, survivals = fused_weights(loaded, dequantize, console)
    lost, more = worn(survivals, loaded)
    found = Fused(trained, out, name, dequantize, survivals, lost, [*notices, *more])
    if lost and not force:
        raise Refused(replace(found, reasons=lost))
    with whole(out) as folder:
        models.save_model(weights, config, loaded.folder, folder)
        del weights
        shipped = models.load(str(folder), trust_remote_code=trust_remote_code)
        report = proof.prove_model(loaded, shipped)
        strength_kl = kl_of_adapter(loaded)
        reasons = [*lost, *unlike(report, strength_kl)]
        found = replace(found, report=report, kl_adapter=strength_kl, reasons=reasons)
        found = replace(found, written=force or not reasons)
        if not found.written:
            raise Refused(found)
        proof.write(report, folder)
        write_figures(found, folder)
    return found


class Refused(Exception):
    """The fused model is not what was trained, so nothing was left behind. Carries the rest."""

    def __init__(self, found: Fused) -> None:
        super().__init__("; ".join(found.reasons))
        self.found = found


def fused_weights(
    loaded: Loaded, dequantize: bool, console: Console
) -> tuple[dict[str, mx.array], dict[str, Any], list[Survival]]:
    """Every weight of the fused model, its config, and how each adapted layer fared."""
    layers = lora_layers(loaded.model)
    weights, survivals = models.base_weights(loaded.model), []
    with watch(console, f"fusing {len(layers)} layers", len(layers), every=len(layers)) as watcher:
        for step, (survival, parts) in enumerate(fused(layers, dequantize=dequantize)):
            survivals.append(survival)
            for part in ("weight", "scales", "biases"):
                weights.pop(f"{survival.module}.{part}", None)
            weights |= {f"{survival.module}.{part}": value for part, value in parts.items()}
            watcher.update(step, {})
    config = dict(loaded.config)
    if dequantize:
        weights |= unpacked(loaded, weights)
        config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    return weights, config, survivals


def unpacked(loaded: Loaded, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Dense weights of the packed layers that no adapter touched, taken out of `weights`."""
    found = {}
    for name, layer in loaded.model.named_modules():
        place = name.removesuffix(".linear").removesuffix(".embedding")
        if "scales" not in layer or f"{place}.scales" not in weights:
            continue
        for part in ("scales", "biases"):
            weights.pop(f"{place}.{part}", None)
        found[f"{place}.weight"] = dense_weight(layer).astype(float_of(layer))
    return found


def worn(survivals: list[Survival], loaded: Loaded) -> tuple[list[str], list[str]]:
    """Why to refuse, and what to tell, by how much of the update is in the stored weights."""
    kept, noise = together(survivals)
    if kept is None or noise is None:
        raise AdapterError("the adapter changes nothing: there is nothing to fuse")
    if kept >= WORN:
        return [], []
    worst = min(survivals, key=lambda s: 1.0 if s.kept is None else s.kept)
    form = bases.form(loaded.config.get("quantization"))
    text = (
        f"{kept:.0%} of the update survives in {form} weights (least at {worst.module}: "
        f"{worst.kept or 0:.0%}), under rounding noise of {noise:.2g} times its size"
    )
    return ([text], []) if kept < LOST else ([], [text])


def kl_of_adapter(loaded: Loaded) -> float:
    """Mean KL(base || adapter) in nats a token on the texts of the check."""
    probes = read_probes(loaded)
    reading = read_both(Side(loaded, off=True), Side(loaded), probes)
    return float(reading.column("kl").mean())


def unlike(report: Report, kl_adapter: float) -> list[str]:
    """Why a fused model does not pass for the adapter's, by what both say."""
    found = list(report.reasons) if report.verdict == "fail" else []
    kl = report.measured.kl_mean
    if report.verdict != "pass" and not kl < LOST * kl_adapter:
        found.append(
            f"the fused model is {kl:.3g} nats a token away from the adapter's, and the base only "
            f"{kl_adapter:.3g}: most of what was learned is lost"
        )
    return found


def write_figures(found: Fused, folder: Path) -> None:
    log = RunLog(folder)
    log.write_json(FUSED, found.to_json())
    with atomically(folder / PICTURE) as part:
        part.write_bytes(survival_plot(found.survivals))
