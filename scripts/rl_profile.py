"""A process of bench_rl.py: where the time of our step goes, part by part and function by function.

    python rl_profile.py FOLDER OPTIONS

MLX is lazy, so that a clock around the forward pass of a gradient would show nothing: each part is
run to its end on its own, medians. The last line of stdout is the JSON.
"""

import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx_lora  # noqa: F401  first: on Linux it puts OpenBLAS in place before MLX loads

import mlx.core as mx  # isort: skip
import numpy as np
import rl_setting as setting
from rl_worker import our_config

from mlx_lora import config, cpu, models
from mlx_lora.adapter.attach import attach
from mlx_lora.bases import is_matrix
from mlx_lora.generate import generate
from mlx_lora.optimizers import optimizer_of
from mlx_lora.rl.describe import describe
from mlx_lora.rl.grpo import problems, sample
from mlx_lora.rl.learner import Fixed, apply, gradients, policy_logps
from mlx_lora.rl.logprobs import reference_logps
from mlx_lora.rl.rollout import rewards
from mlx_lora.rl.update import lessons, rule_of, update
from mlx_lora.runlog import Clock
from mlx_lora.tasks import load_task

FUNCTIONS = 12


def main() -> None:
    folder, o = Path(sys.argv[1]), json.loads(sys.argv[2])
    file = folder / f"profile_{o['bits']}.json"
    file.write_text(json.dumps(our_config(folder, o)))
    e = config.load(file).first
    assert e.task is not None
    loaded, task = models.load(e.model), load_task(e.task.name, e.task.options)
    attach(loaded.model, rank=setting.RANK, scale=setting.SCALE)
    model, optimizer, rule = loaded.model, optimizer_of(e), rule_of(e)
    samples = problems(task, setting.PROBLEMS, e.seed)
    prompts = [s.prompt for s in samples[: o["prompts"]]]
    _, groups = sample(loaded, task, samples, e, 0, Clock())
    packed, _ = lessons(groups, rewards(groups), e)
    assert packed is not None
    ref_BT = reference_logps(model, packed, rule.temperature)

    def written(tokens: int) -> Callable[[], Any]:
        options = {"group": o["group"], "purpose": "bench", "max_tokens": tokens}
        return lambda: generate(loaded, prompts, **options)

    def whole() -> None:
        _, groups = sample(loaded, task, samples, e, 0, Clock())
        describe(groups, rewards(groups))
        packed, _ = lessons(groups, rewards(groups), e)
        assert packed is not None
        update(model, packed, rule, optimizer, e, 0)

    def learnt(optimizer_too: bool) -> Callable[[], Any]:
        def learn() -> None:
            measured, grads = gradients(model, packed, rule, Fixed(ref_BT=ref_BT))
            if optimizer_too:
                apply(model, optimizer, measured, grads, e.grpo.max_grad_norm)
            else:
                mx.eval(measured, grads)

        return learn

    seconds = medians(
        {
            "one token": written(1),
            "rollout": written(o["tokens"]),
            "reference": lambda: reference_logps(model, packed, rule.temperature),
            "forward": lambda: policy_logps(model, packed, rule.temperature),
            "gradient": learnt(False),
            "update": learnt(True),
            "step": whole,
            "products a decode step": products(model, o["prompts"] * o["group"]),
            "products a forward pass": products(model, packed.tokens),
        },
        o["repeats"],
    )
    parts = {
        "rollout: prefill and first token": seconds["one token"],
        "rollout: decode": seconds["rollout"] - seconds["one token"],
        "learn: log-probabilities of the reference": seconds["reference"],
        "learn: forward": seconds["forward"],
        "learn: backward": seconds["gradient"] - seconds["forward"],
        "learn: clip and Adam": seconds["update"] - seconds["gradient"],
    }
    parts["rewards, packing and the rest"] = seconds["step"] - sum(parts.values())
    scoring = seconds["products a forward pass"]
    floors = {
        "rollout: decode": (o["tokens"] - 1) * seconds["products a decode step"],
        "learn: log-probabilities of the reference": scoring,
        "learn: forward": scoring,
        "learn: backward": scoring,
    }
    found = {"path": cpu.mode(), "seconds": seconds, "parts": parts, "products": floors}
    print(json.dumps(found | {"functions": functions(whole)}))


def medians(works: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each piece of work, taken in turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            mx.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def products(model: Any, count: int) -> Callable[[], None]:
    """The frozen layers' products with `count` inputs, in NumPy: the least a pass can take."""
    linears = [m for _, m in model.named_modules() if is_matrix(m)]
    weights = [np.array(models.dense_weight(m)) for m in (*linears, model.model.embed_tokens)]
    inputs = {w.shape[1]: np.ones((count, w.shape[1]), np.float32) for w in weights}

    def work() -> None:
        for w_OI in weights:
            np.matmul(inputs[w_OI.shape[1]], w_OI.T)

    return work


def functions(work: Callable[[], Any]) -> list[dict[str, Any]]:
    """Those in which one piece of work spends most time of its own, what they call left out."""
    profile = cProfile.Profile()
    profile.runcall(work)
    stats: Any = pstats.Stats(profile)
    rows = sorted(stats.stats.items(), key=lambda row: -row[1][2])[:FUNCTIONS]
    return [
        {
            "function": called(*place),
            "calls": calls,
            "seconds": own,
            "share": own / stats.total_tt,
        }
        for place, (_, calls, own, _, _) in rows
    ]


def called(file: str, line: int, name: str) -> str:
    """cpu_layers.py:product, or a built-in without its address."""
    return name.strip("<>").split(" at 0x")[0] if file == "~" else f"{Path(file).name}:{name}"


if __name__ == "__main__":
    main()
