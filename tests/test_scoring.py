"""Log-probabilities of completions: equal to the plain form, and never all logits at once."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora import config, cpu, cpu_head, models, sft
from mlx_lora.adapter.attach import attach, blocks, lora_layers
from mlx_lora.data import Text, training_texts
from mlx_lora.optimizers import optimizer_of
from mlx_lora.recompute import recomputing
from mlx_lora.rl import grpo, logprobs, vocabulary
from mlx_lora.rl.logprobs import completion_logps, pack, rows_of
from mlx_lora.runlog import Clock
from mlx_lora.tasks import load_task
from mlx_lora.types import Rollout
from mlx_lora.unsupported import refuse
from tests import zoo
from tests.tiny import COMMON, tiny

ROOT = Path(__file__).parent.parent


def rollouts(vocabulary=90):
    """Three prompts of two lengths; completions of 1 to 7 tokens."""
    rng = np.random.default_rng(0)
    prompts = [(5, 17, 3), (8, 1, 60), (4, 4, 9, 31, 7)]
    return [
        Rollout(prompts[i % 3], tuple(rng.integers(2, vocabulary, n).tolist()), (-1.0,) * n, "", 1)
        for i, n in enumerate((4, 1, 7, 3, 6))
    ]


def plain_logps(model, packed, temperature):
    """Row by row, every logit of prompt and completion in float32."""
    mask = np.array(packed.mask_BT)
    found = []
    for row, p in enumerate(packed.prompt_of_B):
        prompt, length = packed.prompts[p], int(mask[row].sum())
        ids = [*prompt, *np.array(packed.targets_BT)[row, :length].tolist()]
        logits = model(mx.array([ids]))[0].astype(mx.float32) / temperature
        logps = nn.log_softmax(logits[len(prompt) - 1 : -1])
        at = mx.array(ids[len(prompt) :])[:, None]
        entropy = -(mx.exp(logps) * logps).sum(axis=-1)
        padding = (0, mask.shape[1] - length)
        picked = mx.take_along_axis(logps, at, axis=-1)[:, 0]
        found.append([mx.pad(x, padding) for x in (picked, entropy)])
    logps_BT, entropy_BT = (mx.stack(x) for x in zip(*found, strict=True))
    return logps_BT, entropy_BT


def graded(score, model, packed, temperature=1.0, **options):
    """Log-probabilities, entropies and gradients of an objective that weighs every token."""
    weight_BT = mx.random.normal(packed.mask_BT.shape, key=mx.random.key(1))

    def objective(model):
        logps_BT, entropy_BT = score(model, packed, temperature, **options)
        return (logps_BT * weight_BT * packed.mask_BT).sum(), (logps_BT, entropy_BT)

    (_, found), grads = nn.value_and_grad(model, objective)(model)
    return *(np.array(x) for x in found), {n: np.array(g) for n, g in tree_flatten(grads)}


def same(found, wanted, tolerance=1e-6):
    """Values to 1e-5, gradients to `tolerance` of the largest entry."""
    for a, b in zip(found[:2], wanted[:2], strict=True):
        assert np.allclose(a, b, atol=1e-5)
    largest = max(np.abs(g).max() for g in wanted[2].values())
    assert found[2].keys() == wanted[2].keys() and largest > 0
    for name, g in wanted[2].items():
        assert np.abs(found[2][name] - g).max() <= tolerance * largest, name


def adapted(architecture="llama", **options):
    model = tiny(architecture, **options)
    attach(model, init="gaussian", init_options={"std": 0.1})
    return model


def zoo_model(name):
    model = zoo.build(name, 4)
    attach(model, init="gaussian", init_options={"std": 0.1}, rank=4, keys=zoo.KEYS.get(name))
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "cohere"])
@pytest.mark.parametrize("rows", [1, 3, 5, 1000])
def test_chunks_equal_the_plain_form_forward_and_backward(name, rows, monkeypatch):
    """21 tokens in chunks of 1, 3, 5 (the last one partial) and all at once; two scale logits."""
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", dict.fromkeys(("cpu", "gpu"), 4 * 96 * rows))
    model, packed = zoo_model(name), pack(rollouts(zoo.VOCABULARY), np.ones(5))
    assert models.split_head(model).body is not model
    found = graded(completion_logps, model, packed, 0.7)
    same(found, graded(plain_logps, model, packed, 0.7), tolerance=3e-6)


@pytest.mark.skipif(not cpu.fast(), reason="on the CPU's fast path")
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("llama untied", "lm_head"),
        ("llama", "model.embed_tokens"),
        ("granite", None),
        ("gemma2", None),
        ("gemma4_text", None),
    ],
)
def test_a_head_that_is_one_product_is_known_and_scored_by_it(name, head, monkeypatch):
    """Others scale or cap its logits, and gemma4 has a second table. 21 tokens in pieces of 4."""
    monkeypatch.setattr(cpu_head, "PIECE", 0)
    monkeypatch.setattr(cpu_head, "ROWS", 4)
    model, packed = zoo_model(name), pack(rollouts(zoo.VOCABULARY), np.ones(5))
    cpu.accelerate(model)
    layer = cpu_head.layer_of(model)
    assert model.__dict__["_head_layer"] == head and (layer is None) == (head is None)
    found = graded(completion_logps, model, packed, 0.7)
    same(found, graded(plain_logps, model, packed, 0.7), tolerance=3e-6)
    with_gradient = completion_logps(model, packed, 0.7)
    without = completion_logps(model, packed, 0.7, gradient=False)
    assert all(map(mx.array_equal, with_gradient, without))


SCALED = ["granite", "cohere", "minicpm", "gemma2", "helium", "gemma3n", "talkie"]
NESTED = ["gpt2", "gpt_neox", "mamba", "nemotron_h", "qwen3_vl", "llama4", "phi3small", "dbrx"]


@pytest.mark.parametrize("name", [*SCALED, *NESTED, "phixtral"])
def test_heads_that_scale_or_nest_split_too(name):
    """Also on one position a row, as in decoding; phixtral's body wants a mask, and is left."""
    model = zoo.build(name, 4)
    split = models.split_head(model)
    assert (split.body is model) == (name == "phixtral")
    ids_BT = mx.array([[5, 6, 7], [8, 9, 10]])
    hidden = split.body(ids_BT, cache=models.new_cache(model))
    wanted = np.array(model(ids_BT))[:, -1]
    assert np.allclose(np.array(split.head(hidden[:, -1])), wanted, atol=1e-4)


@pytest.mark.parametrize(("key", "tied"), [("lm_head", False), ("embed_tokens", True)])
def test_an_adapter_on_the_head_learns(key, tied, monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", dict.fromkeys(("cpu", "gpu"), 4 * 96 * 5))
    monkeypatch.setitem(COMMON, "tie_word_embeddings", tied)
    model = tiny("llama", bits=4)
    attach(model, keys=["q_proj", key], init="gaussian", init_options={"std": 0.1})
    for layer in lora_layers(model).values():
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(3))
    packed = pack(rollouts(), np.ones(5))
    found = graded(completion_logps, model, packed, 0.7)
    assert all(np.abs(g).max() > 0 for g in found[2].values())
    same(found, graded(plain_logps, model, packed, 0.7), tolerance=3e-6)


def test_without_a_gradient_the_values_are_the_same():
    model, packed = adapted(bits=4), pack(rollouts(), np.ones(5))
    one = completion_logps(model, packed, 1.0)
    two = completion_logps(model, packed, 1.0, gradient=False)
    assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(one, two, strict=True))


def test_low_precision_hidden_states_keep_their_type():
    hidden = mx.random.normal((5, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    weight = mx.random.normal((64, 300), key=mx.random.key(1))
    targets = mx.array([3, 1, 299, 0, 7])

    def total(hidden):
        return vocabulary.score_tokens(lambda h: h @ weight, hidden, targets, 1.0, 300)[0].sum()

    gradient = mx.grad(total)(hidden)
    assert gradient.dtype == mx.bfloat16 and mx.any(gradient).item()


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_a_model_that_does_not_split_is_scored_a_few_rows_at_a_time(rows, monkeypatch):
    monkeypatch.setattr(
        vocabulary, "CHUNK_BYTES", dict.fromkeys(("cpu", "gpu"), 4 * 96 * 12 * rows)
    )
    model, packed = adapted(bits=4), pack(rollouts(), np.ones(5))
    wanted = graded(plain_logps, model, packed, 0.7)
    monkeypatch.setattr(models, "_try_split", lambda model, path: None)
    model.__dict__.pop("_split", None)
    assert models.split_head(model).body is model
    same(graded(completion_logps, model, packed, 0.7), wanted, tolerance=3e-6)


def test_some_rows_are_those_rows_with_the_prompts_they_need():
    packed = pack(rollouts(), np.arange(5.0))
    part = rows_of(packed, [4, 1])
    assert part.prompts == [(8, 1, 60)] and part.prompt_of_B == [0, 0]
    assert part.targets_BT.shape == (2, 6) and part.mask_BT.sum(axis=1).tolist() == [6, 1]
    assert part.advantages_B.tolist() == [4, 1] and part.sampler_logps_BT.shape == (2, 6)
    assert np.array_equal(part.targets_BT[0], packed.targets_BT[4, :6])
    two = rows_of(packed, slice(2, 4))
    assert two.prompts == [(4, 4, 9, 31, 7), (5, 17, 3)] and two.prompt_of_B == [0, 1]
    model = adapted()
    whole, _ = completion_logps(model, packed, 1.0)
    some, _ = completion_logps(model, two, 1.0)
    assert np.allclose(np.array(some), np.array(whole)[2:4, :7], atol=1e-5)


def test_rows_of_one_repacked_batch_score_alike():
    model, packed = adapted(), pack(rollouts(), np.ones(5))
    everything = rows_of(packed, slice(None))
    assert everything.prompts == packed.prompts
    a, b = (np.array(completion_logps(model, p, 1.0)[0]) for p in (packed, everything))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "qwen3_5", "mamba2", "lfm2"])
def test_recomputed_blocks_give_the_same_gradients_and_are_themselves_again(name):
    """Dense, sliding windows, and hybrids with a state."""
    model = zoo_model(name)
    packed = pack(rollouts(zoo.VOCABULARY), np.ones(5))
    before = [type(b) for b in blocks(model)]
    wanted = graded(completion_logps, model, packed)
    weights = dict(tree_flatten(model.trainable_parameters()))
    with recomputing(blocks(model)):
        assert [type(b) for b in blocks(model)] != before
        found = graded(completion_logps, model, packed)
    assert [type(b) for b in blocks(model)] == before
    assert all(model_weight is weights[n] for n, model_weight in weights.items())
    same(found, wanted)


def test_recomputing_is_for_one_model_and_can_be_off():
    one, other = tiny(), tiny()
    plain = type(blocks(one)[0])
    with recomputing(blocks(one)):
        assert type(blocks(one)[0]) is not plain and type(blocks(other)[0]) is plain
        with recomputing(blocks(other), on=False):
            assert type(blocks(other)[0]) is plain
    with pytest.raises(ZeroDivisionError), recomputing(blocks(one)):
        _ = 1 / 0
    assert type(blocks(one)[0]) is plain


@pytest.mark.parametrize("at_once", [True, False])
def test_recomputed_blocks_drop_out_the_same_entries(at_once):
    """In SFT; the stream of random numbers goes on as it would have."""
    model = tiny(bits=4)
    attach(model, init="gaussian", dropout=0.3)
    models.split_head(model), models.vocabulary_size(model)  # both try it, and draw
    batch = sft.pack([Text((5, 17, 3, 44, 60, 2), 1), Text((8, 1, 90), 2)])

    def run(on):
        mx.random.seed(3)
        with sft.in_training(model), recomputing(blocks(model), on=on, at_once=at_once):
            loss, grads = nn.value_and_grad(model, sft.mean_loss)(model, *batch)
        found = {n: np.array(g) for n, g in tree_flatten(grads)}
        return np.array(loss), mx.random.uniform(shape=(3,)).tolist(), found

    plain, again = run(False), run(True)
    assert plain[0] == again[0] and plain[1] == again[1]
    assert all(np.array_equal(again[2][n], g) for n, g in plain[2].items())


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_a_run_with_grad_checkpoint_ends_in_the_same_adapter(method, tmp_path):
    rows = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def trained(on):
        loaded = models.load("demo")
        attach(loaded.model)
        e = config.from_text(
            f"{{model: demo, method: {method}, iters: 2, batch_size: 2, learning_rate: 1e-3,"
            f" task: countdown, data: {tmp_path}, grad_checkpoint: {on},"
            " grpo: {group_size: 4}, rollout: {max_tokens: 8}}"
        )
        refuse(e)
        if method == "sft":
            texts, _ = training_texts(loaded, list(enumerate(rows)), "", limit=99, mask_prompt=True)
            steps = sft.train(loaded, texts, e, optimizer_of(e), Clock(), lambda *_: None)
        else:
            task = load_task("countdown")
            steps = grpo.train(loaded, task, e, optimizer_of(e), Clock(), lambda *_: None)
        assert len(list(steps)) == 2
        return dict(tree_flatten(loaded.model.trainable_parameters()))

    plain, again = trained("false"), trained("true")
    assert any(mx.any(v).item() for n, v in plain.items() if n.endswith("lora_b"))
    for name, value in plain.items():
        assert np.array_equal(np.array(value), np.array(again[name])), name


MEMORY = """
import sys
import mlx_lora, mlx.core as mx, mlx.nn as nn, numpy as np
from mlx_lora import cpu
from mlx_lora.adapter.attach import attach, blocks
from mlx_lora.footprint import counted
from mlx_lora.recompute import recomputing
from mlx_lora.rl.logprobs import completion_logps, pack
from mlx_lora.types import Rollout
from tests import tiny
vocabulary, length, layers, again = map(int, sys.argv[1:])
tokens = [t % 90 for t in range(3 * length)]
tiny.COMMON.update(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=4096)
model = tiny.tiny("qwen3", bits=4)
cpu.accelerate(model)
attach(model, rank=4)

def peak(count):
    rows = [Rollout(tuple(range(20)), tuple(tokens[:count]), (-1.0,) * count, "", True)]
    packed = pack(rows, np.ones(1))
    def objective(model):
        return completion_logps(model, packed, 1.0)[0].sum()
    def step():
        with recomputing(blocks(model), on=bool(again)):
            mx.eval(nn.value_and_grad(model, objective)(model))
    return counted(step)

peak(2)
print(peak(length), peak(3 * length))
"""


def peaks(vocabulary, tokens, layers=2, again=0):
    """Peak bytes of scoring and gradient at two lengths, in a process where nothing else lives."""
    asked = [sys.executable, "-c", MEMORY, *map(str, (vocabulary, tokens, layers, again))]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    return tuple(map(int, done.stdout.split()))


def test_memory_of_a_large_vocabulary_does_not_grow_with_the_tokens():
    """Three times the tokens: the logits alone would be two more times 4 · tokens · V."""
    vocabulary_, tokens = 100_000, 100
    short, long = peaks(vocabulary_, tokens)
    assert long - short < 0.5 * (2 * tokens) * 4 * vocabulary_
    assert long < 8 * vocabulary.CHUNK_BYTES["cpu"]


@pytest.mark.slow
def test_recomputing_takes_less_memory_the_deeper_the_model():
    kept, again = (peaks(96, 200, layers=8, again=on)[1] for on in (0, 1))
    assert again < 0.5 * kept


def test_packing_pads_on_the_right_and_masks():
    packed = pack(rollouts(), np.ones(5))
    assert packed.tokens == 21 and packed.mask_BT.shape == (5, 7)
    at_N, place_BT = logprobs.real_tokens(packed.mask_BT)
    assert len(at_N) == 21 and place_BT[1].tolist() == [4] + [21] * 6
