"""A spline adapter from a YAML: checked, trained, killed, resumed, and known again."""

import json

import mlx.core as mx
import pytest

from mlx_lora import config, curves, experiment, models, sft
from mlx_lora.adapter import files
from mlx_lora.check import certificate, gate
from mlx_lora.progress import console
from mlx_lora.report import page

YAML = """
model: demo
data: DATA/train.jsonl
iters: 4
save_every: 2
batch_size: 2
learning_rate: 1e-2
num_layers: 1
lora_parameters: {type: spline, rank: 4, scale: 8.0, keys: [q_proj, down_proj], num_knots: 7}
check: {prompts: DATA/probes.jsonl, samples: 1}
"""


class Cut(Exception):
    """Stands for a power failure."""


def cut_short(*args, real=sft.train, **options):
    for step in real(*args, **options):
        yield step
        if step == 2:  # after the checkpoint of two steps and one step more
            raise Cut


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run("name")` runs the YAML into that folder, without pictures and pages."""
    rows = [{"text": f"A duck has two legs, {n} ducks have {2 * n}."} for n in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text)
    (tmp_path / "probes.jsonl").write_text(text + json.dumps({"prompt": "A duck"}) + "\n")
    for module, name in ((experiment, "write"), (experiment, "plot"), (curves, "draw")):
        monkeypatch.setattr(module, name, lambda *given: None)
    monkeypatch.setattr(page, "of", lambda folder: None)
    monkeypatch.setattr(page, "write", lambda *given: None)
    e = config.from_text(YAML.replace("DATA", str(tmp_path)))

    def run(name, **options):
        experiment.run(e, tmp_path / name, console(quiet=True), **options)
        return tmp_path / name

    return run


def test_a_spline_from_a_yaml_trains_and_is_resumed_to_the_bit(run, tmp_path, monkeypatch):
    whole = run("whole")
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(sft, "train", cut_short)
        run("cut")
    cut = run("cut", resume=True)
    (about, one), (_, two) = (files.read(folder / "adapters") for folder in (whole, cut))
    assert one.keys() == two.keys() and all(mx.array_equal(one[k], two[k]) for k in one)
    assert about["fine_tune_type"] == "spline" and about["lora_parameters"]["num_knots"] == 7
    bends = {name: value for name, value in one.items() if name.endswith(".spline")}
    assert len(bends) == 2 and all(mx.any(bend).item() for bend in bends.values())
    begun = files.read(whole / "adapters" / "initial")[1]
    grids = [name for name in one if name.endswith(".spline_scale")]
    assert all(one[n].item() != begun[n].item() != 1 for n in grids)  # they kept up
    assert not any(mx.any(begun[name]).item() for name in bends)
    its_start_is_certified(whole / "adapters", tmp_path)


def its_start_is_certified(folder, tmp_path):
    """And what was trained is not what the certificate is about."""
    recorded = certificate.read(folder / "initial")
    assert recorded["bitwise_identical"] and recorded["expect"] == "same"

    def verified(adapter):
        loaded = models.load("demo", quantize=certificate.quantization(recorded))
        probes = {"prompts": tmp_path / "probes.jsonl", "samples": 1}
        report = gate.check(loaded, adapter=adapter, expect="same", **probes)
        return certificate.verify(loaded, report, recorded, adapter).certificate["status"]

    assert verified(folder / "initial") == "valid" and verified(folder) == "invalid"
