"""From one adapter, SFT takes the steps of mlx_lm.lora: same rows, same losses, same weights."""

import functools
import json
import types
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.trainer import train as train_theirs
from mlx_lm.tuner.utils import build_schedule
from mlx_lm.utils import load_tokenizer

from mlx_lora import batches, cpu, lessons, models, sft, sources
from mlx_lora.adapter.attach import attach
from mlx_lora.models import Loaded
from mlx_lora.optimizers import CLASSES, optimizer_of
from mlx_lora.runlog import Clock
from mlx_lora.schema import Stage
from tests import tiny

TOLERANCE = 1e-5


class Heard(TrainingCallback):
    """The losses that mlx-lm reports."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.losses.append(train_info["train_loss"])


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """MLX as it comes, on both sides."""
    monkeypatch.setattr(cpu, "_mode", "plain")
    monkeypatch.setitem(tiny.COMMON, "vocab_size", 1024)


@functools.cache
def tokenizer():
    """Of the embedded model, for the tiny ones too."""
    return load_tokenizer(models.DEMO_FOLDER)


def fresh(name: str) -> Loaded:
    """A model with an adapter that is the same at each call."""
    cpu.settle()
    if name == "demo":
        loaded = models.load("demo")
    else:
        loaded = replace(tiny.tiny_loaded(name, bits=4), tokenizer=tokenizer())
    attach(loaded.model, rank=4, scale=8.0, seed=1)
    loaded.model.eval()
    return loaded


def weights(loaded: Loaded) -> dict[str, mx.array]:
    return dict(tree_flatten(loaded.model.trainable_parameters()))


def theirs(loaded: Loaded, e: Stage, folder) -> list[float]:
    """The losses of mlx-lm's own data, batches and loop."""
    names = ("data", "mask_prompt", "train", "test", "prompt_feature", "completion_feature")
    args = types.SimpleNamespace(**{n: getattr(e, n) for n in names})
    train, valid, _ = load_dataset(args, loaded.tokenizer)
    rate = build_schedule(dict(e.lr_schedule)) if e.lr_schedule else e.learning_rate
    options = e.optimizer_config.get(e.optimizer, {})
    np.random.seed(e.seed)
    train_theirs(
        loaded.model,
        getattr(optim, CLASSES[e.optimizer])(learning_rate=rate, **options),
        CacheDataset(train),
        CacheDataset(valid),
        TrainingArgs(
            batch_size=e.batch_size,
            iters=e.iters,
            val_batches=e.val_batches,
            steps_per_eval=e.steps_per_eval,
            steps_per_report=1,
            max_seq_length=e.max_seq_length,
            grad_accumulation_steps=e.grad_accumulation_steps,
            adapter_file=str(folder / "adapters.safetensors"),
        ),
        training_callback=(heard := Heard()),
    )
    return heard.losses


def ours(loaded: Loaded, e: Stage) -> list[float]:
    found = {s: lessons.lessons_of(loaded, p, e).texts for s, p in sources.sources_of(e).items()}
    seen: list[float] = []
    steps = sft.train(
        loaded,
        found["train"],
        e,
        optimizer_of(e),
        Clock(),
        lambda step, metrics: seen.append(metrics["loss"]),
        valid=found.get("valid", ()),
    )
    for _ in steps:
        pass
    return seen


def rows(kind: str, count: int) -> str:
    """JSONL whose rows differ in length, some with one key more, which mlx-lm sorts by."""
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        words = " ".join(f"{n} ducks" for n in rng.integers(0, 30, rng.integers(1, 4)))
        row: dict[str, object] = {"text": words}
        if kind == "completions":
            row = {"prompt": words, "completion": f"It is {number}."}
        if kind == "chat":
            said = [("user", words), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "No.")]
            row = {"messages": [{"role": r, "content": c} for r, c in said]}
        lines.append(json.dumps(row | ({"note": 1} if number % 5 == 0 else {})))
    return "".join(f"{line}\n" for line in lines)


def compared(name: str, kind: str, tmp_path, **keys) -> tuple[float, float]:
    """Largest difference of a loss, and of a weight after the last step."""
    for split, count in (("train", 15), ("valid", 5)):
        (tmp_path / f"{split}.jsonl").write_text(rows(kind, count))
    plain = {"iters": 20, "batch_size": 2, "learning_rate": 1e-2, "steps_per_eval": 6, "seed": 3}
    e = Stage(data=str(tmp_path), val_batches=1, **plain | keys)  # type: ignore[arg-type]
    a, b = fresh(name), fresh(name)
    one, two = ours(a, e), theirs(b, e, tmp_path)
    assert len(one) == len(two) == e.iters and np.ptp(one) > 0.05 and len(set(one)) > 3
    apart = max(mx.abs(x - weights(b)[n]).max().item() for n, x in weights(a).items())
    return float(np.abs(np.subtract(one, two)).max()), apart


SETTINGS = {
    "text": {},
    "completions": {"mask_prompt": True, "max_seq_length": 14},
    "chat": {"grad_accumulation_steps": 3, "mask_prompt": True},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_twenty_losses_of_a_tiny_model_are_those_of_mlx_lm(kind, tmp_path, capsys):
    loss, weight = compared("qwen3", kind, tmp_path, **SETTINGS[kind])
    assert loss <= TOLERANCE and weight <= TOLERANCE


@pytest.mark.slow
def test_twenty_losses_of_the_embedded_model_are_those_of_mlx_lm(tmp_path, capsys):
    loss, weight = compared("demo", "completions", tmp_path)
    assert loss <= TOLERANCE and weight <= TOLERANCE


OPTIMIZERS = {
    "adam": {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 8], "warmup": 2}},
    "adamw": {"optimizer_config": {"adamw": {"weight_decay": 0.1}}},
    "sgd": {"optimizer_config": {"sgd": {"momentum": 0.9}}},
    "muon": {"lr_schedule": {"name": "step_decay", "arguments": [1e-3, 0.5, 2]}},
    "adafactor": {"optimizer_config": {"adafactor": {"relative_step": False}}},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_takes_the_steps_of_mlx_lm(optimizer, tmp_path, capsys):
    keys = {"optimizer": optimizer, "iters": 4, **OPTIMIZERS[optimizer]}
    loss, weight = compared("qwen3", "text", tmp_path, **keys)
    assert loss <= TOLERANCE and weight <= TOLERANCE


def test_its_order_is_asked_for_where_the_file_asks_nothing_else():
    assert Stage().order == "mlx_lm" and Stage().padding_limit == 2048
    assert Stage(epochs=1.0).order == "shuffled"
    sampled = Stage(rejection_sampling={})  # type: ignore[arg-type]
    assert sampled.order == "shuffled" and sampled.padding_limit is None
    e = Stage(batch_size=4, iters=9, steps_per_eval=2)
    drawn = [list(rows) for rows, _ in zip(batches.as_mlx_lm(11, e), range(6), strict=False)]
    assert sorted(drawn[:2]) == sorted(drawn[2:4]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
