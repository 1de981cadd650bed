"""An adapter with its intruder dimensions turned down, at its own rank, judged by the check.

Intruders (arXiv 2410.21228) are strong directions of W + scale·BA that W did not have. Of one with
the singular vectors u and v, uᵀ(scale·BA)v is the adapter's own share. It is multiplied with λ, by
the smallest change of BA that reads only what A reads and writes only what B writes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora import cpu
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.check import probes
from mlx_lora.check.gate import Report, judged
from mlx_lora.check.metrics import perplexity
from mlx_lora.check.probes import Probes
from mlx_lora.check.reading import read_both
from mlx_lora.check.sides import Side
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.runlog import RunLog, atomically, refuse_occupied
from mlx_lora.ship import proof
from mlx_lora.ship.export import whole
from mlx_lora.ship.plots import repair_plot
from mlx_lora.ship.shrink import FACTORS, Factors, Version, put, refuse_unfit, write
from mlx_lora.ship.trained import base_name, load_base, read
from mlx_lora.spectral.base import Matrix, Updated, frozen_layers, matrix, sigma_max
from mlx_lora.spectral.deep import Intruder, Tell, intruding, lying
from mlx_lora.spectral.names import split_expert
from mlx_lora.spectral.read import adapter_folder
from mlx_lora.spectral.spectrum import Pair, pairs

FILE, PICTURE = "repair.json", "repair.png"


@dataclass(frozen=True)
class Wanted:
    """What counts as an intruder, and what becomes of it."""

    times: float = 0.75  # λ
    top: int = 10  # singular vectors looked at
    cosine: float = 0.5  # to W's: below it is a stranger

    def __post_init__(self) -> None:
        asked = {
            f"--lambda is at least 0 and below 1, got {self.times:g}": 0 <= self.times < 1,
            f"--top is at least 1, got {self.top}": self.top >= 1,
            f"--cosine is above 0 and up to 1, got {self.cosine:g}": 0 < self.cosine <= 1,
        }
        if problems := [said for said, sound in asked.items() if not sound]:
            raise ConfigError("\n".join(problems))


@dataclass(frozen=True)
class Dimension:
    """One intruder, before and after."""

    sigma: float  # of W + scale·BA
    cosine: float  # to the nearest of W's
    share: float  # of sigma that the adapter makes; the rest is W's
    after: float  # uᵀ(W + scale·BA)v when repaired


@dataclass(frozen=True)
class Module:
    """A module that has intruders."""

    module: str
    base: float  # σ_max(W)
    before: int
    after: int
    moved: float  # ‖change‖ / ‖BA‖
    intruders: Sequence[Dimension]


@dataclass(frozen=True)
class Repaired:
    """What was found and done."""

    adapter: Path
    out: Path | None  # None: nothing was written
    base: str
    wanted: Wanted
    looked_at: int  # modules
    modules: Sequence[Module]
    notices: Sequence[str] = ()
    report: Report | None = None  # unrepaired against repaired
    texts: Mapping[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(("base", "before", "after", "kl_before", "kl_after"))
    )

    @property
    def count(self) -> tuple[int, int]:
        """Intruders before and after."""
        return sum(m.before for m in self.modules), sum(m.after for m in self.modules)

    def to_json(self) -> dict[str, Any]:
        before, after = self.count
        return {
            "adapter": str(self.adapter),
            "out": None if self.out is None else str(self.out),
            "base": self.base,
            "lambda": self.wanted.times,
            "top": self.wanted.top,
            "cosine": self.wanted.cosine,
            "looked_at": self.looked_at,
            "intruders_before": before,
            "intruders_after": after,
            "perplexity_base": self.texts["base"],
            "perplexity_before": self.texts["before"],
            "perplexity_after": self.texts["after"],
            "kl_base_before": self.texts["kl_before"],
            "kl_base_after": self.texts["kl_after"],
            "check": proof.summary(self.report) if self.report else None,
            "notices": list(self.notices),
            "modules": [
                vars(m) | {"intruders": [vars(d) for d in m.intruders]} for m in self.modules
            ],
        }


def repair(
    adapter: Path,
    out: Path,
    *,
    model: str | None = None,
    wanted: Wanted | None = None,
    trust_remote_code: bool = False,
    tell: Tell = lambda done, total: None,
) -> Repaired:
    """Turn the intruders of an adapter down and write it to `out`, if the check does not fail.

    Without an intruder nothing is written. AdapterError for DoRA: its magnitudes would give a
    direction back what was taken from it.
    """
    begin, wanted = time.perf_counter(), wanted or Wanted()
    refuse_occupied(out)
    folder = adapter_folder(adapter)
    trained = read(folder)
    if trained.magnitudes_O:
        raise AdapterError(
            f"{folder} is a DoRA adapter: its magnitudes rescale every row, so that a direction "
            "that is turned down comes back", "Adapters of plain LoRA can be repaired.",
        )  # fmt: skip
    name = base_name(trained, model)
    loaded, notices = load_base(trained, name, trust_remote_code=trust_remote_code)
    config, tensors = files.read(trained.folder)
    files.load(loaded.model, trained.folder)
    layers = lora_layers(loaded.model)
    original: Factors = {n: (m.lora_a, m.lora_b) for n, m in layers.items()}
    held = pairs_of(original, trained.scale)
    refuse_unfit(held, folder)
    frozen, found, changed = frozen_layers(loaded.model), {}, {}
    for done, pair in enumerate(held):
        if seen := strangers(pair, frozen, wanted):
            found[pair.name] = seen
            changed[pair.name] = mended(pair, frozen, seen, wanted.times)
        tell(done + 1, len(held))
    fixed = replaced(original, changed)
    now = {p.name: p for p in pairs_of(fixed, trained.scale)} if found else {}
    modules = [
        judge(p, now[p.name], frozen, found[p.name], wanted) for p in held if p.name in found
    ]
    result = Repaired(folder, None, name, wanted, len(held), modules, notices)
    if not modules:
        return result
    put(layers, fixed)
    cpu.follow(loaded.model)
    texts = probes.read(loaded)
    before, after = Version(loaded, factors=original), Side(loaded)
    report = judged(before, after, texts, None, "healthy", None, begin, 0)
    told = on_texts(Side(loaded, off=True), before, after, texts)
    result = replace(result, report=report, texts=told)
    if report.exit_code == 0:
        result = replace(result, out=out)
        with whole(out) as part:
            write(tensors, config, fixed, part)
            proof.write(report, part)
            RunLog(part).write_json(FILE, result.to_json())
            with atomically(part / PICTURE) as picture:
                picture.write_bytes(repair_plot(result.to_json()))
    return result


def pairs_of(factors: Factors, scale: float) -> list[Pair]:
    """The pairs in a model's factors, experts one by one."""
    return list(pairs({f"{n}.{f}": ab[i] for n, ab in factors.items() for i, f in FACTORS}, scale))


def strangers(pair: Pair, layers: Mapping[str, Any], wanted: Wanted) -> list[Intruder]:
    """A pair's intruders."""
    name, expert = split_expert(pair.name)
    flat = lying(pair, layers[name])
    if not (flat.a_IR.any() and flat.b_RO.any()):
        return []
    weight = matrix(layers[name], expert)
    return intruding(weight, flat, top=wanted.top, cosine=wanted.cosine)


def mended(
    pair: Pair, layers: Mapping[str, Any], found: Sequence[Intruder], times: float
) -> tuple[np.ndarray, np.ndarray]:
    """A pair's factors with `times` its share of each intruder."""
    name, expert = split_expert(pair.name)
    flat, weight = lying(pair, layers[name]), matrix(layers[name], expert)
    back = lying(turned_down(flat, *directions(weight, flat, found), times), layers[name])
    return back.a_IR, back.b_RO


def judge(
    pair: Pair, now: Pair, layers: Mapping[str, Any], found: Sequence[Intruder], wanted: Wanted
) -> Module:
    """What became of a module's intruders in the factors as they are stored."""
    name, expert = split_expert(pair.name)
    weight = matrix(layers[name], expert)
    old, new = lying(pair, layers[name]), lying(now, layers[name])
    vectors = directions(weight, old, found)
    shares, left = answers(old, *vectors), answers(new, *vectors)
    whole = old.a_IR @ old.b_RO
    moved = np.linalg.norm(new.a_IR @ new.b_RO - whole) / np.linalg.norm(whole)
    dimensions = [
        Dimension(each.sigma, each.cosine, share / each.sigma, each.sigma - share + rest)
        for each, share, rest in zip(found, shares.tolist(), left.tolist(), strict=True)
    ]
    after = len(strangers(now, layers, wanted))
    return Module(pair.name, sigma_max(weight), len(found), after, float(moved), dimensions)


def directions(
    weight: Matrix, pair: Pair, found: Sequence[Intruder]
) -> tuple[np.ndarray, np.ndarray]:
    """Left [K, O] and right [K, I] singular vectors of the updated weight."""
    updated = Updated(weight, pair.a_IR, pair.b_RO, pair.scale)
    rights = [updated.transposed(each.left_O) / each.sigma for each in found]
    return np.stack([each.left_O for each in found]), np.stack(rights)


def answers(pair: Pair, lefts_KO: np.ndarray, rights_KI: np.ndarray) -> np.ndarray:
    """uᵀ(scale·BA)v of each pair of vectors."""
    return pair.scale * ((rights_KI @ pair.a_IR) * (lefts_KO @ pair.b_RO.T)).sum(axis=1)


def turned_down(pair: Pair, lefts_KO: np.ndarray, rights_KI: np.ndarray, times: float) -> Pair:
    """The pair whose share of each uᵀ(scale·BA)v is `times` what it was.

    scale·BA = scale · Q_B C Q_Aᵀ, and of all C' with pᵀC'q = times · pᵀCq, where p = Q_Bᵀu and
    q = Q_Aᵀv, the nearest: C less the combination of the p qᵀ that does it. What is orthogonal to
    all p or to all q stays, and so does the rank, or it falls.
    """
    (q_a, r_a), (q_b, r_b) = np.linalg.qr(pair.a_IR), np.linalg.qr(pair.b_RO.T)
    core = r_b @ r_a.T
    p_KR, q_KR = lefts_KO @ q_b, rights_KI @ q_a
    share_K = np.einsum("kr,rs,ks->k", p_KR, core, q_KR)
    gram_KK = (p_KR @ p_KR.T) * (q_KR @ q_KR.T)
    x_K = np.linalg.lstsq(gram_KK, (1 - times) * share_K)[0]
    u_RR, s_R, v_RR = np.linalg.svd(core - (p_KR.T * x_K) @ q_KR, full_matrices=False)
    root = np.sqrt(s_R)
    a_IR, b_RO = q_a @ v_RR.T * root, root[:, None] * (q_b @ u_RR).T
    more = pair.a_IR.shape[1] - len(root)
    return replace(
        pair, a_IR=np.pad(a_IR, ((0, 0), (0, more))), b_RO=np.pad(b_RO, ((0, more), (0, 0)))
    )


def replaced(original: Factors, changed: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Factors:
    """The factors with those of some modules or experts changed; all others are the same arrays."""
    found = dict(original)
    for key, (a_IR, b_RO) in changed.items():
        name, expert = split_expert(key)
        a, b = found[name]
        if expert is None:
            found[name] = mx.array(a_IR).astype(a.dtype), mx.array(b_RO).astype(b.dtype)
            continue
        a, b = mx.array(a), mx.array(b)  # copies: the original is compared with
        a[expert], b[expert] = mx.array(a_IR.T).astype(a.dtype), mx.array(b_RO.T).astype(b.dtype)
        found[name] = a, b
    mx.eval(list(found.values()))
    return found


def on_texts(base: Side, before: Side, after: Side, texts: Probes) -> dict[str, float | None]:
    """Perplexity on the check's known-good texts, and KL to the base, of both adapters."""
    first, second = (read_both(base, side, texts) for side in (before, after))
    return {
        "base": perplexity(first.mean("nll_base")),
        "before": perplexity(first.mean("nll_adapted")),
        "after": perplexity(second.mean("nll_adapted")),
        "kl_before": first.mean("kl"),
        "kl_after": second.mean("kl"),
    }
