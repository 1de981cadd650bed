"""What a model is asked: known-good text to read, prompts to continue."""

from collections.abc import Iterator
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

from mlx_lora.data import Row, context_of, encode, rows_of
from mlx_lora.errors import ConfigError
from mlx_lora.models import DEMO_FOLDER, Loaded, encode_prompt
from mlx_lora.types import Prompt

ASSETS = Path(__file__).parents[1] / "assets"
ROOM = 20  # tokens of a continuation, beside its prompt


@dataclass(frozen=True)
class Probes:
    """Texts as token ids with the index of the first token scored, and prompts to continue."""

    texts: list[tuple[list[int], int]]
    prompts: list[Prompt]


def read(loaded: Loaded, path: Path | None = None, *, samples: int | None = None) -> Probes:
    """Probes from a JSONL or text file; else a general set, or that of the embedded model's kind.

    At most `samples` prompts are continued; None: all.

    JSONL rows: {"text": ...} is read whole, {"prompt": ..., "completion": ...} is read from the
    completion on, {"prompt": ...} is continued; {"messages": [...]} is read from the assistant's
    last turn on, or continued where there is none. A .txt file is one text per line, read and
    continued.
    """
    if path is None:
        path = ASSETS / ("check_demo.jsonl" if speaks_demo(loaded) else "check_general.jsonl")
    texts: list[tuple[list[int], int]] = []
    prompts: list[Prompt] = []
    problems: list[str] = []
    limit = context_of(loaded)
    for number, row in spelled_rows(path, problems):
        found = encode(row, loaded.tokenizer)
        length = len(found.ids) if found else 0
        if path.suffix == ".txt":
            prompts.append(row["text"])
        elif "text" not in row and "completion" not in row:
            prompts.append(row["prompt"])
            length = len(encode_prompt(loaded.tokenizer, row["prompt"])) + ROOM
        elif not found:
            problems.append(f"{path}:{number}: a single token, of which none follows another")
        if limit and length > limit:
            problems.append(f"{path}:{number}: {length} tokens, the context holds {limit}")
        elif found:
            texts.append((list(found.ids), found.start))
    if problems:
        raise ConfigError("\n".join(problems), "Nothing is cut: shorten or leave out these rows.")
    if not texts or not prompts:
        raise ConfigError(
            f"{path}: {len(texts)} texts to read and {len(prompts)} prompts to continue; need both",
            'Rows are {"text": ...}, {"prompt": ..., "completion": ...}, {"prompt": ...} or '
            '{"messages": [...]}.',
        )
    return Probes(texts, prompts[:samples])


def foresee(path: Path | None) -> None:
    """Raise what can be known to be wrong with a file of probes before a model is loaded."""
    problems: list[str] = []
    if path is not None and not list(spelled_rows(path, problems)) and not problems:
        raise ConfigError(f"{path} is empty: there is nothing to read or to continue")
    if problems:
        raise ConfigError("\n".join(problems))


def spelled_rows(path: Path, problems: list[str]) -> Iterator[tuple[int, Row]]:
    """Line numbers and rows that can be read or continued; of others the problem is noted."""
    for number, row in rows_of(path):
        row = spelled_out(row)
        if problem := unfit(row):
            problems.append(f"{path}:{number}: {problem}")
        else:
            yield number, row


def speaks_demo(loaded: Loaded) -> bool:
    """Whether the model has the embedded one's tokenizer, as a run's base and fused models have."""
    mine, theirs = (folder / "tokenizer.json" for folder in (loaded.folder, DEMO_FOLDER))
    return mine == theirs or (mine.is_file() and cmp(mine, theirs, shallow=False))


def spelled_out(row: Row) -> Row:
    """Messages as the prompt that the assistant's last turn, if it is there, completes."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(is_turn(turn) for turn in turns):
        return row
    pairs = tuple((turn["role"], turn["content"]) for turn in turns)
    if pairs and pairs[-1][0] == "assistant":
        return {"prompt": pairs[:-1], "completion": pairs[-1][1]}
    return {"prompt": pairs}


def is_turn(turn: Any) -> bool:
    keys = ("role", "content")
    return isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in keys)


def unfit(row: Row) -> str:
    """What is wrong with a row, in words; nothing where it can be read or continued."""
    if "messages" in row:
        return "`messages` is a list of {role, content}, both texts"
    if not {"text", "prompt"} & row.keys():
        return f"needs `text`, `prompt` or `messages`, got {sorted(row)}"
    blank = [k for k in ("text", "prompt", "completion") if k in row and not has_text(row[k])]
    return f"`{blank[0]}` is empty" if blank else ""


def has_text(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)
