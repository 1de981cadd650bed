"""Which rows a step of SFT learns from, and those rows as arrays.

mlx-lm's own order is the default, so that a run that moves over from it takes the same steps.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_lora.data import Text, draw
from mlx_lora.schema import Stage

Row = Sequence[Text]  # one text, or several packed into one row
Packed = tuple[mx.array, ...]  # ids_BT, at_BS, targets_BS, mask_BS, and segments_BT where packed
WIDTH = 32  # rows are padded to a multiple of this, so that few shapes are compiled ...
SCORED = 8  # ... and so are the tokens of a row that count
PADDING = 0  # the id that mlx-lm fills rows up with


def batches(texts: Sequence[Text], e: Stage, valid: int = 0) -> Iterator[list[Row]]:
    """The rows of step 0, of step 1 ... without end: a function of (seed, step)."""
    if e.sft.packing:
        packed = best_fit(texts, e.max_seq_length)
        for step in itertools.count():
            yield draw(packed, step, e.batch_size, e.seed)
    elif e.order == "mlx_lm":
        for rows in as_mlx_lm(len(texts), e, valid):
            yield [(texts[i],) for i in rows]
    else:
        for step in itertools.count():
            yield [(text,) for text in draw(texts, step, e.batch_size, e.seed)]


def as_mlx_lm(count: int, e: Stage, valid: int = 0) -> Iterator[range]:
    """Indices of each step's rows as `mlx_lm.lora` draws them at this seed.

    Neighbours make a batch, batches are shuffled anew every epoch, and the rows that fill no whole
    batch are never seen. Each of its validations draws from the same stream of random numbers, if
    there are `valid` rows to validate on.
    """
    stream = np.random.RandomState(e.seed % 2**32)
    queue: list[int] = []
    for step in itertools.count():
        queue = queue or stream.permutation(count // e.batch_size).tolist()[::-1]
        first = queue.pop() * e.batch_size
        if valid and e.val_batches and validates_at(e, step):
            stream.permutation(valid // e.batch_size)
        yield range(first, first + e.batch_size)


def validates_at(e: Stage, step: int) -> bool:
    """Whether mlx-lm validates before this step."""
    return step == 0 or (step + 1) % e.steps_per_eval == 0 or step + 1 == e.iters


def best_fit(texts: Sequence[Text], limit: int) -> list[Row]:
    """Texts in rows of up to `limit` tokens, longest first, each where it leaves the least room.

    >>> rows = best_fit([Text((1,) * n, 1) for n in (3, 5, 2, 6)], 8)
    >>> [[len(t.ids) for t in row] for row in rows]
    [[6, 2], [5, 3]]
    """
    rows: list[list[Text]] = []
    rooms: list[tuple[int, int]] = []  # free tokens and number of each row, sorted
    for text in sorted(texts, key=lambda t: -len(t.ids)):
        size = len(text.ids)
        place = bisect.bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, at = rooms.pop(place)
        else:
            room, at = limit, len(rows)
            rows.append([])
        rows[at].append(text)
        bisect.insort(rooms, (room - size, at))
    return list(rows)


def pack(texts: Sequence[Text], *, limit: int | None = None) -> Packed:
    """Texts as arrays: ids [B, T], and of the S tokens that count the place before and the token.

    Padding is on the right, where a causal model does not look, and masked. With a `limit` the
    loss is mlx-lm's at that max_seq_length: the first padding token behind a row counts too.
    """
    longest = max(len(t.ids) for t in texts)
    if limit is None:
        width = rounded_up(longest - 1, WIDTH)
        last = [len(t.ids) for t in texts]
    else:
        width = min(rounded_up(longest, WIDTH), limit - 1)
        last = [min(len(t.ids), width) + 1 for t in texts]
    counts = [max(0, end - t.start) for t, end in zip(texts, last, strict=True)]
    scored = rounded_up(max(1, *counts), SCORED)
    ids = np.full((len(texts), width + 1), PADDING, np.int32)
    at, targets = (np.zeros((len(texts), scored), np.int32) for _ in range(2))
    mask = np.zeros((len(texts), scored), np.float32)
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        ids[row, : len(text.ids)] = text.ids
        at[row, :count] = np.arange(text.start - 1, text.start - 1 + count)
        targets[row, :count] = ids[row, text.start : text.start + count]
        mask[row, :count] = 1
    return mx.array(ids[:, :-1]), mx.array(at), mx.array(targets), mx.array(mask)


def pack_rows(rows: Sequence[Row]) -> Packed:
    """Rows of several texts as `pack` makes them of one, and of which text each token is.

    Each text is learnt as if it were alone: see packing.py. Padding is a text of its own.
    """
    width = rounded_up(max(sum(len(t.ids) for t in row) for row in rows), WIDTH)
    counts = [sum(max(0, len(t.ids) - t.start) for t in row) for row in rows]
    scored = rounded_up(max(1, *counts), SCORED)
    ids, segments = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    at, targets = (np.zeros((len(rows), scored), np.int32) for _ in range(2))
    mask = np.zeros((len(rows), scored), np.float32)
    for row, texts in enumerate(rows):
        begin = found = 0
        for number, text in enumerate(texts, start=1):
            end, count = begin + len(text.ids), max(0, len(text.ids) - text.start)
            ids[row, begin:end], segments[row, begin:end] = text.ids, number
            part = slice(found, found + count)
            at[row, part] = np.arange(begin + text.start - 1, begin + text.start - 1 + count)
            targets[row, part], mask[row, part] = text.ids[text.start :], 1
            begin, found = end, found + count
    return tuple(map(mx.array, (ids, at, targets, mask, segments)))


def rounded_up(count: int, to: int) -> int:
    """
    >>> rounded_up(33, 32), rounded_up(32, 32)
    (64, 32)
    """
    return -(-count // to) * to
