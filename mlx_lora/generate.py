"""Batched decoding: many prompts, several completions each, a fixed number of rows at a time.

Each prompt is prefilled once and its cache forked to the group. Sampled ids are kept as drawn, with
the log-probability of the distribution that drew them. A row's randomness depends on (purpose,
seed, step, prompt number, member) alone.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.nn as nn

from mlx_lora import cpu
from mlx_lora.adapter.dora import frozen_norms
from mlx_lora.caches import Sit, company, nobody
from mlx_lora.decode import Row, decode
from mlx_lora.models import Loaded, encode_prompt, eos_ids, plain_cache
from mlx_lora.runlog import Clock
from mlx_lora.sampling import drawer_of, row_key
from mlx_lora.types import Rollout

WIDTH = 128  # rows decoded together


def generate(
    loaded: Loaded,
    prompts: Sequence[Any],
    *,
    purpose: str,
    group: int = 1,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    step: int = 0,
    numbers: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    width: int = WIDTH,
    done: Callable[[int, list[Rollout]], None] | None = None,
    sit: Sit = nobody,
    clock: Clock | None = None,
) -> list[list[Rollout]]:
    """`group` completions of each prompt. Temperature 0 is greedy (log-probabilities then at 1).

    A completion ends with an EOS, or with the token in which a stop string becomes complete; both
    stay. `numbers` are the prompts' numbers in the random keys (0, 1, 2 ... by default), so that a
    part of a batch draws what the whole would. `done(p, rollouts)` hears of each prompt, on this
    thread, as soon as all its completions have ended. `sit`, `clock`: see decode.
    """
    prompts_ids = [encode_prompt(loaded.tokenizer, prompt) for prompt in prompts]
    numbers = range(len(prompts)) if numbers is None else numbers
    rows_PG = [
        [Row(p, row_key(purpose, seed, step, number, g)) for g in range(group)]
        for p, number in enumerate(numbers)
    ]
    eos = eos_ids(loaded.tokenizer)
    found: dict[int, list[Rollout]] = {}

    def ended(row: Row) -> None:
        rows = rows_PG[row.prompt]
        if row.prompt not in found and all(r.ended for r in rows):
            ids = prompts_ids[row.prompt]
            found[row.prompt] = [rollout_of(loaded.tokenizer, ids, r, eos) for r in rows]
            if done:
                done(row.prompt, found[row.prompt])

    drawer, closes = drawer_of(temperature, top_p, top_k), closing(loaded.tokenizer, eos, stop)
    with frozen_norms(loaded.model), cpu.decoding(loaded.model):
        for rows in parties(loaded.model, prompts_ids, rows_PG, width):
            decode(
                loaded.model,
                prompts_ids,
                rows,
                width=width,
                max_tokens=max_tokens,
                drawer=drawer,
                closes=closes,
                ended=ended,
                sit=sit,
                clock=clock,
            )
    return [found[p] for p in range(len(prompts))]


def parties(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rows_PG: Sequence[Sequence[Row]],
    width: int,
) -> list[list[Row]]:
    """The rows that may share a batch: all, or where the model takes no such batch, fewer.

    Prompts of one length follow each other: they are prefilled together, and need little padding.
    A batch whose rows all begin together and read equally much is one that every usual cache takes.
    """
    longest_first = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))
    rows = [row for p in longest_first for row in rows_PG[p]]
    lengths = {len(prompts[row.prompt]) for row in rows}
    if len(lengths) == 1 and len(rows) <= width and plain_cache(model):
        return [rows]
    if company(model) == "mixed":
        return [rows]
    if company(model) == "none":
        return [[row] for row in rows]
    alike = [[row for row in rows if len(prompts[row.prompt]) == length] for length in lengths]
    return [part[i : i + width] for part in alike for i in range(0, len(part), width)]


def closing(
    tokenizer: Any, eos: frozenset[int], stop: Sequence[str]
) -> Callable[[list[int]], bool]:
    """Whether the last of these ids ends the completion: an EOS, or the end of a stop string.

    Only a token that shows the last character of a stop string can complete it (or one that shows
    no whole character), and then a bounded tail is decoded, as a stop may begin inside a token.
    """
    tail = 2 * max((len(text.encode()) for text in stop), default=0) + 8

    @cache
    def may_complete(token: int) -> bool:
        shown = tokenizer.decode([token])
        odd = not shown.strip() or "\ufffd" in shown
        return odd or any(text[-1] in shown or text[-1].isspace() for text in stop)

    def closes(ids: list[int]) -> bool:
        if ids[-1] in eos:
            return True
        if not stop or not may_complete(ids[-1]):
            return False
        shown = tokenizer.decode(ids[-tail:])
        return any(text in shown for text in stop)

    return closes


def rollout_of(tokenizer: Any, prompt: Sequence[int], row: Row, eos: frozenset[int]) -> Rollout:
    """The finished record. Its EOS stays among the ids: ending is a decision to learn."""
    shown = row.ids[:-1] if row.ids[-1] in eos else row.ids
    text = tokenizer.decode(shown)
    return Rollout(tuple(prompt), tuple(row.ids), tuple(row.logps), text, row.finished)
