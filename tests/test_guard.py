"""The check in training: it sees ruin, warns, stops or goes back, and leaves sound runs alone."""

import json

import mlx.core as mx
import pytest

from mlx_lora import config, experiment, stages
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.guard import NAME, ROLLBACKS, Guard, Unhealthy
from mlx_lora.progress import console
from mlx_lora.rl import grpo

YAML = """
model: demo
method: grpo
task: countdown
iters: 8
batch_size: 2
learning_rate: 1.0e-4
grpo: {group_size: 2}
rollout: {max_tokens: 6}
eval: {n: 4}
save_every: 4
monitor: {check_every: 2, policy: POLICY, cooldown: COOLDOWN}
"""


def run(tmp_path, policy, monkeypatch, ruin=(), cooldown=1):
    """A run in which the weights are ruined after these steps."""
    real = grpo.train

    def ruined(loaded, *given, **more):
        for step in real(loaded, *given, **more):
            if step in ruin:
                for layer in lora_layers(loaded.model).values():
                    layer.lora_b = layer.lora_b + 5.0
            yield step

    monkeypatch.setattr(stages.grpo, "train", ruined)
    text = YAML.replace("POLICY", policy).replace("COOLDOWN", str(cooldown))
    folder = tmp_path / policy
    summary = experiment.run(config.from_text(text), folder, console(quiet=True))
    return folder, summary


def alerts(folder) -> list[dict]:
    path = folder / "alerts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [a for a in map(json.loads, lines) if a["name"] == NAME]


def size(folder) -> float:
    _, tensors = files.read(folder / "adapters")
    return max(mx.abs(t).max().item() for n, t in tensors.items() if n.endswith("lora_b"))


def test_a_sound_run_says_nothing(tmp_path, monkeypatch):
    folder, _ = run(tmp_path, "rollback", monkeypatch)
    assert not alerts(folder)
    rows = json.loads((folder / "time_breakdown.json").read_text())["rows"]
    looked = next(r for r in rows if r["name"] == "check in training")
    assert looked["count"] == 4


def test_warn_names_it_once_in_a_cooldown_and_goes_on(tmp_path, monkeypatch):
    folder, summary = run(tmp_path, "warn", monkeypatch, ruin={2}, cooldown=100)
    (alert,) = alerts(folder)
    assert alert["step"] == 3 and "perplexity" in alert["message"]
    assert NAME in summary["alerts"]
    assert size(folder) > 1, "the policy was to go on"
    again, _ = run(tmp_path / "eager", "warn", monkeypatch, ruin={2}, cooldown=1)
    assert len(alerts(again)) > 1


def test_stop_ends_the_run_with_the_last_healthy_adapter(tmp_path, monkeypatch):
    with pytest.raises(Unhealthy, match=r"failed the check at step 4.*adapter is that of step 2"):
        run(tmp_path, "stop", monkeypatch, ruin={2})
    assert size(tmp_path / "stop") < 0.1
    assert json.loads((tmp_path / "stop" / "status.json").read_text())["state"] == "failed"


def test_rollback_goes_back_and_trains_on(tmp_path, monkeypatch):
    folder, _ = run(tmp_path, "rollback", monkeypatch, ruin={2})
    assert len(alerts(folder)) == 1
    assert 0 < size(folder) < 0.1
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8, "every step was taken"


def test_rollbacks_come_to_an_end(tmp_path, monkeypatch):
    with pytest.raises(Unhealthy, match=f"for the {ROLLBACKS + 1}th time"):
        run(tmp_path, "rollback", monkeypatch, ruin=set(range(8)))
    assert size(tmp_path / "rollback") < 0.1


def test_nan_in_the_weights_is_ruin(tmp_path, monkeypatch):
    real = Guard.failures

    def poisoned(self):
        layer = next(iter(lora_layers(self.loaded.model).values()))
        kept = layer.lora_b
        layer.lora_b = layer.lora_b * float("nan")
        found = real(self)
        layer.lora_b = kept
        return found

    monkeypatch.setattr(Guard, "failures", poisoned)
    folder, _ = run(tmp_path, "warn", monkeypatch, cooldown=100)
    assert "NaN or Inf" in alerts(folder)[0]["message"]
