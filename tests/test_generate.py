"""Decoding: forked = full prefill, batched = alone, and the stored log-probabilities are true."""

import itertools
import warnings
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_lora import caches, cpu, decode, models
from mlx_lora import generate as generating
from mlx_lora.caches import company, forked, prefill, prefilled
from mlx_lora.generate import closing, generate
from mlx_lora.models import split_head
from mlx_lora.numerics import log_softmax
from mlx_lora.sampling import BLOCK, drawer_of, row_key, sampling_logps, uniform_block, uniforms
from mlx_lora.types import Rollout
from tests.tiny import tiny
from tests.zoo import build

PROMPTS = [[5, 17, 3, 44], [8, 1, 90, 12, 77, 4], [9, 9, 2, 30]]
TEXTS = ["abc", "abcdefg", "xy", "qwertyuiop", "hello", "abcd", "zzz"]
FIRST = [0.11398178339004517, 0.5578752160072327]
EAGER = {"cpu": 0.01, "gpu": 0.01}  # rows come in wherever there is room


class Letters:
    """Token i of 2 to 91 is one letter; four of them end a text."""

    eos_token_ids = (1, 7, 20, 33)
    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [2 + byte % 60 for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def loaded_of(model: nn.Module) -> models.Loaded:
    return models.Loaded(model, Letters(), {}, "tiny", Path("tiny"), False)


def roll(loaded, texts=TEXTS, **options) -> list[list[Rollout]]:
    return generate(loaded, texts, **{"purpose": "test", "group": 2, "max_tokens": 18, **options})


def flat(groups):
    return list(itertools.chain.from_iterable(groups))


def assert_same(found, wanted):
    """Equal ids, and log-probabilities to 1e-5."""
    for a, b in zip(flat(found), flat(wanted), strict=True):
        assert (a.ids, a.text, a.finished) == (b.ids, b.text, b.finished)
        assert np.allclose(a.logps, b.logps, atol=1e-5)


def one_by_one(loaded, **options):
    return [roll(loaded, [text], numbers=[p], **options)[0] for p, text in enumerate(TEXTS)]


def full_logps(model, prompt, ids):
    """Log-probabilities of ids after the prompt by one forward without a cache."""
    logits = model(mx.array([[*prompt, *map(int, ids)]]))[0, len(prompt) - 1 : -1]
    logps = log_softmax(logits.astype(mx.float32))
    return np.array(mx.take_along_axis(logps, mx.array(ids)[:, None], axis=-1))[:, 0]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gemma2"])
@pytest.mark.parametrize("width", [128, 4])
def test_stored_logps_are_those_of_a_full_forward(architecture, width):
    model = tiny(architecture, bits=4)
    for row in flat(roll(loaded_of(model), width=width)):
        assert np.allclose(row.logps, full_logps(model, row.prompt_ids, row.ids), atol=1e-4)


def test_stored_logps_are_those_of_the_distribution_that_drew():
    model = tiny(bits=4)
    for row in flat(roll(loaded_of(model), temperature=0.7, top_k=20, top_p=0.8)):
        logits = model(mx.array([[*row.prompt_ids, *row.ids]]))[0, len(row.prompt_ids) - 1 : -1]
        logps = sampling_logps(logits.astype(mx.float32), 0.7, 0.8, 20)
        exact = mx.take_along_axis(logps, mx.array(row.ids)[:, None], axis=-1)[:, 0]
        assert np.allclose(row.logps, np.array(exact), atol=1e-4)


MIXED = [
    "llama", "qwen3", "gemma3_text", "gpt_oss", "mamba2", "falcon_h1", "lfm2", "qwen3_next",
    "qwen3_moe", "deepseek_v3",
]  # fmt: skip
EQUAL = ["gemma2", "gpt_bigcode", "afm7", "llama4"]


@pytest.mark.parametrize("name", [*MIXED, *EQUAL])
def test_a_row_is_the_same_alone_in_a_batch_and_let_in_late(name, monkeypatch):
    """Windows of 4 tokens and state spaces too: rows come and go at other times for each width."""
    loaded = loaded_of(build(name))
    alone = one_by_one(loaded)
    lengths = {len(r.ids) for r in flat(alone)}
    assert len(lengths) > 1 and max(lengths) == 18, "rows must end at different times"
    assert company(loaded.model) == ("mixed" if name in MIXED else "equal")
    monkeypatch.setattr(decode, "FILL", EAGER)
    for width in (128, 5):
        assert_same(roll(loaded, width=width), alone)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1"])
def test_on_a_gpu_the_looks_are_rarer_and_the_text_the_same(name, monkeypatch):
    loaded = loaded_of(build(name))
    alone = one_by_one(loaded)
    monkeypatch.setattr(decode.cpu, "active", lambda: False)
    monkeypatch.setattr(decode, "STEP", 4)
    monkeypatch.setattr(decode, "FILL", EAGER)
    for width in (128, 5):
        assert_same(roll(loaded, width=width), alone)


def test_a_batch_that_a_model_takes_not_is_never_an_error(monkeypatch):
    loaded = loaded_of(tiny(bits=4))
    alone = one_by_one(loaded)
    sizes: list[int] = []
    real = generating.decode

    def listening(model, prompts, rows, **options):
        sizes.append(len(rows))
        real(model, prompts, rows, **options)

    monkeypatch.setattr(generating, "decode", listening)
    for kept, most in (("equal", 3), ("none", 1)):
        sizes.clear()
        loaded.model.__dict__["_company"] = kept
        assert_same(roll(loaded, width=3), alone)
        assert max(sizes) == most and sum(sizes) == 2 * len(TEXTS)


def test_a_cache_that_holds_one_row_is_found_out(monkeypatch):
    class OneRow(KVCache):
        def update_and_fetch(self, keys, values):
            assert len(keys) == 1, "one row"
            return super().update_and_fetch(keys, values)

    model = tiny(bits=4)
    expected = roll(loaded_of(model))
    single = tiny(bits=4)
    monkeypatch.setattr(caches, "new_cache", lambda model: [OneRow() for _ in model.layers])
    monkeypatch.setattr(generating, "plain_cache", lambda model: False)
    assert company(single) == "none"
    assert_same(roll(loaded_of(single)), expected)


def test_a_silently_wrong_batch_is_found_out(monkeypatch):
    """As a model is that counts positions from the padded start."""
    real = caches.padded

    def wrong(layer, rows):
        wide = real(layer, rows)
        wide.offset = wide.offset + mx.arange(rows)
        return wide

    monkeypatch.setattr(caches, "padded", wrong)
    assert company(tiny()) == "equal"


def test_text_depends_on_purpose_seed_step_number_and_member_alone():
    loaded = loaded_of(tiny(bits=4))
    whole = roll(loaded, max_tokens=BLOCK + 9)
    assert max(len(r.ids) for r in flat(whole)) > BLOCK, "the second block must be drawn"
    part = roll(loaded, TEXTS[2:5], numbers=[2, 3, 4], group=3, max_tokens=BLOCK + 30, width=2)
    for two, three in zip(whole[2:5], part, strict=True):
        for a, b in zip(two, three, strict=False):
            assert a.ids == b.ids[: len(a.ids)]
    first = [r.ids for r in flat(whole)]
    for other in ({"purpose": "other"}, {"seed": 1}, {"step": 1}, {"numbers": range(1, 8)}):
        assert all(a != r.ids for a, r in zip(first, flat(roll(loaded, **other)), strict=True))
    assert len(set(first)) > len(TEXTS), "siblings differ"


def test_the_plain_path_is_bitwise_at_equal_shape():
    loaded = loaded_of(tiny(bits=4))
    same_length = ["abcd", "wxyz", "hell"]
    together = roll(loaded, same_length)
    assert together == roll(loaded, same_length)
    if cpu.mode() == "plain":
        assert together[1] == roll(loaded, same_length[1:2], numbers=[1])[0]


def test_done_hears_of_each_prompt_once_and_as_soon_as_it_ends():
    loaded = loaded_of(tiny(bits=4))
    heard: list[int] = []
    found: dict[int, list[Rollout]] = {}

    def done(p, rollouts):
        heard.append(p)
        found[p] = rollouts

    rows = roll(loaded, done=done, width=6)
    assert sorted(heard) == list(range(len(TEXTS))) and heard != sorted(heard)
    assert all(found[p] == rows[p] for p in found)
    lengths = [max(len(r.ids) for r in group) for group in rows]
    everybody: list[int] = []
    roll(loaded, done=lambda p, _: everybody.append(p))
    assert [lengths[p] for p in everybody] == sorted(lengths)


def test_rows_take_the_places_of_those_that_end(monkeypatch):
    loaded, batches = loaded_of(tiny(bits=4)), []
    real = decode.written

    def listening(split, live, *rest):
        batches.append([row.key for row in live.rows])
        return real(split, live, *rest)

    monkeypatch.setattr(decode, "written", listening)
    monkeypatch.setattr(decode, "FILL", EAGER)
    roll(loaded, width=8)
    assert len(batches[0]) == max(map(len, batches)) == 8
    pairs = [(set(a), set(b)) for a, b in itertools.pairwise(batches)]
    assert any(b - a and a & b for a, b in pairs), "nobody came in while others went on"


def test_a_prompt_whose_rows_come_in_at_different_times_is_read_once(monkeypatch):
    loaded, read = loaded_of(tiny(bits=4)), []
    real = caches.read

    def listening(split, model, ids_NL):
        read.extend(ids_NL.tolist())
        return real(split, model, ids_NL)

    assert company(loaded.model) == "mixed"
    monkeypatch.setattr(caches, "read", listening)
    monkeypatch.setattr(decode, "FILL", EAGER)
    roll(loaded, group=5, width=4)
    assert len(read) == len(TEXTS) and len({tuple(ids) for ids in read}) == len(TEXTS)


def test_when_rows_come_in_and_when_ended_ones_leave(monkeypatch):
    for device, room in (("cpu", 64), ("gpu", 32)):
        monkeypatch.setattr(decode.cpu, "active", lambda device=device: device == "cpu")
        assert decode.fills(128 - room, 99, 128) and not decode.fills(129 - room, 99, 128)
        assert decode.fills(126, 2, 128) and not decode.fills(127, 2, 128), "the last ones"
        assert decode.fills(0, 1, 1) and not decode.fills(0, 0, 128)
    monkeypatch.setattr(decode.cpu, "active", lambda: False)
    assert not decode.leave(97, 128) and decode.leave(96, 128)
    assert not decode.leave(1, 32), "narrower than this is not quicker on a GPU"
    monkeypatch.setattr(decode.cpu, "active", lambda: True)
    assert decode.leave(8, 32) and not decode.leave(31, 32)


def test_forked_cache_equals_prefilling_every_row():
    model = tiny(bits=4)
    hidden_BD, cache = prefill(model, PROMPTS, [0, 0, 1, 1, 2, 2])
    logits_BV = split_head(model).head(hidden_BD)
    for row in range(6):
        own = make_prompt_cache(model)
        alone = model(mx.array([PROMPTS[row // 2]]), cache=own)[0, -1]
        assert mx.abs(logits_BV[row] - alone).max().item() < 1e-5
        pad = cache[0].left_padding[row].item()
        keys = cache[0].keys[row, :, pad : cache[0]._idx]
        assert mx.abs(keys - own[0].keys[0, :, : own[0].offset]).max().item() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1", "nemotron"])
def test_a_prompt_read_in_chunks_is_the_prompt_read_at_once(name, monkeypatch):
    model = build(name)
    prompts = [list(range(2, 15)), list(range(30, 37)), list(range(40, 47))]
    whole, _ = prefill(model, prompts, [0, 1, 2])
    monkeypatch.setattr(caches, "CHUNK", 4)
    monkeypatch.setattr(caches, "AREA", 4)
    split, shapes = split_head(model), []

    def listening(ids, cache):
        shapes.append(ids.shape)
        return split.body(ids, cache=cache)

    model.__dict__["_split"] = models.Split(listening, split.head)
    chunked, _ = prefill(model, prompts, [0, 1, 2])
    assert set(shapes) == {(1, 4), (1, 1), (1, 3)}
    assert mx.abs(whole - chunked).max().item() < 1e-4 * mx.abs(whole).max().item()


def test_no_prompt_token_but_the_last_meets_the_vocabulary(monkeypatch):
    model = tiny()
    shapes = []
    whole = models.Split(model, lambda logits: shapes.append(logits.shape) or logits)
    model.__dict__["_split"] = whole
    lengths = []
    real = type(model).__call__
    monkeypatch.setattr(
        type(model), "__call__", lambda s, x, **o: lengths.append(x.shape) or real(s, x, **o)
    )
    hidden, _ = prefill(model, [list(range(2, 12))], [0])
    assert lengths == [(1, 9), (1, 1)] and hidden.shape == (1, 96)


def test_gradients_flow_through_a_prompt_in_chunks(monkeypatch):
    model = tiny()
    model.unfreeze()

    def loss(model):
        hidden_BD, layers = prefill(model, PROMPTS, [0, 1, 1, 2])
        more_BTD = split_head(model).body(mx.array([[5, 6]] * 4), cache=layers)
        return (hidden_BD**2).sum() + (more_BTD**3).sum()

    found = []
    for chunk in (512, 2):
        monkeypatch.setattr(caches, "CHUNK", chunk)
        found.append(dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1])))
    for name, grad in found[0].items():
        assert mx.abs(grad - found[1][name]).max().item() < 1e-4 * mx.abs(grad).max().item(), name


def test_fork_keeps_rows_apart():
    """Writing to one fork must not reach its siblings or what it was forked from."""
    model = tiny()
    places = prefilled(model, [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10]])
    for chosen in ([places[0], places[0], places[1]], [places[0], places[0], places[2]]):
        template = places[0][0].layers[0]
        before = np.array(template.keys[..., :3, :])
        one = forked(chosen)[1][0]
        one.update_and_fetch(mx.ones((3, 2, 1, 32)), mx.ones((3, 2, 1, 32)))
        assert template.offset == 3
        assert np.array_equal(before, np.array(template.keys[..., :3, :]))
        again = forked(chosen)[1][0]
        assert np.array_equal(np.array(again.keys[0, :, :3]), np.array(one.keys[0, :, :3]))


def test_a_block_of_uniforms_is_the_same_however_many_are_drawn():
    key = row_key("rollout", 1, 2, 3, 4)
    places = [0, 5, BLOCK - 1, BLOCK, 3 * BLOCK + 1]
    one_by_one = [uniforms([key], [t])[0] for t in places]
    assert np.array_equal(uniforms([key] * 5, places), one_by_one)
    drawn = np.concatenate([uniform_block(key, b) for b in range(200)])
    assert drawn.dtype == np.float32 and len(set(drawn.tolist())) > 0.99 * len(drawn)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.01 and abs(drawn.std() - 12**-0.5) < 0.01
    assert uniform_block("rollout/0/0/0/0", 0)[:2].tolist() == FIRST, "runs can be repeated"


def test_draws_follow_the_distribution():
    logits = mx.log(mx.array([[0.5, 0.2, 0.0, 0.3]]))
    draws = mx.arange(1000) / 1000
    ids, logps = drawer_of(1.0)(mx.broadcast_to(logits, (1000, 4)), draws)
    counts = np.bincount(np.array(ids), minlength=4)
    assert np.abs(counts - [500, 200, 0, 300]).max() <= 1
    assert np.allclose(np.exp(np.array(logps)), np.array([0.5, 0.2, 0.0, 0.3])[np.array(ids)])


def test_the_highest_draw_never_lands_on_an_impossible_token():
    logits = mx.array([[0.0, -mx.inf, 0.0, -mx.inf]])
    for highest in (1 - 2**-24, 1.0):
        ids, logps = drawer_of(1.0)(logits, mx.array([highest]))
        assert ids.item() == 2 and np.isfinite(logps.item())


def test_temperature_top_k_and_top_p_renormalise():
    logits = mx.log(mx.array([[0.4, 0.3, 0.2, 0.1]]))
    assert np.allclose(np.exp(sampling_logps(logits, 1.0, top_k=2)), [[4 / 7, 3 / 7, 0, 0]])
    assert np.allclose(np.exp(sampling_logps(logits, 1.0, top_p=0.75)), [[4 / 9, 3 / 9, 2 / 9, 0]])
    squared = np.array([0.16, 0.09, 0.04, 0.01])
    assert np.allclose(np.exp(sampling_logps(logits, 0.5)), squared / squared.sum(), atol=1e-6)


def test_greedy_takes_the_most_likely():
    model = tiny()
    for row in flat(roll(loaded_of(model), temperature=0.0)):
        logits = model(mx.array([[*row.prompt_ids, *row.ids]]))[0, len(row.prompt_ids) - 1 : -1]
        assert row.ids == tuple(mx.argmax(logits, axis=-1).tolist())


def test_eos_is_kept_as_a_decision_and_what_follows_is_cut():
    rows = flat(roll(loaded_of(tiny(bits=4))))
    ended = [r for r in rows if r.finished]
    cut = [r for r in rows if not r.finished]
    assert ended and cut
    for row in ended:
        assert row.ids[-1] in Letters.eos_token_ids and len(row.text) == len(row.ids) - 1
    assert all(len(r.ids) == len(r.logps) == len(r.text) == 18 for r in cut)
    assert not {*Letters.eos_token_ids} & {i for r in rows for i in r.ids[:-1]}


def test_a_row_ends_with_the_token_that_completes_a_stop():
    """A stop is the letters of three tokens; the rows are those without a stop, cut."""
    loaded = loaded_of(tiny(bits=4))
    free = roll(loaded)
    longest = max(flat(free), key=lambda r: len(r.ids))
    stop = longest.text[4:7]
    stopped = roll(loaded, stop=["never", stop], width=5)
    cuts = 0
    for a, b in zip(flat(free), flat(stopped), strict=True):
        end = a.text.find(stop) + 3
        if end < 3:
            assert a == b or (a.ids == b.ids and np.allclose(a.logps, b.logps, atol=1e-5))
            continue
        cuts += 1
        assert b.ids == a.ids[:end] and b.text == a.text[:end] and b.finished
        assert np.allclose(b.logps, a.logps[:end], atol=1e-5)
    assert cuts


class Pieces:
    """Tokens are pieces of bytes, decoded together: a character may be in two of them."""

    vocabulary: ClassVar = [
        b"<", b"/an", b"swer", b">", b"</answer> and", b"r>", b"x", b"\xe2\x82", b"\xac",
    ]  # fmt: skip

    def decode(self, ids):
        return b"".join(self.vocabulary[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("ids", "stop", "end"),
    [
        ([6, 0, 1, 2, 3, 6], "</answer>", 5),
        ([6, 4, 6], "</answer>", 2),  # inside one token
        ([6, 0, 1, 2, 6, 3], "</answer>", None),
        ([3, 3, 0, 1, 2, 2, 5], "</answer>", None),
        ([6, 7, 8, 6], "x\u20ac", 3),  # ends with half a character
        ([7, 8] * 40 + [0, 3, 3], "\u20ac<", 81),  # far behind the first tail
        ([6] * 50, "x" * 20, 20),
    ],
)
def test_where_a_stop_string_ends(ids, stop, end):
    closes = closing(Pieces(), frozenset(), [stop])
    ends = (t for t in range(1, len(ids) + 1) if closes(ids[:t]))
    assert next(ends, None) == end


def test_a_look_at_the_stop_decodes_a_bounded_tail():
    longest = 0

    class Watching(Pieces):
        def decode(self, ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    closes = closing(Watching(), frozenset(), ["</answer>"])
    assert not closes([6] * 5000 + [3]) and 0 < longest < 40


def test_a_long_completion_never_draws_the_same_numbers_again():
    key = row_key("rollout", 0, 0, 0, 0)
    places = list(range(3 * BLOCK))
    drawn = np.array([uniforms([key], [t])[0] for t in places])
    assert len(np.unique(drawn)) == len(places)
    np.testing.assert_array_equal(drawn[BLOCK : 2 * BLOCK], uniform_block(key, 1))


def test_a_model_that_says_nan_decodes_alone_and_without_a_warning():
    model = tiny()
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, float("nan"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert company(model) == "none"
    assert not said
