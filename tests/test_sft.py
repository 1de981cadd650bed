"""SFT: the loss is mlx-lm's, only what should count counts, and bad steps change nothing."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss

from mlx_lora import cpu, data, models, sft, stages
from mlx_lora.adapter.attach import attach
from mlx_lora.data import Text
from mlx_lora.errors import ConfigError, ModelError
from mlx_lora.lessons import lasting
from mlx_lora.models import Loaded
from mlx_lora.optimizers import Diverged, learning_rate, optimizer_of
from mlx_lora.recompute import recomputed
from mlx_lora.rl import vocabulary
from mlx_lora.rl.checkpoints import Snapshot
from mlx_lora.runlog import Clock
from mlx_lora.schema import Stage
from tests.tiny import ByteTokenizer, tiny, tiny_loaded

TEXTS = [
    Text(tuple(1 + (first * 7 + i * i) % 90 for i in range(length)), start)
    for first, length, start in ((1, 6, 3), (2, 9, 1), (3, 40, 30), (4, 5, 4), (5, 12, 6))
]


def stage(**keys) -> Stage:
    plain = {"method": "sft", "iters": 4, "batch_size": 2, "learning_rate": 1e-2, "val_batches": -1}
    return Stage(**plain | keys)  # type: ignore[arg-type]


def attached(architecture="llama", **options) -> Loaded:
    cpu.settle()
    model = tiny(architecture, bits=4)
    attach(model, init="gaussian", init_options={"std": 0.05}, **options)
    model.eval()
    return Loaded(model, None, {}, "tiny", Path(), False)


def weights(loaded: Loaded) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in tree_flatten(loaded.model.trainable_parameters())}


def run(loaded, e, texts=TEXTS, optimizer=None, look=lambda: None, **options):
    seen = []
    optimizer = optimizer or optimizer_of(e)
    loop = sft.train(loaded, texts, e, optimizer, Clock(), lambda s, m: seen.append(m), **options)
    for step in range(options.get("start", 0), e.iters):
        assert next(loop) == step
        look()
    assert not list(loop)
    return seen


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # gemma2 has no head to split off
def test_the_loss_is_the_one_of_mlx_lm(architecture):
    model = attached(architecture).model
    for rows in (TEXTS[:2], TEXTS):
        ids, *_ = batch = sft.pack(rows)
        # mlx-lm's own batches count the first padding token too: lengths are one less here
        lengths = mx.array([[t.start, len(t.ids) - 1] for t in rows])
        whole = mx.array([[*t.ids, *[0] * (ids.shape[1] + 1 - len(t.ids))] for t in rows])
        theirs, count = default_loss(model, whole, lengths)
        assert sft.mean_loss(model, *batch).item() == pytest.approx(theirs.item(), rel=1e-4)
        assert batch[-1].sum().item() == count.item() == sum(len(t.ids) - t.start for t in rows)


def test_padding_changes_neither_loss_nor_gradient():
    model = attached().model
    loss_and_grads = nn.value_and_grad(model, sft.mean_loss)
    parts = [loss_and_grads(model, *sft.pack([t])) for t in TEXTS]
    counts = [len(t.ids) - t.start for t in TEXTS]
    whole, grads = loss_and_grads(model, *sft.pack(TEXTS))
    mean = sum(n * loss.item() for n, (loss, _) in zip(counts, parts, strict=True)) / sum(counts)
    assert whole.item() == pytest.approx(mean, rel=1e-5)
    pairs = [tree_flatten(g) for _, g in parts]
    for index, (name, grad) in enumerate(tree_flatten(grads)):
        expected = sum(n * p[index][1] for n, p in zip(counts, pairs, strict=True)) / sum(counts)
        assert mx.allclose(grad, expected, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("way", ["by slope", "made again", "made again lazily"])
def test_chunks_of_the_vocabulary_give_the_same_loss_and_gradient(way, monkeypatch):
    model, batch = attached().model, sft.pack(TEXTS)
    learn = nn.value_and_grad(model, sft.mean_loss)
    whole, grads = learn(model, *batch)
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", {"cpu": 7 * 4 * 96, "gpu": 7 * 4 * 96})
    chunks, real = [], sft.in_chunks
    monkeypatch.setattr(sft, "in_chunks", lambda *given: chunks.append(1) or real(*given))
    if way != "by slope":
        monkeypatch.setattr(sft, "learns_outside_blocks", lambda model: True)
    if way == "made again lazily":
        monkeypatch.setattr(sft, "recomputed", lambda *a, at_once: recomputed(*a, at_once=False))
    parts, again = learn(model, *batch)
    assert chunks and parts.item() == pytest.approx(whole.item(), rel=1e-5)
    for (name, a), (_, b) in zip(tree_flatten(grads), tree_flatten(again), strict=True):
        assert mx.allclose(a, b, rtol=1e-3, atol=1e-6), name


def test_accumulated_batches_move_as_the_mean_of_their_gradients():
    """Two batches of one length, or one of both rows."""
    texts = [Text(t.ids[:5], 1) for t in TEXTS[:2]]
    keys = {"optimizer": "sgd", "iters": 2, "sft": {"first_padding": False}}
    two = attached()
    seen = run(two, stage(batch_size=1, grad_accumulation_steps=2, **keys), texts)
    one = attached()
    (whole,) = run(one, stage(batch_size=2, **keys | {"iters": 1}), texts)
    a, b = weights(one), weights(two)
    assert all(np.allclose(a[k], b[k], atol=1e-6) for k in a)
    assert "grad_norm" not in seen[0] and seen[1]["grad_norm"] == pytest.approx(whole["grad_norm"])


def test_gradients_by_module_are_reported_when_due():
    heard = []
    e = stage(iters=4, monitor={"every": 2})
    seen = run(attached(), e, report_norms=lambda step, norms: heard.append((step, norms)))
    assert [step for step, _ in heard] == [1, 3]
    assert [s for s, m in enumerate(seen) if "grad_largest_share" in m] == [1, 3]
    total = np.sqrt(np.square(list(heard[0][1].values())).sum())
    assert total == pytest.approx(seen[1]["grad_norm"], rel=1e-4)


def test_free_memory_is_let_go_as_mlx_lm_does(monkeypatch):
    cleared = []
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1000)
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    for threshold, method, expected in ((0, "sft", 1), (999, "sft", 1), (1000, "sft", 0)):
        stages.let_go(Stage(method=method, clear_cache_threshold=threshold))  # type: ignore[arg-type]
        assert len(cleared) == expected
        cleared.clear()
    for threshold, expected in ((0, 0), (999, 1)):
        stages.let_go(Stage(method="grpo", clear_cache_threshold=threshold))
        assert len(cleared) == expected
        cleared.clear()


def test_rows_are_packed_by_what_counts():
    ids, at, targets, mask = sft.pack([Text((5, 6, 7, 8), 2), Text((1, 2), 1)])
    assert ids.shape == (2, 32) and at.shape == (2, 8)
    assert ids[0, :5].tolist() == [5, 6, 7, 8, 0]
    assert at[0, :2].tolist() == [1, 2] and targets[0, :2].tolist() == [7, 8]
    assert mask.tolist() == [[1, 1, *[0] * 6], [1, *[0] * 7]]


def test_it_learns_and_validates_when_asked():
    loaded = attached()
    e = stage(iters=20, steps_per_eval=15, learning_rate=3e-2)
    seen = run(loaded, e, TEXTS, valid=TEXTS[:3])
    losses = [m["loss"] for m in seen]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    assert [s for s, m in enumerate(seen) if "valid_loss" in m] == [14, 19]
    expected = sft.mean_loss(loaded.model, *sft.pack(TEXTS[:3], limit=2048)).item()
    assert seen[-1]["valid_loss"] == pytest.approx(expected, rel=1e-4)
    assert seen[-1]["valid_loss"] == pytest.approx(sft.mean_over(loaded.model, TEXTS[:3], e, -1)[0])
    assert all(m["scale"] == 2.0 and m["update_taken"] == 1.0 for m in seen)
    assert not loaded.model.training


def test_a_run_is_a_function_of_its_seed_and_can_be_cut_anywhere():
    e = stage(lora_parameters={"dropout": 0.2}, iters=5)
    one, two, other = (attached(dropout=0.2) for _ in range(3))
    seen = run(one, e)
    optimizer = optimizer_of(e)
    first = run(two, e.model_copy(update={"iters": 3}), optimizer=optimizer)
    second = run(two, e, optimizer=optimizer, start=3, history=first)
    assert first + second == seen
    a, b = weights(one), weights(two)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert run(other, e.model_copy(update={"seed": 1})) != seen


def test_dropout_is_on_in_training_only():
    e = stage(iters=1, lora_parameters={"dropout": 0.5})
    without = run(attached(), e)[0]["loss"]
    loaded = attached(dropout=0.5)
    assert (
        sft.mean_over(loaded.model, TEXTS, e, -1)[0] == sft.mean_over(loaded.model, TEXTS, e, -1)[0]
    )
    looks = []
    (metrics,) = run(loaded, e, valid=TEXTS, look=lambda: looks.append(loaded.model.training))
    assert looks == [False]
    assert metrics["loss"] != without
    assert metrics["valid_loss"] == sft.mean_over(loaded.model, TEXTS, e, -1)[0]


def test_a_non_finite_gradient_leaves_all_as_it_was_and_three_stop_the_run(monkeypatch):
    loaded, e = attached(), stage(iters=9, optimizer="adam")
    optimizer = optimizer_of(e)
    run(loaded, stage(iters=2), optimizer=optimizer)
    before, state = weights(loaded), [np.array(v) for _, v in tree_flatten(optimizer.state)]
    real = sft.mean_loss
    monkeypatch.setattr(sft, "mean_loss", lambda *a: real(*a) * mx.array(float("nan")))
    with pytest.raises(Diverged, match="3 updates in a row"):
        run(loaded, e, optimizer=optimizer)
    after = weights(loaded)
    assert all(np.array_equal(before[k], after[k]) for k in before)
    kept = [np.array(v) for _, v in tree_flatten(optimizer.state)]
    assert all(np.array_equal(a, b) for a, b in zip(state, kept, strict=True))


def test_a_state_can_be_put_back_again_and_again():
    loaded, e = attached(), stage(iters=9, batch_size=1)
    optimizer = optimizer_of(e)
    loop = sft.train(loaded, TEXTS[:1], e, optimizer, Clock(), lambda step, metrics: None)
    begun = Snapshot.take(0, loaded.model, optimizer)
    next(loop)
    first, once = Snapshot.take(1, loaded.model, optimizer), weights(loaded)
    next(loop)
    twice = weights(loaded)
    for state, expected in ((first, twice), (begun, once), (first, twice)):
        state.put_back(loaded.model, optimizer)
        next(loop)  # on the one text there is
        after = weights(loaded)
        assert all(np.array_equal(after[k], expected[k]) for k in after)


def step_of(**keys) -> dict[str, np.ndarray]:
    """What one step of SGD does to the weights."""
    loaded = attached()
    before = weights(loaded)
    e = stage(iters=1, optimizer="sgd", **keys)
    run(loaded, e)
    return {k: v - before[k] for k, v in weights(loaded).items()}


def test_lora_plus_lengthens_the_steps_of_b_alone():
    plain, plus = step_of(), step_of(lora_parameters={"lora_plus_ratio": 4.0})
    for name, moved in plain.items():
        ratio = 4.0 if name.endswith("lora_b") else 1.0
        assert np.abs(moved).max() > 0
        assert np.allclose(plus[name], ratio * moved, rtol=1e-3, atol=1e-7), name


def test_gradients_are_shortened_only_when_asked():
    norm = run(attached(), stage(iters=1))[0]["grad_norm"]
    plain, short = step_of(), step_of(sft={"max_grad_norm": norm / 10})
    for name, moved in plain.items():
        assert np.allclose(short[name], moved / 10, rtol=1e-3, atol=1e-7), name


def test_the_rate_is_constant_unless_scheduled():
    e = stage(learning_rate=1e-3)
    assert [learning_rate(e, s) for s in range(3)] == [1e-3] * 3
    schedule = {"name": "linear_schedule", "arguments": [1e-2, 0.0, 10]}
    seen = run(attached(), stage(lr_schedule=schedule))
    assert [m["learning_rate"] for m in seen] == pytest.approx([0.01, 0.009, 0.008, 0.007])


def test_epochs_are_steps():
    assert lasting(stage(), TEXTS).iters == 4
    assert lasting(Stage(method="sft", epochs=2.0, batch_size=4), [*TEXTS, *TEXTS[1:]]).iters == 5


DEMO = models.load("demo")
ROWS = [
    (1, {"prompt": "How many legs has a duck?", "completion": "Two."}),
    (2, {"text": "A duck has two legs."}),
]


def texts_of(rows, **options):
    settings = {"limit": 100, "mask_prompt": False} | options
    return data.training_texts(DEMO, rows, "rows", **settings)


def test_rows_become_texts_as_mlx_lm_makes_them():
    (pair, plain), cut = texts_of(ROWS)
    eos = models.eos_ids(DEMO.tokenizer)
    assert cut == 0 and pair.start == plain.start == 1
    assert pair.ids[-1] in eos and plain.ids[-1] in eos
    assert "legs" in DEMO.tokenizer.decode(list(pair.ids[:-6]))
    ((masked,), _) = texts_of(ROWS[:1], mask_prompt=True)
    assert DEMO.tokenizer.decode(list(masked.ids[masked.start : -1])) == "Two."
    ((short, _), cut) = texts_of(ROWS, limit=len(pair.ids) - 2)
    assert short.ids == pair.ids[:-2] and cut == 1


def test_an_answer_is_closed_by_the_tokenizers_own_end():
    """Qwen's config names two: <|endoftext|> is the smaller number, <|im_end|> ends a turn."""

    class TwoEnds(ByteTokenizer):
        eos_token_id, eos_token_ids = 7, (3, 7)

    class NoEnd(ByteTokenizer):
        eos_token_id, eos_token_ids = None, ()

    row = {"prompt": "2+2?", "completion": "4"}
    loaded = replace(tiny_loaded(), tokenizer=TwoEnds())
    found = data.encode(row, loaded.tokenizer)
    assert found is not None and found.ids[-1] == 7
    ((text,), _) = data.training_texts(loaded, [(1, row)], "", limit=99, mask_prompt=True)
    assert text.ids[-1] == 7
    with pytest.raises(ModelError, match="names a token that ends a text"):
        data.encode(row, NoEnd())


def test_rows_with_nothing_to_learn_are_named():
    with pytest.raises(ConfigError) as caught:
        texts_of([*ROWS, (7, {"completion": "x"})], mask_prompt=True, limit=6)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("rows:1: its prompt alone fills 6 tokens")
    assert lines[1].startswith("rows:2: mask_prompt") and lines[2].startswith("rows:7: needs")


def test_a_batch_is_drawn_from_step_and_seed():
    batches = [data.draw(range(5), step, 2, 0) for step in range(5)]
    assert batches == [data.draw(range(5), step, 2, 0) for step in range(5)]
    flat = [x for batch in batches for x in batch]
    assert sorted(flat[:5]) == sorted(flat[5:]) == list(range(5))


def test_no_batches_to_validate_on_are_no_validation():
    """A loss of 0.0 would be the best there is."""
    seen = run(attached(), stage(iters=2, val_batches=0, steps_per_eval=1), valid=TEXTS)
    assert not any(name.startswith("valid_loss") for metrics in seen for name in metrics)
