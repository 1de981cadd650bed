"""`mlx-lora fuse`: the adapter into the weights, measured layer by layer, proven at the end."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_lora import bases, models
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.check.gate import Report
from mlx_lora.check.metrics import is_finite
from mlx_lora.check.probes import read as read_probes
from mlx_lora.check.reading import read_both
from mlx_lora.check.sides import Side
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.models import Loaded, dense_weight
from mlx_lora.progress import watch
from mlx_lora.runlog import RunLog, atomically, refuse_occupied
from mlx_lora.ship import proof
from mlx_lora.ship.export import whole
from mlx_lora.ship.fuse_plan import (
    NOTHING,
    Plan,
    Standard,
    one_width,
    planned,
    quantization_of,
)
from mlx_lora.ship.plots import LOST, plan_plot, survival_plot
from mlx_lora.ship.requantize import Forms, Survival, float_of, fused, own_forms, together
from mlx_lora.ship.switch import Adapters
from mlx_lora.ship.trained import Trained, base_name, load_base, read

FUSED, PICTURE = "fuse.json", "fuse.png"
PLAN, PLAN_PICTURE = "fuse_plan.json", "fuse_plan.png"
PLANNED = "plan"  # --bits plan
WORN = 0.95  # less is told
DROWNED = 2.0  # times the update, of noise: more is refused


@dataclass(frozen=True)
class Fused:
    """A fused model, or why there is none."""

    trained: Trained
    folder: Path
    base: str
    dequantized: bool
    bits: str | None  # what was asked for
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
            "bits": self.bits,
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
    bits: str | None = None,
    standard: Standard | None = None,
    force: bool = False,
    strength: float = 1.0,
    trust_remote_code: bool = False,
    console: Console,
) -> Fused:
    """Write the base with the adapter in its weights, in the base's own packing.

    `dequantize` writes it unquantized. `bits` packs the adapted layers at so many, or, if "plan",
    each at the fewest that meet the `standard`. Raises Refused, leaving nothing behind, where less
    than half of the update would be in the stored weights or the fused model is not the adapter's
    to the check; `force` writes it all the same, with the reasons in fuse.json.
    """
    refuse_bits(bits, dequantize)
    refuse_occupied(out)
    trained, name, loaded, notices = opened(adapter, model, strength, trust_remote_code)
    plan = planned(loaded, standard or Standard(), console) if bits == PLANNED else None
    forms = forms_of(loaded, bits, plan, dequantize)
    weights, config, survivals = fused_weights(loaded, forms, dequantize, console)
    lost, more = worn(survivals, forms)
    found = Fused(trained, out, name, dequantize, bits, survivals, lost, [*notices, *more])
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
        if plan:
            write_plan(replace(plan, about=about(trained, name, strength, notices)), folder)
    return found


def plan(
    adapter: Path,
    out: Path | None,
    *,
    model: str | None = None,
    standard: Standard | None = None,
    strength: float = 1.0,
    trust_remote_code: bool = False,
    console: Console,
) -> Plan:
    """What would survive at which width, without a fused model; as files where `out` is given."""
    if out:
        refuse_occupied(out)
    trained, name, loaded, notices = opened(adapter, model, strength, trust_remote_code)
    found = planned(loaded, standard or Standard(), console)
    found = replace(found, about=about(trained, name, strength, notices))
    if out:
        with whole(out) as folder:
            write_plan(found, folder)
    return found


def opened(
    adapter: Path, model: str | None, strength: float, trust: bool
) -> tuple[Trained, str, Loaded, list[str]]:
    """The adapter, its base's name, that with the adapter on, and what to know of it."""
    trained = read(adapter)
    name = base_name(trained, model)
    loaded, notices = load_base(trained, name, trust_remote_code=trust)
    adapters = Adapters(loaded)
    adapters.use(adapters.load(trained.folder, "trained"), strength)
    broken = [n for n, layer in lora_layers(loaded.model).items() if not is_finite(layer)]
    if broken:
        raise AdapterError(
            f"{trained.folder}: {len(broken)} modules hold NaN or infinity, {broken[0]} for one",
            "Go back to the last good checkpoint.",
        )
    if not strength or not any(moves(layer) for layer in lora_layers(loaded.model).values()):
        raise AdapterError(*NOTHING)
    return trained, name, loaded, notices


def moves(layer: Any) -> bool:
    """Whether an adapter changes its layer at all; of DoRA the magnitudes may alone."""
    return "m" in layer or bool(mx.any(layer.lora_a).item() and mx.any(layer.lora_b).item())


def about(trained: Trained, base: str, strength: float, notices: list[str]) -> dict[str, Any]:
    """What a plan is a plan of."""
    found = {"adapter": str(trained.folder), "base": base}
    return {**found, "strength": strength, "notices": notices}


def refuse_bits(bits: str | None, dequantize: bool) -> None:
    if bits is not None and bits != PLANNED and not bits.isdecimal():
        raise ConfigError(f"--bits is a number or `{PLANNED}`, got {bits}")
    if bits is not None and dequantize:
        raise ConfigError("--bits packs the weights and --dequantize unpacks them: give one")


def forms_of(loaded: Loaded, bits: str | None, plan: Plan | None, dequantize: bool) -> Forms:
    """How each adapted layer is to be stored."""
    if plan:
        return plan.forms
    own = own_forms(lora_layers(loaded.model))
    if dequantize:
        return dict.fromkeys(own)
    return one_width(loaded, int(bits)) if bits else own


class Refused(Exception):
    """The fused model is not what was trained, so nothing was left behind. Carries the rest."""

    def __init__(self, found: Fused) -> None:
        super().__init__("; ".join(found.reasons))
        self.found = found


def fused_weights(
    loaded: Loaded, forms: Forms, dequantize: bool, console: Console
) -> tuple[dict[str, mx.array], dict[str, Any], list[Survival]]:
    """Every weight of the fused model, its config, and how each adapted layer fared.

    A layer without an update stays to the bit what it is, if its form does.
    """
    layers = lora_layers(loaded.model)
    own = own_forms(layers)
    weights, survivals = models.base_weights(loaded.model), []
    with watch(console, f"fusing {len(layers)} layers", len(layers), every=len(layers)) as watcher:
        for step, (survival, parts) in enumerate(fused(layers, forms)):
            name = survival.module
            survivals.append(survival)
            watcher.update(step, {})
            if survival.kept is None and forms[name] == own[name]:
                continue
            for part in ("weight", "scales", "biases"):
                weights.pop(f"{name}.{part}", None)
            weights |= {f"{name}.{part}": value for part, value in parts.items()}
    config = dict(loaded.config)
    if dequantize:
        weights |= unpacked(loaded, weights)
        config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    elif forms != own:
        config["quantization"] = quantization_of(config, own, forms)
    return weights, config, survivals


def unpacked(loaded: Loaded, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Dense weights of the packed layers that no adapter touched, taken out of `weights`."""
    found, adapted = {}, lora_layers(loaded.model)
    for name, layer in loaded.model.named_modules():
        place = models.unwrapped(name, adapted)
        if "scales" not in layer or f"{place}.scales" not in weights:
            continue
        for part in ("scales", "biases"):
            weights.pop(f"{place}.{part}", None)
        found[f"{place}.weight"] = dense_weight(layer).astype(float_of(layer))
    return found


def worn(survivals: list[Survival], forms: Forms) -> tuple[list[str], list[str]]:
    """Why to refuse, and what to tell, by how much of the update is in the stored weights."""
    kept, noise = together(survivals)
    if kept is None or noise is None:
        raise AdapterError(*NOTHING)
    if kept >= WORN and noise <= DROWNED:
        return [], []
    worst = min(survivals, key=lambda s: 1.0 if s.kept is None else s.kept)
    ways = {bases.form(form.settings() if form else None) for form in forms.values()}
    text = (
        f"{kept:.0%} of the update survives in {' and '.join(sorted(ways))} weights (least at "
        f"{worst.module}: {worst.kept or 0:.0%}), under rounding noise of {noise:.2g} times it"
    )
    if kept < LOST or noise > DROWNED:
        return [f"{text}; `fuse --plan` shows at how many bits it would survive"], []
    return [], [text]


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


def write_plan(plan: Plan, folder: Path) -> None:
    RunLog(folder).write_json(PLAN, plan.to_json())
    with atomically(folder / PLAN_PICTURE) as part:
        part.write_bytes(plan_plot(plan))
