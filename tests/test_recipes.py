"""Shipped experiments: listed, copied, and each runs a few steps as its comment says."""

import json
import re
from itertools import pairwise

import pytest

from mlx_lora import config, curves, experiment, recipes
from mlx_lora.errors import ConfigError
from mlx_lora.progress import console

SHIPPED = config.shipped()
# a few steps, small, and on the embedded model where the recipe is for a real one
SHORT = ["rollout.max_tokens=8", "eval.n=4", "save_every=1", "check.samples=2"]
STEPS = ["iters=2"]
SMALL = {
    "grpo": ["batch_size=2", "grpo.group_size=2"],
    "es": ["es.population=4", "es.samples_per_generation=2", "es.test_samples=2"],
    "sft": ["batch_size=2", "max_seq_length=64", "val_batches=1", "test_batches=1"],
    "stages": [
        "stages.0.iters=1", "stages.1.iters=1", "stages.0.batch_size=2", "stages.1.batch_size=2",
        "stages.0.rejection_sampling.problems=8", "stages.1.grpo.group_size=2",
    ],
}  # fmt: skip


def test_each_is_listed_with_a_sentence(run_cli):
    listed = json.loads(run_cli("ls", "configs", "--json").stdout)["configs"]
    assert [entry["name"] for entry in listed] == sorted(SHIPPED)
    assert all(re.fullmatch(r"[A-Z].{15,}\.", entry["about"]) for entry in listed)


def commands(text: str) -> list[list[str]]:
    """Words behind `mlx-lora train FILE` of each command in a file's comment."""
    lines = re.findall(r"(?m)^#\s+mlx-lora train \S+(.*)$", recipes.comment_of(text))
    return [line.split() for line in lines]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_commands_of_its_comment_are_understood(name):
    found = commands(SHIPPED[name].read_text("utf-8"))
    assert found and found[0] in ([], ["--dry-run"])
    for words in found:
        options = [value for flag, value in pairwise(words) if flag == "-o"]
        assert set(words) <= {"-o", "--dry-run", *options}
        config.check_names(config.load(name, options))


@pytest.mark.parametrize("name", SHIPPED)
def test_it_runs_a_few_steps(name, tmp_path, monkeypatch):
    for module, drawn in ((experiment, "write"), (experiment, "plot"), (curves, "draw")):
        monkeypatch.setattr(module, drawn, lambda *given: None)
    e = config.load(name)
    options = [*SHORT, *(SMALL["stages"] if e.stages else [*STEPS, *SMALL[e.first.method]])]
    if e.first.model != "demo":
        options.append("model=demo")
        options += ["data=demo"] if e.first.method == "sft" else []
    path = recipes.write(name, tmp_path / "mine.yaml")
    summary = experiment.run(config.load(path, options), tmp_path / "run", console(quiet=True))
    assert summary["check"]["verdict"] == "pass"
    lines = [line for f in tmp_path.rglob("metrics.jsonl") for line in f.read_text().splitlines()]
    assert len(lines) == 2
    assert (tmp_path / "run" / "adapters" / "adapters.safetensors").is_file()


def test_a_recipe_becomes_a_file_of_ones_own(run_cli, tmp_path):
    done = run_cli("new", "sft_demo", cwd=tmp_path)
    assert done.returncode == 0 and "sft_demo.yaml --dry-run" in done.stdout
    made = tmp_path / "sft_demo.yaml"
    assert config.resolved(config.load(made)) == config.resolved(config.load("sft_demo"))
    text = made.read_text("utf-8")
    assert "mlx-lora train sft_demo.yaml" in text and "configs/sft_demo" not in text
    again = run_cli("new", "sft_demo", "--json", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stdout
    assert made.read_text("utf-8") == text
    other = run_cli("new", "sft_demo", "--out", "mine/first.yaml", "--json", cwd=tmp_path)
    assert json.loads(other.stdout) == {"recipe": "sft_demo", "file": "mine/first.yaml"}
    assert "mlx-lora train mine/first.yaml" in (tmp_path / "mine" / "first.yaml").read_text("utf-8")


def test_a_recipe_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="no recipe 'sft_dmeo'") as caught:
        recipes.write("sft_dmeo", None)
    assert "sft_demo" in caught.value.hint
