"""What becomes of an update when it is added to a weight and the sum is stored.

A 4-bit weight moves in steps: an update far below a step rounds away. `kept` is the projection of
what the stored weight moved on what it should have, 1 for all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_lora.adapter.dora import DEAD
from mlx_lora.models import dense_weight

Weights = dict[str, mx.array]


@dataclass(frozen=True)
class Survival:
    """A layer's update before and after it was stored, by Frobenius norms and products."""

    module: str
    bits: int | None  # None: stored unquantized
    size: float  # ‖update‖ / ‖weight‖
    energy: float  # ‖update‖²
    product: float  # ⟨what was stored less the weight, update⟩
    error: float  # ‖what was stored less what was meant‖²

    @property
    def kept(self) -> float | None:
        """Share of the update that is in the stored weight; None where there is no update."""
        return self.product / self.energy if self.energy else None

    @property
    def noise(self) -> float | None:
        """Rounding error over the update's size; None where there is no update."""
        return (self.error / self.energy) ** 0.5 if self.energy else None

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


def stored(inner: Any, dense: mx.array) -> tuple[Weights, mx.array]:
    """A weight in the packing of a layer, and what can be read back of it, in float32."""
    if "scales" not in inner:
        kept = dense.astype(inner.weight.dtype)
        return {"weight": kept}, kept.astype(mx.float32)
    form = {"group_size": inner.group_size, "bits": inner.bits, "mode": inner.mode}
    floating = mx.issubdtype(inner.scales.dtype, mx.floating)
    given = dense.astype(inner.scales.dtype) if floating else dense
    packed = mx.quantize(given, **form)  # two arrays in the fp modes, which have no biases
    parts: Weights = dict(zip(("weight", "scales", "biases"), packed, strict=False))
    back = mx.dequantize(*packed, **form)
    return parts, back.astype(mx.float32)


def fused(layers: Mapping[str, Any], *, dequantize: bool) -> Iterator[tuple[Survival, Weights]]:
    """Each adapted layer with its update in the weight, one at a time: how it fared, its arrays."""
    for name, layer in layers.items():
        inner = layer.linear if "linear" in layer else layer.embedding
        before, update = dense_weight(inner), update_of(layer)
        if dequantize and "scales" in inner:
            dense = (before + update).astype(float_of(inner))
            parts, after = {"weight": dense}, dense.astype(mx.float32)
        else:
            parts, after = stored(inner, before + update)
        moved = after - before
        figures = mx.stack(
            [
                mx.square(update).sum(),
                (moved * update).sum(),
                mx.square(moved - update).sum(),
                mx.square(before).sum(),
            ]
        )
        mx.eval(figures, parts)
        values: list[float] = figures.tolist()  # type: ignore[assignment]
        energy, product, error, weight = values
        size = (energy / weight) ** 0.5 if weight else 0.0
        bits = None if dequantize else getattr(inner, "bits", None)
        yield Survival(name, bits, size, energy, product, error), parts


def float_of(inner: Any) -> mx.Dtype:
    """The floating type of a packed layer's numbers; the fp modes keep none, and get 16 bits."""
    dtype = inner.scales.dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16
