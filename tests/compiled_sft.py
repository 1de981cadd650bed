"""Run as a script, with compilation really on: does a scheduled scale act inside compiled steps?"""

import contextlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_lora import config, cpu, sft
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.data import Text, draw
from mlx_lora.models import Loaded
from mlx_lora.runlog import Clock
from tests.tiny import tiny

EXPERIMENT = """
method: sft
optimizer: sgd
learning_rate: 0.5
iters: 6
batch_size: 2
lora_parameters: {rank: 4, scale: 4.0}
sft: {order: shuffled, first_padding: false}
scale_schedule: {name: linear, start: 0.1, until: 0.8}
"""
STILL = EXPERIMENT.replace("scale_schedule:", "# no schedule:")
FACTORS = [0.1 + 0.9 * min(1.0, step / 6 / 0.8) for step in range(6)]
TEXTS = [Text(tuple(range(first, first + 6)), 3) for first in (1, 7, 20, 33)]


def fresh(init: str = "zero", dropout: float = 0.0) -> Loaded:
    model = tiny("llama")
    attach(model, rank=4, scale=4.0, keys=["v_proj"], num_layers=1, init=init, dropout=dropout)
    model.eval()
    return Loaded(model, None, {}, "tiny", Path(), False)


def weights(loaded: Loaded) -> dict[str, mx.array]:
    return dict(tree_flatten(loaded.model.trainable_parameters()))


def trained(text: str = EXPERIMENT, **options) -> dict[str, mx.array]:
    """By the loop of the package."""
    loaded, e = fresh(**options), config.from_text(text)
    optimizer = optim.SGD(learning_rate=e.learning_rate)
    list(sft.train(loaded, TEXTS, e, optimizer, Clock(), lambda step, metrics: None))
    return weights(loaded)


def by_hand() -> dict[str, mx.array]:
    """The same without anything of the package but the order of the texts."""
    loaded = fresh()
    optimizer = optim.SGD(learning_rate=0.5)
    for step, factor in enumerate(FACTORS):
        for layer in lora_layers(loaded.model).values():
            layer.scale = 4.0 * factor
        batch = draw(TEXTS, step, 2, 0)

        def loss(model, batch=batch):
            logits = model(mx.array([t.ids[:-1] for t in batch]))[:, 2:]
            return nn.losses.cross_entropy(
                logits, mx.array([t.ids[3:] for t in batch]), reduction="mean"
            )

        _, grads = nn.value_and_grad(loaded.model, loss)(loaded.model)
        optimizer.update(loaded.model, grads)
        mx.eval(loaded.model.parameters(), optimizer.state)
    return weights(loaded)


def apart(a: dict[str, mx.array], b: dict[str, mx.array]) -> float:
    """The largest difference of any weight."""
    return max(mx.abs(a[name] - b[name]).max().item() for name in a)


def main() -> None:
    """Prints how far apart compiled runs are from what they should equal."""
    assert cpu.mode() in ("plain", "gpu"), "the CPU's fast path does not compile"
    cpu.settle()
    expected, moved = by_hand(), {"init": "gaussian", "dropout": 0.5}
    moved_expected = trained(STILL, **moved)
    mx.enable_compile()
    traces = []
    real = sft.mean_loss

    def counted(*args):
        traces.append(1)
        return real(*args)

    sft.mean_loss = counted
    found = {"compiled": apart(trained(), expected), "traces": len(traces)}
    found["moved"] = apart(trained(STILL, **moved), moved_expected)
    sft.scale_as_array = contextlib.nullcontext  # what a Python number in the layers would do
    found["frozen"] = apart(trained(), expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
