"""What do scoring and its gradient hold in memory, and what does the plain form hold and cost?

A random 4-bit Qwen3 of 4 layers and width 128 with a tied head, prompt of 400 tokens. Ours: the
completion's tokens meet the vocabulary a chunk at a time (`recomputed`: with grad_checkpoint too).
Plain: all logits of prompt and completion in float32. All score and differentiate the same row in
one process; peaks are above what is resident before (weights, and the dense copy of them that the
CPU's fast paths keep). NumPy's own arrays, which MLX does not count, are counted beside. Writes
figures/scoring_memory.json and .png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "figures/scoring_memory.json"
SHAPES = ((1_024, 100), (16_384, 100), (151_936, 50), (151_936, 100), (151_936, 200))
PATHS = ("openblas", "numpy", "plain")
PROMPT = 400
LABELS = {"plain": "all logits", "ours": "ours", "recomputed": "ours, grad_checkpoint"}
LIMIT_MB, PEER_MB = 200, 1053  # asked for at V 151,936 and 100 tokens; a peer's peak there


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", nargs=2, type=int, metavar=("V", "T"))
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    if asked.worker:
        vocabulary, tokens = asked.worker
        print(json.dumps(measured(vocabulary, tokens, asked.repeats)))
        return
    rows = []
    for path in PATHS:
        for vocabulary, tokens in SHAPES:
            command = [sys.executable, __file__, "--worker", str(vocabulary), str(tokens)]
            done = subprocess.run(
                [*command, "--repeats", str(asked.repeats)],
                env=os.environ | {"MLX_LORA_CPU": path},
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append(json.loads(done.stdout))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
    from mlx_lora.runlog import environment

    about = {"question": (__doc__ or "").splitlines()[0], "environment": environment()}
    about |= {"model": "qwen3, 4 layers, width 128, 4 bit, tied head", "prompt": PROMPT}
    about |= {"limit_mb": LIMIT_MB, "peer_mb": PEER_MB}
    OUT.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    draw(rows)


def measured(vocabulary: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Peaks in MB, median seconds, and the largest difference of gradients, of both forms."""
    from mlx_lora import cpu  # isort: skip  (chooses the CPU path before MLX is imported)
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    from mlx.utils import tree_flatten

    from mlx_lora.adapter.attach import attach, blocks
    from mlx_lora.recompute import recomputing
    from mlx_lora.rl.logprobs import completion_logps, pack
    from mlx_lora.types import Rollout

    model = qwen3(vocabulary)
    packed_mb = mx.get_active_memory() / 1e6
    cpu.accelerate(model)
    attach(model, rank=8, init="gaussian", init_options={"std": 0.05})
    rng = np.random.default_rng(0)
    prompt, ids = (tuple(rng.integers(0, vocabulary, n).tolist()) for n in (PROMPT, tokens))
    packed = pack([Rollout(prompt, ids, (-1.0,) * tokens, "", True)], np.ones(1))
    ids_1L = mx.array([[*prompt, *ids]])
    weight_T = mx.random.normal((tokens,), key=mx.random.key(1))

    def ours(model: nn.Module) -> mx.array:
        return (completion_logps(model, packed, 1.0)[0][0] * weight_T).sum()

    def plain(model: nn.Module) -> mx.array:
        logps_LV = nn.log_softmax(model(ids_1L[:, :-1])[0].astype(mx.float32))
        at_L1 = ids_1L[0, 1:, None]
        return (mx.take_along_axis(logps_LV, at_L1, axis=-1)[-tokens:, 0] * weight_T).sum()

    mx.eval(model(ids_1L[:, :2]))  # the dense copies are made at first use
    found: dict[str, Any] = {"path": cpu.mode(), "vocabulary": vocabulary, "tokens": tokens}
    found |= {"weights_mb": mx.get_active_memory() / 1e6, "packed_mb": packed_mb}
    grads = {}
    for name, objective in (("ours", ours), ("recomputed", ours), ("plain", plain)):

        def step(objective: Any = objective, on: bool = name == "recomputed") -> Any:
            with recomputing(blocks(model), on=on):
                return nn.value_and_grad(model, objective)(model)

        (_, grads[name]), seconds = timed(step, repeats)
        found |= {f"{name}_{k}": v for k, v in peaks(step).items()}
        found[f"{name}_seconds"] = seconds
    found["time_over_plain"] = found["ours_seconds"] / found["plain_seconds"]
    flat = {name: [np.array(g) for _, g in tree_flatten(grads[name])] for name in grads}
    largest = max(float(np.abs(g).max()) for g in flat["plain"])
    for name in ("ours", "recomputed"):
        pairs = zip(flat[name], flat["plain"], strict=True)
        found[f"{name}_gradient_error"] = (
            max(float(np.abs(a - b).max()) for a, b in pairs) / largest
        )
    return found


def qwen3(vocabulary: int) -> Any:
    """The model, frozen and packed."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import qwen3

    from mlx_lora import cpu

    cpu.settle()
    mx.random.seed(0)
    model = qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=128,
            num_hidden_layers=4,
            intermediate_size=384,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rms_norm_eps=1e-6,
            vocab_size=vocabulary,
            rope_theta=1e6,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    )
    nn.quantize(model, group_size=64, bits=4)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


def timed(step: Any, repeats: int) -> tuple[Any, float]:
    """What a step gives, and its median seconds."""
    import mlx.core as mx

    seconds, found = [], None
    for _ in range(repeats):
        begin = time.perf_counter()
        found = step()
        mx.eval(found)
        seconds.append(time.perf_counter() - begin)
    return found, statistics.median(seconds)


def peaks(step: Any) -> dict[str, float]:
    """MB above what was there: MLX's arrays, and MLX's and NumPy's together."""
    import mlx.core as mx

    from mlx_lora.footprint import counted

    both = counted(lambda: mx.eval(step()))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step())
    return {"peak_mb": both / 1e6, "mlx_mb": (mx.get_peak_memory() - before) / 1e6}


def draw(rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    names = [f"{r['path']}, V {r['vocabulary']:,}, {r['tokens']} tokens" for r in rows]
    for place, row in enumerate(rows):
        for offset, name, colour in (
            (0.27, "plain", "lightgrey"),
            (0, "ours", "steelblue"),
            (-0.27, "recomputed", "navy"),
        ):
            label = LABELS[name] if place == 0 else None
            axes.barh(place + offset, row[f"{name}_peak_mb"], 0.27, color=colour, label=label)
    axes.axvline(LIMIT_MB, color="black", linestyle=":", linewidth=1)
    axes.axvline(PEER_MB, color="firebrick", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("peak MB over weights; dotted: asked for (black), a peer (red)")
    axes.legend(fontsize=7)
    axes.set_title("Scoring and gradient of one sequence, prompt 400", loc="left")
    figure.savefig(OUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
