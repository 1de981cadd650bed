"""Rows of text as token ids: what the check reads, calibration runs on, and SFT trains on.

A row is {"text": ...}, read whole, or {"prompt": ..., "completion": ...}, read from the completion
on, in the model's chat template where it has one. Other keys are left alone.
"""

import json
import random
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from mlx_lora.errors import ConfigError, ModelError
from mlx_lora.models import Loaded, encode_prompt, eos_ids

Row = Mapping[str, Any]
Item = TypeVar("Item")
POOL = 4096  # training problems kept; longer runs reshuffle them every epoch


@dataclass(frozen=True)
class Text:
    """Token ids, and the index of the first that counts: the ones before it are given."""

    ids: tuple[int, ...]
    start: int


def rows_of(path: Path) -> list[tuple[int, Row]]:
    """Line numbers and rows of a JSONL or plain text file. ConfigError names the bad line."""
    found: list[tuple[int, Row]] = []
    for number, line in lines_of(path):
        try:
            row = {"text": line.decode()} if path.suffix == ".txt" else json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}:{number}: not UTF-8: {error.reason}") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not JSON: {error.msg}") from error
        row = with_turns(row)
        if not isinstance(row, dict) or not all(isinstance(row[k], str) for k in texts_in(row)):
            raise ConfigError(f"{path}:{number}: a row is an object with strings under {NAMES}")
        found.append((number, row))
    return found


def lines_of(path: Path) -> list[tuple[int, bytes]]:
    """Numbers and bytes of the lines that hold something. ConfigError where it cannot be read.

    A line ends at a line feed alone, because JSON strings may hold U+2028; a byte order mark at the
    beginning of the file is none of its text.
    """
    try:
        lines = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    lines = [line.removesuffix(b"\r") for line in lines]
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def with_turns(row: Any) -> Any:
    """The row with a prompt of several turns as `encode_prompt` takes it, in tuples."""
    turns = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and [type(x) for x in turn] == [str, str] for turn in turns
    ):
        return row
    return {**row, "prompt": tuple((role, content) for role, content in turns)}


def texts_in(row: Mapping[str, Any]) -> set[str]:
    return {k for k in KEYS & row.keys() if not isinstance(row[k], tuple)}


KEYS = {"text", "prompt", "completion"}
NAMES = "text, prompt and completion"


def encode(row: Row, tokenizer: Any) -> Text | None:
    """The row as token ids, a completion closed by EOS. None where it holds nothing to read."""
    if "text" in row:
        ids, start = tuple(tokenizer.encode(row["text"])), 1
    elif "prompt" in row and "completion" in row:
        head = encode_prompt(tokenizer, row["prompt"])
        tail = tokenizer.encode(row["completion"], add_special_tokens=False)
        ids, start = (*head, *tail, end_of_answer(tokenizer)), len(head)
    else:
        return None
    return Text(ids, start) if len(ids) > start else None


@lru_cache(maxsize=8)
def end_of_answer(tokenizer: Any) -> int:
    """The token that ends a completion: of several EOS that which the chat template writes there.

    Llama 3, Qwen and Gemma have others for the end of a document.
    """
    eos, usual = eos_ids(tokenizer), end_of(tokenizer)
    usual = usual if usual in eos or not eos else min(eos)
    if not getattr(tokenizer, "chat_template", None):
        return usual
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=True)
    except Exception:  # a template may refuse what it likes
        return usual
    ids = whole["input_ids"] if hasattr(whole, "keys") else whole
    head = encode_prompt(tokenizer, "a")
    pairs = enumerate(zip(ids, head, strict=False))
    shared = next((i for i, (one, other) in pairs if one != other), len(head))
    return next((token for token in ids[shared:] if token in eos), usual)


def end_of(tokenizer: Any) -> int:
    """The token that ends a text. Of several that a config names the tokenizer's own, a turn's end.

    ModelError where there is none.
    """
    own, named = getattr(tokenizer, "eos_token_id", None), eos_ids(tokenizer)
    if own is None and not named:
        raise ModelError(
            "neither the tokenizer nor the config names a token that ends a text",
            "Set eos_token_id in config.json.",
        )
    return min(named) if own is None else own


def context_of(loaded: Loaded) -> int | None:
    """Tokens the model was made for, where its config says so."""
    config: Mapping[str, Any] = loaded.config.get("text_config") or loaded.config
    return config.get("max_position_embeddings")


def read(loaded: Loaded, rows: Sequence[tuple[int, Row]], source: str) -> list[Text]:
    """All rows as token ids. ConfigError lists empty and over-long ones: nothing is cut."""
    texts, problems, limit = [], [], context_of(loaded)
    for number, row in rows:
        text = encode(row, loaded.tokenizer)
        if text is None:
            problems.append(f'{source}:{number}: needs "text", or "prompt" and "completion"')
        elif limit and len(text.ids) > limit:
            problems.append(f"{source}:{number}: {len(text.ids)} tokens, the context holds {limit}")
        else:
            texts.append(text)
    if problems or not texts:
        raise ConfigError("\n".join(problems) or f"{source} is empty: there is no text in it")
    return texts


def training_texts(
    loaded: Loaded,
    rows: Sequence[tuple[int, Row]],
    source: str,
    *,
    limit: int,
    mask_prompt: bool,
) -> tuple[list[Text], int]:
    """Rows closed by EOS as mlx-lm closes them, cut at `limit` tokens, and how many were cut.

    Without `mask_prompt` every token counts but the first. ConfigError lists the rows that hold
    nothing to learn.
    """
    limit = min(limit, context_of(loaded) or limit)
    eos = eos_ids(loaded.tokenizer)
    texts, problems, cut = [], [], 0
    for number, row in rows:
        text = encode(row, loaded.tokenizer)
        if text is None:
            problems.append(f'{source}:{number}: needs "text", or "prompt" and "completion"')
            continue
        if mask_prompt and "text" in row:
            problems.append(f"{source}:{number}: mask_prompt needs a prompt, not a text")
            continue
        ids = text.ids if text.ids[-1] in eos else (*text.ids, end_of(loaded.tokenizer))
        start = text.start if mask_prompt else 1
        cut += len(ids) > limit
        texts.append(Text(ids[:limit], start))
        if start >= limit:
            problems.append(f"{source}:{number}: its prompt alone fills {limit} tokens")
    if problems or not texts:
        raise ConfigError("\n".join(problems) or f"{source} is empty: there is no text in it")
    return texts, cut


def learnable(texts: Sequence[Text]) -> list[Text]:
    """Those in which a token counts: a cut may have left a prompt alone."""
    return [text for text in texts if text.start < len(text.ids)]


def draw(items: Sequence[Item], step: int, count: int, seed: int) -> list[Item]:
    """The items of one step: a function of (seed, step), every item once per epoch."""
    found = []
    for index in range(step * count, (step + 1) * count):
        epoch, at = divmod(index, len(items))
        found.append(items[order(len(items), seed, epoch)[at]])
    return found


@lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> list[int]:
    shuffled = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(shuffled)
    return shuffled


def cycled(items: Sequence[Item], step: int, count: int, seed: int) -> list[Item]:
    """`count` different items: a function of (seed, step), every item once per epoch.

    Where `count` does not divide the set, the step that ends one epoch begins the next, and the
    new order starts with items that the step does not hold yet. ConfigError where there are fewer.
    """
    if count > len(items):
        raise ConfigError(
            f"{count:,} problems a step were asked for, and there are {len(items):,}",
            "Lower es.samples_per_generation, or give the task more problems.",
        )
    found = []
    for index in range(step * count, (step + 1) * count):
        epoch, at = divmod(index, len(items))
        found.append(items[order_without_repeats(len(items), count, seed, epoch)[at]])
    return found


@lru_cache(maxsize=2)
def order_without_repeats(size: int, count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch whose first step may have begun in the epoch before."""
    first = next(e for e in range(epoch, -1, -1) if e * size % count == 0)  # begins with a step
    found = order(size, seed, first)
    for number in range(first + 1, epoch + 1):
        shared = number * size % count  # places of the step that the epoch before has filled
        held = set(found[len(found) - shared :])
        shuffled = order(size, seed, number)
        head = [i for i in shuffled if i not in held][: count - shared if shared else 0]
        begun = set(head)
        found = head + [i for i in shuffled if i not in begun]
    return found
