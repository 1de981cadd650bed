"""Packed rows: every text is learnt as if it were alone, or the model is refused."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora import cpu, packing, sft
from mlx_lora.adapter.attach import attach, blocks
from mlx_lora.batches import batches, best_fit, pack, pack_rows
from mlx_lora.config import from_text
from mlx_lora.data import Text
from mlx_lora.errors import ConfigError, ModelError
from mlx_lora.models import Loaded
from mlx_lora.recompute import recomputing
from mlx_lora.schema import Stage
from tests.tiny import tiny

TEXTS = [
    Text(tuple(1 + (first * 7 + i * i) % 90 for i in range(length)), start)
    for first, length, start in ((1, 6, 3), (2, 9, 1), (3, 20, 15), (4, 5, 4), (5, 12, 6))
]


def adapted(architecture: str = "llama") -> nn.Module:
    cpu.settle()
    model = tiny(architecture, bits=4)
    attach(model, init="gaussian", init_options={"std": 0.05})
    model.eval()
    return model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gemma"])
def test_loss_and_gradient_are_those_of_the_texts_alone(architecture):
    model = adapted(architecture)
    packing.refuse_unfit(model, [t.ids for t in TEXTS[:2]])
    learn = nn.value_and_grad(model, sft.mean_loss)
    alone, alone_grads = learn(model, *pack(TEXTS))
    rows = [TEXTS[:3], TEXTS[3:]]
    together, grads = learn(model, *pack_rows(rows))
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    for (name, a), (_, b) in zip(tree_flatten(grads), tree_flatten(alone_grads), strict=True):
        assert mx.allclose(a, b, rtol=1e-3, atol=1e-5), name
    ids, at, targets, mask, _ = pack_rows(rows)
    without, _ = learn(model, ids, at, targets, mask)
    assert abs(without.item() - alone.item()) > 1e-3, "else the mask would not show"


def test_it_goes_with_recomputed_blocks():
    model, rows = adapted(), pack_rows([TEXTS[:3], TEXTS[3:]])
    learn = nn.value_and_grad(model, sft.mean_loss)
    plain, grads = learn(model, *rows)
    with recomputing(blocks(model)):
        again, same = learn(model, *rows)
    assert plain.item() == pytest.approx(again.item(), rel=1e-6)
    for (name, a), (_, b) in zip(tree_flatten(grads), tree_flatten(same), strict=True):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("architecture", ["gpt2", "mamba2"])
def test_a_model_that_cannot_is_refused(architecture, monkeypatch):
    if architecture == "mamba2":  # a state that every token before has part in
        model = adapted()
        monkeypatch.setattr(packing, "plain_cache", lambda model: False)
        words = "other state than keys and values"
    else:  # places that a later text of a row would see
        from mlx_lm.models import gpt2

        size = {"n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64}
        more = {"layer_norm_epsilon": 1e-5, "vocab_size": 96, "model_type": "gpt2"}
        mx.random.seed(0)
        model = gpt2.Model(gpt2.ModelArgs.from_dict(size | more))
        words = "reads a text differently behind another"
    with pytest.raises(ModelError, match=words):
        packing.refuse_unfit(model, [t.ids for t in TEXTS[:2]])


def test_rows_hold_what_fits_and_every_text_once():
    rows = best_fit(TEXTS, 24)
    assert all(sum(len(t.ids) for t in row) <= 24 for row in rows)
    assert sorted(t.ids for row in rows for t in row) == sorted(t.ids for t in TEXTS)
    e = Stage(sft={"packing": True}, batch_size=2, max_seq_length=24)  # type: ignore[arg-type]
    drawn = next(batches(TEXTS, e))
    assert len(drawn) == 2 and {len(row) for row in drawn} <= {len(row) for row in rows}


def test_it_trains():
    from mlx_lora.optimizers import optimizer_of
    from mlx_lora.runlog import Clock

    e = Stage(
        sft={"packing": True},  # type: ignore[arg-type]
        batch_size=1, iters=12, max_seq_length=32, learning_rate=3e-2, val_batches=-1,
    )  # fmt: skip
    loaded, seen = Loaded(adapted(), None, {}, "tiny", None, False), []  # type: ignore[arg-type]
    steps = sft.train(
        loaded, TEXTS, e, optimizer_of(e), Clock(), lambda s, m: seen.append(m), valid=TEXTS[:2]
    )
    assert list(steps) == list(range(12))
    losses = [m["loss"] for m in seen]
    assert np.mean(losses[-3:]) < 0.85 * np.mean(losses[:3])
    assert seen[-1]["valid_loss"] < 0.85 * seen[0]["valid_loss_before"]


def test_what_mlx_lm_has_not_is_not_asked_of_packing():
    with pytest.raises(ConfigError, match=r"sft\.order: mlx_lm does not go with packing"):
        from_text("sft: {packing: true, order: mlx_lm}")
