"""Adapters on and off a running model: load several, switch between them, set their strength."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from mlx_lora import cpu
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.adapter.strength import Whole, refuse_strength, weaken, whole_of
from mlx_lora.errors import AdapterError, near
from mlx_lora.models import Loaded
from mlx_lora.ship.trained import read, refuse_other_base
from mlx_lora.types import Factors

Layers = Mapping[str, Any]


def take_off(model: nn.Module) -> dict[str, Any]:
    """The model's LoRA layers, which it has no longer: what they wrapped is back in place."""
    layers = lora_layers(model)
    put_on(model, {name: inside(layer) for name, layer in layers.items()})
    return layers


def put_on(model: nn.Module, layers: Layers) -> None:
    """Layers into their places."""
    if layers:
        model.update_modules(tree_unflatten(list(layers.items())))


def inside(layer: Any) -> Any:
    """What a LoRA layer wraps."""
    return layer.linear if "linear" in layer else layer.embedding


@contextlib.contextmanager
def wearing(model: nn.Module, layers: Layers) -> Iterator[None]:
    """Inside, the model has these LoRA layers and no others."""
    before = take_off(model)
    put_on(model, layers)
    try:
        yield
    finally:
        take_off(model)
        put_on(model, before)


def layers_of(
    model: nn.Module, folder: Path, reading: files.Reading = files.read
) -> dict[str, Any]:
    """LoRA layers of an adapter folder over the model's own layers; the model stays without."""
    with wearing(model, {}):
        files.load(model, folder, reading)
        return take_off(model)


def layers_with(
    model: nn.Module, modules: Mapping[str, Factors], scale: float
) -> dict[str, LoRALinear]:
    """The same of factors for linear layers, at whatever ranks."""
    with wearing(model, {}):
        there = dict(model.named_modules())
        layers = {}
        for name, factors in modules.items():
            layer = LoRALinear.from_base(there[name], r=factors.lora_a_IR.shape[1], scale=scale)
            layer.lora_a, layer.lora_b = factors.lora_a_IR, factors.lora_b_RO
            layers[name] = layer
        put_on(model, layers)
        cpu.follow(model)
        return take_off(model)


class Adapters:
    """Several adapters of one model, by name. One at a time is in force, at any strength.

    They share the model's frozen weights: each costs its own factors. Without one in force the
    model is bitwise its base.
    """

    def __init__(self, loaded: Loaded) -> None:
        if lora_layers(loaded.model):
            raise AdapterError("this model has LoRA layers already", "Load the model afresh.")
        self.loaded = loaded
        self.notices: list[str] = []
        self.current: str | None = None
        self.strength = 1.0
        self._layers: dict[str, dict[str, Any]] = {}
        self._whole: dict[str, list[Whole]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._layers)

    def load(self, folder: Path | str, name: str | None = None) -> str:
        """Read an adapter; it is in force once `use` says so. Returns its name, by default the
        folder's. AdapterError where it belongs to another base or the name is taken.
        """
        folder = files.folder_of(str(folder))
        name = name or folder.resolve().name
        if name in self._layers:
            raise AdapterError(f"there is an adapter named {name} already", "Give it another name.")
        with wearing(self.loaded.model, {}):
            self.notices += refuse_other_base(read(folder, curved=True), self.loaded)
            layers = layers_of(self.loaded.model, folder)
        self._layers[name] = layers
        self._whole[name] = [whole_of(layer) for layer in layers.values()]
        return name

    def use(self, name: str | None, strength: float = 1.0) -> None:
        """Put this adapter in force, in place of any other; None: the base alone."""
        if name is not None:
            self._known(name)
        refuse_strength(strength)
        take_off(self.loaded.model)
        self.current, self.strength = name, strength
        if name is not None:
            for layer, whole in zip(self._layers[name].values(), self._whole[name], strict=True):
                weaken(layer, whole, strength)
            put_on(self.loaded.model, self._layers[name])

    def set_strength(self, strength: float) -> None:
        """Multiply the update of the adapter in force: 0 is the base, 1 as it was trained."""
        self.use(self.current, strength)

    def unload(self, name: str) -> None:
        """Forget an adapter; if it was in force, the base alone is."""
        self._known(name)
        if name == self.current:
            self.use(None)
        del self._layers[name], self._whole[name]

    @contextlib.contextmanager
    def using(self, name: str | None, strength: float = 1.0) -> Iterator[None]:
        """Inside, this adapter is in force."""
        before = self.current, self.strength
        self.use(name, strength)
        try:
            yield
        finally:
            self.use(*before)

    def _known(self, name: str) -> None:
        if name not in self._layers:
            raise AdapterError(f"there is no adapter named {name}", near(name, self._layers))
