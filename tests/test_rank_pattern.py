"""Another rank for some modules: who gets it, what trains with it, and what a file of it holds."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters

from mlx_lora import config, experiment, models, sft
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.adapter.inits import inits
from mlx_lora.adapter.patterns import matching, ranks_of
from mlx_lora.check.run import Request, of_experiment
from mlx_lora.config import ConfigError
from mlx_lora.errors import AdapterError
from mlx_lora.lessons import lessons_of
from mlx_lora.memory import foretell
from mlx_lora.models import DEMO, read_json, resolve
from mlx_lora.optimizers import optimizer_of
from mlx_lora.prepare import attach as attach_asked
from mlx_lora.prepare import load
from mlx_lora.progress import console
from mlx_lora.rl import checkpoints, es, grpo
from mlx_lora.runlog import Clock
from mlx_lora.sources import sources_of
from mlx_lora.spectral.report import LoRAAnalyzer
from mlx_lora.tasks import load_task
from tests.tiny import IDS, tiny
from tests.zoo import build

X = mx.array(IDS)
PATTERN = {"q_proj": 2, "layers.0.mlp.*": 12, "layers.1.self_attn.q_proj": 3}
Q0, Q1, UP0 = (
    f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj")
)


def widths(model) -> dict[str, int]:
    return {name: m.lora_a.shape[1] for name, m in lora_layers(model).items()}


def test_a_pattern_is_the_end_of_a_name_and_the_one_for_fewer_modules_counts():
    model = tiny()
    config = attach(model, rank=8, rank_pattern=PATTERN)
    found = widths(model)
    assert (found[Q0], found[Q1], found[UP0]) == (2, 3, 12)
    assert found["model.layers.1.mlp.up_proj"] == found["model.layers.0.self_attn.v_proj"] == 8
    assert config["lora_parameters"]["rank"] == 12, "of the widest: what a file is filled up to"


def test_everything_wrong_with_a_pattern_is_said_at_once():
    with pytest.raises(AdapterError) as refused:
        attach(tiny(), rank_pattern={"q_prj": 2, "layers.7.mlp.up_proj": 2, "*q_proj": 2})
    text = str(refused.value)
    assert "'q_prj' matches no adapted layer. Did you mean q_proj" in text
    assert "'layers.7.mlp.up_proj' matches no" in text and "1.mlp.up_proj" in text
    assert "'*q_proj' is no regular expression" in text


def test_a_pattern_matches_as_in_peft_to_the_end_and_from_a_dot():
    names = ["q_proj", "a.q_proj", "a.seq_proj", "a.q_proj.inner", "layers.10.q", "layers.1.q"]
    assert matching("q_proj", names) == ["q_proj", "a.q_proj"]
    assert matching("layers.1.q", names) == ["layers.1.q"]


def test_the_check_of_an_experiment_attaches_them(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("model: demo\nlora_parameters: {rank_pattern: {q_proj: 2}}\n")
    assert of_experiment(str(path), Request("")).lora["rank_pattern"] == {"q_proj": 2}


def test_two_patterns_of_equal_reach_are_told_apart_by_nobody():
    with pytest.raises(AdapterError, match=r"a\.q is meant by 'a\.\*' and 'q'"):
        ranks_of({"q": 2, "a.*": 3}, ["a.q"], 8)
    assert ranks_of({"q": 2, "a.*": 2}, ["a.q"], 8) == {"a.q": 2}


def test_a_rank_above_a_layer_is_refused_with_its_size():
    with pytest.raises(
        AdapterError, match=r"rank 129 is above .* 1 layers\n.*0.mlp.up_proj is 192 × 128"
    ):
        attach(tiny(), rank_pattern={"layers.0.mlp.up_proj": 129})


@pytest.mark.parametrize("name", sorted(set(inits) - {"antisymmetric", "svd"}))
def test_every_init_makes_factors_of_these_ranks(name):
    loaded = models.load(DEMO)  # antisymmetric takes no rectangle, svd another run's files
    rows = [{"text": f"The duck number {i} has two legs."} for i in range(4)]
    options = {"std": 0.02} if name == "gaussian" else {}
    keys, pattern = ["q_proj", "up_proj"], {"q_proj": 2, "up_proj": 12}
    attach(
        loaded, keys=keys, num_layers=1, rank_pattern=pattern, init=name, rows=rows,
        init_options=options,
    )  # fmt: skip
    assert sorted(widths(loaded.model).values()) == [2, 12]


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_holds_them_for_us_and_for_mlx_lm(tmp_path, dora):
    model = tiny(bits=4)
    config = attach(
        model, rank=4, rank_pattern=PATTERN, init="gaussian", init_options={"std": 0.1}, dora=dora
    )
    files.save(model, config, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["rank_pattern"][Q0] == 2 and UP0 not in written["rank_pattern"]
    again, stock = tiny(bits=4), tiny(bits=4)
    files.load(again, tmp_path)
    assert widths(again) == widths(model)
    assert mx.array_equal(again(X), model(X))
    if not dora:
        load_adapters(stock, str(tmp_path))
        assert np.allclose(np.array(stock(X)), np.array(model(X)), atol=1e-4)
    found = LoRAAnalyzer(tmp_path).analyze().adapters
    assert (found[Q0].nominal_rank, found[UP0].nominal_rank) == (2, 12)


METHODS = {
    "sft": "data: {rows}\nmask_prompt: true\nlearning_rate: 1e-3\nscale_schedule: linear\n",
    "grpo": "method: grpo\ntask: {name: countdown, partial_credit: 0.5}\ngrpo: {group_size: 4}\n"
    "learning_rate: 1e-3\n",
    "es": "method: es\ntask: {name: countdown, partial_credit: 0.5}\n"
    "es: {population: 4, samples_per_generation: 4, test_samples: 4}\n",
}
COMMON = """model: demo
num_layers: -1
iters: 2
rollout: {max_tokens: 12}
eval: {n: 4}
monitor: {every: 1, spectrum_every: 1}
save_every: 1
lora_parameters:
  rank: 4
  scale: 2
  rank_pattern: {q_proj: 2, layers.0.mlp.*: 6}
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"prompt": "How many legs has a duck?", "completion": "A duck has two legs."}
    path.write_text(f"{json.dumps(row)}\n" * 8)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_ranks_there_are(method, rows):
    e = config.from_text(METHODS[method].replace("{rows}", str(rows)) + COMMON)
    loaded = load(e)
    attach_asked(loaded, e)
    before = widths(loaded.model)
    list(one_step(loaded, e.model_copy(update={"iters": 1})))
    assert widths(loaded.model) == before and set(before.values()) == {2, 4, 6}
    assert all(mx.any(m.lora_b != 0, axis=1).all() for m in lora_layers(loaded.model).values())


def one_step(loaded, e):
    optimizer, clock = optimizer_of(e), Clock()
    if e.method == "sft":
        texts = lessons_of(loaded, sources_of(e)["train"], e).texts
        return sft.train(loaded, texts, e, optimizer, clock, lambda *found: None)
    task = load_task(e.task.name, e.task.options)
    loop = grpo if e.method == "grpo" else es
    return loop.train(loaded, task, e, optimizer, clock, lambda *found: None)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_saves_and_resumes_them(method, rows, tmp_path, monkeypatch):
    text = METHODS[method].replace("{rows}", str(rows)) + COMMON
    e, whole = config.from_text(text), tmp_path / "whole"
    experiment.run(e, whole, console(quiet=True))
    read, tensors = files.read(whole / "adapters")
    assert sorted(set(read["rank_pattern"].values())) == [2, 4]
    moved = tensors[f"{Q0}.lora_b"]
    assert mx.any(moved[:2]).item() and not mx.any(moved[2:]).item(), "learnt in the ranks it has"

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", cut_after(checkpoints.save))
        with pytest.raises(Cut):
            experiment.run(e, tmp_path / "cut", console(quiet=True))
    experiment.run(e, tmp_path / "cut", console(quiet=True), resume=True)
    again = files.read(tmp_path / "cut" / "adapters")[1]
    assert all(mx.array_equal(again[name], tensors[name]) for name in tensors)


class Cut(Exception):
    """Stands for a power failure."""


def cut_after(save):
    def once(*given, **options):
        save(*given, **options)
        raise Cut

    return once


def test_alpha_would_mean_another_scale_for_each_and_is_refused():
    with pytest.raises(ConfigError, match="alpha: does not go with rank_pattern"):
        config.from_text("lora_parameters: {alpha: 16, rank_pattern: {q_proj: 2}}")


def test_memory_is_foretold_at_these_ranks():
    about = read_json(resolve(DEMO) / "config.json")
    text = METHODS["grpo"] + COMMON
    narrow = config.from_text(text.replace("{q_proj: 2, layers.0.mlp.*: 6}", '{".*": 2}'))
    wide = config.from_text(text.replace("{q_proj: 2, layers.0.mlp.*: 6}", '{".*": 4}'))
    assert foretell(about, wide, 20).adapter == 2 * foretell(about, narrow, 20).adapter


def test_experts_and_embeddings_take_them_too(tmp_path):
    model = build("qwen3_moe", bits=None)
    found = attach(model, rank=4, rank_pattern={"switch_mlp.up_proj": 2})
    layers = lora_layers(model)
    name = next(n for n in layers if n.endswith("switch_mlp.up_proj"))
    assert layers[name].lora_a.shape[1] == layers[name].lora_b.shape[2] == 2
    layers[name].lora_b = layers[name].lora_b + 0.1
    files.save(model, found, tmp_path)
    again = build("qwen3_moe", bits=None)
    files.load(again, tmp_path)
    assert lora_layers(again)[name].lora_b.shape == layers[name].lora_b.shape
    assert mx.array_equal(again(X), model(X))
