"""Where a module sits: its block, its kind, its expert."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

NATURAL = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
)


def split_expert(name: str) -> tuple[str, int | None]:
    """Module and expert number.

    >>> split_expert("mlp.up_proj[3]"), split_expert("mlp.up_proj")
    (('mlp.up_proj', 3), ('mlp.up_proj', None))
    """
    match = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def natural(name: str) -> list[str | int]:
    """A sort key that puts block 10 after block 9.

    >>> sorted(["layers.10.q", "layers.9.q"], key=natural)
    ['layers.9.q', 'layers.10.q']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def places(names: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """Block number and kind of each module: None outside the blocks, experts share their kind.

    >>> places(["model.layers.3.mlp.up_proj[7]", "lm_head"])
    {'model.layers.3.mlp.up_proj[7]': (3, 'up_proj'), 'lm_head': (None, 'lm_head')}
    """
    found: dict[str, tuple[int | None, str]] = {}
    for name in names:
        path, _ = split_expert(name)
        match = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", path)
        found[name] = (int(match[1]), match[2]) if match else (None, path)
    paths = {path for _, path in found.values()}
    last = Counter(path.rpartition(".")[2] for path in paths)
    label = {  # two parts where one is ambiguous: self_attn.q_proj, cross_attn.q_proj
        path: ".".join(path.split(".")[-1 if last[path.rpartition(".")[2]] == 1 else -2 :])
        for path in paths
    }
    return {name: (layer, label[path]) for name, (layer, path) in found.items()}


def kinds(places: Mapping[str, tuple[int | None, str]]) -> list[str]:
    """The kinds of module in the order in which a block applies them."""

    def order(kind: str) -> tuple[int, str]:
        short = kind.rpartition(".")[2]
        return (NATURAL.index(short) if short in NATURAL else len(NATURAL), kind)

    return sorted({kind for _, kind in places.values()}, key=order)
