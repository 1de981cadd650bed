"""What becomes of an update when it is added to a weight and the sum is stored.

A 4-bit weight moves in steps: an update far below a step rounds away. `kept` is the projection of
what the stored weight moved on what it should have, 1 for all of it; `noise` is the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.adapter.dora import DEAD
from mlx_lora.models import dense_weight
from mlx_lora.ship.switch import inside

Weights = dict[str, mx.array]


@dataclass(frozen=True)
class Form:
    """How a weight is packed. Where there is None in its place, it is stored unquantized."""

    bits: int
    group_size: int
    mode: str = "affine"

    def settings(self) -> dict[str, Any]:
        """As MLX and a model's config spell it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


Forms = Mapping[str, Form | None]  # by layer


@dataclass(frozen=True)
class Survival:
    """A layer's update before and after it was stored, by Frobenius norms and products."""

    module: str
    bits: int | None  # None: stored unquantized
    size: float  # ‖update‖ / ‖weight‖
    energy: float  # ‖update‖²
    product: float  # ⟨what was stored less the weight, update⟩
    error: float  # ‖what was stored less what was meant‖²
    bytes: int = 0  # of what is stored

    @property
    def kept(self) -> float | None:
        """Share of the update that is in the stored weight; None where there is no update."""
        return self.product / self.energy if self.energy else None

    @property
    def noise(self) -> float | None:
        """What moved besides the kept share, over the update's size; None without an update."""
        if self.kept is None:
            return None
        return max(0.0, self.error / self.energy - (1 - self.kept) ** 2) ** 0.5

    def to_json(self) -> dict[str, Any]:
        shown = {"module": self.module, "bits": self.bits, "size": self.size}
        return shown | {"kept": self.kept, "noise": self.noise}


def together(survivals: Sequence[Survival]) -> tuple[float | None, float | None]:
    """`kept` and `noise` over all layers, each weighted by the square of its update."""
    sums = [sum(getattr(s, name) for s in survivals) for name in ("energy", "product", "error")]
    whole = Survival("", None, 0.0, *sums)
    return whole.kept, whole.noise


def update_of(layer: Any) -> mx.array:
    """What a LoRA layer adds to its weight, in float32 and the weight's shape."""
    a, b = layer.lora_a.astype(mx.float32), layer.lora_b.astype(mx.float32)
    if "embedding" in layer:
        return layer.scale * (a @ b)
    if a.ndim == 3:
        return layer.scale * (b @ a)
    update_OI = layer.scale * (a @ b).T
    if "m" not in layer or layer.scale == 0:
        return update_OI
    weight_OI, norm_O = dense_weight(layer.linear), layer.norm_O()
    factor_O = mx.where(norm_O > DEAD, layer.m / mx.maximum(norm_O, DEAD), 1)
    return factor_O[:, None] * (weight_OI + update_OI) - weight_OI


def form_of(inner: Any) -> Form | None:
    """How a layer is packed."""
    return Form(inner.bits, inner.group_size, inner.mode) if "scales" in inner else None


def own_forms(layers: Mapping[str, Any]) -> dict[str, Form | None]:
    """What is in each layer stays packed as it is."""
    return {name: form_of(inside(layer)) for name, layer in layers.items()}


def float_of(inner: Any) -> mx.Dtype:
    """The floating type of a layer's numbers; the fp modes keep none, and get 16 bits."""
    dtype = inner.scales.dtype if "scales" in inner else inner.weight.dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16


def stored(inner: Any, dense: mx.array, form: Form | None) -> tuple[Weights, mx.array]:
    """A weight in a form, at a layer's precision, and what can be read back of it, in float32."""
    affine = form is None or form.mode == "affine"
    given = dense.astype(float_of(inner)) if affine else dense
    if form is None:
        return {"weight": given}, given.astype(mx.float32)
    packed = mx.quantize(given, **form.settings())  # two arrays in the fp modes: no biases
    parts: Weights = dict(zip(("weight", "scales", "biases"), packed, strict=False))
    return parts, mx.dequantize(*packed, **form.settings()).astype(mx.float32)


def fused(layers: Mapping[str, Any], forms: Forms) -> Iterator[tuple[Survival, Weights]]:
    """Each adapted layer with its update in the weight, one at a time: how it fared, its arrays."""
    for name, layer in layers.items():
        inner = inside(layer)
        before, update = dense_weight(inner), update_of(layer)
        yield survived(name, inner, before, update, forms[name])


def survived(
    name: str, inner: Any, before: mx.array, update: mx.array, form: Form | None
) -> tuple[Survival, Weights]:
    """One layer with its update in a form."""
    parts, after = stored(inner, before + update, form)
    moved = after - before
    products = (
        mx.square(update).sum(axis=-1),
        (moved * update).sum(axis=-1),
        mx.square(moved - update).sum(axis=-1),
        mx.square(before).sum(axis=-1),
    )
    mx.eval(products, parts)
    # rows in float64: MLX's own sum of many numbers is naive on a CPU
    energy, product, error, weight = (float(np.array(x).sum(dtype=np.float64)) for x in products)
    size = (energy / weight) ** 0.5 if weight else 0.0
    bits = form.bits if form else None
    count = sum(part.nbytes for part in parts.values())
    return Survival(name, bits, size, energy, product, error, count), parts
