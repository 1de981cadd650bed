"""The memory that the plan foretells: exact where it can be, monotonic, told with advice."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora import config, cpu, memory, models, plan
from mlx_lora.adapter.attach import attach
from mlx_lora.caches import prefill
from mlx_lora.errors import ModelError
from mlx_lora.memory import cache_of, foretell, nbytes, skeleton, told
from mlx_lora.optimizers import optimizer_of
from mlx_lora.progress import console
from tests import zoo

DEMO = models.read_json(models.DEMO_FOLDER / "config.json")
BASE = "{{model: {model}, method: grpo, task: countdown, batch_size: 4, iters: 2{more}}}"
SHAPE = {**zoo.ARCHITECTURES["llama"], "quantization": {"group_size": 64, "bits": 4}}


def experiment(more="", model="demo"):
    return config.from_text(BASE.format(model=model, more=f", {more}" if more else ""))


def test_parameters_adapter_and_optimizer_are_exact():
    e = experiment("lora_parameters: {rank: 4, keys: [q_proj, v_proj]}, num_layers: 3")
    loaded = models.load("demo")
    before = nbytes(loaded.model.parameters())
    attach(loaded.model, rank=4, keys=["q_proj", "v_proj"], num_layers=3)
    optimizer = optimizer_of(e)
    optimizer.init(loaded.model.trainable_parameters())
    found = foretell(DEMO, e, 20)
    assert found.base == before
    assert found.adapter == nbytes(loaded.model.trainable_parameters())
    assert found.optimizer == nbytes(optimizer.state)


def test_dense_copies_are_those_that_are_made():
    loaded = models.load("demo")
    loaded.model(mx.array([[1, 2]]))
    made = [vars(m)["_dense"] for m in loaded.model.modules() if "_dense" in vars(m)]
    assert foretell(DEMO, experiment(), 20).copies == sum(x.nbytes for x in made)
    assert bool(made) == (cpu.mode() in ("openblas", "numpy"))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mamba2", "lfm2", "qwen3_moe"])
def test_a_cache_is_as_large_as_the_real_one(name):
    """Of the tokens that are there, without the room ahead: keys and values, windows, states."""
    model = zoo.build(name, None)
    kept = cache_of(model)
    tokens = 3
    _, layers = prefill(model, [[5, 6, 7]], [0])
    real = 0
    for layer in layers:
        for _, x in tree_flatten(vars(layer)):
            if isinstance(x, mx.array) and x.ndim > 1:
                growing = hasattr(layer, "keys")
                real += x.nbytes // x.shape[2] * tokens if growing else x.nbytes
    assert kept.row(tokens) == real
    assert kept.plain == models.plain_cache(model)


def test_a_window_bounds_the_cache():
    kept = cache_of(zoo.build("gemma3", None))
    assert kept.row(zoo.WINDOW) < kept.row(100)
    assert kept.row(200) - kept.row(100) < 100 * sum(b for b, _ in kept.per_token)


def test_nothing_is_evaluated():
    large = {**SHAPE, "vocab_size": 400_000, "hidden_size": 8192, "intermediate_size": 16384}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = foretell(large, experiment(model="tiny"), 20)
    assert found.base > 1e9 and mx.get_peak_memory() - before < 1e7


@pytest.mark.parametrize(
    ("more", "part", "grows"),
    [
        ("grpo: {group_size: 16}", "learning", True),
        ("rollout: {max_tokens: 512}", "learning", True),
        ("rollout: {max_tokens: 512}", "cache", True),
        ("rollout: {width: 8}", "rollout", False),
        ("rollout: {width: 8}", "evaluation", False),
        ("eval: {n: 100}", "evaluation", False),
        ("grad_checkpoint: true", "learning", False),
        ("grad_accumulation_steps: 4", "learning", False),
        ("num_layers: 1", "adapter", False),
        ("optimizer: sgd", "optimizer", False),
    ],
)
def test_every_knob_moves_its_part(more, part, grows):
    plain, changed = (getattr(foretell(DEMO, experiment(m), 20), part) for m in ("", more))
    assert (changed > plain) == grows and changed != plain


def test_an_evaluation_of_more_rows_than_a_step_decides_the_peak():
    small = "grpo: {group_size: 2}, batch_size: 1, rollout: {max_tokens: 512}"
    e = config.from_text(f"{{model: demo, method: grpo, task: countdown, {small}}}")
    found = foretell(DEMO, e, 20)
    assert found.evaluation > found.rollout and found.evaluation > found.learning
    assert told(DEMO, e, 20)["memory_peak_mb"] * 1e6 > found.evaluation + found.base


def test_what_does_not_fit_comes_with_advice(monkeypatch):
    e = experiment()
    whole = told(DEMO, e, 20)
    assert whole["memory_fits"] and whole["memory_advice"] == []
    monkeypatch.setattr(memory, "memory_of_machine", lambda: 10_000_000)
    tight = told(DEMO, e, 20)
    assert not tight["memory_fits"]
    assert any("grad_checkpoint: true" in line for line in tight["memory_advice"])
    assert tight["memory_peak_mb"] == whole["memory_peak_mb"]


def test_the_step_of_the_demo_takes_about_what_is_foretold():
    found = plan.plan(experiment("grpo: {group_size: 32}, rollout: {max_tokens: 12}"), console())
    assert found["tried"] and 0.5 < found["memory_peak_mb"] / found["peak_memory_mb"] < 1.5


def test_config_json_is_enough(tmp_path):
    """No weights, no tokenizer: nothing is tried, and the memory is told all the same."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    found = plan.plan(experiment(model=folder), console(quiet=True))
    assert found["tried"] is False and found["rollouts_per_step"] == 32
    assert found["memory_base_mb"] > 0 and "seconds_rollout" not in found
    assert np.isfinite(found["memory_peak_mb"])


def test_a_config_that_makes_no_model_says_so():
    with pytest.raises(ModelError, match=r"no model can be built from its config\.json"):
        skeleton({"model_type": "llama", "hidden_size": "wide"}, experiment())


def test_a_model_that_cannot_be_fetched_says_what_to_do_offline(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("mlx_lm.utils._download", unreachable)
    for find in (plan.description, models.resolve):
        with pytest.raises(ModelError, match="no route") as caught:
            find("owner/name")
        assert "hf download owner/name" in caught.value.hint
