"""What a model is asked: known-good text to read, prompts to continue."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.errors import ConfigError
from mlx_lora.models import DEMO, Loaded, encode_prompt, eos_ids

ASSETS = Path(__file__).parents[1] / "assets"
MAX_PROBE_TOKENS = 256


@dataclass(frozen=True)
class Probes:
    """Texts as token ids with the index of the first token scored, and prompts to continue."""

    texts: list[tuple[list[int], int]]
    prompts: list[str]


def read(loaded: Loaded, path: Path | None = None) -> Probes:
    """Probes from a JSONL or text file; else the embedded model's own set, or a general one.

    JSONL rows: {"text": ...} is read whole, {"prompt": ..., "completion": ...} is read from the
    completion on, {"prompt": ...} is continued. A .txt file is one text per line.
    """
    if path is None:
        path = ASSETS / ("check_demo.jsonl" if loaded.name == DEMO else "check_general.jsonl")
    texts: list[tuple[list[int], int]] = []
    prompts: list[str] = []
    for number, row in rows_of(path):
        if "text" in row:
            ids = list(loaded.tokenizer.encode(row["text"]))
            texts.append((ids[:MAX_PROBE_TOKENS], 1))
        elif "completion" in row and "prompt" in row:
            head = list(encode_prompt(loaded.tokenizer, row["prompt"]))
            tail = list(loaded.tokenizer.encode(row["completion"], add_special_tokens=False))
            tail = [*tail, min(eos_ids(loaded.tokenizer))]
            texts.append(((head + tail)[:MAX_PROBE_TOKENS], len(head)))
        elif "prompt" in row:
            prompts.append(row["prompt"])
        else:
            raise ConfigError(f"{path}:{number}: a row needs `text` or `prompt`, got {sorted(row)}")
    texts = [(ids, start) for ids, start in texts if len(ids) > start]
    if not texts or not prompts:
        raise ConfigError(
            f"{path}: {len(texts)} texts to read and {len(prompts)} prompts to continue; need both",
            'Rows are {"text": ...}, {"prompt": ..., "completion": ...} or {"prompt": ...}.',
        )
    return Probes(texts, prompts)


def rows_of(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a JSONL or plain text file. ConfigError names the bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts in {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            found += [(number, {"text": line}), (number, {"prompt": line})]
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not JSON: {error.msg}") from error
        if not isinstance(row, dict) or not all(isinstance(v, str) for v in row.values()):
            raise ConfigError(f"{path}:{number}: a row is an object of strings")
        found.append((number, row))
    return found
