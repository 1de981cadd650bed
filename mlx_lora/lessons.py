"""What SFT learns from, validates on and is tested on, as token ids."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from mlx_lora import data, models, packing
from mlx_lora.batches import best_fit
from mlx_lora.data import Text, context_of
from mlx_lora.errors import ConfigError
from mlx_lora.formats import lesson_of
from mlx_lora.models import Loaded
from mlx_lora.prepare import Prepared
from mlx_lora.progress import watch
from mlx_lora.rl.rejection import harvest
from mlx_lora.runlog import Clock, RunLog
from mlx_lora.schema import Stage
from mlx_lora.sources import Source, shortened, sources_of
from mlx_lora.types import Task

REJECTION = "rejection_sampling"


def lessons(
    e: Stage,
    prepared: Prepared,
    task: Task | None,
    log: RunLog,
    clock: Clock,
    console: Console,
) -> tuple[dict[str, list[Text]], dict[str, Any]]:
    """Texts by split, and how they came about where the model made them."""
    loaded = prepared.loaded
    if e.rejection_sampling:
        assert task is not None, "the config requires a task for rejection sampling"
        found = {REJECTION: sampled(e, prepared, task, log, clock, console)}
        path = log.folder / f"{REJECTION}.jsonl"
        rows, limit = data.rows_of(path), e.max_seq_length
        texts, cut = data.training_texts(loaded, rows, str(path), limit=limit, mask_prompt=True)
        notes = [f"{cut} of {len(texts)} samples are longer than {limit} tokens and were cut"]
        made, notes = {"train": texts}, notes if cut else []
    else:
        with clock.measure("read data"):
            read = {s: lessons_of(loaded, parts, e) for s, parts in sources_of(e).items()}
        found, made = {}, {split: lesson.texts for split, lesson in read.items()}
        notes = [note for lesson in read.values() for note in lesson.notes]
    refuse_few(made["train"], e)
    if e.sft.packing:
        packing.refuse_unfit(loaded.model, [t.ids for t in made["train"][:2]])
    for note in (*notes, *left_out(made, e)):
        console.print(f"[yellow]Note:[/] {escape(note)}.")
    return made, found


def sampled(
    e: Stage, prepared: Prepared, task: Task, log: RunLog, clock: Clock, console: Console
) -> dict[str, int]:
    """Rejection samples in the log's folder, made now unless they are there. Returns the counts."""
    about = log.folder / f"{REJECTION}.json"
    if not about.exists():
        assert e.rejection_sampling is not None
        total = e.rejection_sampling.problems
        with clock.measure("sample"), watch(console, "rejection sampling", total) as watcher:
            made = harvest(prepared.loaded, task, e, lambda done: watcher.update(done - 1, {}))
        lines = (json.dumps(row, allow_nan=False) for row in made.rows)
        log.write_text(f"{REJECTION}.jsonl", "".join(f"{line}\n" for line in lines))
        log.write_json(about.name, made.counts())
    counts: dict[str, int] = models.read_json(about)
    console.print(
        f"Kept {counts['kept']:,} of {counts['sampled']:,} completions: {counts['correct']:,} were "
        f"correct, {counts['distinct']:,} of these whole and distinct"
    )
    return counts


def lasting(e: Stage, texts: Sequence[Text]) -> Stage:
    """The stage with its length in steps, where it was given in epochs."""
    if e.epochs is None:
        return e
    rows = len(best_fit(texts, e.max_seq_length)) if e.sft.packing else len(texts)
    return e.model_copy(update={"iters": math.ceil(e.epochs * rows / e.batch_size)})


@dataclass
class Lessons:
    """Rows as token ids, in mlx-lm's order, and what happened to them."""

    texts: list[Text]
    notes: list[str] = field(default_factory=list)


def lessons_of(loaded: Loaded, parts: Sequence[Source], e: Stage) -> Lessons:
    """The rows of a split, cut at max_seq_length or the model's context.

    ConfigError lists the rows that the chat template refuses; and where nothing is left to learn.
    """
    context = context_of(loaded)
    limit = min(e.max_seq_length, context or e.max_seq_length)
    found: list[tuple[int, Text]] = []
    problems: list[str] = []
    notes: list[str] = []
    for source in parts:
        counts = {"cut": 0, "nothing": 0, "crooked": 0}
        form = source.features.form_of(source.rows[0][1])
        assert form is not None, "sources_of has looked"
        for place, row in source.rows:
            try:
                lesson = lesson_of(
                    row, form, source.features, loaded.tokenizer, mask_prompt=e.mask_prompt
                )
            except Exception as error:  # a template refuses in Jinja's words
                problems.append(f"{place}: the chat template refuses it: {error}")
                continue
            text = lesson.text
            counts["cut"] += len(text.ids) > limit
            counts["nothing"] += text.start >= min(len(text.ids), limit)
            counts["crooked"] += not lesson.straight
            found.append((len(row), Text(text.ids[:limit], text.start)))
        notes += told(source, counts, limit, short=limit < e.max_seq_length)
        if not problems and counts["nothing"] == len(source.rows):
            problems.append(f"{source.name}: no row has a token to learn within {limit} tokens")
    if problems:
        raise ConfigError("\n".join(shortened(iter(problems))))
    if e.order == "mlx_lm" and not e.sft.packing:
        found.sort(key=lambda pair: pair[0])  # by keys of a row: what mlx-lm takes for its length
    return Lessons([text for _, text in found], notes)


def told(source: Source, counts: Mapping[str, int], limit: int, *, short: bool) -> Iterator[str]:
    """What happened to rows, in sentences."""
    whole = f"of {len(source.rows):,} rows of {source.name}"
    why = "the model's context" if short else "max_seq_length"
    if counts["cut"]:
        yield f"{counts['cut']:,} {whole} are longer than {limit} tokens ({why}) and were cut"
    if counts["nothing"]:
        yield f"{counts['nothing']:,} {whole} have no token to learn within {limit} tokens"
    if counts["crooked"]:
        yield (
            f"in {counts['crooked']:,} {whole} the chat template writes the prompt otherwise than "
            "in the whole conversation: the mask counts tokens, as mlx-lm's does"
        )


def refuse_few(texts: Sequence[Text], e: Stage) -> None:
    """ConfigError where mlx-lm's order has not one whole batch."""
    if e.order == "mlx_lm" and not e.sft.packing and len(texts) < e.batch_size:
        raise ConfigError(
            f"batch_size {e.batch_size} is more than the {len(texts)} rows there are to train on",
            "Lower batch_size, or give `sft: {order: shuffled}`, where rows come again.",
        )


def left_out(made: Mapping[str, Sequence[Text]], e: Stage) -> Iterator[str]:
    """What a run will not do with its rows, in sentences."""
    rest = len(made["train"]) % e.batch_size
    if e.order == "mlx_lm" and not e.sft.packing and rest:
        yield (
            f"{rest} of {len(made['train']):,} rows never train: in mlx-lm's order every batch is "
            "whole (`sft: {order: shuffled}` takes all)"
        )
    if e.sft.packing:
        rows = best_fit(made["train"], e.max_seq_length)
        full = sum(len(t.ids) for t in made["train"]) / (len(rows) * e.max_seq_length)
        yield f"{len(made['train']):,} texts are packed into {len(rows):,} rows, {full:.0%} full"
    if not e.rejection_sampling and not (e.val_batches and "valid" in made):
        why = "the data has no valid.jsonl" if e.val_batches else "val_batches is 0"
        yield f"there is no validation: {why}"
