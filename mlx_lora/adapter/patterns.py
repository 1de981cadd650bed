"""Another rank for some modules: PEFT's `rank_pattern`, by the ends of their names."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lora.errors import AdapterError, near


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern means a module: as in PEFT a regular expression for the end of its name.

    It begins where the name does, or behind a dot. AdapterError where it is no expression.

    >>> [fits("q_proj|v_proj", f"layers.0.{name}") for name in ("q_proj", "qv_proj")]
    [True, False]
    """
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error as error:
        raise AdapterError(
            f"{pattern!r} is no regular expression: {error}. A pattern is the end of "
            "a module's name, like q_proj or layers.0.mlp.up_proj; `.*` stands for anything"
        ) from error


def matching(pattern: str, modules: Sequence[str]) -> list[str]:
    """The modules that a pattern means.

    >>> matching("q_proj", ["layers.0.self_attn.q_proj", "layers.0.self_attn.seq_proj"])
    ['layers.0.self_attn.q_proj']
    >>> names = ["layers.1.mlp.up_proj", "layers.10.mlp.up_proj"]
    >>> matching("layers.1.*", names) == names  # as everywhere in expressions . is any sign
    True
    >>> matching("layers[.]1[.].*", names)
    ['layers.1.mlp.up_proj']
    """
    return [name for name in modules if fits(pattern, name)]


def ranks_of(
    pattern: Mapping[str, int] | None, modules: Sequence[str], rank: int
) -> dict[str, int]:
    """The rank of every module. AdapterError lists all that is wrong with the pattern.

    Of two patterns for a module the one for fewer modules counts; PEFT takes the one given first.
    Where both are for as many and ask for different ranks, nobody can tell.

    >>> ranks_of({"q_proj": 4, "layers.0.q_proj": 2}, ["layers.0.q_proj", "layers.1.q_proj"], 8)
    {'layers.0.q_proj': 2, 'layers.1.q_proj': 4}
    """
    found: dict[str, list[str]] = {}
    problems = []
    for key in pattern or {}:
        try:
            found[key] = matching(key, modules)
        except AdapterError as error:
            problems.append(f"rank_pattern: {error}")
            continue
        if not found[key]:
            known = modules if "." in key else {name.rpartition(".")[2] for name in modules}
            problems.append(f"rank_pattern: {key!r} matches no adapted layer. {near(key, known)}")
    ranks = dict.fromkeys(modules, rank)
    for name in modules:
        mine = sorted((len(names), key) for key, names in found.items() if name in names)
        best = [key for count, key in mine if count == mine[0][0]]
        asked = {pattern[key] for key in best} if pattern else set()
        if len(asked) > 1:
            problems.append(f"rank_pattern: {name} is meant by {' and '.join(map(repr, best))}")
        elif asked:
            ranks[name] = asked.pop()
    if problems:
        raise AdapterError("\n".join(dict.fromkeys(problems)))
    return ranks


def narrow(layer: Any, rank: int) -> None:
    """Keep the first of a LoRA layer's ranks; experts lie as [E, R, I] and [E, O, R]."""
    if layer.lora_a.ndim == 3:
        layer.lora_a, layer.lora_b = layer.lora_a[:, :rank], layer.lora_b[..., :rank]
    else:
        layer.lora_a, layer.lora_b = layer.lora_a[:, :rank], layer.lora_b[:rank]
