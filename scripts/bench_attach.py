"""What does our attach cost beyond mlx-lm's own, on a 7B-shaped model of 224 layers?

The frozen weights are packed zeros that all layers share, so that the model fits anywhere: attach
reads their shapes only. Both sides end with every new array evaluated. Writes figures/bench_attach.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from matplotlib.figure import Figure
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_lora  # noqa: F401
from mlx_lora import cpu
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.runlog import environment

OUT = Path(__file__).resolve().parents[1] / "figures/bench_attach.json"
WIDTH, INNER, BLOCKS, RANK = 4096, 11008, 32, 16
SHAPES = {"q_proj": (WIDTH, WIDTH), "k_proj": (WIDTH, WIDTH), "v_proj": (WIDTH, WIDTH),
          "o_proj": (WIDTH, WIDTH), "gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH),
          "down_proj": (WIDTH, INNER)}  # fmt: skip
INITS = ("zero", "orthonormal", "split_support", "tiny_scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {"mlx-lm": [], **{init: [] for init in INITS}}
    for _ in range(repeats):  # taken in turns, so that a slow minute hits all of them
        seconds["mlx-lm"].append(timed(theirs))
        for init in INITS:
            seconds[init].append(timed(lambda model, init=init: ours(model, init)))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    beyond = {init: median[init] - median["mlx-lm"] for init in INITS}
    document = {
        "question": (__doc__ or "").splitlines()[0],
        "layers": BLOCKS * len(SHAPES),
        "rank": RANK,
        "repeats": repeats,
        "median_seconds": median,
        "seconds_beyond_mlx_lm": beyond,
        "environment": environment(blas=cpu.mode()),
    }
    OUT.write_text(json.dumps(document, indent=2) + "\n")
    draw(median)
    for name, value in median.items():
        print(f"{name:14} {value:6.3f} s")


class Block(nn.Module):
    """One block: seven frozen 4-bit layers over the same packed zeros."""

    def __init__(self, packed: dict[tuple[int, int], nn.Module]) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            layer = nn.QuantizedLinear(64, 8, bias=False)
            layer.update(packed[shape].parameters())
            setattr(self, name, layer)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        packed = {}
        for out_dims, in_dims in set(SHAPES.values()):
            packed[out_dims, in_dims] = nn.QuantizedLinear(in_dims, out_dims, bias=False)
        self.layers = [Block(packed) for _ in range(BLOCKS)]
        self.freeze()


def timed(attaching) -> float:
    model = Model()
    mx.eval(model.parameters())
    begin = time.perf_counter()
    attaching(model)
    mx.eval(model.parameters())
    mx.synchronize()
    elapsed = time.perf_counter() - begin
    assert len(lora_layers(model)) == BLOCKS * len(SHAPES)
    return elapsed


def theirs(model: nn.Module) -> None:
    linear_to_lora_layers(model, -1, {"rank": RANK, "scale": 2.0, "dropout": 0.0})


def ours(model: nn.Module, init: str) -> None:
    attach(model, rank=RANK, scale=2.0, init=init)


def draw(median: dict[str, float]) -> None:
    figure = Figure(figsize=(8, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    names = list(median)
    colours = ["grey" if n == "mlx-lm" else "steelblue" for n in names]
    bars = axes.barh(names[::-1], [median[n] for n in names[::-1]], color=colours[::-1])
    axes.bar_label(bars, [f"{median[n]:.2f} s" for n in names[::-1]], padding=4)
    axes.set_xlabel("seconds to attach to 224 layers of a 7B model, rank 16")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
