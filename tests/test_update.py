"""The update: parts add up, old log-probabilities are real, what is masked does not train."""

import math
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_lora import config, models
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.optimizers import Diverged, Patience
from mlx_lora.rl import grpo, learner, logprobs, update
from mlx_lora.rl.importance import sequence, token, ways
from mlx_lora.rl.learner import Fixed, Rule, gradients
from mlx_lora.rl.losses import k3, losses
from mlx_lora.runlog import Clock
from mlx_lora.types import Group, Reward, Rollout, Sample, Task
from tests.tiny import tiny

LENGTHS = (3, 1, 5, 2, 4, 6)
ADVANTAGES = np.array([0.7, -0.3, 0.2, -1.0, 0.4, 0.9])


def rollouts() -> list[Rollout]:
    """Six rows of two prompts, of unequal length, with what a sampler might have logged."""
    draw = np.random.default_rng(0)
    prompts = ((1, 2, 3), (7, 8), (1, 2, 3), (7, 8), (1, 2, 3), (7, 8))
    return [
        Rollout(p, tuple(draw.integers(3, 90, n).tolist()), (-4.5,) * n, "", n < 6)
        for p, n in zip(prompts, LENGTHS, strict=True)
    ]


def setting(bits=None):
    """A tiny model that has moved, and its packed rows."""
    model = tiny(bits=bits)
    attach(model, init="gaussian", init_options={"std": 0.1})
    return model, logprobs.pack(rollouts(), ADVANTAGES)


def rule(name="dapo", **options) -> Rule:
    return Rule(losses.bind(name, {}), max_tokens=8, **options)


def near(a, b, atol=1e-6):
    for (name, x), (_, y) in zip(tree_flatten(a), tree_flatten(b), strict=True):
        assert mx.allclose(x, y, rtol=1e-4, atol=atol), name


def fixed_of(model, packed) -> Fixed:
    """Old log-probabilities off by a little, and the reference's."""
    old_BT = learner.policy_logps(model, packed, 1.0) + 0.1 * mx.sin(mx.arange(36.0)).reshape(6, 6)
    return Fixed(old_BT, logprobs.reference_logps(model, packed, 1.0))


@pytest.mark.parametrize("parts", [2, 4, 6])
@pytest.mark.parametrize("name", list(losses))
def test_micro_batches_give_the_gradient_and_metrics_of_the_whole(name, parts):
    model, packed = setting()
    fixed = fixed_of(model, packed)
    whole, grads = gradients(model, packed, rule(name, beta=0.1), fixed)
    split, split_grads = gradients(model, packed, rule(name, beta=0.1, parts=parts), fixed)
    near(split_grads, grads)
    assert split.keys() == whole.keys()
    for key, value in whole.items():
        assert split[key].item() == pytest.approx(value.item(), abs=1e-5), key
    assert max(mx.abs(g).max().item() for _, g in tree_flatten(grads)) > 1e-3


def test_machines_add_up_when_they_know_the_whole():
    """Each has some of the rows; sums of their gradients are those of one machine with all."""
    model, packed = setting()
    _, grads = gradients(model, packed, rule("grpo"))
    whole = learner.whole_of(packed, rule())
    several = [
        gradients(model, logprobs.rows_of(packed, rows), rule("grpo"), whole=whole)[1]
        for rows in ([0, 2, 4], [1, 3, 5])
    ]
    near(tree_map(mx.add, *several), grads)


def test_rows_scored_in_parts_are_where_they_belong():
    model, packed = setting()
    whole = learner.scored(model, packed, rule(), learner.policy_logps)
    parts = learner.scored(model, packed, rule(parts=4), learner.policy_logps)
    assert mx.allclose(parts, whole * packed.mask_BT + parts * (1 - packed.mask_BT), atol=1e-5)


EXPERIMENT = """
model: demo
method: grpo
task: countdown
iters: 8
batch_size: 4
learning_rate: 1e-3
grpo: {group_size: 4}
rollout: {max_tokens: 8}
monitor: {every: 1}
"""


def experiment(*options):
    return config.from_text(EXPERIMENT, overrides=options)


def updated(e, *, model=None, packed=None, optimizer=None):
    """One step's update of the tiny model, and the model."""
    made, rows = setting()
    model, packed = model or made, packed or rows
    optimizer = optimizer or optim.SGD(learning_rate=0.1)
    metrics, norms = update.update(model, packed, update.rule_of(e), optimizer, e, step=3)
    return model, metrics, norms


def weights(model):
    return {k: np.array(v) for k, v in tree_flatten(model.trainable_parameters())}


@pytest.mark.parametrize("name", list(losses))
def test_grad_accumulation_makes_the_same_step(name):
    one, metrics, _ = updated(experiment(f"grpo.loss={name}"))
    several, split, _ = updated(experiment(f"grpo.loss={name}", "grad_accumulation_steps=3"))
    a, b = weights(one), weights(several)
    assert all(np.allclose(a[k], b[k], atol=1e-6) for k in a)
    assert split.keys() == metrics.keys()
    assert split["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)


def test_one_pass_needs_no_forward_of_its_own(monkeypatch):
    def forbidden(*_):
        raise AssertionError("a forward pass that the default does not need")

    monkeypatch.setattr(update, "policy_logps", forbidden)
    monkeypatch.setattr(update, "reference_logps", forbidden)
    _, metrics, _ = updated(experiment("monitor.every=10"))
    assert "ratio_mean" not in metrics and "kl" not in metrics
    with pytest.raises(AssertionError):
        updated(experiment("monitor.every=10", "grpo.epochs=2"))


def test_the_second_pass_sees_how_far_the_first_has_gone():
    """Ratios are against the policy of the rollouts: 1 in the first pass, not in the second."""
    _, once, _ = updated(experiment("grpo.epochs=1", "grpo.minibatches=2"))
    _, metrics, _ = updated(experiment("grpo.epochs=3"))
    assert metrics["ratio_max"] > 1.01 and metrics["ratio_min"] < 0.99
    assert once["ratio_max"] > 1.0


def test_old_logps_are_those_of_the_policy_that_began_the_step(monkeypatch):
    seen = []
    real = learner.part_of_gradients

    def looking(model, packed, rule, fixed, whole):
        now = learner.policy_logps(model, packed, 1.0)
        gap = mx.abs((now - fixed.old_BT) * packed.mask_BT).max().item()
        seen.append(gap)
        return real(model, packed, rule, fixed, whole)

    monkeypatch.setattr(learner, "part_of_gradients", looking)
    updated(experiment("grpo.epochs=3"), optimizer=optim.SGD(learning_rate=1e-3))
    assert seen[0] == pytest.approx(0, abs=1e-5)
    assert 1e-3 < seen[1] < seen[2], "each pass is further from where the step began"


def test_clipping_stops_what_has_gone_far_enough():
    """Many passes with a large rate: with a tight clip the policy stays near, without it runs."""
    near_by, far = (
        updated(
            experiment("grpo.epochs=12", f"grpo.loss={name}"),
            optimizer=optim.SGD(learning_rate=0.5),
        )[1]
        for name in ("dapo", "reinforce")
    )
    assert near_by["clip_ratio"] > 0.1 and far["clip_ratio"] == 0
    assert math.log(far["ratio_max"]) > 1.5 * math.log(near_by["ratio_max"])


def test_each_row_trains_once_an_epoch_in_an_order_of_seed_step_and_epoch():
    e = experiment("grpo.epochs=2", "grpo.minibatches=4")
    made = list(update.minibatches(16, e, step=3))
    assert [len(rows) for rows in made] == [4] * 8
    for epoch in (made[:4], made[4:]):
        assert sorted(r for rows in epoch for r in rows) == list(range(16))
    assert made[:4] != made[4:]
    assert made == list(update.minibatches(16, e, step=3))
    assert made != list(update.minibatches(16, e, step=4))
    other = e.model_copy(update={"seed": 1})
    assert made != list(update.minibatches(16, other, step=3))
    assert [len(rows) for rows in update.minibatches(3, e, step=0)] == [1, 1, 1] * 2


def test_the_kl_off_policy_is_weighted_by_the_ratio():
    """Its tokens are the old policy's: k3 · policy / old is unbiased, k3 alone is not."""
    model, packed = setting()
    fixed = fixed_of(model, packed)
    now, mask = learner.policy_logps(model, packed, 1.0), packed.mask_BT
    kl_BT = k3(now, fixed.ref_BT) * mx.exp(now - fixed.old_BT) * mask
    measured, _ = gradients(model, packed, rule("grpo", beta=0.3), fixed)
    assert measured["kl"].item() == pytest.approx((kl_BT.sum() / 21).item(), rel=1e-4)
    without = gradients(model, packed, rule("grpo"), fixed)[0]["loss"].item()
    shares_BT = mask / (mask.sum(axis=1, keepdims=True) * 6)
    expected = without + 0.3 * (kl_BT * shares_BT).sum().item()
    assert measured["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_minibatches_take_steps_of_their_own():
    calls = []

    class Counting(optim.SGD):
        def apply_gradients(self, gradients, parameters):
            calls.append(1)
            return super().apply_gradients(gradients, parameters)

    e = experiment("grpo.epochs=2", "grpo.minibatches=3")
    updated(e, optimizer=Counting(learning_rate=0.1))
    assert len(calls) == 6


def test_importance_sampling_by_hand_in_the_gradient():
    """The sampler logged other numbers: the gradient is that of advantages times the weights."""
    model, packed = setting()
    exact = learner.policy_logps(model, packed, 1.0)
    gap = mx.log(mx.array([3.0, 1.0, 1.0, 0.5, 1.0, 1.0]))[:, None] * mx.array([1.0] + [0.0] * 5)
    packed = replace(packed, sampler_logps_BT=exact - gap)
    for way, weights_B in ((sequence, [0, 1, 1, 0.5, 1, 1]), (ways["none"], [1] * 6)):
        metrics, grads = gradients(model, packed, rule(weigh=way))
        scaled = replace(packed, advantages_B=packed.advantages_B * mx.array(weights_B))
        near(grads, gradients(model, scaled, rule(weigh=ways["none"]))[1])
    metrics, _ = gradients(model, packed, rule(weigh=token))
    # 21 tokens: one has 2 (3 cut), one 0.5, the others 1
    assert metrics["is_weight_mean"].item() == pytest.approx(21.5 / 21, abs=1e-5)
    assert metrics["is_weight_min"].item() == pytest.approx(0.5, abs=1e-5)
    assert metrics["is_weight_max"].item() == pytest.approx(2.0, abs=1e-5)
    assert metrics["mismatch_max"].item() == pytest.approx(np.log(3), abs=1e-5)
    expected = (3 - 1 - np.log(3) + 0.5 - 1 - np.log(0.5)) / 21
    assert metrics["mismatch_kl"].item() == pytest.approx(expected, abs=1e-5)
    effective = update.plain(metrics)["is_effective"]
    assert effective == pytest.approx(21.5**2 / (21 * (4 + 0.25 + 19)), abs=1e-4)


@pytest.mark.parametrize("part", ["loss", "grads"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_reaches_the_weights(monkeypatch, part, wrong):
    real = learner.gradients

    def broken(*args):
        metrics, grads = real(*args)
        if part == "loss":
            return metrics | {"loss": mx.array(wrong)}, grads
        return metrics, tree_map(lambda g: g * wrong, grads)

    model, packed = setting()
    before = weights(model)
    monkeypatch.setattr(update, "gradients", broken)
    _, metrics, _ = updated(experiment(), model=model, packed=packed)
    assert metrics["update_taken"] == 0.0
    after = weights(model)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_patience_goes_on_where_a_resumed_run_stopped():
    e = experiment()
    bad, good = {"update_taken": 0.0}, {"update_taken": 1.0}
    with pytest.raises(Diverged, match="3 updates in a row"):
        Patience(e, [good, bad, {}, bad]).saw(4, bad)
    Patience(e, [bad, bad, good]).saw(3, bad)
    Patience(e, [bad]).saw(1, bad)


def groups_of(values, lengths=None, finished=None) -> list[Group]:
    values = np.array(values)
    lengths = np.full(values.shape, 4) if lengths is None else np.array(lengths)
    finished = np.ones(values.shape, bool) if finished is None else np.array(finished)
    return [
        Group(
            Sample("p", {}, ""),
            [
                Rollout((p,), tuple(range(3, 3 + n)), (-1.0,) * int(n), "", bool(f))
                for n, f in zip(lengths[p], finished[p], strict=True)
            ],
            [Reward(float(v), "") for v in values[p]],
        )
        for p in range(len(values))
    ]


def lessons(e, *args, **options):
    groups = groups_of(*args, **options)
    packed, metrics = update.lessons(groups, grpo.rewards(groups), e)
    return packed, metrics


def test_groups_without_a_spread_are_left_out():
    packed, metrics = lessons(experiment(), [[1, 1], [1, 0], [0, 0]])
    assert packed.advantages_B.tolist() == [0.5, -0.5]
    assert metrics == {
        "advantage_min": -0.5,
        "advantage_max": 0.5,
        "advantage_std": pytest.approx(math.sqrt(0.5 / 6)),
    }
    assert lessons(experiment(), [[1, 1], [0, 0]])[0] is None


def test_against_the_batch_a_group_without_a_spread_still_teaches():
    """REINFORCE++ compares with all rewards: all right is better than usual, all wrong worse.

    Leaving such groups out would leave the others with advantages that do not cancel.
    """
    e = experiment("grpo.advantage=batch_normalised")
    packed, _ = lessons(e, [[1, 1], [1, 0], [0, 0]])
    assert len(packed.prompt_of_B) == 6 and abs(packed.advantages_B.sum().item()) < 1e-6
    assert lessons(e, [[1, 1], [1, 1]])[0] is None, "no spread anywhere: nothing to learn"


def test_truncated_rows_do_not_train_when_masked():
    given = ([[1, 0], [0, 1]],)
    options = {"finished": [[True, True], [False, True]]}
    assert len(lessons(experiment(), *given, **options)[0].prompt_of_B) == 4
    e = experiment("grpo.mask_truncated=true")
    packed, _ = lessons(e, *given, **options)
    assert packed.advantages_B.tolist() == [0.5, -0.5, 0.5]
    cut = {"finished": [[False, False], [False, False]]}
    assert lessons(e, *given, **cut)[0] is None
    only_cut = {
        "finished": [[False, False, True, True]]
    }  # 0, 0 is left: Adam's momentum would move
    assert lessons(e, [[1, -1, 0, 0]], **only_cut)[0] is None


def test_the_overlong_penalty_changes_advantages_and_not_rewards():
    """Limit 8, buffer 4: 8 tokens cost 1, 6 cost 0.5, 4 nothing."""
    e = experiment("grpo.overlong_buffer=4")
    packed, metrics = lessons(e, [[1, 1, 0, 0]], lengths=[[4, 8, 6, 4]])
    # rewards 1, 0, -0.5, 0 of mean 0.125
    assert packed.advantages_B.tolist() == [0.875, -0.125, -0.625, -0.125]
    assert metrics["overlong_penalty"] == pytest.approx(-1.5 / 4)


def task_of(reward) -> Task:
    samples = [Sample(f"Tell me about {n}.", {"n": n}, "x") for n in range(64)]
    return Task(
        load=lambda split, count, seed: samples[:count],
        reward=reward,
        first=samples[0],
        wrong="",
    )


def train(e, task, *, start=0, history=()):
    loaded = models.load("demo")
    attach(loaded.model)
    seen: list[tuple[dict, list]] = []
    optimizer = optim.Adam(learning_rate=e.learning_rate)
    steps = grpo.train(
        loaded, task, e, optimizer, Clock(), lambda s, m, g: seen.append((m, list(g))),
        start=start, history=history,
    )  # fmt: skip
    return steps, seen, loaded.model


def test_fresh_problems_are_drawn_until_enough_groups_have_a_spread():
    """Half of the problems can be told apart by their text's length, the others cannot."""
    task = task_of(lambda s, text: Reward(float(len(text) % 2) if s.columns["n"] % 2 else 0.0, ""))
    e = experiment("grpo.dynamic_sampling=2", "iters=2", "rollout.max_tokens=4")
    steps, seen, _ = train(e, task)
    list(steps)
    for metrics, sampled in seen:
        assert metrics["groups_resampled"] == len(sampled) - 4 and len(sampled) % 4 == 0
        rows = {id(r) for g in sampled for r in g.rollouts}
        assert len(rows) == 4 * len(sampled)
    assert any(m["groups_resampled"] > 0 for m, _ in seen)
    drawn = [tuple(g.sample.columns["n"] for g in sampled[:8]) for _, sampled in seen]
    assert all(len(set(problems)) == len(problems) for problems in drawn), "fresh ones"
    again, same, _ = train(e, task)
    list(again)
    assert [g.rollouts for _, gs in seen for g in gs] == [g.rollouts for _, gs in same for g in gs]


def test_only_groups_with_a_spread_are_chosen_and_never_too_many():
    calls = []
    task = task_of(lambda s, text: Reward(0.0, ""))
    e = experiment("grpo.dynamic_sampling=2")
    loaded = models.load("demo")
    attach(loaded.model)
    samples = grpo.problems(task, 64, 0)
    real = grpo.rollout

    def scripted(*args, **options):
        calls.append(list(options["numbers"]))
        groups = real(*args, **options)
        spread = [3, 2][len(calls) - 1]
        return [
            replace(g, rewards=[Reward(float(i == 0 and p < spread), "") for i in range(4)])
            for p, g in enumerate(groups)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "rollout", scripted)
        sampled, chosen = grpo.sample(loaded, task, samples, e, 1, Clock())
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7]], "numbers go on; the third round is not needed"
    assert len(sampled) == 8 and [sampled.index(g) for g in chosen] == [0, 1, 2, 4]


def test_a_batch_without_any_spread_trains_nothing():
    e = experiment("grpo.dynamic_sampling=1", "iters=1")
    steps, seen, model = train(e, task_of(lambda s, text: Reward(1.0, "")))
    before = weights(model)
    list(steps)
    ((metrics, sampled),) = seen
    assert len(sampled) == 8 and "loss" not in metrics and "grad_norm" not in metrics
    after = weights(model)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_norms_are_those_of_each_module():
    model, _, norms = updated(experiment())
    assert norms.keys() == lora_layers(model).keys()
    assert all(n > 0 for n in norms.values())
    assert updated(experiment("monitor.every=10"))[2] == {}
    total = math.sqrt(sum(n * n for n in norms.values()))
    assert total == pytest.approx(updated(experiment())[1]["grad_norm"], rel=1e-5)


BAD = {
    "rollout.top_k": ["rollout.top_k=1"],
    "grpo.minibatches": ("batch_size=2", "grpo.group_size=4", "grpo.minibatches=9"),
    "grad_accumulation_steps": ("batch_size=2", "grad_accumulation_steps=17"),
    "grpo.overlong_buffer": ("grpo.overlong_buffer=9",),
    "grpo.group_size": ("grpo.group_size=1", "grpo.advantage=leave_one_out"),
    "rollout.temperature": ("rollout.temperature=0",),
    "grpo.is_cap": ("grpo.is_cap=0.5",),
    "grpo.importance_sampling": ("grpo.importance_sampling=tokens",),
}


@pytest.mark.parametrize("key", BAD)
def test_what_cannot_work_is_refused_by_its_key(key):
    with pytest.raises(config.ConfigError, match=key.replace(".", r"\.")):
        experiment(*BAD[key])


def test_an_option_that_the_loss_does_not_have_is_refused():
    config.check_names(experiment("grpo.loss=cispo", "grpo.clip_high=4"))
    with pytest.raises(config.ConfigError, match="cispo has no option clip_low"):
        config.check_names(experiment("grpo.loss=cispo", "grpo.clip_low=0.1"))


def test_clips_are_the_losses_own_unless_given():
    assert update.rule_of(experiment()).loss.keywords == {}
    assert update.rule_of(experiment("grpo.clip_high=0.3")).loss.keywords == {"clip_high": 0.3}


def test_a_run_cut_anywhere_goes_on_to_the_same_bits():
    task = task_of(lambda s, text: Reward(float(len(text) % 2) if s.columns["n"] % 2 else 0.0, ""))
    e = experiment(
        "iters=3", "grpo.dynamic_sampling=1", "grpo.epochs=2", "grpo.minibatches=2",
        "rollout.max_tokens=4",
    )  # fmt: skip
    whole, seen, model = train(e, task)
    list(whole)
    loaded = models.load("demo")
    attach(loaded.model)
    optimizer = optim.Adam(learning_rate=e.learning_rate)
    cut: list[dict] = []
    for start, steps in ((0, 1), (1, 2)):
        loop = grpo.train(
            loaded, task, e, optimizer, Clock(), lambda s, m, g: cut.append(m),
            start=start, history=cut[:start],
        )  # fmt: skip
        for _ in range(steps):
            next(loop)
    assert cut == [m for m, _ in seen]
    assert all("ratio_max" in m for m in cut), "steps without an update would prove nothing"
    a, b = weights(model), weights(loaded.model)
    assert all(np.array_equal(a[k], b[k]) for k in a)
