"""The RL step: right gradient, skipped where there is no signal, dropped where it is not finite."""

import itertools
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora import config, decode, models
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.generate import generate
from mlx_lora.rl import grpo, learner, logprobs, monitor, update
from mlx_lora.rl.evaluate import evaluate, examination, wilson
from mlx_lora.rl.learner import Fixed, Rule
from mlx_lora.rl.losses import losses
from mlx_lora.runlog import Clock
from mlx_lora.tasks import load_task
from mlx_lora.types import Reward, Rollout, Sample, Task
from tests.tiny import tiny

EXPERIMENT = """
model: demo
method: grpo
task: countdown
iters: {iters}
batch_size: 4
learning_rate: {rate}
grpo: {{group_size: 4}}
rollout: {{max_tokens: 12}}
"""


DAPO = Rule(losses.bind("dapo", {}))


def experiment(iters=2, rate=1e-3):
    return config.from_text(EXPERIMENT.format(iters=iters, rate=rate))


def task_of(reward) -> Task:
    sample = Sample("Tell me a story.", {}, "x")
    return Task(
        load=lambda split, count, seed: [sample] * count,
        reward=lambda sample, text: Reward(reward(text), "scored"),
        first=sample,
        wrong="",
    )


def attached():
    loaded = models.load("demo")
    attach(loaded.model)
    return loaded


def weights(model):
    return {k: np.array(v) for k, v in tree_flatten(model.trainable_parameters())}


def run(loaded, task, e):
    seen = []
    optimizer = optim.Adam(learning_rate=e.learning_rate)
    steps = grpo.train(loaded, task, e, optimizer, Clock(), lambda s, m, g: seen.append(m))
    assert list(steps) == list(range(e.iters))
    return seen


def test_equal_rewards_train_nothing_and_are_counted():
    loaded = attached()
    before = weights(loaded.model)
    seen = run(loaded, task_of(lambda text: 1.0), experiment())
    assert [m["groups_without_signal"] for m in seen] == [1.0, 1.0]
    assert "loss" not in seen[0]
    after = weights(loaded.model)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_a_reward_for_short_text_makes_text_shorter():
    loaded = attached()
    e = experiment(iters=12, rate=3e-3)
    seen = run(loaded, task_of(lambda text: max(0.0, 1 - len(text) / 100)), e)
    rewards = [m["reward"] for m in seen]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


def test_two_runs_are_bitwise_the_same():
    one, two = attached(), attached()
    task = load_task("countdown")
    assert run(one, task, experiment()) == run(two, task, experiment())
    a, b = weights(one.model), weights(two.model)
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_a_non_finite_gradient_is_dropped_and_three_in_a_row_stop(monkeypatch):
    loaded = attached()
    before = weights(loaded.model)
    real, steps = learner.gradients, itertools.count()

    def broken(*args, **options):
        metrics, grads = real(*args, **options)
        next(steps)
        return metrics, nn.utils.tree_map(lambda g: g * mx.array(float("nan")), grads)

    monkeypatch.setattr(update, "gradients", broken)
    with pytest.raises(grpo.Diverged, match="3 updates in a row"):
        run(loaded, task_of(lambda text: float(len(text) % 2)), experiment(iters=9))
    assert next(steps) == 3
    after = weights(loaded.model)
    assert all(np.array_equal(before[k], after[k]) for k in before), "NaN never reaches the weights"


def test_a_policy_that_is_not_finite_ends_the_run_though_all_rewards_are_equal():
    loaded = attached()
    for layer in lora_layers(loaded.model).values():
        layer.lora_b = mx.full(layer.lora_b.shape, float("nan"))
    with pytest.raises(grpo.Diverged, match="policy that is not finite, the last at step 2"):
        run(loaded, task_of(lambda text: 0.0), experiment(iters=9))


def rows():
    return [
        Rollout((1, 2, 3), (4, 5, 6), (-1.0, -2.0, -3.0), "", True),
        Rollout((7, 8), (9,), (-0.5,), "", True),
    ]


def against_reference(model, packed) -> Fixed:
    return Fixed(ref_BT=logprobs.reference_logps(model, packed, 1.0))


def test_packed_logps_equal_row_by_row_and_padding_has_no_gradient():
    model = tiny(bits=4)
    attach(model, init="gaussian")
    packed = logprobs.pack(rows(), np.array([1.0, -1.0]))
    logps_BT, entropy_BT = logprobs.completion_logps(model, packed, 1.0)
    for row, r in enumerate(rows()):
        logits = model(mx.array([[*r.prompt_ids, *r.ids]]))[0, len(r.prompt_ids) - 1 : -1]
        logps = nn.log_softmax(logits)
        picked = np.array(mx.take_along_axis(logps, mx.array(r.ids)[:, None], axis=-1))[:, 0]
        assert np.allclose(np.array(logps_BT[row, : len(r.ids)]), picked, atol=1e-5)
        entropy = -(mx.exp(logps) * logps).sum(axis=-1)
        assert np.allclose(np.array(entropy_BT[row, : len(r.ids)]), np.array(entropy), atol=1e-5)
    assert packed.mask_BT.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert packed.tokens == 4


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
def test_shared_prompts_equal_full_rows_forward_and_backward(architecture):
    model = tiny(architecture, bits=4)
    attach(model, init="gaussian", init_options={"std": 0.1})
    siblings = [*rows(), Rollout((1, 2, 3), (9, 4, 4, 2), (-1.0,) * 4, "", True)]
    packed = logprobs.pack(siblings, np.zeros(3))
    assert len(packed.prompts) == 2
    weight_BTD = mx.random.normal((3, 4, 128), key=mx.random.key(0)) * packed.mask_BT[..., None]

    def value(hidden):
        return nn.value_and_grad(model, lambda m: (hidden(m, packed) * weight_BTD).sum())(model)

    (a, a_grads), (b, b_grads) = (
        value(f) for f in (logprobs.completion_hidden, logprobs.completion_hidden_in_full)
    )
    assert a.item() == pytest.approx(b.item(), abs=1e-3)
    for (name, x), (_, y) in zip(tree_flatten(a_grads), tree_flatten(b_grads), strict=True):
        assert mx.allclose(x, y, rtol=1e-3, atol=1e-4), name
        assert mx.abs(y).max().item() > 0, name


@pytest.mark.parametrize(
    ("architecture", "splits"),
    [("llama", True), ("qwen3", True), ("gemma", True), ("gemma2", True)],
)  # gemma2 caps its logits after the head
def test_the_head_is_split_off_only_where_that_is_the_model(architecture, splits):
    model = tiny(architecture)
    split = models.split_head(model)
    assert (split.body is not model) == splits
    ids = mx.array([[5, 6, 7]])
    assert mx.allclose(split.head(split.body(ids)), model(ids), atol=1e-5)


def test_on_policy_gradient_is_reinforce():
    """One update per rollout: the clipped surrogate's gradient is advantage times grad log p."""
    model = tiny(bits=4)
    attach(model, init="gaussian")
    advantages = np.array([0.7, -0.3])
    packed = logprobs.pack(rows(), advantages)
    exact = mx.stop_gradient(logprobs.completion_logps(model, packed, 1.0)[0])
    packed = logprobs.Packed(**{**packed.__dict__, "sampler_logps_BT": exact})
    _, grads = learner.gradients(model, packed, DAPO)

    def reinforce(model):
        logps_BT, _ = logprobs.completion_logps(model, packed, 1.0)
        return -(logps_BT * packed.advantages_B[:, None] * packed.mask_BT).sum() / 4

    expected = nn.value_and_grad(model, reinforce)(model)[1]
    for (name, a), (_, b) in zip(tree_flatten(grads), tree_flatten(expected), strict=True):
        assert mx.allclose(a, b, atol=1e-6), name


def test_kl_is_zero_at_the_start_and_pulls_back_later():
    model = tiny(bits=4)
    attach(model)
    packed = logprobs.pack(rows(), np.array([1.0, -1.0]))
    metrics, _ = learner.gradients(model, packed, DAPO, against_reference(model, packed))
    assert metrics["kl"].item() == 0.0
    moved = tiny(bits=4)
    attach(moved)
    for layer in lora_layers(moved).values():
        layer.lora_b = layer.lora_b + 0.02
    still = logprobs.pack(rows(), np.zeros(2))
    rule = replace(DAPO, beta=0.5)
    metrics, grads = learner.gradients(moved, still, rule, against_reference(moved, still))
    assert metrics["kl"].item() > 0
    assert any(mx.abs(g).max().item() > 0 for _, g in tree_flatten(grads))


def test_nothing_in_the_padding_reaches_the_kl():
    model = tiny(bits=4)
    attach(model)
    packed = logprobs.pack(rows(), np.array([1.0, -1.0]))
    for wild in (1e4, float("inf"), float("nan")):
        ref_BT = mx.where(packed.mask_BT > 0, against_reference(model, packed).ref_BT, wild)
        rule = replace(DAPO, beta=0.1)
        metrics, grads = learner.gradients(model, packed, rule, Fixed(ref_BT=ref_BT))
        assert metrics["kl"].item() == 0.0 and np.isfinite(metrics["loss"].item())
        assert all(mx.isfinite(g).all().item() for _, g in tree_flatten(grads))


def test_a_collapse_after_one_good_step_is_named():
    dead = history(reward=[0.4] + [0.0] * 5)
    assert monitor.watchers["reward_collapsed"](dead) is not None


def test_each_problem_is_drawn_once_per_epoch_and_epochs_differ():
    samples = list(range(10))
    epochs = [[grpo.draw(samples, s, 5, 0) for s in (e, e + 1)] for e in (0, 2)]
    flat = [[*a, *b] for a, b in epochs]
    assert all(sorted(f) == samples for f in flat)
    assert flat[0] != flat[1] and flat[0] != samples


def test_evaluation_is_repeatable_and_its_interval_holds_the_value():
    loaded, task = models.load("demo"), load_task("countdown")
    first = evaluate(loaded, task, n=40, max_tokens=12)
    assert first == evaluate(loaded, task, n=40, max_tokens=12)
    assert first["accuracy_low"] <= first["accuracy"] <= first["accuracy_high"]
    assert sum(first["reasons"].values()) == 40
    low, high = wilson(50, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)


def test_evaluation_decodes_no_more_rows_together_than_rollouts_may(monkeypatch):
    e = config.from_text(
        "{method: grpo, task: countdown, rollout: {width: 3, max_tokens: 4}, eval: {n: 7}}"
    )
    rows, real = [], decode.onward

    def seen(split, live, *rest):
        rows.append(len(live.rows))
        return real(split, live, *rest)

    monkeypatch.setattr(decode, "onward", seen)
    examination(models.load("demo"), load_task("countdown"), e)()
    assert max(rows) == 3


def test_greedy_text_does_not_depend_on_the_seed_and_samples_do():
    loaded = models.load("demo")

    def text(seed, temperature):
        options = {"purpose": "test", "max_tokens": 20, "seed": seed, "temperature": temperature}
        return generate(loaded, ["Tell me a story."], **options)[0][0].text

    assert text(0, 0.0) == text(1, 0.0)
    assert text(0, 1.0) != text(1, 1.0)


def history(**columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


FIRE = {
    "reward_collapsed": (
        history(reward=[0.6] * 5 + [0.29] * 5), history(reward=[0.6] * 5 + [0.31] * 5)
    ),
    "endless_answers": (history(truncated=[0.91] * 3), history(truncated=[0.9] * 3)),
    "empty_answers": (history(empty=[0.51] * 3), history(empty=[0.5] * 3)),
    "no_signal": (
        history(groups_without_signal=[1.0] * 5, reward=[0.0] * 5),
        history(groups_without_signal=[0.95] * 5, reward=[0.0] * 5),
    ),
    "entropy_collapsed": (
        history(entropy=[1.0] + [0.049] * 5), history(entropy=[1.0] + [0.051] * 5)
    ),
    "kl_runaway": (history(kl=[0.1, 2.1]), history(kl=[0.1, 2.0])),
    "sampler_mismatch": (history(mismatch_kl=[0.011]), history(mismatch_kl=[0.01])),
    "gradient_vanished": (history(grad_norm=[1e-8] * 5), history(grad_norm=[1.1e-8] * 5)),
    "gradient_exploded": (
        history(grad_norm=[0.1] * 10 + [10.1]), history(grad_norm=[0.1] * 10 + [9.9])
    ),
    "dead_modules": (
        history(grad_dead_modules=[0, 2, 1]), history(grad_dead_modules=[2, 2, 0])
    ),
    "overfitting": (
        history(valid_loss=[1.0, 1.03, 1.03], loss=[1.0, 0.9, 0.8]),
        history(valid_loss=[1.0, 1.02, 1.03], loss=[1.0, 0.9, 0.8]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(monitor.watchers))
def test_every_watcher_fires_and_stays_quiet_at_its_boundary(name):
    fires, quiet = FIRE[name]
    finding = monitor.watchers[name](fires)
    assert finding is not None and finding.action and any(c.isdigit() for c in finding.message)
    assert monitor.watchers[name](quiet) is None
    assert monitor.watchers[name]([]) is None


def test_a_finding_is_reported_once_a_run():
    seen: set[str] = set()
    fires = FIRE["empty_answers"][0]
    assert [f.name for f in monitor.fresh(fires, seen)] == ["empty_answers"]
    assert monitor.fresh(fires, seen) == []


def test_dead_modules_and_the_largest_share_are_counted():
    model = tiny(bits=4)
    attach(model, keys=["q_proj"])
    packed = logprobs.pack(rows(), np.array([1.0, -1.0]))
    _, grads = learner.gradients(model, packed, DAPO)
    health = learner.gradient_health(learner.module_norms(grads))
    assert health["grad_dead_modules"] == 0 and 0.5 <= health["grad_largest_share"] < 1
    cut = grads["model"]["layers"][0]["self_attn"]["q_proj"]
    cut["lora_a"], cut["lora_b"] = mx.zeros_like(cut["lora_a"]), mx.zeros_like(cut["lora_b"])
    health = learner.gradient_health(learner.module_norms(grads))
    assert health == {"grad_dead_modules": 1, "grad_largest_share": 1}
