"""Attach LoRA through mlx-lm's `linear_to_lora_layers`, with our own start, asserted."""

import contextlib
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_lora import cpu, models
from mlx_lora.adapter.dora import to_dora
from mlx_lora.adapter.inits import inits, is_harmless
from mlx_lora.adapter.patterns import narrow, ranks_of
from mlx_lora.adapter.scene import Scene, numbered_rows, task_rows
from mlx_lora.adapter.spline import FACTORS as OF_SPLINES
from mlx_lora.adapter.spline import to_spline
from mlx_lora.adapter.spline_math import Curve
from mlx_lora.adapter.tensors import CONFIG, read
from mlx_lora.data import Row
from mlx_lora.errors import AdapterError, few, near
from mlx_lora.models import Loaded
from mlx_lora.registry import options as options_of
from mlx_lora.tasks import load_task
from mlx_lora.types import Factors, Site

if TYPE_CHECKING:
    from mlx_lora.schema import Stage

LORA_LAYERS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding, DoRALinear)
LINEARS = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
PLACED = (LoRALinear, DoRALinear)  # experts and embeddings keep mlx-lm's own A, and B = 0
FACTORS = ("lora_a", "lora_b", "m", *OF_SPLINES)  # m: the magnitudes of DoRA
ROUTER = 32  # layers narrower than this take the rank they can, unless they were named


def attach(
    model: nn.Module | Loaded,
    *,
    rank: int = 8,
    scale: float = 2.0,
    keys: Sequence[str] | None = None,
    num_layers: int = -1,
    init: str = "zero",
    init_options: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    dora: bool = False,
    rows: Sequence[Row] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    curve: Curve | None = None,
) -> dict[str, Any]:
    """Give the model LoRA layers and return the adapter's config (mlx-lm's adapter_config.json).

    `scale` multiplies the update (alpha / rank in PEFT's terms). `keys` are module names inside a
    block, full (`self_attn.q_proj`) or short (`q_proj`); None means every linear layer of every
    block. `num_layers` counts blocks from the end, <= 0 or more than there are means all. `dora`
    learns magnitudes too; `curve` makes it a spline adapter. `rows` are calibration data for inits
    that look at some; those need what models.load() returned, not its bare model. `rank_pattern`
    has other ranks for some modules, see `patterns.ranks_of`. Raises AdapterError for keys and
    patterns that match nothing, a rank above a layer's size, and a model that has an adapter.
    """
    loaded = model if isinstance(model, Loaded) else None
    model = model.model if isinstance(model, Loaded) else model
    if dora and curve:
        raise AdapterError("an adapter is DoRA or a spline, not both", "Leave one of them out.")
    if not 1 <= rank < 2**31:  # beyond it MLX has no shapes
        raise AdapterError(f"rank is at least 1 and at most a layer's smaller side, got {rank}")
    if not (math.isfinite(scale) and scale >= 0):
        raise AdapterError(f"scale is a finite number, 0 or more, got {scale}")
    init_options = dict(init_options or {})
    foresee(init, init_options, rows)
    if lora_layers(model):
        raise AdapterError("this model has LoRA layers already", "Load the model afresh.")
    shape = {"rank": rank, "scale": scale, "dropout": dropout}
    settings, ranks = add_layers(
        model, keys, num_layers, shape, rank_pattern=rank_pattern, dora=dora, curve=curve
    )
    layers = lora_layers(model)
    refuse_idle(keys or (), list(layers), settings["num_layers"])
    sites = [site_of(n, m, ranks[n]) for n, m in layers.items() if isinstance(m, PLACED)]
    refuse_ranks(ranks, sites, {n for n in ranks if keys is not None or ranks[n] != rank})
    cpu.follow(model)
    scene = Scene(model, sites, seed, loaded, rows)
    measured = start(scene, init, init_options)
    about = {"name": init, **init_options, **({"measured": measured} if measured else {})}
    return settings | {"init": about, "seed": seed}


def add_layers(
    model: nn.Module,
    keys: Sequence[str] | None,
    num_layers: int,
    shape: Mapping[str, Any],
    *,
    rank_pattern: Mapping[str, int] | None,
    dora: bool,
    curve: Curve | None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Freeze the model and give it layers of a `shape` (rank, scale, dropout), all with B = 0.

    Returns what an adapter's config says of them, and the rank of each by name.
    """
    found, depth = expand_keys(model, keys), len(blocks(model))
    num_layers = depth if not 0 < num_layers <= depth else num_layers
    parameters: dict[str, Any] = {**shape, "keys": found}
    parameters |= {"type": "spline", **asdict(curve)} if curve else {}
    model.freeze()
    ranks = to_layers_of_ranks(model, num_layers, parameters, rank_pattern, dora=dora)
    if not ranks:
        refuse_idle(found, [], num_layers)
    parameters["rank"] = max(ranks.values())
    for layer in lora_layers(model).values():
        layer.lora_b = mx.zeros_like(layer.lora_b)  # whatever mlx-lm does by default
    return {
        "fine_tune_type": "dora" if dora else "spline" if curve else "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters,
    }, ranks


def foresee(init: str, options: Mapping[str, Any], rows: Sequence[Row] | None) -> None:
    """Raise what can be known to be wrong before a model is loaded: names, options, data."""
    inits.bind(init, options)
    known = options_of(inits[init])
    if "data" in known:
        numbered_rows(options.get("data"), rows, init)
    if "reference" in known:
        reference = Path(options["reference"]).expanduser()
        if (reference / CONFIG).is_file():
            read(reference)
        else:
            models.resolve(str(reference))


def calibration_rows(e: "Stage") -> list[Row] | None:
    """An experiment's own calibration data, its task's training problems, for inits that look."""
    if e.task is None or "data" not in options_of(inits[e.init.name]):
        return None
    return task_rows(load_task(e.task.name, e.task.options))


def start(scene: Scene, init: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Run an init and put what it made into the layers. Returns what it measured."""
    made = inits.bind(init, options)(scene)
    for site in scene.sites:
        place(scene.layer(site), made.factors[site.name], site.name)
    for name, linear in made.bases.items():
        rebase(scene.layers[name], linear)
    mx.eval(scene.model.parameters())
    if is_harmless(init, options):
        assert_no_update(scene.model)
    else:
        remember_start(scene.model)
    return {k: float(v) for k, v in made.measured.items()}


def to_lora_layers(
    model: nn.Module, num_layers: int, parameters: Mapping[str, Any], *, dora: bool = False
) -> None:
    """mlx-lm's linear_to_lora_layers, with our DoRA and splines, its refusals as AdapterError."""
    try:
        linear_to_lora_layers(model, num_layers, dict(parameters))
    except ValueError as error:
        raise AdapterError(f"the layers cannot be adapted: {error}") from error
    if dora:
        to_dora(model)
    if parameters.get("type") == "spline":
        to_spline(model, parameters)


def to_layers_of_ranks(
    model: nn.Module,
    num_layers: int,
    parameters: Mapping[str, Any],
    pattern: Mapping[str, int] | None,
    *,
    dora: bool = False,
) -> dict[str, int]:
    """LoRA layers at the ranks of a rank_pattern, and the rank of each by name."""
    widest = max([parameters["rank"], *(pattern or {}).values()])
    to_lora_layers(model, num_layers, {**parameters, "rank": widest}, dora=dora)
    layers = lora_layers(model)
    ranks = ranks_of(pattern, list(layers), parameters["rank"])
    for name, layer in layers.items():
        narrow(layer, ranks[name])
    return ranks


def refuse_ranks(ranks: Mapping[str, int], sites: Sequence[Site], named: Container[str]) -> None:
    """AdapterError where a rank exceeds a layer's size; a router nobody named may be narrow."""
    above: dict[int, list[str]] = {}
    for s in sites:
        most = min(s.in_dims, s.out_dims)
        if most < ranks[s.name] and (s.name in named or most >= ROUTER):
            above.setdefault(ranks[s.name], []).append(f"  {s.name} is {s.out_dims} × {s.in_dims}")
    if above:
        lines = [
            f"rank {rank} is above the size of {len(some)} layers\n"
            + "\n".join([*some[:5], *(["  ..."] if len(some) > 5 else [])])
            for rank, some in above.items()
        ]
        raise AdapterError(
            "\n".join(lines),
            "A layer's update has at most the rank of its smaller side. Lower the rank.",
        )


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Every LoRA layer by its full name, in the model's order."""
    found = reversed(model.named_modules())  # MLX walks from the end
    return {name: m for name, m in found if isinstance(m, LORA_LAYERS)}


def heads_in(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of these modules that are embeddings and the output head in one: there is no other.

    mlx-lm's LoRA layer adapts both, PEFT's the embedding alone.
    """
    widths = {m.weight.shape[-2] for m in model.modules() if isinstance(m, LINEARS)}
    there = dict(model.named_modules())
    tables = {name: there.get(f"{name}.embedding", there.get(name)) for name in names}
    return [
        name
        for name, table in tables.items()
        if isinstance(table, EMBEDDINGS) and table.weight.shape[0] not in widths
    ]


def blocks(model: nn.Module) -> Sequence[Any]:
    """The model's blocks, first to last: every model of mlx-lm has them as `layers`."""
    layers = model.layers
    assert layers is not None
    return layers


def linear_keys(model: nn.Module) -> list[str]:
    """Names, inside a block, of every linear layer of any block."""
    found: dict[str, None] = {}
    for block in blocks(model):
        for name, module in block.named_modules():
            if isinstance(module, LINEARS) and not hasattr(module, "to_lora"):
                found[name] = None  # with a LoRA of its own kind we could not switch it off
    return sorted(found)


def expand_keys(model: nn.Module, keys: Sequence[str] | None) -> list[str]:
    """Full names for short ones. AdapterError lists every key that matches nothing."""
    inside = linear_keys(model)
    if keys is None:
        if not inside:
            raise AdapterError("this model has no linear layer that LoRA could adapt")
        return inside
    within = {id(module) for block in blocks(model) for module in block.modules()}
    outside = [
        n
        for n, m in model.named_modules()
        if isinstance(m, (*LINEARS, *EMBEDDINGS)) and id(m) not in within
    ]
    found: dict[str, None] = {}
    problems = []
    for key in keys:
        matches = [k for k in (*inside, *outside) if k == key or k.endswith(f".{key}")]
        if not matches:
            short = {k.rpartition(".")[2] for k in (*inside, *outside)}
            known = [*inside, *outside] if "." in key else short
            problems.append(f"the key {key!r} matches no layer. {near(key, known)}")
        found |= dict.fromkeys(matches)
    if problems or not found:
        raise AdapterError("\n".join(problems) or "no keys given: nothing would be trained")
    return sorted(found)


def refuse_idle(keys: Sequence[str], adapted: Sequence[str], num_layers: int) -> None:
    """AdapterError for keys whose layers lie in blocks that are not adapted, all at once."""
    idle = [k for k in keys if not any(n == k or n.endswith(f".{k}") for n in adapted)]
    if idle:
        raise AdapterError(
            f"no layer of {few(idle)} lies in the last {num_layers} blocks, which are "
            "those to adapt",
            "Raise num_layers (-1 is all blocks), or leave these keys out.",
        )


def site_of(name: str, layer: Any, rank: int) -> Site:
    """The site of a linear layer; a router narrower than the rank gets the rank it can use."""
    in_dims, out_dims = layer.lora_a.shape[0], layer.lora_b.shape[-1]
    return Site(name, in_dims, out_dims, min(rank, in_dims, out_dims), layer.scale, layer.linear)


def place(layer: Any, factors: Factors, name: str) -> None:
    """Put factors into a layer. AdapterError where their shapes are not the layer's."""
    a, b = factors.lora_a_IR, factors.lora_b_RO
    wanted = (layer.lora_a.shape[0], layer.lora_b.shape[-1])
    if (a.shape[0], b.shape[-1]) != wanted or a.shape[1] != b.shape[0]:
        raise AdapterError(f"{name}: the init made {a.shape} and {b.shape}, the layer is {wanted}")
    layer.lora_a, layer.lora_b = a, b


def rebase(layer: Any, linear: nn.Module) -> None:
    """Put another frozen layer under the adapter, and keep the base's own to switch back to."""
    base = layer.linear
    if isinstance(base, type(linear)):
        linear.__class__ = type(base)  # the CPU's fast twin, where the base has it
    layer.__dict__["_base"], layer.linear = base, linear


def forget_base(model: nn.Module) -> None:
    """Let go of the base that an init replaced: from here on `switched_off` is the new one."""
    for layer in lora_layers(model).values():
        if layer.__dict__.pop("_base", None) is not None:
            layer.__dict__["_remainder"] = True


def on_remainder(model: nn.Module) -> None:
    """Note that an init took BA out of the frozen weights: it is a part of them, not a change."""
    for layer in lora_layers(model).values():
        layer.__dict__["_remainder"] = True


def assert_no_update(model: nn.Module) -> None:
    """Every rank has a zero factor, so that the update is exactly zero in any precision."""
    moved = [name for name, layer in lora_layers(model).items() if mx.any(in_use(layer)).item()]
    assert not moved, f"lora_b is not zero where lora_a is not, after a harmless init: {moved}"


def in_use(layer: Any) -> mx.array:
    """Which ranks of a layer have both factors; of experts, which numbers of B are not zero."""
    b = layer.lora_b != 0
    return b if b.ndim == 3 else mx.any(layer.lora_a != 0, axis=0) & mx.any(b, axis=1)


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: every scale is 0, bitwise the base if factors are finite."""
    layers = list(lora_layers(model).values())
    scales = [layer.scale for layer in layers]
    rebased = [(m, m.linear) for m in layers if "_base" in m.__dict__]
    try:
        for layer in layers:
            layer.scale = 0.0
        for layer, _ in rebased:
            layer.linear = layer.__dict__["_base"]
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
        for layer, linear in rebased:
            layer.linear = linear


def remember_start(model: nn.Module) -> None:
    """Make the adapter as it is now what `reference` goes back to, where it does anything."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.__dict__["_start"] = {f: layer[f] for f in FACTORS if f in layer}


def remembers_start(model: nn.Module) -> bool:
    """True where the reference policy is an adapter, not the base."""
    return any("_start" in layer.__dict__ for layer in lora_layers(model).values())


def start_of(model: nn.Module) -> dict[str, mx.array]:
    """The remembered start as `<module>.<factor>`; empty where the reference is the base."""
    return {
        f"{name}.{factor}": value
        for name, layer in lora_layers(model).items()
        for factor, value in layer.__dict__.get("_start", {}).items()
    }


@contextlib.contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its reference policy: the remembered start, else its base."""
    if not remembers_start(model):
        with switched_off(model):
            yield
        return
    layers = list(lora_layers(model).values())
    now = [{f: layer[f] for f in layer.__dict__["_start"]} for layer in layers]
    try:
        for layer in layers:
            layer.update(layer.__dict__["_start"])
        yield
    finally:
        for layer, factors in zip(layers, now, strict=True):
            layer.update(factors)
