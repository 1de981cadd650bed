"""Decoding: forked = full prefill, batched = alone, and the stored log-probabilities are true."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora.generate import decode, drawer_of, fork, noise, prefill, sampling_logps, trim
from mlx_lora.models import split_head
from mlx_lora.numerics import log_softmax
from tests.tiny import tiny

PROMPTS = [[5, 17, 3, 44], [8, 1, 90, 12, 77, 4], [9, 9, 2, 30]]
EOS = frozenset({95})


def forks(prompts, group):
    return [p for p in range(len(prompts)) for _ in range(group)]


def roll(model, prompts, group=1, width=10, temperature=1.0, uniforms=None):
    uniforms = noise(0, 0, len(prompts), group, width) if uniforms is None else uniforms
    hidden_BD, cache = prefill(model, prompts, forks(prompts, group))
    return decode(model, hidden_BD, cache, uniforms, drawer_of(temperature, 1.0, 0), EOS)


def full_logps(model, prompt, ids):
    """Log-probabilities of ids after the prompt by one forward without a cache."""
    logits = model(mx.array([[*prompt, *map(int, ids)]]))[0, len(prompt) - 1 : -1]
    logps = log_softmax(logits.astype(mx.float32))
    return np.array(mx.take_along_axis(logps, mx.array(ids)[:, None], axis=-1))[:, 0]


SAME_LENGTH = [p[:4] for p in PROMPTS]


@pytest.mark.parametrize(
    ("architecture", "prompts"),
    [("llama", PROMPTS), ("qwen3", PROMPTS), ("gemma", PROMPTS), ("gemma2", SAME_LENGTH)],
)  # mlx-lm's gemma2 takes no left-padded batch
def test_stored_logps_are_those_of_a_full_forward(architecture, prompts):
    model = tiny(architecture, bits=4)
    ids_BT, logps_BT = roll(model, prompts, group=2)
    for row in range(6):
        exact = full_logps(model, prompts[row // 2], ids_BT[row])
        assert np.allclose(logps_BT[row], exact, atol=1e-4)


def test_forked_cache_equals_prefilling_every_row():
    model = tiny(bits=4)
    hidden_BD, cache = prefill(model, PROMPTS, forks(PROMPTS, 2))
    logits_BV = split_head(model).head(hidden_BD)
    for row in range(6):
        own = make_prompt_cache(model)
        alone = model(mx.array([PROMPTS[row // 2]]), cache=own)[0, -1]
        assert mx.abs(logits_BV[row] - alone).max().item() < 1e-5
        pad = cache[0].left_padding[row].item()
        keys = cache[0].keys[row, :, pad : cache[0]._idx]
        assert mx.abs(keys - own[0].keys[0, :, : own[0].offset]).max().item() < 1e-5


def test_a_row_is_the_same_alone_and_in_a_batch():
    model = tiny(bits=4)
    uniforms = noise(0, 0, len(PROMPTS), 1, 10)
    together, _ = roll(model, PROMPTS, uniforms=uniforms)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = roll(model, [prompt], uniforms=uniforms[row : row + 1])
        width = min(alone.shape[1], together.shape[1])
        assert np.array_equal(alone[0, :width], together[row, :width])


def test_siblings_differ_and_a_rerun_does_not():
    model = tiny(bits=4)
    first, _ = roll(model, PROMPTS, group=4)
    again, _ = roll(model, PROMPTS, group=4)
    assert np.array_equal(first, again)
    assert len({tuple(r) for r in first}) > len(PROMPTS)


def test_noise_depends_on_seed_step_prompt_and_member_alone():
    wide, narrow = noise(1, 2, 3, 4, 5), noise(1, 2, 2, 4, 5)
    assert mx.array_equal(wide[:8], narrow)
    assert not mx.array_equal(noise(1, 3, 2, 4, 5), narrow)
    assert not mx.array_equal(noise(2, 2, 2, 4, 5), narrow)
    assert (wide >= 0).all().item() and (wide < 1).all().item()


def test_draws_follow_the_distribution():
    logits = mx.log(mx.array([[0.5, 0.2, 0.0, 0.3]]))
    uniforms = mx.arange(1000) / 1000
    ids, logps = drawer_of(1.0, 1.0, 0)(mx.broadcast_to(logits, (1000, 4)), uniforms)
    counts = np.bincount(np.array(ids), minlength=4)
    assert np.abs(counts - [500, 200, 0, 300]).max() <= 1
    assert np.allclose(np.exp(np.array(logps)), np.array([0.5, 0.2, 0.0, 0.3])[np.array(ids)])


def test_the_highest_draw_never_lands_on_an_impossible_token():
    logits = mx.array([[0.0, -mx.inf, 0.0, -mx.inf]])
    for highest in (1 - 2**-24, 1.0):
        ids, logps = drawer_of(1.0, 1.0, 0)(logits, mx.array([highest]))
        assert ids.item() == 2 and np.isfinite(logps.item())


def test_eos_is_kept_as_a_decision_and_what_follows_is_cut():
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    ids, logps = np.array([4, 7, 95, 8, 95]), -np.arange(5.0)
    ended = trim(tokenizer, (1, 2), ids, logps, EOS)
    assert ended.ids == (4, 7, 95) and ended.logps == (0.0, -1.0, -2.0)
    assert ended.finished and ended.text == "4 7"
    cut = trim(tokenizer, (1, 2), ids[:2], logps[:2], EOS)
    assert cut.ids == (4, 7) and not cut.finished and cut.text == "4 7"


def test_temperature_top_k_and_top_p_renormalise():
    logits = mx.log(mx.array([[0.4, 0.3, 0.2, 0.1]]))
    assert np.allclose(np.exp(sampling_logps(logits, 1.0, top_k=2)), [[4 / 7, 3 / 7, 0, 0]])
    assert np.allclose(np.exp(sampling_logps(logits, 1.0, top_p=0.75)), [[4 / 9, 3 / 9, 2 / 9, 0]])
    squared = np.array([0.16, 0.09, 0.04, 0.01])
    assert np.allclose(np.exp(sampling_logps(logits, 0.5)), squared / squared.sum(), atol=1e-6)


def test_greedy_takes_the_most_likely():
    model = tiny()
    ids_BT, _ = roll(model, PROMPTS, temperature=0.0)
    logits_BV = split_head(model).head(prefill(model, PROMPTS, forks(PROMPTS, 1))[0])
    assert np.array_equal(ids_BT[:, 0], np.array(mx.argmax(logits_BV, axis=-1)))


def test_fork_keeps_rows_apart():
    """Writing to one fork must not reach its siblings or the template."""
    model = tiny()
    cache = make_prompt_cache(model)
    model(mx.array([[1, 2, 3], [4, 5, 6]]), cache=cache)
    other = make_prompt_cache(model)
    model(mx.array([[7, 8, 9, 10]]), cache=other)
    one = fork([cache[0], other[0]], mx.array([0, 0, 2]))
    before = np.array(cache[0].keys[..., :3, :])
    one.update_and_fetch(mx.ones((3, 2, 1, 32)), mx.ones((3, 2, 1, 32)))
    assert np.array_equal(before, np.array(cache[0].keys[..., :3, :]))
    assert np.array_equal(np.array(one.keys[0, :, 1:4]), np.array(one.keys[1, :, 1:4]))
