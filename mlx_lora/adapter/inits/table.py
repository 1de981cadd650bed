"""The table of inits. An init maps a Scene to a Start; `each_site` makes one of a site's."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_lora.adapter.scene import Scene, module_key
from mlx_lora.errors import AdapterError
from mlx_lora.registry import Table
from mlx_lora.types import Factors, Site, Start

Init = Callable[..., Start]

inits: Table[Init] = Table("init")
HARMLESS: dict[str, str | None] = {}  # name -> the option that, when true, gives up the claim
REBASING: set[str] = set()  # these put other frozen weights under the adapter


def each_site(function: Callable[..., Factors]) -> Init:
    """An init from a function (site, key, *, options) -> Factors that looks at one site alone."""

    @functools.wraps(function)
    def init(scene: Scene, **options: Any) -> Start:
        factors, problems = {}, []
        for site in scene.sites:
            try:
                factors[site.name] = function(site, module_key(scene.seed, site.name), **options)
            except AdapterError as error:
                problems.append(error)
        if problems:
            lines = sorted({str(p) for p in problems})
            raise AdapterError("\n".join(lines), problems[0].hint)
        return Start(factors)

    return init


def harmless(init: Init) -> Init:
    """Mark an init that claims bitwise equal logits. The contract suite holds it to that."""
    HARMLESS[init.__name__] = None  # type: ignore[attr-defined]
    return init


def harmless_unless(option: str) -> Callable[[Init], Init]:
    """The same for an init that gives up the claim when `option` is true."""

    def mark(init: Init) -> Init:
        HARMLESS[init.__name__] = option  # type: ignore[attr-defined]
        return init

    return mark


def is_rebased(config: Mapping[str, Any]) -> bool:
    """True where the init that an adapter's config names put other frozen weights under it."""
    about = config.get("init")
    name = about.get("name") if isinstance(about, Mapping) else about
    return isinstance(name, str) and name in REBASING


def rebasing(init: Init) -> Init:
    """Mark an init that changes the base: a run saves that base beside the adapter."""
    REBASING.add(init.__name__)  # type: ignore[attr-defined]
    return init


def is_harmless(name: str, options: Mapping[str, Any]) -> bool:
    """Whether the init claims bitwise equal logits with these options.

    >>> from mlx_lora.adapter.inits import is_harmless
    >>> is_harmless("svd", {}), is_harmless("svd", {"keep_delta": True})
    (True, False)
    """
    forfeit = HARMLESS.get(name, "")
    return name in HARMLESS and not (forfeit and options.get(forfeit))


def label(name: str, options: Mapping[str, Any]) -> str:
    """What reports call a start: its name while it claims to be harmless, else its options too.

    >>> from mlx_lora.adapter.inits import label
    >>> label("zero", {}), label("svd", {"reference": "runs/a", "keep_delta": True})
    ('zero', 'svd (reference=runs/a, keep_delta=True)')
    """
    shown = ", ".join(f"{k}={v}" for k, v in options.items())
    return name if is_harmless(name, options) or not shown else f"{name} ({shown})"


def uniform(key: mx.array, rows: int, columns: int, fan: int) -> mx.array:
    """U(±1/sqrt(fan)), mlx-lm's start of A with fan = d_in."""
    bound = fan**-0.5
    return mx.random.uniform(-bound, bound, (rows, columns), key=key)


def zero_start(site: Site, seed: int) -> Factors:
    """A as mlx-lm draws it, B = 0: where an init has nothing to say about a site."""
    a_IR = uniform(module_key(seed, site.name), site.in_dims, site.rank, site.in_dims)
    return Factors(a_IR, mx.zeros((site.rank, site.out_dims)))
