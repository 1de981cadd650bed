"""The decode loop: a batch of rows whose free places are taken by rows that wait.

The host looks at what was drawn every few steps. Only there does the batch change: rows that ended
leave, and rows of waiting prompts come in, so that the batch neither waits for its longest row nor
shrinks to a width at which a step costs as much as a wide one.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import cpu
from mlx_lora.caches import Bucket, Layers, Sit, forked, joined, nobody, picked, prefilled
from mlx_lora.models import Split, split_head
from mlx_lora.runlog import Clock
from mlx_lora.sampling import Drawer, uniforms

LOOK_EVERY = 8  # decode steps between looks on a GPU, where each costs a wait for it
STEP = 32  # rows: on a GPU fewer are hardly quicker, 4-bit products amortise little
# On a CPU every row costs, but each change of the batch costs a copy of what stays, and prompts are
# read quickest many at a time.
LEAVE = 1 / 4  # of the rows, on a CPU: so many have ended when they leave and nobody comes in
FILL = {"cpu": 1 / 2, "gpu": 1 / 4}  # of the width: so much is free when waiting rows come in


@dataclass
class Row:
    """A completion in the making."""

    prompt: int  # its place in the batch of prompts
    key: str  # of its random numbers
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False  # by an EOS or a stop string
    ended: bool = False  # so, or by its length


@dataclass(frozen=True)
class Live:
    """Rows that decode together. Their hidden states [B, D] are those after the last token."""

    rows: list[Row]
    hidden_BD: mx.array
    layers: Layers


def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rows: Iterable[Row],
    *,
    width: int,
    max_tokens: int,
    drawer: Drawer,
    closes: Callable[[list[int]], bool],
    ended: Callable[[Row], None],
    sit: Sit = nobody,
    clock: Clock | None = None,
) -> None:
    """Write all rows to their ends, `width` at a time; `ended` hears of each when it does.

    `closes` says of the ids so far whether the last one finishes the completion. Rows of one prompt
    follow each other. `sit` hears, before each forward pass, which prompts its rows are of.
    `clock` gets the rows `prefill` and `decode`.
    """
    split, waiting, live = split_head(model), deque(rows), None
    clock = clock or Clock()
    opened: dict[int, tuple[Bucket, int]] = {}
    while waiting or live:
        if fills(alive(live), len(waiting), width):
            free = min(width - alive(live), len(waiting))
            entering = [waiting.popleft() for _ in range(free)]
            with clock.measure("prefill", kind="step"):
                live = admitted(model, prompts, live, entering, opened, sit)
                mx.eval(live.hidden_BD)
            opened = {p: place for p, place in opened.items() if waiting and p == waiting[0].prompt}
        assert live is not None, "something waits or lives"
        with clock.measure("decode", kind="step"):
            sit([row.prompt for row in live.rows])
            ids_B = written(split, live, max_tokens, drawer, closes, ended)
            live = onward(split, live, ids_B, fills(alive(live), len(waiting), width), sit)


def alive(live: Live | None) -> int:
    return sum(not row.ended for row in live.rows) if live else 0


def fills(rows: int, waiting: int, width: int) -> bool:
    """Whether waiting rows should come in: there is room for many at once, or for all."""
    room = max(1, int(width * FILL["cpu" if cpu.active() else "gpu"]))
    return waiting > 0 and width - rows >= min(waiting, room)


def leave(alive: int, rows: int) -> bool:
    """Whether ended rows should leave although nobody takes their places."""
    if cpu.active():
        return rows - alive >= LEAVE * rows
    return math.ceil(alive / STEP) < math.ceil(rows / STEP)


def admitted(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    live: Live | None,
    entering: list[Row],
    opened: dict[int, tuple[Bucket, int]],
    sit: Sit,
) -> Live:
    """The batch with rows that come in after those that are there.

    `opened` keeps the prefilled prompts: one may have more rows than there is room for.
    """
    new = [p for p in dict.fromkeys(row.prompt for row in entering) if p not in opened]
    read = prefilled(model, [prompts[p] for p in new], lambda part: sit([new[i] for i in part]))
    opened.update(zip(new, read, strict=True))
    hidden_BD, layers = forked([opened[row.prompt] for row in entering])
    if live is None:
        return Live(entering, hidden_BD, layers)
    layers = joined([live.layers, layers], [len(live.rows), len(entering)])
    return Live([*live.rows, *entering], mx.concatenate([live.hidden_BD, hidden_BD]), layers)


def written(
    split: Split,
    live: Live,
    max_tokens: int,
    drawer: Drawer,
    closes: Callable[[list[int]], bool],
    ended: Callable[[Row], None],
) -> mx.array:
    """Decode until the next look and write what was drawn into the rows.

    Returns the last ids [B], which the model has not read yet.
    """
    open_rows = [row for row in live.rows if not row.ended]
    steps = min(1 if cpu.active() else LOOK_EVERY, max_tokens - min(len(r.ids) for r in open_rows))
    keys, places = [r.key for r in live.rows], [len(r.ids) for r in live.rows]
    hidden_BD, drawn = live.hidden_BD, []
    for step in range(steps):
        if step:
            hidden_BD = split.body(drawn[-1][0][:, None], cache=live.layers)[:, -1, :]
        uniform_B = mx.array(uniforms(keys, [t + step for t in places]))
        drawn.append(drawer(split.head(hidden_BD).astype(mx.float32), uniform_B))
        mx.async_eval(*drawn[-1])
    for ids_B, logps_B in drawn:
        for row, token, logp in zip(live.rows, ids_B.tolist(), logps_B.tolist(), strict=True):
            if not row.ended:
                row.ids.append(token)
                row.logps.append(logp)
                row.finished = closes(row.ids)
                row.ended = row.finished or len(row.ids) == max_tokens
    for row in open_rows:
        if row.ended:
            ended(row)
    return drawn[-1][0]


def onward(split: Split, live: Live, ids_B: mx.array, make_room: bool, sit: Sit) -> Live | None:
    """The batch after its last ids are read, without ended rows where that pays; None if empty."""
    stay = [place for place, row in enumerate(live.rows) if not row.ended]
    if not stay:
        return None
    rows, layers = live.rows, live.layers
    if len(stay) < len(rows) and (make_room or leave(len(stay), len(rows))):
        index = mx.array(stay)
        for place, layer in enumerate(layers):  # in place: the old cache goes as the new one comes
            (layers[place],) = picked([layer], index, len(rows))
        ids_B = ids_B[index]
        rows = [rows[place] for place in stay]
        sit([row.prompt for row in rows])
    return Live(rows, split.body(ids_B[:, None], cache=layers)[:, -1, :], layers)
