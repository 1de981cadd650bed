"""Inits that draw their factors and look at nothing but the shape."""

import math
from typing import Annotated

import mlx.core as mx
from annotated_types import Ge, Lt

from mlx_lora.adapter.inits.table import each_site, harmless, inits, uniform
from mlx_lora.adapter.size import predicted_sigma_max
from mlx_lora.errors import AdapterError
from mlx_lora.types import Factors, Site

Size = Annotated[float, Ge(0), Lt(math.inf)]


@inits.add
@harmless
@each_site
def zero(site: Site, key: mx.array) -> Factors:
    """A ~ U(±1/sqrt(d_in)), B = 0: mlx-lm's own start, asserted. Logits bitwise equal to base."""
    a_IR = uniform(key, site.in_dims, site.rank, site.in_dims)
    return Factors(a_IR, mx.zeros((site.rank, site.out_dims)))


@inits.add
@harmless
@each_site
def orthonormal(site: Site, key: mx.array) -> Factors:
    """A with orthonormal columns (condition number 1), B = 0. Logits bitwise equal to base."""
    return Factors(orthonormal_columns(site, key), mx.zeros((site.rank, site.out_dims)))


@inits.add
@harmless
@each_site
def split_support(site: Site, key: mx.array) -> Factors:
    """A lives in the first half of the ranks, B in the second: BA = 0 exactly, and both learn.

    Every rank-1 term has a zero factor, so the product vanishes in any precision, and both factors
    get gradients at the first step. Raises AdapterError for an odd rank.
    """
    if site.rank % 2:
        raise AdapterError(f"split_support halves the rank: {site.rank} is odd, use an even one")
    half = site.rank // 2
    a_key, b_key = mx.random.split(key)
    a_IH = uniform(a_key, site.in_dims, half, site.in_dims)
    b_HO = uniform(b_key, half, site.out_dims, site.out_dims)
    return Factors(
        mx.concatenate([a_IH, mx.zeros_like(a_IH)], axis=1),
        mx.concatenate([mx.zeros_like(b_HO), b_HO], axis=0),
    )


@inits.add
@each_site
def gaussian(site: Site, key: mx.array, *, std: Size = 0.02) -> Factors:
    """A and B ~ N(0, std): the known-bad start, kept to show what corruption looks like.

    Its largest singular value is about scale · std² · (√d_in + √r)(√d_out + √r), see `size.py`.
    """
    a_key, b_key = mx.random.split(key)
    return Factors(
        std * mx.random.normal((site.in_dims, site.rank), key=a_key),
        std * mx.random.normal((site.rank, site.out_dims), key=b_key),
    )


@inits.add
@each_site
def tiny_scale(site: Site, key: mx.array, *, size: Size = 1e-3) -> Factors:
    """A and B both random, B so small that the update's largest singular value is about `size`.

    The same `size` means the same on every width, rank and scale. The KL it costs grows with its
    square (figures/tiny_scale.png).
    """
    a_key, b_key = mx.random.split(key)
    std = site.in_dims**-0.5
    shape = (site.in_dims, site.out_dims, site.rank)
    unit = predicted_sigma_max(site.scale, std, 1.0, *shape)
    return Factors(
        std * mx.random.normal((site.in_dims, site.rank), key=a_key),
        (size / unit if unit else 0.0) * mx.random.normal((site.rank, site.out_dims), key=b_key),
    )


@inits.add
@each_site
def antisymmetric(site: Site, key: mx.array) -> Factors:
    """A trap: A orthonormal, B = -Aᵀ/scale is often called near zero. It is minus a projector.

    scale · BA = -P with P the orthogonal projector on A's directions: its spectral norm is 1 and
    its Frobenius norm √r at every scale. Square layers only; others raise AdapterError.
    """
    if site.in_dims != site.out_dims:
        raise AdapterError(
            f"antisymmetric needs square layers, {site.name} is {site.out_dims} × {site.in_dims}",
            "It is kept as a warning and does harm on square layers too. Use zero.",
        )
    if not site.scale:
        raise AdapterError("antisymmetric divides by the scale, which is 0")
    a_IR = orthonormal_columns(site, key)
    return Factors(a_IR, -a_IR.T / site.scale)


def orthonormal_columns(site: Site, key: mx.array) -> mx.array:
    """A random [I, R] with orthonormal columns, computed on the CPU in any case."""
    normal_IR = mx.random.normal((site.in_dims, site.rank), key=key)
    q_IR, _ = mx.linalg.qr(normal_IR, stream=mx.cpu)  # type: ignore[arg-type]
    return q_IR
