"""A process of bench_sft.py: one side, which takes so many steps for each line on its stdin.

    python sft_worker.py ours|theirs FOLDER OPTIONS

It answers with a line of JSON each, with the seconds of every step, and sleeps in between.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rl_worker import Talk, about

RANK, SCALE, RATE, NEVER = 8, 20.0, 1e-5, 10_000


def settings(folder: Path, o: dict[str, Any]) -> dict[str, Any]:
    """The experiment file of both sides: keys of mlx_lm.lora."""
    return {
        "model": str(folder / f"bits{o['bits']}"),
        "train": True,
        "data": str(folder / "data"),
        "seed": 0,
        "num_layers": -1,
        "batch_size": o["batch"],
        "iters": NEVER,
        "max_seq_length": o["longest"],
        "learning_rate": RATE,
        "save_every": NEVER,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
    }


class Pace:
    """Steps on request: how long each takes, and the memory they take at most."""

    def __init__(self, talk: Talk) -> None:
        self.talk, self.left, self.seconds = talk, 0, list[float]()

    def step(self, begin: float) -> None:
        """Book a step that began then."""
        import mlx.core as mx

        mx.synchronize()
        self.seconds.append(time.perf_counter() - begin)
        self.left -= 1
        if not self.left:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux in kB
            memory = {"memory": mx.get_peak_memory(), "resident_kb": resident}
            self.talk.say({"seconds": self.seconds, **memory})

    def wait(self) -> float:
        """When the next step begins: at once while some are left, else when it is asked for."""
        import mlx.core as mx

        if not self.left:
            self.left, self.seconds = self.talk.asked()["steps"], []
            mx.reset_peak_memory()
        return time.perf_counter()


def ours(talk: Talk, folder: Path, o: dict[str, Any]) -> None:
    """`mlx-lora train`, whole: only its loop waits for the word before each step."""
    from mlx_lora import cpu, config, experiment  # isort: skip  before mlx
    from rich.console import Console

    from mlx_lora import sft

    train = sft.train

    def paced(loaded: Any, texts: Any, *given: Any, **more: Any) -> Iterator[int]:
        ids = [list(text.ids) for text in texts]
        pace = Pace(talk)
        steps = train(loaded, texts, *given, **more)
        talk.say(about(loaded.model, ids) | {"path": cpu.mode()})
        while True:
            begin = pace.wait()
            yield next(steps)  # what the run does after a step is part of it
            pace.step(begin)

    sft.train = paced
    file = folder / f"run{os.getpid()}.json"  # JSON is YAML
    file.write_text(json.dumps(settings(folder, o)))
    experiment.run(config.load(file), file.with_suffix(""), Console(file=sys.stderr))


def theirs(talk: Talk, folder: Path, o: dict[str, Any]) -> None:
    """`mlx_lm.lora`, whole: only its batches wait for the word."""
    import types

    from mlx_lm import lora
    from mlx_lm.tuner import trainer

    options = lora.CONFIG_DEFAULTS | settings(folder, o)
    options |= {"steps_per_report": NEVER, "adapter_path": str(folder / f"theirs{os.getpid()}")}
    real = trainer.iterate_batches

    def paced(dataset: Any, **more: Any) -> Iterator[Any]:
        pace = Pace(talk)
        for batch in real(dataset=dataset, **more):
            begin = pace.wait()
            yield batch  # the loop evaluates everything before it wants the next batch
            pace.step(begin)

    train = lora.train

    def watched(model: Any, **more: Any) -> None:
        rows = more["train_dataset"]
        talk.say(about(model, [list(rows[i][0])[: o["longest"]] for i in range(len(rows))]))
        train(model=model, iterate_batches=paced, **more)

    lora.train = watched
    lora.run(types.SimpleNamespace(**options))


JOBS: dict[str, Callable[[Talk, Path, dict[str, Any]], None]] = {"ours": ours, "theirs": theirs}


def main() -> None:
    job, folder, options = sys.argv[1:]
    if job == "theirs" and os.environ.get("MLX_LORA_CPU") == "openblas":
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)  # before MLX, as the package does
    JOBS[job](Talk(), Path(folder), json.loads(options))


if __name__ == "__main__":
    main()
