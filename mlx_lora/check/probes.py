"""What a model is asked: known-good text to read, prompts to continue."""

from dataclasses import dataclass
from pathlib import Path

from mlx_lora.data import context_of, encode, rows_of
from mlx_lora.errors import ConfigError
from mlx_lora.models import DEMO, Loaded, encode_prompt

ASSETS = Path(__file__).parents[1] / "assets"
ROOM = 20  # tokens of a continuation, beside its prompt


@dataclass(frozen=True)
class Probes:
    """Texts as token ids with the index of the first token scored, and prompts to continue."""

    texts: list[tuple[list[int], int]]
    prompts: list[str]


def read(loaded: Loaded, path: Path | None = None, *, samples: int | None = None) -> Probes:
    """Probes from a JSONL or text file; else the embedded model's own set, or a general one.

    At most `samples` prompts are continued; None: all.

    JSONL rows: {"text": ...} is read whole, {"prompt": ..., "completion": ...} is read from the
    completion on, {"prompt": ...} is continued. A .txt file is one text per line, read and
    continued.
    """
    if path is None:
        path = ASSETS / ("check_demo.jsonl" if loaded.name == DEMO else "check_general.jsonl")
    texts: list[tuple[list[int], int]] = []
    prompts: list[str] = []
    problems: list[str] = []
    limit = context_of(loaded)
    for number, row in rows_of(path):
        if not {"text", "prompt"} & row.keys():
            problems.append(f"{path}:{number}: needs `text` or `prompt`, got {sorted(row)}")
            continue
        found = encode(row, loaded.tokenizer)
        length = len(found.ids) if found else 0
        if path.suffix == ".txt":
            prompts.append(row["text"])
        elif "text" not in row and "completion" not in row:
            prompts.append(row["prompt"])
            length = len(encode_prompt(loaded.tokenizer, row["prompt"])) + ROOM
        if limit and length > limit:
            problems.append(f"{path}:{number}: {length} tokens, the context holds {limit}")
        elif found:
            texts.append((list(found.ids), found.start))
    if problems:
        raise ConfigError("\n".join(problems), "Nothing is cut: shorten or leave out these rows.")
    if not texts or not prompts:
        raise ConfigError(
            f"{path}: {len(texts)} texts to read and {len(prompts)} prompts to continue; need both",
            'Rows are {"text": ...}, {"prompt": ..., "completion": ...} or {"prompt": ...}.',
        )
    return Probes(texts, prompts[:samples])
