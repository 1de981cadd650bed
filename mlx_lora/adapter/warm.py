"""An adapter from disk to start from, under the settings of an experiment.

As mlx-lm does it: layers by the experiment's `num_layers` and `lora_parameters`, and the adapter's
weights over them. Layers that the adapter lacks start at zero. What the experiment leaves out is
the adapter's own; what cannot fit is an error, where mlx-lm goes on with whatever came of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from rich.console import Console
from rich.markup import escape

from mlx_lora import cpu
from mlx_lora.adapter import attach as attaching
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import FACTORS, lora_layers
from mlx_lora.adapter.patterns import matching, ranks_of
from mlx_lora.adapter.scene import Scene
from mlx_lora.adapter.spline import refuse_unsound
from mlx_lora.adapter.spline_math import Curve, asked
from mlx_lora.adapter.tensors import unpadded
from mlx_lora.config import locate, refuse
from mlx_lora.errors import AdapterError, few
from mlx_lora.models import Loaded
from mlx_lora.schema import Experiment, LoraParameters, Stage
from mlx_lora.yamlfile import KeyPath

CURVE = tuple(f.name for f in fields(Curve))
FREE = "spline_reg_weight"  # of a curve: how it is trained, not what it is
SHOWN = 5  # names in a sentence
HINT = "Leave it out, and it is the adapter's"


def adopted(experiment: Experiment, console: Console) -> Experiment:
    """The experiment with what it does not say taken from the adapter it starts from; told.

    ConfigError lists every key that cannot fit that adapter. Unchanged where there is none.
    """
    first = experiment.first
    if first.resume_adapter_file is None or not first.train:
        return experiment
    config, tensors = files.read(files.folder_of(first.resume_adapter_file))
    top, lora = left_out(experiment, config)

    def filled(stage: Any) -> Any:
        parameters = stage.lora_parameters.model_copy(update=lora)
        return stage.model_copy(update={**top, "lora_parameters": parameters})

    whole: Experiment = filled(experiment)
    whole = whole.model_copy(update={"stages": tuple(map(filled, experiment.stages))})
    found = misfits(whole, config, tensors)
    refuse([(locate(at, whole._marks)[1], f"{'.'.join(map(str, at))}: {x}") for at, x in found])
    for notice in notices(experiment, whole, config, {**top, **lora}):
        console.print(f"[yellow]Note:[/] {escape(notice)}.")
    return whole


def says(experiment: Experiment, *path: str) -> bool:
    """Whether the file or an option gives this key, once for all or in a stage."""
    marks = experiment._marks
    if marks:
        return any(at == path or (at[:1] == ("stages",) and at[2:] == path) for at in marks)
    block: Any = experiment.first  # built in Python
    for key in path:
        if key not in block.model_fields_set:
            return False
        block = getattr(block, key)
    return True


def left_out(
    experiment: Experiment, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an adapter's config has in place of keys that are not given: of the top, of the block.

    `lora_parameters` with rank and scale, as mlx-lm demands them, are whole: without keys they mean
    every layer.
    """
    theirs, kind = config["lora_parameters"], config.get("fine_tune_type", "lora")

    def given(key: str) -> bool:
        return says(experiment, "lora_parameters", key)

    scaled = given("scale") or experiment.first.lora_parameters.alpha is not None
    top: dict[str, Any] = {
        "num_layers": max(config.get("num_layers", -1), -1),
        "fine_tune_type": "dora" if kind == "dora" else "lora",
    }
    lora: dict[str, Any] = {k: theirs[k] for k in CURVE if k in theirs} if kind == "spline" else {}
    lora |= {"rank": theirs["rank"], "type": "spline" if kind == "spline" else "lora"}
    lora = {key: value for key, value in lora.items() if not given(key)}
    if not scaled:
        lora["scale"] = float(theirs["scale"])
    if not given("keys") and not (given("rank") and scaled):
        keys = theirs.get("keys")
        lora["keys"] = None if keys is None else tuple(keys)
    return {k: v for k, v in top.items() if not says(experiment, k)}, lora


def misfits(
    experiment: Experiment, config: Mapping[str, Any], tensors: Mapping[str, mx.array]
) -> Iterator[tuple[KeyPath, str]]:
    """(path, problem) of every key that cannot go with this adapter."""
    e, theirs = experiment.first, config["lora_parameters"]
    lora, kind = e.lora_parameters, config.get("fine_tune_type", "lora")
    block, where = ("lora_parameters",), f"the adapter in {e.resume_adapter_file}"
    wanted = e.fine_tune_type if e.fine_tune_type != "lora" else lora.type
    if wanted != kind:
        key = ("fine_tune_type",) if "spline" not in (wanted, kind) else (*block, "type")
        yield key, f"{wanted} does not fit {where}, which is {kind}. {HINT}"
    if e.init.name != "zero":
        yield ("init",), f"{e.init.name} does not go with {where}, which is the start. Leave it out"
    if lora.rank_pattern:
        yield from (((*block, "rank_pattern"), x) for x in other_ranks(lora, config, tensors))
    elif lora.rank != theirs["rank"]:
        yield (*block, "rank"), f"{lora.rank} does not fit {where}: {theirs['rank']}. {HINT}"
    for key in CURVE if wanted == kind == "spline" else ():
        mine, its = getattr(lora, key), theirs.get(key, getattr(Curve(), key))
        if key != FREE and mine != its:
            yield (*block, key), f"{mine} does not fit {where}: {its}. {HINT}"


def other_ranks(
    lora: LoraParameters, config: Mapping[str, Any], tensors: Mapping[str, mx.array]
) -> Iterator[str]:
    """What a rank_pattern asks for and the adapter has otherwise, a line for a pair of ranks."""
    has = {
        name.rpartition(".")[0]: files.rank_of(value)
        for name, value in unpadded(config, tensors).items()
        if name.endswith(".lora_a")
    }
    try:
        known = {p: r for p, r in (lora.rank_pattern or {}).items() if matching(p, list(has))}
        wanted = ranks_of(known, list(has), lora.rank)
    except AdapterError as error:
        yield from str(error).split("\n")
        return
    pairs: dict[tuple[int, int], list[str]] = {}
    for name, rank in has.items():
        if wanted[name] != rank:
            pairs.setdefault((wanted[name], rank), []).append(name)
    for (mine, its), names in pairs.items():
        yield f"rank {mine} does not fit the adapter's {its} of {few(names, SHOWN)}. {HINT}"


def notices(
    before: Experiment, e: Experiment, config: Mapping[str, Any], taken: Mapping[str, Any]
) -> Iterator[str]:
    """What is the adapter's and not the file's, and what is the file's and not the adapter's."""
    default = {**Stage.model_fields, **LoraParameters.model_fields}
    own = {k: v for k, v in taken.items() if v != default[k].default and k != "keys"}
    if own:
        listed = ", ".join(f"{key} {value}" for key, value in own.items())
        yield f"of the adapter that training starts from, because the file does not say: {listed}"
    scale, its = e.first.lora_parameters.effective_scale, config["lora_parameters"]["scale"]
    if scale != its:
        yield (
            f"scale {scale:g} is in force, and the adapter was saved at {its:g}: as in mlx-lm, "
            f"what it learned begins {scale / its if its else float('inf'):.3g} times as strong"
        )
    if says(before, "lora_parameters", "calibrate"):
        yield "lora_parameters.calibrate is not used: curves keep the grids of the adapter"


def attach(loaded: Loaded, e: Stage, dropout: float) -> tuple[dict[str, Any], list[str]]:
    """Give the model the layers of an adopted stage, with its adapter's weights in them.

    Factors learn in float32, whatever the file holds: half precision swallows small updates, and
    in float16 Adam divides by zero. Returns the adapter's config, and the names of the layers that
    start at zero. AdapterError lists what the adapter has and no layer holds.
    """
    assert e.resume_adapter_file is not None
    folder, model, lora = files.folder_of(e.resume_adapter_file), loaded.model, e.lora_parameters
    config, tensors = files.read(folder)
    refuse_unsound(tensors, folder)
    tensors = {name: value.astype(mx.float32) for name, value in tensors.items()}
    shape = {"rank": lora.rank, "scale": lora.effective_scale, "dropout": dropout}
    settings, ranks = attaching.add_layers(
        model,
        lora.keys,
        e.num_layers,
        shape,
        rank_pattern=lora.rank_pattern,
        dora=e.fine_tune_type == "dora",
        curve=asked(lora.model_dump()),
    )
    layers = lora_layers(model)
    refuse_misfits(layers, unpadded(config, tensors) if lora.rank_pattern else tensors, folder)
    within = {name.rpartition(".")[0] for name in tensors}
    fresh = [name for name in layers if name not in within]
    placed = [n for n in fresh if isinstance(layers[n], attaching.PLACED)]
    sites = [attaching.site_of(n, layers[n], ranks[n]) for n in placed]
    cpu.follow(model)
    attaching.start(Scene(model, sites, e.seed, loaded), "zero", {})
    files.put(model, config, tensors)
    model.eval()  # new layers drop inputs until they are told not to
    mx.eval(model.parameters())
    config = {k: v for k, v in config.items() if k != "partial"}  # of PEFT's: all layers are whole
    return config | settings, fresh


def refuse_misfits(
    layers: Mapping[str, Any], tensors: Mapping[str, mx.array], folder: Path
) -> None:
    """AdapterError where the adapter has layers that the model lacks, or of another form."""
    within = {name.rpartition(".")[0] for name in tensors}
    wanted = {
        f"{name}.{factor}": layers[name][factor].shape
        for name in within & layers.keys()
        for factor in FACTORS
        if factor in layers[name]
    }
    found = {k: v.shape for k, v in tensors.items() if k.rpartition(".")[0] in layers}
    lines = [f"  no layer    {name}" for name in sorted(within - layers.keys())]
    lines += files.mismatches(found, wanted)
    if lines:
        raise AdapterError(
            f"{folder}: {len(lines)} parts of the adapter do not fit the layers asked for\n"
            + "\n".join(lines),
            "Its keys and num_layers have to take in every layer that the adapter has; left out, "
            "they are the adapter's. Was it trained on this base model?",
        )


def of_new(fresh: list[str], model: nn.Module) -> str:
    """The sentence about layers that the adapter does not have."""
    return (
        f"{len(fresh)} of {len(lora_layers(model))} layers are not in the adapter that training "
        f"starts from, and start at zero: {few(fresh, SHOWN)}"
    )
