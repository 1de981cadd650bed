"""Ways to start: functions of a site and a key. `harmless` ones leave the logits bitwise equal."""

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_lora.registry import Table
from mlx_lora.types import Factors, Site

inits: Table[Callable[..., Factors]] = Table("init")
HARMLESS: set[str] = set()


def harmless(function: Callable[..., Factors]) -> Callable[..., Factors]:
    """Mark an init that claims bitwise equal logits. The contract suite holds it to that."""
    HARMLESS.add(function.__name__)
    return function


@inits.add
@harmless
def zero(site: Site, key: mx.array) -> Factors:
    """A ~ U(±1/sqrt(d_in)), B = 0: mlx-lm's own start, asserted. Logits bitwise equal to base."""
    bound = 1 / math.sqrt(site.in_dims)
    a_IR = mx.random.uniform(-bound, bound, (site.in_dims, site.rank), key=key)
    return Factors(a_IR, mx.zeros((site.rank, site.out_dims)))


@inits.add
def gaussian(site: Site, key: mx.array, *, std: float = 0.02) -> Factors:
    """A and B ~ N(0, std): the known-bad start, kept to show what corruption looks like.

    Its largest singular value is about scale · std² · (√d_in + √r)(√d_out + √r).
    """
    a_key, b_key = mx.random.split(key)
    return Factors(
        std * mx.random.normal((site.in_dims, site.rank), key=a_key),
        std * mx.random.normal((site.rank, site.out_dims), key=b_key),
    )
