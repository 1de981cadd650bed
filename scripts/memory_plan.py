"""Is the memory that `train --dry-run` foretells what a step takes?

Three random models whose shapes the plan was not fitted to, each a GRPO step's rollout, in which a
third of the rows end early, and the gradient with every completion at its longest; in a process of
its own on each CPU path, with and without grad_checkpoint. Writes figures/memory_plan.json. `--fit`
prints the weights of arrays that memory.py should hold, from other shapes.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "figures/memory_plan.json"
PATHS, TWO = ("numpy", "plain"), ("false", "true")
SHAPES = {  # config, prompt, completion, prompts, group
    "qwen3, wide": (
        {"model_type": "qwen3", "hidden_size": 320, "num_hidden_layers": 3, "vocab_size": 3000,
         "intermediate_size": 896, "num_attention_heads": 10, "num_key_value_heads": 2},
        (60, 40, 4, 6),
    ),
    "llama, deep, long prompt": (
        {"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 10, "vocab_size": 800,
         "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 4},
        (250, 50, 2, 8),
    ),
    "llama, large vocabulary": (
        {"model_type": "llama", "hidden_size": 192, "num_hidden_layers": 4, "vocab_size": 60_000,
         "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2},
        (90, 30, 4, 8),
    ),
}  # fmt: skip
KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size")  # fmt: skip
FITTING = [  # KEYS; prompt, completion, prompts, group
    ((2, 128, 192, 4, 2, 32, 500), (40, 24, 2, 8)),
    ((6, 128, 192, 4, 2, 32, 500), (40, 24, 2, 8)),
    ((4, 256, 192, 4, 2, 32, 500), (40, 24, 2, 8)),
    ((4, 128, 768, 4, 2, 32, 500), (40, 24, 2, 8)),
    ((4, 128, 192, 8, 4, 32, 500), (40, 24, 2, 8)),
    ((4, 128, 192, 4, 2, 32, 500), (200, 24, 1, 8)),
    ((4, 128, 192, 4, 2, 32, 500), (20, 150, 1, 4)),
    ((4, 128, 384, 4, 4, 64, 500), (64, 64, 4, 2)),
    ((3, 192, 512, 6, 2, 32, 500), (100, 60, 2, 4)),
    ((4, 128, 192, 4, 2, 32, 500), (40, 24, 2, 32)),
    ((4, 128, 192, 4, 2, 32, 50_000), (40, 24, 2, 8)),
    ((2, 128, 192, 4, 2, 32, 100_000), (40, 50, 1, 4)),
    ((4, 128, 192, 4, 2, 32, 20_000), (200, 50, 1, 8)),
    ((4, 128, 384, 8, 8, 64, 500), (200, 40, 4, 8)),
]
ALL = SHAPES | {
    f"fit {i}": ({"model_type": "llama", **dict(zip(KEYS, widths, strict=True))}, step)
    for i, (widths, step) in enumerate(FITTING)
}
SMALL = 4e6  # bytes of logits that hide behind the rest
COMMON = {
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "quantization": {"group_size": 64, "bits": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", nargs=2, metavar=("SHAPE", "CHECKPOINT"))
    parser.add_argument("--fit", action="store_true")
    asked = parser.parse_args()
    if asked.fit:
        for path in PATHS:
            names = [f"fit {i}" for i in range(len(FITTING))]
            print(path, fit([run(path, name, again) for name in names for again in TWO]))
        return
    if asked.worker:
        print(json.dumps(measured(asked.worker[0], asked.worker[1] == "true")))
        return
    rows = []
    for path in PATHS:
        for name in SHAPES:
            for again in TWO:
                rows.append({k: v for k, v in run(path, name, again).items() if k != "arrays"})
                print(rows[-1])
    from mlx_lora.runlog import environment

    about = {"question": (__doc__ or "").splitlines()[0], "environment": environment()}
    errors = [abs(r[f"{k}_error"]) for r in rows for k in ("rollout", "learning")]
    OUT.write_text(
        json.dumps(about | {"largest_error": max(errors), "rows": rows}, indent=2) + "\n"
    )
    print(f"largest error {max(errors):.0%}")


def run(path: str, name: str, again: str) -> dict[str, Any]:
    """`measured` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", name, again],
        env=os.environ | {"MLX_LORA_CPU": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """memory.Weights of one path but for `scoring_again`, and the largest error of each fit."""

    def solved(table: list[tuple[list[float], float]]) -> tuple[list[float], float]:
        return least_squares([[x / y for x in parts] for parts, y in table])

    held, again, decoding = [], [], []
    for row in rows:
        a = row["arrays"]
        layers, inside, logits = a["layers"], a["inside"], a["logits"]
        if row["grad_checkpoint"] and logits < SMALL:
            again.append(([*inside, layers * inside[0], layers * inside[4]], a["learning"]))
        if not row["grad_checkpoint"]:
            held.append(([*(layers * x for x in inside), inside[0], logits], a["learning"]))
            decoding.append((a["decoding"], a["rollout"]))
    return {"held, outside, scoring": solved(held), "again, kept": solved(again)} | {
        "decoding": solved(decoding)
    }


def least_squares(table: list[list[float]]) -> tuple[list[float], float]:
    """Weights, none negative, that bring every row closest to 1, and the largest distance."""
    import numpy as np

    a_NW = np.array(table)
    scale_W = np.linalg.norm(a_NW, axis=0) + 1e-30
    a_NW /= scale_W
    gram, aim, w_W = a_NW.T @ a_NW, a_NW.sum(axis=0), np.zeros(a_NW.shape[1])
    for _ in range(5000):
        for j in range(len(w_W)):
            w_W[j] = max(0.0, w_W[j] - (gram[j] @ w_W - aim[j]) / max(gram[j, j], 1e-30))
    return [round(float(w), 2) for w in w_W / scale_W], float(np.abs(a_NW @ w_W - 1).max())


def measured(name: str, again: bool) -> dict[str, Any]:
    """MB of whole peaks, weights included, foretold and measured."""
    from mlx_lora import cpu  # isort: skip  (chooses the CPU path before MLX is imported)
    import mlx.core as mx
    import numpy as np

    from mlx_lora import config as configs
    from mlx_lora import models
    from mlx_lora.adapter.attach import attach
    from mlx_lora.footprint import counted
    from mlx_lora.memory import foretell, skeleton

    cpu.settle()
    shape, (prompt, length, prompts, group) = ALL[name]
    config = {**COMMON, **shape}
    e = configs.from_text(
        f"{{model: random, method: grpo, task: countdown, batch_size: {prompts},"
        f" grad_checkpoint: {str(again).lower()}, grpo: {{group_size: {group}}},"
        f" rollout: {{max_tokens: {length}}}}}"
    )
    foretold = foretell(config, e, prompt)
    arrays, merged = arrays_of(config, e, prompt)
    mx.random.seed(0)
    model = skeleton(config, e)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    cpu.accelerate(model)
    attach(model, rank=e.lora_parameters.rank, keys=e.lora_parameters.keys)
    mx.eval(model(mx.array([[1, 2]])))  # the dense copies are made at first use
    ending = config["vocab_size"] // (2 * length) if name in SHAPES else 0
    loaded = models.Loaded(model, Words(ending), config, "random", Path("random"), False)
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(1, 500, prompt - i))) for i in range(prompts)]
    found: dict[str, Any] = {"path": cpu.mode(), "shape": name, "grad_checkpoint": again}
    always = foretold.base + foretold.copies + foretold.adapter
    for part, work in works(loaded, e, texts, length).items():
        work()
        wanted, got = always + getattr(foretold, part), mx.get_active_memory() + counted(work)
        found |= {f"{part}_foretold_mb": wanted / 1e6, f"{part}_measured_mb": got / 1e6}
        found[f"{part}_error"] = wanted / got - 1
        arrays[part] = got - always - (merged if part == "rollout" else 0)
    return found | {"arrays": arrays}


def works(loaded: Any, e: Any, texts: list[str], length: int) -> dict[str, Any]:
    """The two parts of a step, the second on what the first has sampled."""
    import mlx.core as mx
    import numpy as np

    from mlx_lora.adapter.attach import blocks
    from mlx_lora.generate import generate
    from mlx_lora.recompute import recomputing
    from mlx_lora.rl.learner import gradients
    from mlx_lora.rl.logprobs import pack
    from mlx_lora.rl.update import rule_of

    rows: list[Any] = []

    def rollout() -> None:
        options = {"group": e.grpo.group_size, "max_tokens": length, "purpose": "rollout"}
        rows[:] = generate(loaded, texts, width=e.rollout.width, **options)

    def learning() -> None:
        longest = max(len(r.ids) for rows_G in rows for r in rows_G)
        assert longest == length, "the plan is for the longest"
        flat = [filled(r, length) for rows_G in rows for r in rows_G]
        packed = pack(flat, np.ones(len(flat)))
        with recomputing(blocks(loaded.model), on=e.grad_checkpoint):
            mx.eval(gradients(loaded.model, packed, rule_of(e)))

    return {"rollout": rollout, "learning": learning}


def arrays_of(config: dict[str, Any], e: Any, prompt: int) -> tuple[dict[str, Any], int]:
    """Sizes of the arrays that the plan weighs, and of merged copies, in bytes."""
    from mlx_lora import memory

    model = memory.skeleton(config, e)
    kept, sizes = memory.cache_of(model), memory.sizes_of(config, model)
    copies = memory.dense_copies(model)
    inside, logits = memory.learning_arrays(sizes, kept, e, prompt)
    decoding = memory.decoding_arrays(sizes, kept, e, prompt)
    memory.adapted(model, e)
    found = {"layers": sizes.layers, "inside": inside, "logits": logits, "decoding": decoding}
    return found, memory.merged_copies(model, sizes) if copies else 0


def filled(r: Any, length: int) -> Any:
    """A rollout made as long as it may be."""
    missing = length - len(r.ids)
    return replace(r, ids=(*r.ids, *(1,) * missing), logps=(*r.logps, *(-1.0,) * missing))


class Words:
    """Numbers as tokens, some of which end a text."""

    chat_template = None

    def __init__(self, ending: int) -> None:
        self.eos_token_ids = range(ending)

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


if __name__ == "__main__":
    main()
