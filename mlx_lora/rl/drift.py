"""How far the model has moved from its base, on what it writes itself."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapter.attach import lora_layers, switched_off
from mlx_lora.rl.logprobs import completion_logps, pack
from mlx_lora.rl.losses import k3
from mlx_lora.types import Group

ROWS = 64  # completions scored at a time


def kl_to_base(model: nn.Module, groups: Sequence[Group]) -> float:
    """KL(model ‖ base) in nats a token: mean of r - 1 - ln r, r = base's over model's probability.

    Over the tokens of these groups, which the model has sampled at temperature 1. The base is the
    model with its adapter switched off; without an adapter the KL is 0.
    """
    if not lora_layers(model):
        return 0.0
    rows = [r for g in groups for r in g.rollouts]
    total, tokens = 0.0, 0
    for begin in range(0, len(rows), ROWS):
        part = rows[begin : begin + ROWS]
        packed = pack(part, np.zeros(len(part)))
        logps_BT, _ = completion_logps(model, packed, 1.0, gradient=False)
        with switched_off(model):
            base_BT, _ = completion_logps(model, packed, 1.0, gradient=False)
            mx.eval(logps_BT, base_BT)
        total += float((k3(logps_BT, base_BT) * packed.mask_BT).sum())
        tokens += packed.tokens
    return total / tokens
