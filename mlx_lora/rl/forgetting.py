"""What training moves besides the reward: how far the policy is, and what it forgets."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_lora.check.metrics import perplexity
from mlx_lora.check.probes import Probes
from mlx_lora.check.reading import surprise
from mlx_lora.check.sides import Side
from mlx_lora.generate import generate
from mlx_lora.models import Loaded
from mlx_lora.optimizers import Metrics
from mlx_lora.rl.logprobs import completion_logps, pack, reference_logps
from mlx_lora.rl.losses import k3, masked_mean
from mlx_lora.rl.rollout import stops
from mlx_lora.rl.update import wants_kl
from mlx_lora.runlog import Clock
from mlx_lora.schema import Stage
from mlx_lora.types import Sample, Task

PROMPTS = 16  # whose completions the KL is measured on


def looking(
    loaded: Loaded, task: Task, e: Stage, plain: Probes, clock: Clock
) -> Callable[[int], Metrics]:
    """What is measured after a step: every `monitor.every` steps, after the first and the last.

    The KL to the reference on completions of the policy's own, the perplexity on plain texts.
    """
    samples = task.load("train", PROMPTS, e.seed)

    def look(step: int) -> Metrics:
        if not wants_kl(e, step):
            return {}
        with clock.measure("monitor", kind="step"):
            nll = surprise(Side(loaded), plain)["nll"]
            return {"kl": kl_to_reference(loaded, task, e, samples), "perplexity": perplexity(nll)}

    return look


def kl_to_reference(loaded: Loaded, task: Task, e: Stage, samples: Sequence[Sample]) -> float:
    """Mean k3 over the tokens of one sampled completion of each problem, in nats a token.

    The same random numbers every time, so that a difference is the policy's.
    """
    rows = generate(
        loaded,
        [s.prompt for s in samples],
        purpose="kl",
        max_tokens=e.rollout.max_tokens,
        temperature=1.0,
        seed=e.seed,
        stop=stops(task) if e.rollout.stop is None else e.rollout.stop,
        width=e.rollout.width,
    )
    packed = pack([row for (row,) in rows], np.zeros(len(rows)))
    logps_BT, _ = completion_logps(loaded.model, packed, 1.0, gradient=False)
    reference_BT = reference_logps(loaded.model, packed, 1.0)
    gaps_BT = mx.where(packed.mask_BT > 0, k3(logps_BT, reference_BT), 0.0)
    return float(masked_mean(gaps_BT, packed.mask_BT))
