"""Evolution strategies: what a generation does, whole runs, what is refused before the first."""

import contextlib
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import config, distributed, experiment, models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.errors import AdapterError, ConfigError, RewardError
from mlx_lora.optimizers import optimizer_of
from mlx_lora.plan import plan
from mlx_lora.progress import console
from mlx_lora.rl import es
from mlx_lora.rl.fitness import fitnesses, measured
from mlx_lora.runlog import Clock
from mlx_lora.tasks import load_task
from mlx_lora.types import Reward, Sample, Task
from tests.test_distributed import together

YAML = """
model: demo
method: es
task: countdown
init: activations
lora_parameters: {rank: 1, scale: 2.0, keys: [o_proj, down_proj]}
iters: 4
save_every: 2
es: {population: 6, samples_per_generation: 8, perturb_scale: 0.3, step_scale: 2}
rollout: {max_tokens: 12}
eval: {n: 8}
monitor: {every: 2}
"""
TIMES = {"seconds", "tokens_per_second"}


def of(*overrides):
    return config.from_text(YAML, overrides=overrides)


def run(folder, *overrides, **options):
    return experiment.run(of(*overrides), folder, console(quiet=True), **options)


def read(folder):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in TIMES} for x in lines]


def tensors(folder, name="adapters"):
    return files.read(folder / name)[1]


def same(a, b):
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)


def scored(reward) -> Task:
    sample = Sample("Tell me a story.", {}, "x")
    return Task(
        load=lambda split, count, seed: [sample] * count,
        reward=lambda sample, text: Reward(reward(text), "scored"),
        first=sample,
        wrong="",
    )


def attached(init="activations"):
    loaded = models.load("demo")
    attach(loaded, rank=1, init="zero", keys=["o_proj", "down_proj"])
    return loaded


def generations(loaded, task, e):
    seen = []
    steps = es.train(loaded, task, e, optimizer_of(e), Clock(), lambda s, m, g: seen.append(m))
    assert list(steps) == list(range(e.iters))
    return seen


def weights(model):
    return {k: np.array(v) for k, v in es.factors(model).items()}


def moved(before, after):
    return {k for k in before if not np.array_equal(before[k], after[k])}


def length(text):
    return max(0.0, 1 - len(text) / 100)


def test_equal_rewards_change_nothing_and_are_counted():
    loaded = attached()
    before = weights(loaded.model)
    seen = generations(loaded, scored(lambda text: 0.1), of("iters=2"))
    assert [m["generations_skipped"] for m in seen] == [1, 2]
    assert "update_norm" not in seen[1] and seen[1]["distance"] == 0
    assert not moved(before, weights(loaded.model))


@pytest.mark.parametrize("key", ["perturb_scale", "sigma"])
def test_sigma_zero_changes_nothing(key):
    loaded = attached()
    before = weights(loaded.model)
    options = ["iters=1", "rollout.temperature=1.0", f"es.{key}=0"]
    text = YAML.replace("perturb_scale: 0.3, ", "")
    e = config.from_text(text, overrides=options)
    (seen,) = generations(loaded, scored(length), e)
    assert seen["fitness_std"] < 1e-12 and seen["generations_skipped"] == 1
    assert not moved(before, weights(loaded.model))


def test_one_factor_moves_at_a_time_and_b_first():
    loaded = attached()
    e = of("es.factor=alternate", "es.turn=1", "iters=2", "es.perturb_scale=0.5")
    steps = es.train(loaded, scored(length), e, optimizer_of(e), Clock(), lambda *_: None)
    now = weights(loaded.model)
    for factor in ("lora_b", "lora_a"):
        next(steps)
        before, now = now, weights(loaded.model)
        names = moved(before, now)
        assert names and all(name.endswith(factor) for name in names)


def test_the_update_is_the_weighted_mean_of_the_directions():
    """By hand, with the way back to the start."""
    loaded = attached()
    e = of("iters=1", "es.anchor=0.25", "es.population=4")
    noise, anchor = es.noise_of(e, 0), es.factors(loaded.model)
    sigmas = es.sizes(loaded.model, e, "lora_b")
    layers = lora_layers(loaded.model)
    for layer in layers.values():
        layer.lora_b = layer.lora_b + 0.5
    optimizer = optimizer_of(e)
    optimizer.learning_rate = 2.0
    weights_G = np.array([1.5, -0.5, 0.0, -1.0])
    es.update(loaded.model, optimizer, noise, sigmas, weights_G, anchor, 0.25)
    for name, layer in layers.items():
        one, two = np.array(noise.drawn(name, [0, 1], (1, layer.lora_b.shape[1])))
        mean = (1.5 * one + 0.5 * one + 1.0 * two) / 4
        wanted = 0.5 + 2.0 * sigmas[name] * mean - 0.25 * 0.5
        np.testing.assert_allclose(np.array(layer.lora_b), wanted, rtol=1e-5)


def test_a_reward_for_short_text_makes_text_shorter():
    loaded = attached()
    e = of(
        "iters=16", "es.population=16", "es.samples_per_generation=1", "es.perturb_scale=0.8",
        "rollout.max_tokens=16",
    )  # fmt: skip
    seen = generations(loaded, scored(length), e)
    rewards = [m["fitness_mean"] for m in seen]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.04


def test_every_member_meets_the_same_problems_on_one_machine_or_two(monkeypatch):
    loaded, task = attached(), load_task("countdown")
    e = of("es.population=5", "es.antithetic=false", "es.noise=uniform", "rollout.temperature=1.0")
    samples = task.load("train", 8, 0)
    noise, sigmas = es.noise_of(e, 0), es.sizes(loaded.model, e, "lora_b")

    def tried():
        return es.tried(loaded, task, samples, e, noise, sigmas, Clock())

    groups = tried()
    assert [g.sample for g in groups] == list(samples)
    for group in groups:
        assert len(group.rollouts) == len(group.rewards) == 5
        assert len({r.prompt_ids for r in group.rollouts}) == 1
    parts = []
    for rank in (0, 1):  # what each of two machines would say
        monkeypatch.setattr(distributed, "size", lambda: 2)
        monkeypatch.setattr(distributed, "mine", lambda all_, rank=rank: all_[rank::2])
        monkeypatch.setattr(distributed, "everything", lambda said: parts.append(said()) or [])
        with contextlib.suppress(IndexError):
            tried()
    texts = [[r["text"] for r in member["rollouts"]] for part in parts for member in part]
    order = [0, 2, 4, 1, 3]
    for place, member in enumerate(order):
        assert texts[place] == [g.rollouts[member].text for g in groups]


def test_adam_steps_by_the_size_that_was_asked_for():
    """Its gradient has length 1 for any population, so the rate brings the population in."""
    plain, adam = of("es.population=16"), of("es.population=16", "optimizer=adam")
    assert es.rate(plain, 0) == 2 and es.rate(adam, 0) == 0.5
    assert es.rate(plain, 3) == 0.5
    loaded = attached()
    seen = generations(loaded, scored(length), of("optimizer=adam", "iters=1", "es.population=6"))
    assert seen[0]["distance"] > 0


def test_rewards_that_come_to_the_same_are_no_difference():
    rewards_PG = np.array([[0.01, 0.06], [0.05, 0.0]])
    assert not any(fitnesses.bind(name, {})(rewards_PG).any() for name in fitnesses)


@pytest.mark.parametrize("name", list(fitnesses))
def test_fitness_contract(name):
    fit = fitnesses.bind(name, {})
    rng = np.random.default_rng(0)
    rewards_PG = rng.random((7, 6))
    found_G = fit(rewards_PG)
    order = np.argsort(rewards_PG.mean(axis=0))
    assert (np.diff(found_G[order]) > 0).all(), "the fitter, the more weight"
    np.testing.assert_allclose(found_G.mean(), 0, atol=1e-12)
    np.testing.assert_allclose(fit(3 * rewards_PG + 1), found_G, atol=1e-9)
    np.testing.assert_allclose(fit(rewards_PG[rng.permutation(7)]), found_G, atol=1e-12)
    for value in (0.1, 1 / 3, 0.0):
        assert not fit(np.full((7, 6), value)).any()
    swapped = rewards_PG[:, [0, 0, 0, 0, 0, 0]]
    swapped = np.array([rng.permutation(row) for row in swapped.T]).T  # same rewards, other order
    assert not fit(swapped).any(), "equal means are equal to the bit"


def test_split_halves_agree_where_members_differ_and_not_in_noise():
    rng = np.random.default_rng(0)
    members_G = rng.normal(size=40)
    signal = measured(members_G + 0.1 * rng.normal(size=(20, 40)))
    noise = measured(rng.normal(size=(20, 40)))
    assert signal["fitness_correlation"] > 0.95 > 0.5 > abs(noise["fitness_correlation"])
    assert "fitness_correlation" not in measured(np.ones((4, 3)))
    assert "fitness_correlation" not in measured(rng.normal(size=(1, 3)))


class Cut(Exception):
    """Stands for a power failure."""


RESTLESS = (  # so that every generation has something to learn, and state to lose
    "optimizer=adam", "es.factor=alternate", "es.turn=1", "es.step_scale=0.2",
    "rollout.temperature=1.0", "es.perturb_scale=0.5", "eval.n=2",
)  # fmt: skip


MOMENTUM = ("optimizer=sgd", "optimizer_config={sgd: {momentum: 0.9}}")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), MOMENTUM], ids=["adam", "momentum"])
def test_a_killed_run_resumed_equals_an_uninterrupted_one_bitwise(tmp_path, monkeypatch, more):
    whole = run(tmp_path / "whole", *RESTLESS, *more)
    real = es.train

    def cut_short(*args, **options):
        for step in real(*args, **options):
            yield step
            if step == 2:  # after the checkpoint of two generations and one more
                raise Cut

    monkeypatch.setattr(es, "train", cut_short)
    with pytest.raises(Cut):
        run(tmp_path / "cut", *RESTLESS, *more)
    assert len(read(tmp_path / "cut")) == 3
    monkeypatch.setattr(es, "train", real)
    resumed = run(tmp_path / "cut", *RESTLESS, *more, resume=True)
    metrics = read(tmp_path / "whole")
    assert read(tmp_path / "cut") == metrics
    assert sum("update_norm" in m for m in metrics) >= 3, "it should have learnt"
    assert resumed["accuracy_after"] == whole["accuracy_after"]
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    start = tensors(tmp_path / "whole", "adapters/initial")
    assert not same(start, tensors(tmp_path / "whole"))


def test_the_start_is_the_base_and_a_bad_start_is_not_taken_for_it(tmp_path):
    summary = run(tmp_path / "run", "iters=1", "es.init_scale=4.0", "eval.every=1")
    assert summary["check"]["bitwise_identical"]
    (first,) = read(tmp_path / "run")
    assert {"kl", "perplexity", "fitness_min", "fitness_max"} <= first.keys()
    assert (tmp_path / "run" / "adapters" / "best").is_dir() and (
        tmp_path / "run" / "training.png"
    ).stat().st_size > 10_000
    (row,) = map(json.loads, (tmp_path / "run" / "evals.jsonl").read_text().splitlines())
    assert row["n"] == 100, "es.test_samples, not eval.n"
    loaded = attached()
    for layer in lora_layers(loaded.model).values():
        layer.lora_b = layer.lora_b + 1
    with pytest.raises(AssertionError, match="lora_b is not zero"):
        generations(loaded, scored(length), of("iters=1"))


def test_patience_stops_at_the_best(tmp_path):
    summary = run(tmp_path / "run", "eval.every=1", "eval.patience=1", "es.sigma=1e-9",
                  "es.perturb_scale=null", "es.test_samples=8")  # fmt: skip
    assert summary["best"]["step"] == 0 and len(read(tmp_path / "run")) == 2


def test_a_plan_counts_what_a_run_will_ask(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plan(of("iters=7000", "eval.every=3000", "es.test_samples=10"), console(quiet=True))
    assert found["rollouts_per_step"] == 6 * 8 and found["rollouts"] == 7000 * 6 * 8
    assert found["rollouts_of_evaluations"] == 2 * (2 * 8 + 3 * 10)
    assert found["tokens"] == 7000 * found["tokens_per_step"] > 0
    assert found["seconds_rollout"] > 0.05 and found["memory_learning_mb"] == 0
    assert found["minutes"] >= 0.9 * found["seconds_rollout"] * 7000 / 60
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # of GRPO's loop the same is proven in every run: tests/test_distributed.py
@pytest.mark.parametrize("path", ["auto", "plain"])
def test_two_processes_learn_what_one_does(tmp_path, run_cli, monkeypatch, path):
    """Six members, two processes: no gradient is exchanged, and the adapter is the same bits."""
    monkeypatch.setenv("MLX_LORA_CPU", path)
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    few = ("iters=2", "es.population=6", "es.samples_per_generation=2", "eval.n=2",
           "rollout.max_tokens=6", "rollout.temperature=1.0", "check.samples=1")  # fmt: skip
    options = [word for value in few for word in ("-o", value)]
    done = run_cli("train", file, "--run-dir", tmp_path / "one", "--json", *options)
    assert done.returncode == 0, done.stderr
    arguments = ("-m", "mlx_lora", "train", file, "--run-dir", tmp_path / "two", "--json", *options)
    first, second = together(tmp_path, *arguments)
    assert second == "" and json.loads(first)["accuracy_after"] is not None
    for a, b in zip(read(tmp_path / "one"), read(tmp_path / "two"), strict=True):
        assert a == (b if path == "plain" else pytest.approx(b, abs=1e-5, rel=1e-4))
    assert same(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    assert not same(tensors(tmp_path / "one", "adapters/initial"), tensors(tmp_path / "one"))


REFUSED = {
    "es.population=7": "population: should be even",
    "es.population=1": "population.*greater than or equal to 2|at least 2",
    "es.fitness=z_scor": "z_score",
    "optimizer=muon": "sgd.*adam, not muon",
    "optimizer_config={sgd: {weight_decay: 0.1}}": "es.anchor",
    "learning_rate=0.1": "does not act on learning_rate",
    "fine_tune_type=dora": "plain LoRA, not dora",
    "eval.patience=2": "eval.every",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_does_not_go_is_refused_before_anything_is_loaded(override, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(ConfigError, match=f"(?s){REFUSED[override]}"):
        run(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def rows(path, count):
    lines = [json.dumps({"prompt": f"What is {i} + 1?", "answer": i + 1}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")


def test_too_few_problems_are_named_all_at_once(tmp_path):
    rows(tmp_path / "train.jsonl", 5)
    rows(tmp_path / "test.jsonl", 3)
    task = f"{{name: jsonl, path: {tmp_path}/train.jsonl, test_path: {tmp_path}/test.jsonl}}"
    with pytest.raises(ConfigError, match=r"(?s)is 8; task jsonl has 5 train.*is 100.*3 test"):
        run(tmp_path / "run", f"task={task}", "eval.every=1", "init=zero")
    assert not (tmp_path / "run").exists()


def test_layers_without_a_population_form_are_named(tmp_path):
    with pytest.raises(AdapterError, match=r"(?s)embed_tokens \(embedding\)"):
        run(tmp_path / "run", "lora_parameters.keys=[q_proj, embed_tokens]", "init=zero")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_reward_that_is_not_finite_ends_the_run():
    task = scored(lambda text: float("nan"))
    with pytest.raises(RewardError, match=r"nan|finite"):
        generations(attached(), replace(task, low=0.0, high=1.0), of("iters=1"))


def test_what_was_trained_before_can_be_planned(tmp_path):
    """From disk, or after a stage that moves the model: generation 0 is not the base then."""
    run(tmp_path / "run", "iters=2", "rollout.temperature=1.0", "es.perturb_scale=0.6")
    started = f"resume_adapter_file={tmp_path / 'run' / 'adapters'}"
    found = plan(of(started, "init=zero"), console(quiet=True))
    assert found["tried"] and found["rollouts_per_step"] == 48
