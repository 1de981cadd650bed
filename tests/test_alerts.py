"""Every alert fires just past its threshold and is quiet at it; the table says which there are."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mlx_lora.errors import ConfigError, UnknownNameError
from mlx_lora.spectral.alerts import alerts, find
from mlx_lora.spectral.dynamics import Look
from mlx_lora.spectral.metrics import LoRAAdapterMetrics, LoRAReport
from mlx_lora.spectral.spectrum import Pair, measure
from mlx_lora.spectral.splines import SplineMetrics
from mlx_lora.spectral.structure import structure

NAME = "model.layers.0.self_attn.q_proj"
OTHER = "model.layers.1.self_attn.q_proj"


def adapter(spectrum=(1.0, 1.0, 1.0, 1.0), scale: float = 1.0) -> LoRAAdapterMetrics:
    """A = I, B = diag(spectrum): BA has just these singular values."""
    rank = len(spectrum)
    return measure(Pair(NAME, np.eye(6)[:, :rank], np.diag(spectrum), scale, 2.0**-23))


def report(m: LoRAAdapterMetrics, dominance: float | None = None) -> LoRAReport:
    """One module, and with `dominance` a base that makes its scaled dominance just that."""
    whole = structure({NAME: m}, None)
    if dominance is not None:
        whole = replace(whole, scaled_per_layer_dominance={NAME: dominance})
    return LoRAReport({NAME: m}, whole)


def looks(*ranks: tuple[int, float], size: float = 1.0, growth: float = 0.0) -> LoRAReport:
    """A run that looked at one module: (step, effective rank) of each look."""
    seen = [
        Look(
            step=step,
            rank_utilization_mean=rank / 4,
            effective_rank_BA={NAME: rank},
            rank_utilization={NAME: rank / 4},
            kappa_A={NAME: 1.0},
            kappa_B={NAME: 1.0},
            sigma_max_BA={NAME: size},
            frobenius_BA={NAME: size + growth * i},
            gradient_rank={NAME: 1.0},
        )
        for i, (step, rank) in enumerate(ranks)
    ]
    return replace(report(SOUND), looks=seen)


def up(x: float) -> float:
    return float(np.nextafter(x, math.inf))


def down(x: float) -> float:
    return float(np.nextafter(x, -math.inf))


SOUND = adapter()
BROKEN = adapter((1.0, math.nan, 1.0, 1.0))
UNTRAINED = adapter((0.0, 0.0, 0.0, 0.0))


def curve(deviation, *, slope_variance=0.01, least_slope=0.9):
    return SplineMetrics(deviation, slope_variance, least_slope, 1.0, 1.0, (-3.0, 3.0), (-3.0, 3.0))


CASES = {  # alert -> (reports on which it fires, reports on which it is quiet)
    "non_finite": (
        [report(BROKEN), report(adapter((1.0, math.inf)))],
        [report(SOUND), report(UNTRAINED), report(adapter((3e38, 1.0)))],
    ),
    "untrained": (
        [report(UNTRAINED), report(UNTRAINED, dominance=0.0)],
        [report(SOUND), report(BROKEN), report(adapter((1e-30, 1e-30)))],
    ),
    "switched_off": (
        [report(adapter(scale=0.0))],
        [report(SOUND), report(UNTRAINED), report(BROKEN), report(adapter((0.0, 0.0), scale=0.0))],
    ),
    "effective_rank_low": (
        [report(replace(SOUND, rank_utilization=down(0.25)))],
        [report(replace(SOUND, rank_utilization=0.25)), report(UNTRAINED), report(BROKEN)],
    ),
    "ill_conditioned": (
        [
            report(replace(SOUND, kappa_A=up(1000.0))),
            report(replace(SOUND, kappa_B=up(1000.0), kappa_B_status="at_least")),
            report(adapter((1.0, 1.0, 1.0, 0.0))),  # no full rank
        ],
        [report(replace(SOUND, kappa_A=1000.0, kappa_B=1000.0)), report(UNTRAINED), report(BROKEN)],
    ),
    "scale_mismatch": (
        [report(SOUND, up(1.0)), report(SOUND, down(1e-4))],
        [report(SOUND, 1.0), report(SOUND, 1e-4), report(SOUND), report(UNTRAINED, 0.0)],
    ),
    "dominance_warning": (
        [report(SOUND, up(0.30)), report(SOUND, 0.50)],
        [report(SOUND, 0.30), report(SOUND, up(0.50)), report(SOUND)],
    ),
    "dominance_critical": (
        [report(SOUND, up(0.50))],
        [report(SOUND, 0.50), report(SOUND)],
    ),
    "spline_deviation": (
        [replace(report(SOUND), splines={NAME: curve(up(1.0))})],
        [replace(report(SOUND), splines={NAME: curve(1.0)}), report(SOUND)],
    ),
    "spline_folded": (
        [replace(report(SOUND), splines={NAME: curve(0.5, least_slope=0.0)})],
        [replace(report(SOUND), splines={NAME: curve(0.5, least_slope=up(0.0))})],
    ),
    "spline_unused": (
        [replace(report(SOUND), splines={NAME: curve(down(0.01), slope_variance=down(0.05))})],
        [
            replace(report(SOUND), splines={NAME: curve(0.01), OTHER: curve(0.0)}),
            replace(report(SOUND), splines={NAME: curve(0.0, slope_variance=0.05)}),
            replace(report(UNTRAINED), splines={NAME: curve(0.0)}),
            report(SOUND),
        ],
    ),
    "collapsed_early": (
        [
            looks((10, 4.0), (20, down(2.0))),
            looks((10, 2.0), (50, 4.0), (110, down(2.0))),
            looks((10, 4.0), (20, 1.0), (30, 1.0)),  # told once
        ],
        [
            looks((10, 4.0), (20, 2.0)),
            looks((9, 4.0), (20, 1.0)),  # the maximum was in the warm-up
            looks((10, 4.0), (111, 1.0)),  # late
            looks((10, 1.0), (20, 4.0)),
            report(SOUND),
        ],
    ),
    "saturated": (
        [
            looks((0, 2.0), (50, 2.0), (100, 2.0)),
            looks((0, 1.0), (10, 1.98 + 1e-12), (110, 2.0)),  # 1 %; what was before is past
        ],
        [
            looks((1, 2.0), (100, 2.0)),  # not long enough
            looks((0, 1.98 - 1e-12), (100, 2.0)),
            looks((0, 2.0), (50, 2.1), (100, 2.0)),  # there and back
            looks((0, 2.0), (100, 2.0), growth=0.1),
            report(SOUND),
        ],
    ),
}


def test_every_alert_has_its_cases():
    assert CASES.keys() == set(alerts)


@pytest.mark.parametrize("name", list(alerts))
def test_fires_and_says_what_to_do(name):
    for case in CASES[name][0]:
        (finding,) = alerts[name](case)
        assert finding.name == name
        assert finding.module in (NAME, "")
        assert finding.action.endswith(".") and len(finding.action) > 20
        assert finding in find(case)


@pytest.mark.parametrize("name", list(alerts))
def test_stays_quiet(name):
    for case in CASES[name][1]:
        assert alerts[name](case) == []


def test_messages_carry_the_numbers():
    low = report(replace(SOUND, effective_rank_BA=0.8, rank_utilization=0.2))
    assert "0.8 of rank 4 (20%" in alerts["effective_rank_low"](low)[0].message
    wide = replace(SOUND, nominal_rank=1024, effective_rank_BA=200.0, rank_utilization=0.2)
    assert "Rank 300 would hold it" in alerts["effective_rank_low"](report(wide))[0].action
    sick = report(replace(SOUND, kappa_B=2500.0, kappa_B_status="at_least"))
    assert "κ(B) is at least 2.5e+03" in alerts["ill_conditioned"](sick)[0].message
    loud = report(replace(SOUND, effective_lr_scale=8.0), 4.0)
    (finding,) = alerts["scale_mismatch"](loud)
    assert "is 4 of the base's, at scale 8" in finding.message and "below 2" in finding.action


def test_an_untrained_adapter_is_one_finding_and_an_idle_module_names_itself():
    idle = {NAME: UNTRAINED, OTHER: UNTRAINED}
    (finding,) = find(LoRAReport(idle, structure(idle, None)))
    assert (finding.name, finding.module) == ("untrained", "")
    mixed = {NAME: SOUND, OTHER: UNTRAINED}
    assert [f.module for f in find(LoRAReport(mixed, structure(mixed, None)))] == [OTHER]


def test_only_a_broken_adapter_is_a_failure():
    assert find(report(BROKEN))[0].severity == "fail"
    assert {f.severity for f in find(report(SOUND, 2.0))} == {"warn"}


def test_thresholds_are_options():
    case = report(SOUND, 0.2)
    assert find(case) == []
    assert find(case, {"dominance_warning": {"threshold": 0.1}})[0].name == "dominance_warning"
    with pytest.raises(ConfigError, match="threshold"):
        find(case, {"dominance_warning": {"treshold": 0.1}})
    with pytest.raises(UnknownNameError, match="dominance_warn"):
        find(case, {"dominance_warn": {}})
