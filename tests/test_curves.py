"""The headline of training.png: what was held out first, and no trend where there is only noise."""

import numpy as np
import pytest

from mlx_lora import curves, stages
from mlx_lora.runlog import METRICS, Clock, RunLog

NOISE = np.random.default_rng(0)
BEFORE = {"accuracy": 0.37, "accuracy_low": 0.33, "accuracy_high": 0.41}
AFTER = {"accuracy": 0.63, "accuracy_low": 0.58, "accuracy_high": 0.67}


def history(values) -> list[dict[str, float]]:
    return [{"reward": float(v)} for v in values]


@pytest.mark.parametrize("steps", [3, 8, 16, 64])
def test_noise_is_called_a_trend_one_time_in_twenty_or_less(steps):
    found = [curves.rising(v) for v in NOISE.standard_normal((400, steps))]
    assert np.mean(np.abs(found)) <= 0.085, "0.05 and three standard deviations of 400 draws"


def test_a_rise_is_found_under_its_noise_and_a_fall_is_its_mirror():
    rises = NOISE.standard_normal((100, 64)) + np.linspace(0, 2, 64)
    found = [curves.rising(v) for v in rises]
    assert np.mean(found) > 0.95
    assert [curves.rising(-v) for v in rises] == [-sign for sign in found]


def test_a_long_run_is_judged_by_means_of_its_steps():
    assert curves.rising(NOISE.standard_normal(20_000) + np.linspace(0, 0.5, 20_000)) == 1


def test_one_wild_step_is_no_trend():
    assert "shows no clear trend" in curves.trend(history([0.5, 0.4] * 7 + [0.4, 90.0]), "reward")


def test_the_picture_leads_with_what_was_held_out(tmp_path, monkeypatch):
    log, drawn = RunLog(tmp_path), []
    for step in range(8):
        log.metric(step, {"reward": 0.1 * step, "kl": float("nan")})
    monkeypatch.setattr(curves, "draw", lambda *given: drawn.append(given))
    for before, after in ((BEFORE, AFTER), (BEFORE, {}), ({}, {})):
        stages.picture(tmp_path, before, after, Clock())
    rows, path, held_out = drawn[0]
    assert len(rows) == 8 and "kl" not in rows[0] and path == tmp_path / curves.FILE
    assert held_out.startswith(
        "It learned: accuracy on held-out problems from 37.0% to 63.0%. Gain"
    )
    assert [given[2] for given in drawn[1:]] == ["", ""]
    (tmp_path / METRICS).unlink()
    assert curves.history_in(tmp_path) == []


def test_the_trend_of_the_steps_comes_second_where_something_was_held_out(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(curves, "blank", lambda width, height, text: told.append(text))
    monkeypatch.setattr(curves, "panel", lambda axes, rows, name, said: told.append(said))
    monkeypatch.setattr(curves, "png", lambda figure: b"")
    losses = [{"loss": 3.0 - 0.1 * i} for i in range(8)]
    losses[0]["valid_loss_before"], losses[7]["valid_loss"] = 3.0, 2.5
    fell = "fell from 2.95 to 2.35: first and last quarter of 8 steps"
    monkeypatch.setattr(curves, "inches", lambda *place: Axes())
    for rows, lead in ((losses, "It learned"), (losses, ""), (losses[1:7], "")):
        curves.draw(rows, tmp_path / "x.png", lead)
    assert told[:2] == ["It learned", fell]
    assert told[2:4] == ["Held-out loss fell: 3 to 2.5 nats per token", fell]
    assert told[4].startswith("Loss fell from") and told[5] == ""


class Axes:
    def set_xlabel(self, text): ...


@pytest.mark.parametrize(("length", "lines"), [(60, 1), (150, 2)])
def test_a_long_headline_takes_two_legible_lines_above_the_panels(length, lines):
    from mlx_lora.spectral.canvas import HEADLINE, LEGIBLE, blank

    words = ("held out " * 40)[:length].strip()
    (text,) = blank(8.6, 5.0, words).texts
    assert len(text.get_text().splitlines()) == lines and text.get_text().split() == words.split()
    assert text.get_fontsize() >= LEGIBLE
    assert 0.12 + lines * 1.2 * text.get_fontsize() / 72 <= HEADLINE or lines == 1
