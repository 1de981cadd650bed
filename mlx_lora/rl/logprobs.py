"""Log-probabilities of completion tokens under the policy and under its reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.adapter.attach import blocks, reference
from mlx_lora.caches import company, prefill
from mlx_lora.cpu_head import layer_of
from mlx_lora.models import pad_right, plain_cache, split_head, vocabulary_size
from mlx_lora.numerics import entropy, log_softmax
from mlx_lora.recompute import recomputed
from mlx_lora.rl.vocabulary import joined, rows_of_a_chunk, score_and_recompute, score_tokens
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


def rows_of(packed: Packed, rows: slice | Sequence[int]) -> Packed:
    """Some rows, with the prompts that they need, as wide as the longest of them."""
    chosen = np.arange(len(packed.prompt_of_B))[rows]
    prompt_of_B = [packed.prompt_of_B[row] for row in chosen]
    place_of = {p: i for i, p in enumerate(dict.fromkeys(prompt_of_B))}
    kept = mx.array(chosen)
    width = int(np.array(packed.mask_BT)[chosen].sum(axis=1).max())
    return Packed(
        [packed.prompts[p] for p in place_of],
        [place_of[p] for p in prompt_of_B],
        packed.targets_BT[kept, :width],
        packed.mask_BT[kept, :width],
        packed.sampler_logps_BT[kept, :width],
        packed.advantages_B[kept],
    )


def completion_logps(
    model: nn.Module, packed: Packed, temperature: float, *, gradient: bool = True
) -> tuple[mx.array, mx.array]:
    """Log-probabilities [B, T] of the completion tokens and the entropy [B, T] there, in nats.

    Both are 0 where the mask is. The vocabulary is met at completion tokens only, a few at a time,
    and a prompt is computed once for its whole group: the completions run as one block over its
    forked cache. Where that does not go (sliding windows, state spaces) every row runs in full.
    `gradient=False` saves the work that only a gradient needs, where none is taken.
    """
    split = split_head(model)
    if split.body is model:
        return whole_logps(model, packed, temperature)
    hidden = completion_hidden if forks(model, packed) else completion_hidden_in_full
    hidden_BTD = hidden(model, packed)
    at_N, place_BT = real_tokens(packed.mask_BT)
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[at_N]
    targets_N = packed.targets_BT.reshape(-1)[at_N]
    if learns_outside_blocks(model):
        scores = score_and_recompute(model, split.head, hidden_ND, targets_N, temperature)
    else:
        size, layer = vocabulary_size(model), layer_of(model)
        scores = score_tokens(
            split.head, hidden_ND, targets_N, temperature, size, layer=layer, gradient=gradient
        )
    logps_BT, entropy_BT = (mx.pad(x_N, (0, 1))[place_BT] for x_N in scores)
    return logps_BT, entropy_BT


def learns_outside_blocks(model: nn.Module) -> bool:
    """Whether an adapter sits on the head, or on an embedding that may be the head too."""
    inside = {id(x) for b in blocks(model) for _, x in tree_flatten(b.trainable_parameters())}
    return any(id(x) not in inside for _, x in tree_flatten(model.trainable_parameters()))


def forks(model: nn.Module, packed: Packed) -> bool:
    """Whether the cache of these prompts can be forked, and gradients go through."""
    lengths = set(map(len, packed.prompts))
    return plain_cache(model) and (len(lengths) == 1 or company(model) == "mixed")


def real_tokens(mask_BT: mx.array) -> tuple[mx.array, mx.array]:
    """Places [N] of the tokens that count among all B·T, and of each [B, T] its n; padding's is N.

    >>> [x.tolist() for x in real_tokens(mx.array([[1, 0], [1, 1]]))]
    [[0, 2, 3], [[0, 3], [1, 2]]]
    """
    real = np.array(mask_BT).reshape(-1) > 0
    place = np.where(real, np.cumsum(real) - 1, real.sum())
    return mx.array(np.flatnonzero(real)), mx.array(place.reshape(mask_BT.shape))


def whole_logps(model: nn.Module, packed: Packed, temperature: float) -> tuple[mx.array, mx.array]:
    """The same for a model whose head cannot be told apart: a few rows at a time, made twice."""
    width = packed.targets_BT.shape[1]
    longest = max(map(len, packed.prompts)) + width
    count = max(1, rows_of_a_chunk(vocabulary_size(model)) // longest)
    found: list[list[mx.array]] = []
    for start in range(0, len(packed.prompt_of_B), count):
        part = rows_of(packed, slice(start, start + count))

        def scored(targets_BT: mx.array, part: Packed = part) -> tuple[mx.array, ...]:
            logits_BTV = completion_hidden_in_full(model, part).astype(mx.float32) / temperature
            logps_BTV = log_softmax(logits_BTV)
            logps_BT = mx.take_along_axis(logps_BTV, targets_BT[..., None], axis=-1)[..., 0]
            return logps_BT, entropy(logps_BTV)

        made = recomputed(model, scored, part.targets_BT)
        padding = [(0, 0), (0, width - part.targets_BT.shape[1])]
        found.append([mx.pad(x_BT * part.mask_BT, padding) for x_BT in made])
    logps_BT, entropy_BT = joined(found)
    return logps_BT, entropy_BT


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
        logps_BT, _ = completion_logps(model, packed, temperature, gradient=False)
        mx.eval(logps_BT)
    return logps_BT
