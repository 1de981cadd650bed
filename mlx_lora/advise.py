"""`mlx-lora advise`: ranks by module, from gradients before training, from the spectra after."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora import advise_trained, config, data, unsupported
from mlx_lora.adapter.attach import PLACED, attach, lora_layers
from mlx_lora.adapter.files import rank_of
from mlx_lora.adapter.inits.gradient import BATCH, gradients
from mlx_lora.adapter.scene import Scene, generator, task_rows
from mlx_lora.data import Row, Text, learnable
from mlx_lora.errors import ConfigError, near
from mlx_lora.lessons import lessons_of
from mlx_lora.memory import noise_bytes
from mlx_lora.models import Loaded
from mlx_lora.optimizers import optimizer_of
from mlx_lora.prepare import load
from mlx_lora.runlog import json_safe, write_all
from mlx_lora.schema import Experiment, Stage
from mlx_lora.sources import sources_of
from mlx_lora.spectral import advice
from mlx_lora.spectral.advice import GRAINS, Block, Need
from mlx_lora.spectral.names import places
from mlx_lora.spectral.request import Bars
from mlx_lora.spectral.sketch import OVERSAMPLE, Agreement, Product, agreements
from mlx_lora.tasks import load_task
from mlx_lora.types import Site

RULE = "knee"  # where none is asked for
ALTERNATIONS = 2
PASSES = 2 * ALTERNATIONS + 2  # over each half of the texts
TOKENS = 4096  # of one backward pass, padding among them
Tell = Callable[[str, int, int], None]


def before_training(
    experiment: Experiment, *, batches: int = 16, directions: int = 16
) -> dict[str, Any]:
    """Advice from the gradient on calibration texts, of a model that nobody has trained yet."""
    if not experiment.first.train:
        raise ConfigError(
            "train is false: an experiment that only measures has no ranks to choose",
            "Give one that trains, or the folder of an adapter or run.",
        )
    config.check_names(experiment)
    unsupported.refuse(experiment)
    e, count = experiment.last, batches * BATCH  # model and adapter are the same in every stage
    solved = solutions(e, count)
    loaded = load(e)
    texts, named = calibration(loaded, e, solved, count)
    lora = e.lora_parameters
    attach(
        loaded,
        rank=lora.rank,
        scale=1.0,
        keys=lora.keys,
        num_layers=e.num_layers,
        rank_pattern=lora.rank_pattern,
    )
    with Bars() as bars:
        found = sketched(loaded, texts, directions, e.seed, bars.tell)
    needs = {
        name: need_of(layer, found.get(name)) for name, layer in lora_layers(loaded.model).items()
    }
    about = {
        "kind": "before_training",
        "status": status_of(found),
        "model": e.model,
        "data": {"source": named, "texts": len(texts), "tokens": counted(texts)},
        "directions_measured": directions,
        "notes": list(notes(experiment)),
    }
    evidence = {name: measured(a) for name, a in found.items()}
    comment = f"mlx-lora advise: the gradient on {len(texts)} texts of {named}"
    if about["status"] != "measured":
        return about | {"modules": {}, "blocks": {}}
    return about | advised(needs, evidence, lora.effective_scale, e, comment)


def status_of(found: Mapping[str, Agreement]) -> str:
    """Whether there is anything to advise from."""
    if not found:
        return "not_measured"
    return "measured" if any(a.norm for a in found.values()) else "no_gradient"


def after_training(given: Path, rule: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Advice from the spectra of an adapter; only its status where these say nothing of rank."""
    seen = advise_trained.look(given, rule, options)
    if not seen.needs:
        return json_safe(seen.about | {"modules": {}, "blocks": {}})
    e = advise_trained.experiment_of(given, Path(seen.about["adapter"]))
    comment = f"mlx-lora advise: the spectra of {given}"
    return json_safe(seen.about) | advised(seen.needs, seen.evidence, seen.scale, e, comment)


def notes(experiment: Experiment) -> Iterator[str]:
    """What the gradient that was measured is not, in sentences."""
    if any(loop.is_rl for loop in experiment.loops):
        yield "the gradient is that of learning the task's own solutions, not of its rewards"
    if experiment.first.resume_adapter_file:
        yield "the gradient is the base's: resume_adapter_file was not loaded"
    if experiment.first.fine_tune_type == "dora":
        yield "the gradient is that of plain LoRA: DoRA's lengths were left aside"


def solutions(e: Stage, count: int) -> list[Row] | None:
    """The task's training problems with solutions, where the stage learns from a task."""
    if e.task is None or not (e.is_rl or e.rejection_sampling):
        return None
    rows = [r for r in task_rows(load_task(e.task.name, e.task.options), count) if r["completion"]]
    if len(rows) < 2:
        raise ConfigError(
            f"task {e.task.name} has {len(rows)} training problems with a solution: advice needs a "
            "gradient, and that needs texts",
            "Give the problems answers, or advise on an SFT experiment with such data.",
        )
    return rows


def calibration(
    loaded: Loaded, e: Stage, solved: Sequence[Row] | None, count: int
) -> tuple[list[Text], str]:
    """Those problems as texts, else up to so many rows of the data; and what they are called."""
    if solved is not None:
        assert e.task is not None
        named = f"task {e.task.name}"
        return data.read(loaded, list(enumerate(solved, start=1)), named), named
    texts = learnable(lessons_of(loaded, sources_of(e)["train"], e).texts)
    if len(texts) < 2:
        raise ConfigError(f"{e.data}: halves of the data are compared, and one row can be learnt")
    chosen = data.order(len(texts), e.seed, 0)[:count]
    return [texts[i] for i in chosen], str(e.hf_dataset[0].path if e.hf_dataset else e.data)


def counted(texts: Sequence[Text]) -> int:
    """Tokens that the loss is a mean over."""
    return sum(len(t.ids) - t.start for t in texts)


def sketched(
    loaded: Loaded, texts: Sequence[Text], directions: int, seed: int, tell: Tell
) -> dict[str, Agreement]:
    """What two halves of the texts agree on, by module. The layers' scale is 1, their B zero."""
    layers = {n: m for n, m in lora_layers(loaded.model).items() if isinstance(m, PLACED)}
    sites = [
        Site(n, m.lora_a.shape[0], m.lora_b.shape[-1], rank_of(m.lora_a), m.scale, m.linear)
        for n, m in layers.items()
    ]
    if not sites:
        return {}
    scene = Scene(loaded.model, sites, seed, loaded)
    halves = [list(batched(texts[half::2])) for half in (0, 1)]
    total, done = PASSES * sum(map(len, halves)), 0

    def step() -> None:
        nonlocal done
        done += 1
        tell("gradient sketch", done, total)

    def products(wanted: str) -> Product:
        return lambda half, known: summed(scene, halves[half], known, wanted, step)

    starts = {
        s.name: generator(seed, s.name).standard_normal(
            (s.in_dims, min(directions + OVERSAMPLE, s.in_dims, s.out_dims))
        )
        for s in sites
    }
    return agreements(products("lora_b"), products("lora_a"), starts, directions, ALTERNATIONS)


def summed(
    scene: Scene,
    batches: Sequence[Sequence[Text]],
    known: Mapping[str, Any],
    wanted: str,
    step: Callable[[], None],
) -> dict[str, Any]:
    """`gradients` of all batches together, in float32. `step` is called after each."""
    sums: dict[str, Any] = {}
    whole = sum(map(counted, batches))
    for some in batches:
        for name, x in gradients(scene, some, known, wanted).items():
            sums[name] = sums.get(name, 0) + counted(some) / whole * x
        step()
    return {name: x.astype(np.float32) for name, x in sums.items()}


def batched(texts: Sequence[Text]) -> Iterator[list[Text]]:
    """Up to BATCH texts together, and fewer where these are long."""
    some: list[Text] = []
    for text in texts:
        longest = max(len(t.ids) for t in (*some, text))
        if some and (len(some) == BATCH or (len(some) + 1) * longest > TOKENS):
            yield some
            some = []
        some.append(text)
    yield some


def need_of(layer: Any, agreement: Agreement | None) -> Need:
    """Of a LoRA layer. Experts count as one module of so many more inputs and outputs."""
    a, b = layer.lora_a, layer.lora_b
    rank = rank_of(a)
    dims = (a.size // rank, b.size // rank)
    if agreement is None:
        return Need(*dims, rank, None)
    lever = agreement.lever / a.shape[0] ** 0.5  # A ~ U(±1/sqrt(d_in)), the sketch is of N(0, 1)
    whole = agreement.agreeing == min(dims)
    return Need(*dims, rank, agreement.agreeing, None if whole else agreement.open, lever)


def measured(a: Agreement) -> dict[str, Any]:
    """A module's evidence, before training."""
    return {
        "agreement": [round(float(c), 4) for c in a.cosines_2K.mean(axis=0)],
        "threshold": round(a.threshold, 4),
        "gradient_norm": a.norm,
        "gradient_common": a.common,
        "gradient_held": a.held,
    }


def advised(
    needs: Mapping[str, Need],
    evidence: Mapping[str, Mapping[str, Any]],
    scale: float,
    e: Stage,
    comment: str,
) -> dict[str, Any]:
    """Needs as a document: by module, by kind and group, and blocks of YAML to paste."""
    where, whole = places(needs), advice.overall(needs)
    rule = "es" if e.method == "es" else e.optimizer
    now = {name: need.rank for name, need in needs.items()}
    blocks = {
        grain: advice.block(needs, grain, scale=scale, optimizer=rule, cost=cost_under(e, needs))
        for grain in GRAINS
    }
    paid, held = advice.parameters(needs, now), cost_under(e, needs)(now)
    return json_safe(
        {
            "rank_now": max(now.values()),
            "scale_now": scale,
            "predicted_rank": whole.found if whole else None,
            "predicted_rank_text": whole.text if whole else "–",
            "cannot_tell": whole is None or whole.open is not None,
            "modules": {
                name: {
                    "block": where[name][0],
                    "kind": where[name][1],
                    "group": advice.group_of(name),
                    "rank_now": need.rank,
                    "predicted_rank": need.found,
                    "predicted_rank_text": need.text,
                    "cannot_tell": need.found is None or need.open is not None,
                    "cannot_tell_why": "not_measured" if need.found is None else need.open,
                    "rank": blocks["module"].ranks[name],
                }
                | dict(evidence.get(name, {}))
                for name, need in needs.items()
            },
            "groups": {g: mean_of(needs, g) for g in dict.fromkeys(map(advice.group_of, needs))},
            "parameters_now": paid,
            "bytes_now": held,
            "scale_why": advice.why(rule),
            "blocks": {
                grain: told(found, paid, held, others(e), f"{comment}, by {grain}")
                for grain, found in blocks.items()
            },
        }
    )


def mean_of(needs: Mapping[str, Need], group: str) -> dict[str, Any]:
    """The modules of attention, or of the MLPs, together."""
    mine = [need for name, need in needs.items() if advice.group_of(name) == group]
    found = [need.found for need in mine if need.found is not None]
    return {
        "modules": len(mine),
        "predicted_rank_mean": sum(found) / len(found) if found else None,
        "cannot_tell": sum(need.found is None or need.open is not None for need in mine),
    }


def told(
    found: Block, paid: int, held: int, others: Mapping[str, Any], comment: str
) -> dict[str, Any]:
    return {
        "rank": found.rank,
        "scale": found.scale,
        "rank_pattern": dict(found.pattern),
        "parameters": found.parameters,
        "parameters_saved": paid - found.parameters,
        "bytes": found.bytes,
        "bytes_saved": held - found.bytes,
        "yaml": advice.yaml_of(found, others, comment),
    }


def others(e: Stage) -> dict[str, Any]:
    """What else the experiment says of its adapter, which stays."""
    ours = ("rank", "scale", "alpha", "rslora", "rank_pattern")
    kept, default = e.lora_parameters, type(e.lora_parameters)()
    keys = [k for k in type(kept).model_fields if k not in ours]
    values = {k: getattr(kept, k) for k in keys if getattr(kept, k) != getattr(default, k)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def cost_under(e: Stage, needs: Mapping[str, Need]) -> advice.Bytes:
    """Bytes of float32 factors, and of what a step needs of their size. Nothing is computed."""

    def cost(ranks: Mapping[str, int]) -> int:
        tree = {
            name: {
                "lora_a": mx.zeros((n.in_dims, ranks[name])),
                "lora_b": mx.zeros((ranks[name], n.out_dims)),
            }
            for name, n in needs.items()
        }
        weights = 4 * advice.parameters(needs, ranks)
        if e.method == "es":
            return weights + noise_bytes(tree, e)
        optimizer = optimizer_of(e)
        optimizer.init(tree)
        state = [x for _, x in tree_flatten(optimizer.state) if isinstance(x, mx.array)]
        return 2 * weights + sum(x.nbytes for x in state)

    return cost


def write(document: Mapping[str, Any], folder: Path, grain: str) -> list[Path]:
    """advice.json, the block to paste and the picture, each whole or not there."""
    from mlx_lora.spectral.advice_plots import draw

    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    contents = {"advice.json": text.encode()}
    if document["blocks"]:
        contents["lora_parameters.yaml"] = document["blocks"][grain]["yaml"].encode()
    contents["advice.png"] = draw(document)
    return write_all(contents, folder, "the advice")


def advise(
    given: str,
    *,
    by: str = "kind",
    batches: int | None = None,
    directions: int | None = None,
    rule: str | None = None,
    option: Sequence[str] = (),
) -> dict[str, Any]:
    """Advice on an experiment file, or on an adapter or run folder. `by` is judged, not used.

    `batches` and `directions` belong to the first, `rule` [knee] to the second.
    """
    if by not in GRAINS:
        raise ConfigError(f"--by {by}: ranks come by {', '.join(GRAINS)}. {near(by, GRAINS)}")
    path = Path(given).expanduser()
    asked = {"batches": batches, "directions": directions}
    sketch = {name: n for name, n in asked.items() if n is not None}
    if path.is_dir() or path.suffix == ".safetensors":
        if sketch:
            named = ", ".join(f"--{name}" for name in sketch)
            raise ConfigError(
                f"{named}: of an experiment's gradient, and {given} was trained", "Leave it out."
            )
        return after_training(path, RULE if rule is None else rule, config.parse_options(option))
    if rule is not None:
        raise ConfigError(
            f"--rule: of an adapter's spectra, and {given} is an experiment", "Leave it out."
        )
    return before_training(config.load(config.find(given), option), **sketch)
