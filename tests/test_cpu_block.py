"""A block as one piece of NumPy: the same values, gradients and caches as the block's own."""

import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import BatchKVCache, KVCache

from mlx_lora import cpu, cpu_block, cpu_pass, cpu_step, cpu_threads, models
from mlx_lora.adapter.attach import attach, switched_off
from mlx_lora.adapter.listen import its_input, listening
from mlx_lora.generate import generate
from mlx_lora.recompute import recomputing
from tests.tiny import tiny

pytestmark = pytest.mark.skipif(not cpu.active(), reason="the CPU fast path")
USUAL = ("llama", "qwen2", "qwen3")
WIDTH, ROWS, TOKENS = 128, 3, 5


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(cpu, "_mode", "numpy")


def pair(architecture="qwen3", bits=4, **lora):
    """One block of one model twice: quick, and its own way."""
    found = []
    for quick in (True, False):
        model = tiny(architecture, bits=bits)
        cpu.accelerate(model)
        options = {"init": "gaussian", "init_options": {"std": 0.1}, "rank": 4} | lora
        attach(model, **options)
        block = model.layers[1]
        assert hasattr(type(block), "_parent")
        if not quick:
            block.__class__ = type(block)._parent
        found.append((model, block))
    return found


def tokens(rows=ROWS, length=TOKENS, seed=0):
    return mx.random.normal((rows, length, WIDTH), key=mx.random.key(seed))


def batch_cache(seed=7):
    kept = BatchKVCache([2, 0, 1])
    keys = mx.random.split(mx.random.key(seed), 2)
    kept.update_and_fetch(*(mx.random.normal((ROWS, 2, 4, 32), key=k) for k in keys))
    return kept


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(np.array(a), np.array(b), atol=atol, rtol=1e-4)


def through(block, x, kept, masked):
    return block(x, create_attention_mask(x, kept) if masked else None, kept)


class TestPass:
    @pytest.mark.parametrize("architecture", USUAL)
    @pytest.mark.parametrize("cached", ["none", "empty", "batch"])
    def test_values_gradients_and_cache_are_the_blocks_own(self, architecture, cached):
        if architecture == "llama" and cached == "batch":
            cached = "plain"
        answers = []
        for model, block in pair(architecture):
            kinds = {"none": lambda: None, "empty": KVCache, "batch": batch_cache}
            kept = kinds.get(cached, KVCache)()
            if cached == "plain":
                through(block, tokens(seed=3), kept, masked=True)

            def loss(model, x, block=block, kept=kept):
                y = through(block, x, kept, masked=True)
                extra = (kept.keys[..., :TOKENS, :] ** 2).sum() if kept is not None else 0.0
                return (y**2).sum() + extra, y

            (_, y), grads = nn.value_and_grad(model, loss)(model, tokens())
            slope = mx.grad(lambda x, loss=loss, model=model: loss(model, x)[0])(tokens())
            flat = dict(tree_flatten(grads))
            mine = {k: v for k, v in flat.items() if "layers.1." in k}
            answers.append((y, slope, mine))
        (y, slope, grads), (y2, slope2, grads2) = answers
        close(y, y2)
        assert len(grads) == 14
        for name, value in grads2.items():
            assert mx.abs(value).max().item() > 0, name
            size = mx.abs(value).max().item()
            close(grads[name] / size, value / size)
        size = mx.abs(slope2).max().item()
        close(slope / size, slope2 / size)

    def test_gradients_reach_what_the_cache_holds(self):
        """The prompt is computed once for its group: its keys and values learn too."""
        answers = []
        for _, block in pair():
            past = tokens(length=4, seed=5)

            def loss(past, block=block):
                kept = KVCache()
                block(past, "causal", kept)
                return (block(tokens(), "causal", kept) ** 2).sum()

            answers.append(mx.grad(loss)(past))
        assert mx.abs(answers[1]).max().item() > 1e-3
        size = mx.abs(answers[1]).max().item()
        close(answers[0] / size, answers[1] / size)

    def test_rows_in_threads_are_rows_alone(self, monkeypatch):
        (model, block), _ = pair()

        def both():
            def loss(model):
                y = block(tokens(), batch_cache().make_mask(TOKENS), batch_cache())
                return (y**2).sum(), y

            (_, y), grads = nn.value_and_grad(model, loss)(model)
            return y, dict(tree_flatten(grads))

        alone = both()
        monkeypatch.setattr(cpu_pass, "LEAST", 1)
        monkeypatch.setattr(cpu_threads, "workers", lambda: 2)
        assert len(cpu_threads.slices(ROWS, 1)) == 2
        split = both()
        close(split[0], alone[0])
        for name, value in alone[1].items():
            close(split[1][name], value, atol=1e-4 * max(1, mx.abs(value).max().item()))

    def test_switched_off_it_is_the_base_and_passes_no_gradient_to_the_adapter(self):
        (model, block), _ = pair()
        base = tiny("qwen3", bits=4)
        cpu.accelerate(base)
        with switched_off(model):
            found = block(tokens(), "causal", None)
            slopes = nn.value_and_grad(model, lambda _: (block(tokens(), "causal") ** 2).sum())
            grads = slopes(model)
        assert mx.array_equal(found, base.layers[1](tokens(), "causal", None))
        assert all(not mx.any(g).item() for n, g in tree_flatten(grads[1]))

    def test_recomputed_it_is_the_same(self):
        (model, _), _ = pair()
        ids = mx.array([[1, 2, 3, 4, 5]])

        def loss(model):
            return (models.logits(model, ids) ** 2).mean()

        plain = nn.value_and_grad(model, loss)(model)
        with recomputing(list(model.layers)):
            again = nn.value_and_grad(model, loss)(model)
        for (name, a), (_, b) in zip(tree_flatten(plain[1]), tree_flatten(again[1]), strict=True):
            assert mx.array_equal(a, b), name

    def test_too_large_scores_are_made_again(self, monkeypatch):
        (_, block), _ = pair()

        def slopes():
            return mx.grad(lambda x: (block(x, "causal") ** 2).sum())(tokens())

        kept = slopes()
        monkeypatch.setattr(cpu_pass, "KEPT", 0)
        assert mx.array_equal(slopes(), kept)


class TestWhoGoesItsOwnWay:
    def taken(self, monkeypatch, model):
        calls = []
        real = cpu_pass.block
        monkeypatch.setattr(cpu_pass, "block", lambda *a, **k: calls.append(1) or real(*a, **k))
        mx.eval(models.logits(model, mx.array([[1, 2, 3]])))
        return len(calls)

    def test_the_usual_kind_is_taken(self, monkeypatch):
        (model, _), _ = pair()
        assert self.taken(monkeypatch, model) == len(model.layers)

    def test_unusual_blocks_are_not(self, monkeypatch):
        for architecture in ("gemma", "phi3"):
            model = tiny(architecture, bits=4)
            cpu.accelerate(model)
            assert self.taken(monkeypatch, model) == 0, architecture

    def test_a_block_that_is_called_in_another_way_is_left_alone(self):
        model = tiny("llama", bits=4)
        kind = type(model.layers[0])

        class Scaled(kind):
            def __call__(self, x, scale, mask=None, cache=None):
                return super().__call__(x * scale, mask, cache)

        for block in model.layers:
            block.__class__ = Scaled
        cpu.accelerate(model)
        assert all(type(block) is Scaled for block in model.layers)

    def test_a_block_that_computes_something_else_is_left_alone(self, monkeypatch):
        model = tiny("llama", bits=4)
        kind = type(model.layers[0])

        class Louder(kind):
            def __call__(self, *given):
                return 1.5 * super().__call__(*given)

        for block in model.layers:
            block.__class__ = Louder
        cpu.accelerate(model)
        assert all(type(block) is Louder for block in model.layers)

    def test_nor_one_with_dropout_at_work_or_dora(self, monkeypatch):
        model = tiny("llama", bits=4)
        cpu.accelerate(model)
        attach(model, rank=4, dropout=0.5)
        model.train()
        assert self.taken(monkeypatch, model) == 0
        model.eval()
        assert self.taken(monkeypatch, model) == len(model.layers)

    def test_nor_one_that_is_listened_to(self, monkeypatch):
        (model, _), _ = pair()
        names = {n: m for n, m in model.named_modules() if n.endswith("layers.0.mlp.up_proj")}
        with listening(names, its_input) as heard:
            assert self.taken(monkeypatch, model) == len(model.layers) - 1
        assert len(heard) == 1

    def test_nor_low_precision_or_a_strange_mask(self):
        x = tokens()
        assert cpu_block.suits(x, "causal", None)
        assert not cpu_block.suits(x.astype(mx.bfloat16), "causal", None)
        assert not cpu_block.suits(x, mx.zeros((ROWS, 4, TOKENS, TOKENS)), None)
        assert not cpu_block.suits(x, "sideways", None)
        assert not cpu_block.suits(x, None, object())


class TestStep:
    def stacked(self, model):
        return [b for b in model.layers if "_stacked" in b.__dict__]

    @pytest.mark.parametrize("architecture", USUAL)
    @pytest.mark.parametrize("bits", [None, 4])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_steps_and_cache_are_the_blocks_own(self, monkeypatch, architecture, bits, threads):
        monkeypatch.setattr(cpu_threads, "workers", lambda: threads)
        monkeypatch.setattr(cpu_step, "LEAST", 1)
        answers = []
        for model, block in pair(architecture, bits):
            kept = batch_cache() if architecture != "llama" else KVCache()
            kept.step = 2  # so that it grows on the way
            if architecture == "llama":
                past = mx.random.normal((ROWS, 2, 4, 32), key=mx.random.key(1))
                kept.update_and_fetch(past, 2 * past)
            with cpu.decoding(model):
                assert len(self.stacked(model)) >= len(model.layers) - 1
                outputs = []
                for seed in range(5):
                    x = tokens(length=1, seed=seed)
                    outputs.append(through(block, x, kept, masked=True))
                    mx.eval(outputs)
            assert not self.stacked(model)
            answers.append((outputs, *kept.keys_and_values(), mx.array(kept.offset)))
        for a, b in zip(answers[0][0], answers[1][0], strict=True):
            close(a, b)
        for a, b in zip(answers[0][1:], answers[1][1:], strict=True):
            close(a, b)

    def test_two_rows_of_one_prompt_do_not_share_memory(self):
        """A forked cache whose arrays others hold is never written to."""
        (model, block), _ = pair()
        kept = batch_cache()
        before = mx.array(np.array(kept.keys_and_values()[0]))
        older = kept.keys
        with cpu.decoding(model):
            mx.eval(block(tokens(length=1), kept.make_mask(1), kept))
            mx.eval(block(tokens(length=1), kept.make_mask(1), kept))
        assert mx.array_equal(older[..., :4, :], before)
        assert mx.array_equal(kept.keys[..., :4, :], before)

    def test_a_cache_that_was_given_other_rows_is_read_anew(self):
        (model, block), _ = pair()
        outputs = []
        for swapped in (True, False):
            kept = batch_cache() if swapped else batch_cache(seed=8)
            with cpu.decoding(model):
                if swapped:
                    mx.eval(block(tokens(length=1), kept.make_mask(1), kept))
                    other = batch_cache(seed=8)
                    kept.keys, kept.values, kept.offset, _, kept._idx = other.state
                outputs.append(block(tokens(length=1), kept.make_mask(1), kept))
                mx.eval(outputs)
        assert mx.array_equal(*outputs)

    def test_numbers_as_a_mask_are_added(self):
        (model, block), (_, plain) = pair()
        mask = mx.array([-1.0, -0.5, -1e9, -2.0, -0.25]).reshape(1, 1, 1, 5)
        found = []
        for b in (block, plain):
            kept = batch_cache()
            with cpu.decoding(model):
                found.append(b(tokens(length=1), mask, kept))
                mx.eval(found)
        close(*found)

    def test_while_decoding_nothing_is_kept_for_a_way_back(self, monkeypatch):
        (model, block), _ = pair()
        alive = []
        real = cpu_pass.Held.__init__

        def noted(self, *given, **named):
            real(self, *given, **named)
            alive.append(weakref.ref(self))

        monkeypatch.setattr(cpu_pass.Held, "__init__", noted)
        kept = KVCache()
        with cpu.decoding(model):
            y = block(tokens(), "causal", kept)
            gc.collect()
            assert alive and not any(ref() for ref in alive)
        y = block(tokens(), "causal", KVCache())
        gc.collect()
        assert any(ref() for ref in alive), y.shape

    def test_stacked_matrices_are_bounded(self, monkeypatch):
        (model, _), _ = pair()
        monkeypatch.setattr(cpu_block, "STACKED_BYTES", 1)
        with cpu.decoding(model):
            assert not self.stacked(model)

    def test_what_is_generated_is_the_plain_paths(self, monkeypatch):
        def texts():
            loaded = models.load("demo")
            attach(loaded, init="gaussian", init_options={"std": 0.02}, rank=4)
            prompts = ["Numbers: 7 23 25. Target: 41.", "How many legs has a duck?"]
            options = {"group": 2, "purpose": "rollout", "max_tokens": 12, "temperature": 0}
            return [r.ids for rows in generate(loaded, prompts, **options) for r in rows]

        quick = texts()
        monkeypatch.setattr(cpu, "_mode", "plain")
        assert quick == texts()


def test_threads_are_as_many_as_blas_was_given_and_each_has_one():
    assert cpu_threads.workers() >= 1
    assert [library.num_threads for library in cpu_threads.numpys_blas()] == [1]
    assert all("numpy" in library.filepath for library in cpu_threads.numpys_blas())
    assert cpu_threads.spread(lambda part: part.stop, cpu_threads.slices(10, 100)) == [10]
    with pytest.raises(ZeroDivisionError):
        cpu_threads.spread(lambda n: 1 // n, [1, 0])
