"""An adapter at the rank it uses: exact truncation of every module, judged by the check."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora import cpu
from mlx_lora.adapter import files, peft
from mlx_lora.adapter.attach import PLACED, lora_layers
from mlx_lora.adapter.listen import layer_inputs
from mlx_lora.adapter.mapped import widened
from mlx_lora.check import probes
from mlx_lora.check.gate import Report, judged
from mlx_lora.check.probes import Probes
from mlx_lora.check.reading import read_both
from mlx_lora.check.sides import Side
from mlx_lora.data import Text
from mlx_lora.errors import AdapterError
from mlx_lora.models import Loaded
from mlx_lora.runlog import json_safe, refuse_occupied
from mlx_lora.ship import proof
from mlx_lora.ship.export import whole
from mlx_lora.ship.ranks import Spent, rules
from mlx_lora.ship.trained import base_name, load_base, read
from mlx_lora.spectral.gram import NOISE
from mlx_lora.spectral.names import split_expert
from mlx_lora.spectral.read import adapter_folder
from mlx_lora.spectral.spectrum import Pair, finite, pairs

Factors = dict[str, tuple[mx.array, mx.array]]  # by layer: lora_a, lora_b
Tell = Callable[[str], None]
FACTORS = ((0, "lora_a"), (1, "lora_b"))
EVENLY = 0.01  # of the inputs' energy
HEARD = 1024  # inputs of a layer


@dataclass(frozen=True)
class Taken:
    """A pair as A·B = left · diag(s) · right, s descending, in float64; right has orthonormal rows.

    left has orthonormal columns where every input counts alike, else left · diag(s) has columns of
    length s over the inputs that were heard.
    """

    left_IR: np.ndarray
    s_R: np.ndarray
    right_RO: np.ndarray

    def cut(self, rank: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The best factors of this rank, equally large, filled up with zeros to `width`."""
        root = np.sqrt(self.s_R[:rank])
        a, b = self.left_IR[:, :rank] * root, root[:, None] * self.right_RO[:rank]
        more = width - len(root)
        return np.pad(a, ((0, 0), (0, more))), np.pad(b, ((0, more), (0, 0)))


@dataclass(frozen=True)
class Version(Side):
    """A model with other factors in its LoRA layers."""

    factors: Factors | None = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[nn.Module]:
        layers = lora_layers(self.model)
        before = {name: (m.lora_a, m.lora_b) for name, m in layers.items()}
        put(layers, self.factors or {})
        try:
            yield self.model
        finally:
            put(layers, before)


def put(layers: Mapping[str, Any], factors: Factors) -> None:
    for name, (a, b) in factors.items():
        layers[name].lora_a, layers[name].lora_b = a, b


def shrink(
    adapter: Path,
    out: Path,
    *,
    model: str | None = None,
    by: str = "kl",
    options: Mapping[str, Any] | None = None,
    weigh: bool = True,
    trust_remote_code: bool = False,
    tell: Tell = lambda said: None,
) -> dict[str, Any]:
    """Cut the adapter in a folder by a rule and write it to `out`, if the check does not fail.

    Returns what was done: ranks, sizes, KL, the check's verdict. `model` is its base, if not the
    one that the adapter's config names. `weigh` counts a direction by what it does to the inputs
    that the base's texts bring, else all inputs count alike.
    """
    begin = time.perf_counter()
    rule = rules.bind(by, dict(options or {}))
    refuse_occupied(out)
    trained = read(adapter_folder(adapter))
    folder = trained.folder
    loaded, notices = load_base(
        trained, base_name(trained, model), trust_remote_code=trust_remote_code
    )
    config, tensors = files.read(folder)
    files.load(loaded.model, folder)
    layers = lora_layers(loaded.model)
    original: Factors = {name: (m.lora_a, m.lora_b) for name, m in layers.items()}
    held = list(pairs({f"{n}.{f}": ab[i] for n, ab in original.items() for i, f in FACTORS}, 1.0))
    refuse_unfit(held, folder, dora=config.get("fine_tune_type") == "dora")
    texts = probes.read(loaded)
    heard = listened(loaded, layers, texts) if weigh else {}
    taken = {pair.name: decomposed(pair, heard.get(pair.name)) for pair in held}
    halves = [Probes(texts.texts[i::2], texts.prompts) for i in range(2)]  # the first was heard
    before = Version(loaded, factors=original)

    def drift(ranks: Mapping[str, int]) -> float:
        after = Version(loaded, factors=cut(original, taken, ranks))
        found = max(read_both(before, after, half).mean("kl") for half in halves)
        tell(f"rank {max(ranks.values())}: KL {found:.2g}")
        return found

    spent = [Spent(p.name, taken[p.name].s_R, p.a_IR.shape[1]) for p in held]
    ranks = rule(spent, drift)
    shrunk = cut(original, taken, ranks)
    put(layers, shrunk)
    cpu.follow(loaded.model)
    report = judged(
        before, Side(loaded), texts, None, "same", None, begin, 0, about=trained.about_base
    )
    if report.exit_code == 0:
        with whole(out) as part:
            write(tensors, config, shrunk, part)
            proof.write(report, part)
    written = out if report.exit_code == 0 else None
    done = summary(
        folder, written, by, options or {}, spent, shrunk, original, ranks, report, weighed=weigh
    )
    return done | {"notices": notices}


def refuse_unfit(held: Sequence[Pair], folder: Path, *, dora: bool = False) -> None:
    """AdapterError for an adapter that holds nothing to cut: broken, or untrained."""
    broken = [p.name for p in held if not (finite(p.a_IR) and finite(p.b_RO))]
    if broken:
        raise AdapterError(
            f"{folder}: {len(broken)} modules hold NaN or infinity, {broken[0]} for one",
            "Go back to the last good checkpoint.",
        )
    if not any(np.any(widened(p.b_RO)) and np.any(widened(p.a_IR)) for p in held):
        what = "has BA = 0" if dora else "is untrained: BA = 0"  # magnitudes may be trained
        raise AdapterError(f"{folder} {what} everywhere, there is no rank to keep")


def decomposed(pair: Pair, x_NI: np.ndarray | None = None) -> Taken:
    """The exact SVD of A·B by two QRs and an R×R SVD; with inputs, of X·A·B, what they become of.

    Cut after k, either is the best approximation of rank k: of the update, or of its outputs. A
    hundredth of the inputs' energy is spread evenly, for directions that the texts do not have.
    """
    a, b = widened(pair.a_IR), widened(pair.b_RO)
    r_a, (q_b, r_b) = np.linalg.qr(a, mode="r"), np.linalg.qr(b.T)
    if x_NI is not None:
        evenly = EVENLY * np.square(x_NI, dtype=np.float64).mean()
        heard = (1 - EVENLY) ** 0.5 / len(x_NI) ** 0.5 * (x_NI.astype(np.float64) @ a)
        r_a = np.linalg.qr(np.vstack([heard, evenly**0.5 * r_a]), mode="r")
    _, s_R, v_RR = np.linalg.svd(np.asarray(r_a) @ r_b.T, full_matrices=False)
    s_R[s_R <= NOISE * np.linalg.norm(r_a) * np.linalg.norm(r_b)] = 0.0
    right = v_RR @ q_b.T
    left = a @ (b @ right.T) / np.where(s_R > 0, s_R, np.inf)
    return Taken(left, s_R, right)


def listened(loaded: Loaded, layers: Mapping[str, Any], texts: Probes) -> dict[str, np.ndarray]:
    """Inputs of the plain linear layers while the adapted model reads every other text."""
    plain = {name: m for name, m in layers.items() if isinstance(m, PLACED)}
    some = [Text(tuple(ids), start) for ids, start in texts.texts[::2]]
    return layer_inputs(loaded.model, plain, some, HEARD)


def cut(original: Factors, taken: Mapping[str, Taken], ranks: Mapping[str, int]) -> Factors:
    """The factors at these ranks; the experts of a layer share the largest of theirs."""
    found: Factors = {}
    for name, (a, b) in original.items():
        mine = [key for key in taken if split_expert(key)[0] == name]
        rank = max(ranks[key] for key in mine)
        each = [taken[key].cut(ranks[key], rank) for key in mine]
        parts = each[0] if a.ndim == 2 else [np.stack([p[i].T for p in each]) for i in (0, 1)]
        found[name] = mx.array(parts[0]).astype(a.dtype), mx.array(parts[1]).astype(b.dtype)
    mx.eval(list(found.values()))
    return found


def write(
    tensors: Mapping[str, mx.array],
    config: Mapping[str, Any],
    shrunk: Factors,
    out: Path,
) -> None:
    """The shrunk adapter as a folder, at the largest rank in use."""
    rank = max(files.rank_of(a) for a, _ in shrunk.values())
    found = {**tensors, **{f"{n}.{f}": ab[i] for n, ab in shrunk.items() for i, f in FACTORS}}
    parameters = {**config["lora_parameters"], "rank": rank}
    files.write({**config, "lora_parameters": parameters}, found, out)


def summary(
    folder: Path,
    out: Path | None,
    by: str,
    options: Mapping[str, Any],
    spent: Sequence[Spent],
    shrunk: Factors,
    original: Factors,
    ranks: Mapping[str, int],
    report: Report,
    *,
    weighed: bool,
) -> dict[str, Any]:
    """What was done, as plain data."""
    kept = {m.name: float((m.s_R[: ranks[m.name]] ** 2).sum()) for m in spent}
    whole = {m.name: float((m.s_R**2).sum()) for m in spent}
    return json_safe(
        {
            "adapter": str(folder),
            "out": None if out is None else str(out),
            "rule": {"name": by, **options},
            "weighed": weighed,
            "rank_before": max(m.rank for m in spent),
            "rank_after": max(ranks.values()),
            "ranks": {
                m.name: {
                    "before": m.rank,
                    "after": ranks[m.name],
                    "energy_kept": kept[m.name] / whole[m.name] if whole[m.name] else None,
                }
                for m in spent
            },
            "parameters_before": parameters(original),
            "parameters_after": parameters(shrunk),
            "bytes_before": size_on_disk(folder),
            "bytes_after": None if out is None else size_on_disk(out),
            "kl_mean": report.measured.kl_mean,
            "kl_p99": report.measured.kl_p99,
            "top1_agreement": report.measured.top1_agreement,
            "check": {"verdict": report.verdict, "reasons": list(report.reasons)},
        }
    )


def parameters(factors: Factors) -> int:
    return sum(a.size + b.size for a, b in factors.values())


def size_on_disk(adapter: Path) -> int:
    """Bytes of the factors' file, in either format; `adapter` is its folder, or a checkpoint."""
    places = (adapter, adapter / files.WEIGHTS, adapter / peft.WEIGHTS)
    return next(place.stat().st_size for place in places if place.is_file())
