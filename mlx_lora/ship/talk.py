"""`mlx-lora generate` and `chat`: a model's words, with any of several adapters at any strength."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import bases, cpu, models
from mlx_lora.adapter import files
from mlx_lora.adapter.dora import frozen_norms
from mlx_lora.adapter.strength import refuse_strength
from mlx_lora.errors import ConfigError, UserError
from mlx_lora.generate import generate
from mlx_lora.models import Loaded, encode_prompt, eos_ids
from mlx_lora.sampling import drawer_of, row_key, uniforms
from mlx_lora.ship.switch import Adapters
from mlx_lora.types import Message

PURPOSE = "talk"


@dataclass(frozen=True)
class Manner:
    """How tokens are drawn. Temperature 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def opened(
    model: str, folders: Sequence[Path], strength: float, *, trust_remote_code: bool = False
) -> Adapters:
    """The model with these adapters loaded and the first in force.

    A base that an adapter had quantized on load is quantized again, and its notices say so.
    """
    refuse_strength(strength, adapted=bool(folders))
    first = files.folder_of(str(folders[0])) if folders else None
    recorded = bases.recorded(first) if first else {}
    loaded = models.load(
        model, rebuild=recorded.get("quantization"), trust_remote_code=trust_remote_code
    )
    adapters = Adapters(loaded)
    adapters.notices += bases.rebuilt(loaded, first)
    names = [
        adapters.load(folder, name) for folder, name in zip(folders, named(folders), strict=True)
    ]
    adapters.use(names[0] if names else None, strength)
    return adapters


def named(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with what is above them where two are alike."""
    paths = [files.folder_of(str(folder)).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError("an adapter is named twice")
    for depth in range(1, max((len(p.parts) for p in paths), default=0) + 1):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return []


def answers(adapters: Adapters, prompts: Sequence[str], n: int, manner: Manner) -> dict[str, Any]:
    """The JSON of `mlx-lora generate`: n completions of each prompt."""
    if n > 1 and manner.temperature == 0:
        raise ConfigError(f"{n} greedy completions would be alike", "Give --temperature.")
    groups = generate(
        adapters.loaded,
        prompts,
        purpose=PURPOSE,
        group=n,
        max_tokens=manner.max_tokens,
        temperature=manner.temperature,
        top_p=manner.top_p,
        seed=manner.seed,
    )
    return {
        "model": adapters.loaded.name,
        "adapter": adapters.current,
        "strength": adapters.strength,
        "notices": adapters.notices,
        "completions": [
            {"prompt": prompt, "text": r.text, "tokens": len(r.ids), "finished": r.finished}
            for prompt, rollouts in zip(prompts, groups, strict=True)
            for r in rollouts
        ],
    }


def spoken(loaded: Loaded, turns: Sequence[Message], manner: Manner, turn: int) -> Iterator[str]:
    """The answer to a conversation, piece by piece, as soon as its characters are whole."""
    ids = encode_prompt(loaded.tokenizer, turns_or_text(loaded, turns))
    cache, eos = models.new_cache(loaded.model), eos_ids(loaded.tokenizer)
    draw = drawer_of(manner.temperature, manner.top_p)
    key, said, shown = row_key(PURPOSE, manner.seed, turn, 0, 0), [], ""
    part_1T = mx.array([ids])
    with frozen_norms(loaded.model), cpu.decoding(loaded.model):
        for place in range(manner.max_tokens):
            logits_1V = loaded.model(part_1T, cache=cache)[:, -1].astype(mx.float32)
            ids_1, _ = draw(logits_1V, mx.array(uniforms([key], [place])))
            token: int = ids_1.item()  # type: ignore[assignment]
            if token in eos:
                break
            said.append(token)
            part_1T = mx.array([[token]])
            whole = loaded.tokenizer.decode(said)
            if not whole.endswith("\ufffd"):
                yield whole[len(shown) :]
                shown = whole
    if said and (whole := loaded.tokenizer.decode(said)) != shown:
        yield whole[len(shown) :]


def turns_or_text(loaded: Loaded, turns: Sequence[Message]) -> Any:
    """A conversation, or without a chat template its last text."""
    if getattr(loaded.tokenizer, "chat_template", None):
        return tuple(turns)
    return turns[-1][1]


HELP = """/adapter NAME   put another adapter in force; /adapter off: the base alone
/strength X     0 is the base, 1 as trained
/new            forget what was said
/quit           leave (Ctrl-D too)"""


@dataclass
class Chat:
    """A conversation at a terminal. `say` writes a piece of text and does not end the line."""

    adapters: Adapters
    manner: Manner
    say: Callable[[str], None]
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    count: int = 0

    def run(self, lines: Iterator[str]) -> None:
        """Answer every line until there are no more, or one says /quit."""
        self.say(f"{self.standing()}\n/help shows what can be changed.\n")
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text.startswith("/"):
                self.say(f"{self.obey(text)}\n")
            elif text:
                self.answer(text)

    def answer(self, text: str) -> None:
        """One turn of both."""
        head = [("system", self.system)] if self.system else []
        self.turns.append(("user", text))
        pieces = []
        for piece in spoken(self.adapters.loaded, [*head, *self.turns], self.manner, self.count):
            pieces.append(piece)
            self.say(printable(piece))
        self.say("\n")
        self.turns.append(("assistant", "".join(pieces)))
        self.count += 1

    def obey(self, command: str) -> str:
        """What a command line answers; what is wrong with it is said, and the chat goes on."""
        word, _, value = command.partition(" ")
        value = value.strip()
        try:
            if word == "/adapter" and value:
                self.adapters.use(None if value == "off" else value, self.adapters.strength)
            elif word == "/strength" and value:
                self.adapters.set_strength(float(value))
            elif word == "/new":
                self.turns.clear()
                return "Forgotten."
            else:
                return HELP
        except ValueError:
            return f"{value} is no number."
        except UserError as error:
            return f"{error}. {error.hint}".strip()
        return self.standing()

    def standing(self) -> str:
        """Who speaks."""
        a = self.adapters
        others = [name for name in a.names if name != a.current]
        more = f" Also loaded: {', '.join(others)}." if others else ""
        if a.current is None:
            return f"{a.loaded.name}, without an adapter.{more}"
        return f"{a.loaded.name} with {a.current} at strength {a.strength:g}.{more}"


def printable(text: str) -> str:
    """The model's text is untrusted: no control character but line ends and tabs gets out."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
