"""The curves of a spline adapter: how far each is from the identity, as numbers and a picture."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.adapter.mapped import mapped, widened
from mlx_lora.adapter.peft import is_peft
from mlx_lora.adapter.spline_math import Curve, asked, curve_at, knots, slopes
from mlx_lora.adapter.tensors import described, place_of
from mlx_lora.errors import AdapterError
from mlx_lora.spectral.canvas import HEADLINE, INK, QUIET, blank, inches, shades, whole_numbers
from mlx_lora.spectral.names import kinds, places
from mlx_lora.spectral.read import adapter_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST, MOST, STRAIGHT = 0.01, 1.0, 0.05  # of deviation, healthy between; of slope variance
BESIDE = 1.25  # a picture shows the grid and a quarter more


@dataclass(frozen=True)
class SplineMetrics:
    """One layer's curve, in units of its grid but for `knots` and `values`."""

    deviation: float | None  # mean of |v - k|
    slope_variance: float | None  # of the slopes of φ over the pieces
    least_slope: float | None  # of these; 0 or less folds the update back
    input_scale: float  # what B A x is multiplied by to come onto the grid
    output_scale: float | None  # and back: 1 / input_scale
    knots: Sequence[float]  # as numbers of B A x; none without a scale above 0
    values: Sequence[float]  # φ at them; none where the curve is not finite


def of_folder(given: str | Path) -> dict[str, SplineMetrics]:
    """The curves of an adapter or run folder by module; none where it has no splines."""
    folder = adapter_folder(given)
    if is_peft(folder):
        return {}
    folder, weights = place_of(folder)
    curve = asked(described(folder, weights)["lora_parameters"])
    if curve is None:
        return {}
    stored = mapped(folder / weights)
    names = [n.removesuffix(".lora_b") for n in stored if n.endswith(".lora_b")]
    parts = {"spline": (curve.num_knots,), "spline_scale": (1,)}
    wanted = {f"{n}.{part}": shape for n in names for part, shape in parts.items()}
    misfits = [
        f"  {name} is {stored[name].shape if name in stored else 'missing'}, should be {shape}"
        for name, shape in wanted.items()
        if name not in stored or stored[name].shape != shape
    ]
    if misfits:
        raise AdapterError(
            f"{folder}: {len(misfits)} curves do not fit num_knots {curve.num_knots}\n"
            + "\n".join(misfits),
            "Are adapter_config.json and adapters.safetensors of one adapter?",
        )
    tensors = {name: widened(np.asarray(stored[name])) for name in wanted}
    return {
        n: measure(tensors[f"{n}.spline"], float(tensors[f"{n}.spline_scale"][0]), curve)
        for n in names
    }


def of_model(model: Any) -> dict[str, SplineMetrics]:
    """The same of a model with its layers attached."""
    import mlx.core as mx

    from mlx_lora.adapter.spline import spline_layers

    return {
        name: measure(
            np.array(m.spline.astype(mx.float32), np.float64), float(m.spline_scale), m.curve
        )
        for name, m in spline_layers(model).items()
    }


def measure(d_K: np.ndarray, input_scale: float, curve: Curve) -> SplineMetrics:
    """Of how far a curve's values are from its knots; without numbers where it is broken."""
    placed = math.isfinite(input_scale) and input_scale > 0
    whole = placed and bool(np.isfinite(d_K).all())
    k_K = knots(curve) / input_scale if placed else np.empty(0)
    slope_P = 1 + slopes(curve) @ d_K
    values = curve_at(k_K, d_K, input_scale, curve) if whole else np.empty(0)
    return SplineMetrics(
        deviation=float(np.abs(d_K).mean()) if whole else None,
        slope_variance=float(slope_P.var()) if whole else None,
        least_slope=float(slope_P.min()) if whole else None,
        input_scale=input_scale,
        output_scale=1 / input_scale if placed else None,
        knots=k_K.tolist(),
        values=values.tolist(),
    )


def headline(splines: Mapping[str, SplineMetrics]) -> str:
    """What the curves amount to."""
    known = {n: s for n, s in splines.items() if s.deviation is not None}
    if not known:
        return f"None of {len(splines)} curves is finite"
    values = np.array([s.deviation for s in known.values()])
    broken = f"; broken: {len(splines) - len(known)}" if len(known) < len(splines) else ""
    if not values.any() and not broken:
        return f"All {len(known)} curves are straight: the adapter is plain LoRA"
    most = max(known, key=lambda n: known[n].deviation or 0.0)
    return (
        f"{len(known)} curves deviate by {values.mean():.2g} on average, "
        f"at most by {values.max():.2g} ({short(most)}){broken}"
    )


def short(name: str) -> str:
    """
    >>> short("model.layers.3.mlp.up_proj")
    'up_proj of block 3'
    """
    (place,) = places([name]).values()
    layer, kind = place
    return kind if layer is None else f"{kind} of block {layer}"


def draw(splines: Mapping[str, SplineMetrics]) -> "Figure":
    """What each curve adds, φ(z) - z, on its grid: a panel per kind of module, a line per block."""
    where = places(splines)
    panels, found = kinds(where), defaultdict(list)
    for name, (layer, kind) in where.items():
        if splines[name].deviation is not None:
            found[kind].append((layer, *added(splines[name])))
    depth = max((layer or 0 for layer, _ in where.values()), default=0)
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = max(6.5, 2.5 * columns + (1.7 if depth else 0.9)), 2.0 * rows + 1.15
    figure = blank(width, height, headline(splines))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    figure.subplots_adjust(
        left=0.8 / width, right=1 - (0.95 if depth else 0.15) / width, wspace=0.08, hspace=0.28,
        bottom=0.72 / height, top=1 - (HEADLINE + 0.2) / height,
    )  # fmt: skip
    shade = shades(depth)
    for i, axis in enumerate(axes):
        if i >= len(panels):
            axis.set_axis_off()
            continue
        axis.grid(color="#eeeeee")
        axis.axhline(0, color=QUIET, lw=0.8, ls="--")
        axis.set_title(panels[i], loc="left")
        axis.tick_params(labelbottom=i + columns >= len(panels))
        for layer, x, y, inner in found[panels[i]]:
            colour = INK if layer is None else shade.to_rgba(layer)
            axis.plot(x, y, color=colour, lw=1.2)
            axis.plot(x[inner], y[inner], "o", color=colour, ms=2.5)
    if depth:
        box = inches(figure, width - 0.75, 0.72, 0.12, height - HEADLINE - 0.92)
        whole_numbers(figure.colorbar(shade, cax=box, label="block").ax.yaxis)
    axes[0].set_ylabel("φ(z) − z")
    note = "z = BAx, in units of the grid (a dot per knot); the dashed line is plain LoRA"
    figure.text(0.8 / width, 0.14 / height, note)
    return figure


def added(s: SplineMetrics) -> tuple[np.ndarray, np.ndarray, slice]:
    """Points of z and of φ(z) - z, in units of the grid, and which of them are knots."""
    z, y = (s.input_scale * np.array(v) for v in (s.knots, s.values))
    bend, step = y - z, (BESIDE - 1) / 2 * (z[-1] - z[0])
    first, last = ((bend[1] - bend[0]) / (z[1] - z[0]), (bend[-1] - bend[-2]) / (z[-1] - z[-2]))
    z = np.concatenate([[z[0] - step], z, [z[-1] + step]])
    bend = np.concatenate([[bend[0] - step * first], bend, [bend[-1] + step * last]])
    return z, bend, slice(1, -1)
