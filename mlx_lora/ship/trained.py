"""An adapter apart from its model, and the base that it belongs to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import bases, models
from mlx_lora.adapter import files, peft
from mlx_lora.adapter.attach import EMBEDDINGS, LINEARS
from mlx_lora.adapter.inits import is_rebased
from mlx_lora.adapter.tensors import unpadded
from mlx_lora.errors import AdapterError, near
from mlx_lora.models import Loaded
from mlx_lora.types import Factors

LAST_DIGITS = 0.01  # of a weight: bfloat16 rounds to 0.004 of a number
ROWS = 4096  # of a weight that are unpacked at a time
UPWARDS = 3  # runs/x/stages/1_sft/adapters lies this deep below the folder that holds base/


@dataclass(frozen=True)
class Trained:
    """The factors of an adapter by module, at the ranks in use, in mlx-lm's layout."""

    folder: Path
    config: Mapping[str, Any]
    modules: Mapping[str, Factors]
    scale: float
    magnitudes_O: Mapping[str, mx.array] = field(default_factory=dict)  # of DoRA

    @property
    def rank(self) -> int:
        """The largest."""
        return max(map(rank_of, self.modules.values()))

    @property
    def experts(self) -> list[str]:
        return [name for name, f in self.modules.items() if f.lora_a_IR.ndim == 3]

    @property
    def broken(self) -> list[str]:
        """Modules that hold NaN or infinity."""
        return [
            name
            for name, f in self.modules.items()
            if not all(mx.isfinite(x).all().item() for x in (f.lora_a_IR, f.lora_b_RO))
        ]

    @property
    def rebased(self) -> bool:
        """True where the init put other frozen weights under the adapter."""
        return is_rebased(self.config)

    @property
    def about_base(self) -> Mapping[str, Any]:
        return self.config.get("base") or {}


def rank_of(factors: Factors) -> int:
    a = factors.lora_a_IR
    return a.shape[-2] if a.ndim == 3 else a.shape[-1]


def refuse_curved(config: Mapping[str, Any], folder: Path) -> None:
    """AdapterError for an adapter whose update is no product of factors."""
    kind = config["lora_parameters"].get("type", "lora")
    if kind != "lora":
        raise AdapterError(
            f"{folder} is an adapter of type {kind}: its update bends with the input",
            "No format and no weight matrix can hold that. Train one of type lora to ship it.",
        )


def read(given: Path, *, curved: bool = False) -> Trained:
    """An adapter folder, mlx-lm's or PEFT's. AdapterError where it is none.

    One of type spline is refused unless `curved`, for callers that need no more than its modules.
    """
    folder = files.folder_of(str(given))
    config, stored = files.read(folder)
    if not curved:
        refuse_curved(config, folder)
    tensors = unpadded(config, stored)
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    strange = [n for n in tensors if n.rpartition(".")[2] not in files.FACTORS]
    halves = [n for n in names if not {f"{n}.lora_a", f"{n}.lora_b"} <= tensors.keys()]
    problems = [f"  {n} is no LoRA factor" for n in strange]
    problems += [f"  {n} has only half of its pair" for n in halves if not strange]
    if problems or not names:
        raise AdapterError(
            f"{folder} holds no LoRA adapter:\n"
            + ("\n".join(problems) or "  there are no tensors"),
            "Expected pairs of tensors, `<module>.lora_a` and `<module>.lora_b`.",
        )
    modules = {n: Factors(tensors[f"{n}.lora_a"], tensors[f"{n}.lora_b"]) for n in names}
    magnitudes = {n: tensors[f"{n}.m"] for n in names if f"{n}.m" in tensors}
    return Trained(folder, config, modules, config["lora_parameters"]["scale"], magnitudes)


def base_name(trained: Trained, given: str | None) -> str:
    """Where the base is: as given, as the adapter recorded, or the one saved in the run's folder.

    An init that wrote a base of its own means that one. AdapterError where nobody says.
    """
    if given:
        return given
    recorded = trained.about_base.get("model") or ""
    here = recorded == models.DEMO or (bool(recorded) and Path(recorded).expanduser().exists())
    if here and not trained.rebased:
        return recorded
    for above in list(trained.folder.resolve().parents)[:UPWARDS]:
        if (above / "base" / "config.json").is_file():
            return str(above / "base")
    if recorded:
        return recorded
    raise AdapterError(
        f"{trained.folder} does not say which base it belongs to", "Name it with --model."
    )


def load_base(
    trained: Trained, name: str, *, trust_remote_code: bool = False
) -> tuple[Loaded, list[str]]:
    """The adapter's base, quantized as it was, and what to know of it.

    AdapterError lists everything by which the model at `name` is not that base.
    """
    loaded = models.load(
        name,
        rebuild=trained.about_base.get("quantization"),
        trust_remote_code=trust_remote_code,
    )
    return loaded, refuse_other_base(trained, loaded)


def refuse_other_base(trained: Trained, loaded: Loaded) -> list[str]:
    """What to know of the base. AdapterError lists every reason why the adapter is not for it."""
    notices = bases.refuse_other(
        trained.folder,
        trained.about_base,
        loaded,
        rebased=trained.rebased,
        misfits=misfits(trained, loaded.model),
    )
    return notices + left_out(trained.folder, loaded.model)


def left_out(folder: Path, model: nn.Module | None) -> list[str]:
    """What to know of the frozen weights that PEFT saved beside factors, which nobody reads.

    Nothing where they are the model's, up to the last digits of 16-bit numbers.
    """
    if not peft.is_peft(folder):
        return []
    stored: dict[str, mx.array] = mx.load(str(folder / peft.WEIGHTS))  # type: ignore[assignment]
    there = dict(model.named_modules()) if model else {}
    lines = []
    for name in sorted(n for n in stored if n.endswith(peft.FROZEN[0])):
        module = name.removeprefix(peft.PREFIX).removesuffix(peft.FROZEN[0])
        text = f"PEFT saved the frozen weight of {module} too, and it is left out: "
        if model is None:
            lines.append(f"{text}--model tells whether it is the base's")
        elif (off := distance(stored[name], there.get(module))) > LAST_DIGITS:
            how = f"{off:.1%} away from" if math.isfinite(off) else "of another size than"
            lines.append(f"{text}it is {how} the base's")
    return lines


def distance(weight_OI: mx.array, layer: Any) -> float:
    """‖difference‖ / ‖weight‖ to a layer's weight; infinity where that has another size."""
    if layer is None or weight_OI.shape != (layer.weight.shape[-2], models.in_dims(layer)):
        return math.inf
    off, whole = 0.0, 0.0
    for begin in range(0, len(weight_OI), ROWS):
        part = weight_OI[begin : begin + ROWS].astype(mx.float32)
        mine = models.dense_weight(layer, slice(begin, begin + ROWS))
        off += float(mx.square(part - mine).sum())
        whole += float(mx.square(mine).sum())
    return (off / whole) ** 0.5 if whole else float(off > 0)


def misfits(trained: Trained, model: nn.Module) -> list[str]:
    """A line for every module that the model lacks, or has in another size."""
    there = {n: m for n, m in model.named_modules() if isinstance(m, (*LINEARS, *EMBEDDINGS))}
    lines = []
    for name, factors in sorted(trained.modules.items()):
        if name not in there:
            lines.append(f"{name}: the model has no such layer. {near(name, there, 1)}"[:200])
            continue
        wanted, found = sizes(there[name]), sizes_of(factors)
        if wanted != found:
            text = " to ".join(map(str, found)), " to ".join(map(str, wanted))
            lines.append(f"{name}: made for {text[0]} dimensions, the layer has {text[1]}")
    return lines


def sizes(layer: Any) -> tuple[int, int]:
    """Width of what goes in and what comes out; of an embedding tokens and width."""
    across, rows = models.in_dims(layer), layer.weight.shape[-2]
    return (rows, across) if isinstance(layer, EMBEDDINGS) else (across, rows)


def sizes_of(factors: Factors) -> tuple[int, int]:
    """The same of the layer that factors were made for."""
    a, b = factors.lora_a_IR, factors.lora_b_RO
    return (a.shape[-1], b.shape[-2]) if a.ndim == 3 else (a.shape[0], b.shape[-1])
