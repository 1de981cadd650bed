"""From the rank that each module seems to need to lines to paste into an experiment's YAML."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from mlx_lora import yamlfile
from mlx_lora.adapter.patterns import ranks_of
from mlx_lora.errors import AdapterError
from mlx_lora.spectral.names import places

MOST = 0.9  # of the modules need no more than the overall rank
GROUPS = {  # by a part of a module's path
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "expert", "moe"),
}
GRAINS = ("kind", "layer", "module")
POWERS = {"sgd": 0.5, "es": 0.0}  # of the ratio of ranks that the scale follows; of Adam's kin: 1

Bytes = Callable[[Mapping[str, int]], int]  # of weights, gradients and optimizer, at these ranks


@dataclass(frozen=True)
class Need:
    """What one adapted module has, and what it seems to need."""

    in_dims: int
    out_dims: int
    rank: int  # that the experiment, or the adapter, gives it
    found: int | None  # directions; None: not measured, it keeps its rank
    open: str | None = None  # why it may need more than was found; None: that is about all
    lever: float = 1.0  # how much a column of A lets the first step lower the loss, relative

    @property
    def least(self) -> int:
        """What it has where it may need more, else 1."""
        return self.rank if self.found is None or self.open else 1

    @property
    def wanted(self) -> int:
        """What was found; where it may need more, no less than it has."""
        return max(self.found or 0, self.least)

    @property
    def smaller(self) -> int:
        return min(self.in_dims, self.out_dims)

    @property
    def text(self) -> str:
        """`4`, or `> 16` where it cannot be told."""
        if self.found is None:
            return "–"
        return f"> {self.found}" if self.open else str(self.found)


@dataclass(frozen=True)
class Block:
    """One way to hand out the ranks."""

    ranks: Mapping[str, int]  # by module
    rank: int  # the most common
    pattern: Mapping[str, int]  # the others
    scale: float
    parameters: int
    bytes: int


def overall(needs: Mapping[str, Need]) -> Need | None:
    """The module whose need nine tenths of the measured modules do not exceed."""
    measured = [n for n in needs.values() if n.found is not None]
    ordered = sorted(measured, key=lambda n: (n.open is not None, n.found))
    return ordered[math.ceil(MOST * len(ordered)) - 1] if ordered else None


def group_of(name: str) -> str:
    """`attention`, `mlp` or `other`.

    >>> group_of("model.layers.0.self_attn.q_proj"), group_of("lm_head")
    ('attention', 'other')
    """
    found = (g for g, parts in GROUPS.items() if any(part in name.lower() for part in parts))
    return next(found, "other")


def block(
    needs: Mapping[str, Need], grain: str, *, scale: float, optimizer: str, cost: Bytes
) -> Block:
    """Ranks by `kind` of module, by `layer` or by `module`.

    The next power of two above what was found, of several the mean of it. What was not measured, or
    cannot be told, gets no less than it has.
    """
    keys = keys_of(needs, grain)
    together = defaultdict(list)
    for name, need in needs.items():
        together[keys[name]] += [] if need.found is None else [need.wanted]
    ranks = {
        name: need.rank
        if need.found is None
        else min(max(power_above(mean(together[keys[name]])), need.least), need.smaller)
        for name, need in needs.items()
    }
    rank, pattern = patterned(ranks, keys)
    return Block(
        ranks,
        rank,
        pattern,
        scale_for(needs, ranks, scale, optimizer),
        parameters(needs, ranks),
        cost(ranks),
    )


def power_above(found: float) -> int:
    """The smallest power of two that is no less.

    >>> [power_above(x) for x in (0, 1, 1.2, 4, 5)]
    [1, 1, 2, 4, 8]
    """
    return 1 << (max(1, math.ceil(found)) - 1).bit_length()


def keys_of(names: Sequence[str] | Mapping[str, Any], grain: str) -> dict[str, str]:
    """The pattern under which a module gets its rank: the same for modules that share one.

    >>> keys_of(["model.layers.3.mlp.up_proj"], "layer")
    {'model.layers.3.mlp.up_proj': 'layers[.]3[.].*'}
    """
    where = places(names)
    exact = {name: name[name.find("layers.") :] if "layers." in name else name for name in names}
    if grain == "module":
        return exact
    if grain == "layer":
        return {n: exact[n] if i is None else f"layers[.]{i}[.].*" for n, (i, _) in where.items()}
    return {name: kind for name, (_, kind) in where.items()}


def patterned(ranks: Mapping[str, int], keys: Mapping[str, str]) -> tuple[int, Mapping[str, int]]:
    """The most common rank, and a rank_pattern for the others. Exact names where keys mislead."""
    counts = Counter(ranks.values())
    rank = min(counts, key=lambda r: (-counts[r], r))
    pattern = {keys[name]: r for name, r in ranks.items() if r != rank}
    try:
        if ranks_of(pattern, list(ranks), rank) == ranks:
            return rank, pattern
    except AdapterError:  # two patterns for as many modules
        pass
    return rank, {name: r for name, r in ranks.items() if r != rank}


def parameters(needs: Mapping[str, Need], ranks: Mapping[str, int]) -> int:
    """Of all factors at these ranks."""
    return sum(ranks[name] * (n.in_dims + n.out_dims) for name, n in needs.items())


def scale_for(
    needs: Mapping[str, Need], ranks: Mapping[str, int], scale: float, optimizer: str
) -> float:
    """The scale at which the first step lowers the loss as much as at the ranks there are.

    From B = 0 a step of Adam moves every entry of B by the learning rate along the sign of its
    gradient, and lowers the loss by scale · rate · Σ|GAᵀ|: in proportion to scale · rank, so that
    alpha = scale · rank stays (arXiv 2106.09685, section 4.1). A step of plain SGD lowers it by
    scale² · rate · ‖GAᵀ‖², in proportion to scale² · rank (rsLoRA's rule, arXiv 2312.03732).
    """
    known = [n.lever for n in needs.values() if n.found is not None]
    levers = {name: mean(known) if n.found is None else n.lever for name, n in needs.items()}
    before = sum(levers[name] * n.rank for name, n in needs.items())
    after = sum(levers[name] * ranks[name] for name in needs)
    ratio = before / after if after else 1.0
    return float(f"{scale * ratio ** POWERS.get(optimizer, 1.0):.3g}")


def why(optimizer: str) -> str:
    """In a sentence, for whoever pastes it."""
    if optimizer == "es":
        return "es perturbs in proportion to the weights, whatever the scale is: it stays as it was"
    if optimizer == "sgd":
        return (
            "a first step of sgd lowers the loss in proportion to scale² · rank: this scale keeps "
            "that as it was, and with it the meaning of the learning rate"
        )
    return (
        f"a first step of {optimizer} lowers the loss in proportion to scale · rank, so alpha = "
        "scale · rank is kept, weighed over the modules, and the learning rate keeps its meaning"
    )


def yaml_of(found: Block, others: Mapping[str, Any], comment: str) -> str:
    """Lines to put in place of `lora_parameters`. `others` are its keys that stay."""
    lora = {"rank": found.rank, "scale": found.scale, **others}
    lora |= {"rank_pattern": dict(found.pattern)} if found.pattern else {}
    return f"# {comment}\n{yamlfile.dump({'lora_parameters': lora})}"
