"""LoRA whose update is bent by a learned curve: y = W x + s·φ(B A x), one curve φ a layer.

φ is element-wise and shared over the features of a layer; see `spline_math`. It starts as the
identity, so that the layer is plain LoRA to the bit, in its output and in the first gradients of A
and B. No weight matrix equals such a layer: it cannot be fused, nor exported.

Parameters: LoRA's, `spline` [K], how far the curve's values are from its knots, and the frozen
`spline_scale` [1], which stretches the knots over the range of the data, now and then again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from mlx_lora.adapter.listen import its_input, listening
from mlx_lora.adapter.spline_math import Curve, bent, curve_of, knots, pull, single
from mlx_lora.errors import AdapterError

LEARNED = "spline"
FACTORS = (LEARNED, "spline_scale")
QUANTILE = 0.99  # of |B A x|: so much of the data lies inside the grid
TOKENS = 512  # that a grid is stretched by


class SplineLoRALinear(LoRALinear):
    """A LoRA layer with a curve."""

    def __init__(self, lora: Any, curve: Curve) -> None:
        nn.Module.__init__(self)  # the parent's own draws a random dense layer of this size first
        self.linear, self.dropout, self.scale = lora.linear, lora.dropout, lora.scale
        self.lora_a, self.lora_b = lora.lora_a, lora.lora_b
        self.curve = curve
        self.spline = mx.zeros(curve.num_knots)
        self.spline_scale = mx.ones(1)
        self.freeze(keys=["spline_scale"], recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        return self.linear(x) + (self.scale * self.bent(z)).astype(x.dtype)

    def bent(self, z: mx.array) -> mx.array:
        """φ(z)."""
        return bent(z, self.spline, self.spline_scale, self.curve)

    def fuse(self, dequantize: bool = False) -> Any:
        raise AdapterError("a spline layer bends with its input: no weight matrix equals it")


def to_spline(model: nn.Module, parameters: Mapping[str, Any]) -> None:
    """Make every LoRA layer a spline layer with its factors. AdapterError names the misfits."""
    curve = curve_of(parameters)
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if "lora_a" in m}
    misfits = [f"{n} ({type(m).__name__})" for n, m in layers.items() if type(m) is not LoRALinear]
    if misfits:
        raise AdapterError(
            f"a spline is for linear layers; these are of another kind: {', '.join(misfits)}",
            "Leave them out of `keys`, or train LoRA.",
        )
    made = [(name, SplineLoRALinear(m, curve)) for name, m in layers.items()]
    model.update_modules(tree_unflatten(made))


def refuse_unsound(tensors: Mapping[str, mx.array], folder: Path) -> None:
    """AdapterError that lists the curves of a file which are not finite, or have no grid."""
    curves = {n: t for n, t in tensors.items() if n.rpartition(".")[2] in FACTORS}
    problems = [f"  {n} holds NaN or infinity" for n, t in curves.items() if not finite(t)]
    problems += [
        f"  {n} is {float(t):g}: the scale of a grid is above 0"
        for n, t in curves.items()
        if n.endswith(FACTORS[1]) and t.size == 1 and float(t) <= 0
    ]
    if problems:
        raise AdapterError(
            f"{folder}: {len(problems)} curves are broken\n" + "\n".join(problems),
            "Go back to the last good checkpoint.",
        )


def finite(x: mx.array) -> bool:
    return bool(mx.isfinite(x).all().item())


def spline_layers(model: nn.Module) -> dict[str, Any]:
    """Every spline layer by its full name, in the model's order."""
    found = reversed(model.named_modules())
    return {name: m for name, m in found if isinstance(m, SplineLoRALinear)}


def learned(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name of the parameter, its layer) of every curve."""
    return ((f"{name}.{LEARNED}", layer) for name, layer in spline_layers(model).items())


def pulled(model: nn.Module, grads: Any) -> Any:
    """Gradients of the loss with the regulariser of every curve added to it."""
    pulls = {name: pull(layer.spline, layer.curve) for name, layer in learned(model)}
    if not pulls:
        return grads
    return tree_map_with_path(lambda n, g: g + pulls[n] if n in pulls else g, grads)


def undecayed(model: nn.Module) -> dict[str, mx.array]:
    """What weight decay is to leave alone, by name."""
    return {name: layer.spline for name, layer in learned(model)}


def calibrate(model: nn.Module, texts: Iterable[Sequence[int]], share: float) -> None:
    """Stretch every grid over the range of its layer's B A x on these texts [ids].

    Where B is zero that range is still to come: the grid is made to hold updates of `share` of
    W x, by the 99 % quantiles of absolute values. The new knots lie on the curve as it was, so that
    identities stay identities.
    """
    layers, left = spline_layers(model), TOKENS
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in layers}
    for text in texts if layers else ():
        ids = list(text)[:left]
        if not ids:
            break
        left -= len(ids)
        with listening(layers, its_input) as heard:
            mx.eval(model(mx.array([ids])))
        for name, x in heard.items():
            layer = layers[name]
            update = (x @ layer.lora_a) @ layer.lora_b
            found[name].append((absolute(update), absolute(layer.linear(x))))
    for name, layer in layers.items():
        scale = abs(float(layer.scale))
        if not found[name] or not scale:
            continue
        updates, products = (np.concatenate(parts) for parts in zip(*found[name], strict=True))
        reached = float(np.quantile(updates, QUANTILE))
        reached = reached or share * float(np.quantile(products, QUANTILE)) / scale
        if np.isfinite(reached) and reached > 0:
            stretch(layer, layer.curve.reach / reached)


def stretch(layer: Any, input_scale: float) -> None:
    """Give the layer's grid another input scale; its knots stay on the curve."""
    z_K = single(knots(layer.curve) / input_scale)
    layer.spline = input_scale * (layer.bent(z_K) - z_K)
    layer.spline_scale = mx.array([input_scale], mx.float32)


def keep_up(
    model: nn.Module, texts: Iterable[Sequence[int]], share: float, steps_done: int
) -> None:
    """`calibrate` after 1, 2, 4, 8, ... steps, to what they learned from: B A x grows as B does.

    Not where `share` is 0.
    """
    if share and steps_done & (steps_done - 1) == 0 and spline_layers(model):
        calibrate(model, texts, share)


def grids(model: nn.Module) -> dict[str, mx.array]:
    """The input scale of every grid by the parameter's name: it changes, and nothing learns it."""
    return {f"{name}.spline_scale": m.spline_scale for name, m in spline_layers(model).items()}


def absolute(x: mx.array) -> np.ndarray:
    return np.abs(np.array(x.astype(mx.float32))).ravel()


def overhead(model: nn.Module) -> str | None:
    """A sentence on what the curves cost in numbers; None without curves."""
    layers = spline_layers(model)
    if not layers:
        return None
    each = [m.spline.size + 2 for m in layers.values()]  # with the scales into and out of the grid
    plain = sum(m.lora_a.size + m.lora_b.size for m in layers.values())
    return (
        f"{each[0]} numbers a layer, {sum(each):,} in {len(layers)} layers: "
        f"{sum(each) / plain:.2g} of the {plain:,} of LoRA"
    )
