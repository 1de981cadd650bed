"""`mlx-lora advise` on an adapter that was trained: the ranks its spectra use, and what is idle."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora import config
from mlx_lora.adapter.peft import is_peft, read_peft
from mlx_lora.adapter.tensors import described, place_of
from mlx_lora.blocks import LoraParameters
from mlx_lora.errors import ConfigError, near
from mlx_lora.schema import Stage
from mlx_lora.ship.ranks import Spent, rules
from mlx_lora.spectral.advice import Need
from mlx_lora.spectral.metrics import LoRAAdapterMetrics, LoRAReport
from mlx_lora.spectral.names import places, split_expert
from mlx_lora.spectral.read import adapter_folder
from mlx_lora.spectral.report import LoRAAnalyzer
from mlx_lora.spectral.spectrum import Pair
from mlx_lora.spectral.structure import SATURATED, finding

IDLE = 0.01  # of an equal share of the adapter's energy: a module below does next to nothing


@dataclass(frozen=True)
class Looked:
    """An adapter's needs and what they rest on, by layer. No needs where it is not sound."""

    about: dict[str, Any]
    needs: dict[str, Need]
    evidence: dict[str, dict[str, Any]]
    scale: float


def look(given: Path, rule: str, options: Mapping[str, Any]) -> Looked:
    """Into an adapter or run folder. AdapterError for one that is torn, foreign or empty."""
    known = sorted(set(rules) - {"kl"})
    if rule == "kl":
        raise ConfigError(
            "--rule kl reads text with the model: that is `mlx-lora shrink --by kl`",
            f"From the spectra alone: {', '.join(known)}.",
        )
    if rule not in known:
        raise ConfigError(
            f"--rule {rule}: no rule for the spectra of an adapter", near(rule, known)
        )
    choose = rules.bind(rule, options)
    folder = adapter_folder(given)
    analyzer = LoRAAnalyzer(folder)
    report, pairs = analyzer.analyze(), {pair.name: pair for pair in analyzer.read()}
    sound = report.status == "trained"
    idle = idle_in(report) if sound else []
    about = {
        "kind": "after_training",
        "adapter": str(folder),
        "status": report.status,
        "finding": f"The adapter {finding(report)}",
        "rule": {"name": rule, **options},
        "idle_modules": idle,
        "idle_blocks": idle_blocks(report.adapters, idle),
    }
    if not sound:
        return Looked(about, {}, {}, 0.0)
    spent = [
        Spent(name, np.array(m.singular_values), m.nominal_rank)
        for name, m in report.adapters.items()
        if m.status == "trained"
    ]
    ranks = choose(spent, lambda ranks: 0.0)
    layers = layers_of(report.adapters)
    return Looked(
        about,
        {
            layer: need(names, report.adapters, pairs, ranks, idle)
            for layer, names in layers.items()
        },
        {layer: evidence(report.adapters[names[0]]) for layer, names in layers.items()},
        Counter(pair.scale for pair in pairs.values()).most_common(1)[0][0],
    )


def layers_of(adapters: Mapping[str, LoRAAdapterMetrics]) -> dict[str, list[str]]:
    """The matrices of each adapted layer: one, or its experts."""
    found = defaultdict(list)
    for name in adapters:
        found[split_expert(name)[0]].append(name)
    return found


def idle_in(report: LoRAReport) -> list[str]:
    """Matrices that hold less than IDLE of an equal share of Σ‖scale·BA‖²."""
    energy = {
        n: (m.effective_lr_scale * (m.frobenius_BA or 0.0)) ** 2 for n, m in report.adapters.items()
    }
    little = IDLE * sum(energy.values()) / len(energy)
    return [name for name, e in energy.items() if e <= little]


def idle_blocks(adapters: Mapping[str, LoRAAdapterMetrics], idle: list[str]) -> list[int]:
    """Blocks in which everything is idle."""
    where = places(adapters)
    busy = {block for name, (block, _) in where.items() if name not in idle}
    return sorted({b for b, _ in where.values() if b is not None} - busy)


def need(
    names: Sequence[str],
    adapters: Mapping[str, LoRAAdapterMetrics],
    pairs: Mapping[str, Pair],
    ranks: Mapping[str, int],
    idle: list[str],
) -> Need:
    """Of an adapted layer: the most that one of its matrices needs; 1 where it is idle.

    Where one uses all of its rank, no rule can tell what it needs.
    """
    inputs, outputs = (
        (pairs[n].a_IR.shape[0] for n in names),
        (pairs[n].b_RO.shape[1] for n in names),
    )
    dims = sum(inputs), sum(outputs)
    busy = [n for n in names if n not in idle]
    rank = adapters[names[0]].nominal_rank
    if not busy:
        return Need(*dims, rank, 1)
    if any((adapters[n].rank_utilization or 0.0) >= SATURATED for n in busy):
        return Need(*dims, rank, rank, "full")
    return Need(*dims, rank, max(ranks[n] for n in busy))


def evidence(m: LoRAAdapterMetrics) -> dict[str, Any]:
    """A module's evidence, after training; of experts the first one's."""
    return {
        "status": m.status,
        "effective_rank": m.effective_rank_BA,
        "rank_utilization": m.rank_utilization,
        "k90": m.k90,
    }


def experiment_of(given: Path, folder: Path) -> Stage:
    """What trained it, where a run says so; else only which layers the adapter is on."""
    if (given / "config.yaml").is_file():
        return config.load(given / "config.yaml").last
    about = read_peft(folder)[0] if is_peft(folder) else described(*place_of(folder))
    keys = about["lora_parameters"].get("keys")
    return Stage(lora_parameters=LoraParameters(keys=None if keys is None else tuple(keys)))
