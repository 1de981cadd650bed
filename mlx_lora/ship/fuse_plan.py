"""At how many bits an adapter's update survives in each layer, and the fewest that suffice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_lora import models
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.models import Loaded, dense_weight, in_dims
from mlx_lora.progress import watch
from mlx_lora.ship.requantize import Form, Survival, form_of, survived, together, update_of
from mlx_lora.ship.switch import inside

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits of MLX's affine packing
GROUPS = (32, 64, 128)  # and its groups
NOTHING = (
    "the adapter changes nothing: there is nothing to fuse",
    "It is untrained, or --strength is 0.",
)


@dataclass(frozen=True)
class Standard:
    """What survival means: `keep` of the update or more, as little above 1, and noise up to."""

    keep: float = 0.95
    noise: float = 0.5

    def __post_init__(self) -> None:
        problems = [] if 0 < self.keep < 1 else [f"--keep is between 0 and 1, got {self.keep:g}"]
        problems += [] if self.noise > 0 else [f"--noise is above 0, got {self.noise:g}"]
        if problems:
            raise ConfigError("\n".join(problems))

    def met(self, s: Survival) -> bool:
        return s.kept is None or s.noise is None or self.holds(s.kept, s.noise)

    def holds(self, kept: float, noise: float) -> bool:
        """Too much counts as too little: rounding W itself may point the update's way by chance."""
        return abs(kept - 1) <= 1 - self.keep and noise <= self.noise


@dataclass(frozen=True)
class LayerPlan:
    """A layer's update at every width, fewest bits first, unquantized last."""

    own: Form | None  # how the base has it
    forms: Sequence[Form | None]
    tried: Sequence[Survival]
    choice: int  # which of them

    @property
    def module(self) -> str:
        return self.tried[0].module

    @property
    def form(self) -> Form | None:
        return self.forms[self.choice]

    @property
    def chosen(self) -> Survival:
        return self.tried[self.choice]

    def at(self, bits: int | None) -> Survival:
        """At so many bits; what has no such width stays as the base has it."""
        found = {s.bits: s for s in self.tried}
        return found.get(bits) or found[self.own.bits if self.own else None]

    def to_json(self) -> dict[str, Any]:
        widths = [
            {"bits": s.bits, "kept": s.kept, "noise": s.noise, "bytes": s.bytes} for s in self.tried
        ]
        about = {"module": self.module, "size": self.chosen.size}
        base = self.own.bits if self.own else None
        return about | {"base_bits": base, "bits": self.chosen.bits, "widths": widths}


@dataclass(frozen=True)
class Plan:
    """Every adapted layer at the fewest bits that meet a standard."""

    standard: Standard
    layers: Sequence[LayerPlan]
    rest: int  # bytes of all other weights
    about: Mapping[str, Any] = field(default_factory=dict)  # adapter, base, strength, notices

    @property
    def forms(self) -> dict[str, Form | None]:
        return {layer.module: layer.form for layer in self.layers}

    @property
    def bits(self) -> list[int | None]:
        """Every width that was tried, unquantized last."""
        widths = {s.bits for layer in self.layers for s in layer.tried if s.bits}
        return [*sorted(widths), None]

    def uniform(self, bits: int | None) -> list[Survival]:
        """Every adapted layer at one width."""
        return [layer.at(bits) for layer in self.layers]

    def summed(self, survivals: Sequence[Survival]) -> dict[str, Any]:
        kept, noise = together(survivals)
        return {"kept": kept, "noise": noise, "bytes": self.rest + sum(s.bytes for s in survivals)}

    def to_json(self) -> dict[str, Any]:
        chosen = [layer.chosen for layer in self.layers]
        return {
            **self.about,
            "keep": self.standard.keep,
            "noise_limit": self.standard.noise,
            "planned": self.summed(chosen),
            "uniform": [{"bits": b, **self.summed(self.uniform(b))} for b in self.bits],
            "layers": [layer.to_json() for layer in self.layers],
        }


def planned(loaded: Loaded, standard: Standard, console: Console) -> Plan:
    """The plan for a model with its adapter on; one layer is unpacked at a time.

    AdapterError where nothing is packed, or the adapter changes nothing.
    """
    layers = packed_layers(loaded)
    found = []
    title = f"trying {len(WIDTHS)} widths in {len(layers)} layers"
    with watch(console, title, len(layers), every=max(1, len(layers) // 4)) as watcher:
        for step, (name, layer) in enumerate(layers.items()):
            found.append(plan_layer(name, layer, standard))
            watcher.update(step, {})
    if all(layer.chosen.kept is None for layer in found):
        raise AdapterError(*NOTHING)
    whole = sum(value.nbytes for value in models.base_weights(loaded.model).values())
    adapted = sum(bytes_of(inside(layer)) for layer in layers.values())
    return Plan(standard, found, whole - adapted)


def packed_layers(loaded: Loaded) -> dict[str, Any]:
    """The adapted layers; AdapterError where none of them is packed."""
    layers = lora_layers(loaded.model)
    if all(form_of(inside(layer)) is None for layer in layers.values()):
        raise AdapterError(
            f"no adapted layer of {loaded.name} is quantized: there are no bits to choose",
            "`mlx-lora fuse` without --plan and --bits writes it as it is.",
        )
    return layers


def plan_layer(name: str, layer: Any, standard: Standard) -> LayerPlan:
    inner = inside(layer)
    own, before, update = form_of(inner), dense_weight(inner), update_of(layer)
    mx.eval(before, update)
    forms = widths_of(inner)
    tried = [survived(name, inner, before, update, form)[0] for form in forms]
    good = [i for i, s in enumerate(tried) if standard.met(s)]
    best = len(tried) - 1  # unquantized: there is no better, whether it meets the standard or not
    choice = forms.index(own) if tried[0].kept is None else min(good, default=best)
    return LayerPlan(own, forms, tried, choice)


def widths_of(inner: Any) -> list[Form | None]:
    """How a layer may be stored, fewest bits first: at the base's group size, unquantized last."""
    own = form_of(inner)
    if own is None:
        return [None]
    if own.mode == "affine":
        return [*(Form(b, own.group_size) for b in sorted({*WIDTHS, own.bits})), None]
    group = own.group_size if own.group_size in GROUPS else GROUPS[0]
    wider = [Form(b, group) for b in WIDTHS if b > own.bits and in_dims(inner) % group == 0]
    return [own, *wider, None]


def one_width(loaded: Loaded, bits: int) -> dict[str, Form | None]:
    """Every packed layer at one width; ConfigError names those that cannot have it.

    AdapterError where nothing is packed.
    """
    found, problems = {}, []
    for name, layer in packed_layers(loaded).items():
        forms = {f.bits: f for f in widths_of(inside(layer)) if f}
        if forms and bits not in forms:
            problems.append(f"{name} can have {', '.join(map(str, sorted(forms)))} bits")
        found[name] = forms.get(bits)
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise ConfigError(f"--bits {bits} does not fit:\n" + "\n".join([*problems[:5], *more]))
    return found


def bytes_of(inner: Any) -> int:
    """Of a layer's weight as it is stored."""
    return sum(inner[part].nbytes for part in ("weight", "scales", "biases") if part in inner)


def quantization_of(
    config: Mapping[str, Any], own: Mapping[str, Form | None], forms: Mapping[str, Form | None]
) -> dict[str, Any]:
    """The config's `quantization` with an entry, as mlx-lm reads it, where a layer differs."""
    other = {name: form for name, form in forms.items() if form != own[name]}
    entries = {name: form.settings() if form else False for name, form in other.items()}
    return {**config["quantization"], **entries}
