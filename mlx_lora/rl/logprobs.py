"""Log-probabilities of completion tokens under the policy and under its reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapter.attach import reference
from mlx_lora.generate import prefill
from mlx_lora.models import pad_right, plain_cache, split_head
from mlx_lora.numerics import entropy, log_softmax
from mlx_lora.types import Rollout


@dataclass(frozen=True)
class Packed:
    """Rollouts as arrays. Shapes: B rows, T completion tokens, right-padded."""

    prompts: Sequence[tuple[int, ...]]  # each distinct prompt once
    prompt_of_B: Sequence[int]
    targets_BT: mx.array
    mask_BT: mx.array
    sampler_logps_BT: mx.array
    advantages_B: mx.array

    @property
    def tokens(self) -> int:
        return int(np.array(self.mask_BT).sum())


def pack(rollouts: Sequence[Rollout], advantages_B: np.ndarray) -> Packed:
    """Every completion token counts, EOS included; padding never does."""
    place_of = {p: i for i, p in enumerate(dict.fromkeys(r.prompt_ids for r in rollouts))}
    width = max(len(r.ids) for r in rollouts)
    targets = np.zeros((len(rollouts), width), np.int32)
    mask, logps = (np.zeros((len(rollouts), width), np.float32) for _ in range(2))
    for row, r in enumerate(rollouts):
        targets[row, : len(r.ids)] = r.ids
        mask[row, : len(r.ids)] = 1
        logps[row, : len(r.ids)] = r.logps
    return Packed(
        list(place_of),
        [place_of[r.prompt_ids] for r in rollouts],
        mx.array(targets),
        mx.array(mask),
        mx.array(logps),
        mx.array(advantages_B.astype(np.float32)),
    )


def completion_logps(
    model: nn.Module, packed: Packed, temperature: float
) -> tuple[mx.array, mx.array]:
    """Log-probabilities [B, T] of the completion tokens and the entropy [B, T] there, in nats.

    The vocabulary is met at completion positions only, and a prompt is computed once for its whole
    group: the completions run as one block over its forked cache. Where caches do not fork
    (sliding windows, state spaces) every row runs in full.
    """
    whole = completion_hidden if plain_cache(model) else completion_hidden_in_full
    hidden_BTD = whole(model, packed)
    logits_BTV = split_head(model).head(hidden_BTD).astype(mx.float32) / temperature
    logps_BTV = log_softmax(logits_BTV)
    logps_BT = mx.take_along_axis(logps_BTV, packed.targets_BT[..., None], axis=-1)[..., 0]
    return logps_BT, entropy(logps_BTV)


def completion_hidden(model: nn.Module, packed: Packed) -> mx.array:
    """Hidden states [B, T, D] that predict the completion tokens, prompts shared."""
    first_BD, cache = prefill(model, packed.prompts, packed.prompt_of_B)
    if packed.targets_BT.shape[1] == 1:
        return first_BD[:, None, :]
    rest_BTD = split_head(model).body(packed.targets_BT[:, :-1], cache=cache)
    return mx.concatenate([first_BD[:, None, :], rest_BTD], axis=1)


def completion_hidden_in_full(model: nn.Module, packed: Packed) -> mx.array:
    """The same by one forward of every whole row."""
    targets, mask = np.array(packed.targets_BT), np.array(packed.mask_BT)
    prompts = [packed.prompts[p] for p in packed.prompt_of_B]
    rows = [
        [*p, *t[: int(m.sum())].tolist()] for p, t, m in zip(prompts, targets, mask, strict=True)
    ]
    ids_BL, _ = pad_right(rows)
    start_B1 = mx.array([[len(p) - 1] for p in prompts])
    at_BT = mx.minimum(start_B1 + mx.arange(targets.shape[1]), ids_BL.shape[1] - 2)
    hidden_BLD = split_head(model).body(ids_BL[:, :-1])
    return mx.take_along_axis(hidden_BLD, at_BT[..., None], axis=1)


def reference_logps(model: nn.Module, packed: Packed, temperature: float) -> mx.array:
    """The same under the reference policy, which needs no second model in memory."""
    with reference(model):
        logps_BT, _ = completion_logps(model, packed, temperature)
        mx.eval(logps_BT)
    return logps_BT
