"""DoRA on frozen layers of any packing, without unpacking the weight in a forward.

DoRA (Liu et al. 2024, arXiv 2402.09353) gives each row of the adapted weight W + s·(A B)ᵀ a
trained length m: the row is divided by its norm, a constant to the gradient (section 4.3), and
multiplied by m. mlx-lm's `DoRALinear` unpacks W and builds the adapted weight in every forward, and
takes no 3, 5 or 6 bits. Here W x is the frozen layer's own product, and the norms follow
from those of W:

    |w'|² = |w|² + 2s·(W A)·b + s²·b·(AᵀA) b      for a row w of W and its column b of B

Parameters, their names and the files are mlx-lm's. With zero factors the output is bitwise the
base's, in every dtype and packing, and with scale 0 whatever m has become.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_lora.errors import AdapterError
from mlx_lora.models import dense_weight, in_dims

BLOCK = 1 << 22  # weights unpacked at a time for their norms: 16 MB in float32
DEAD = 1e-12  # a row with a smaller norm has no direction, and is left as it is
FLOOR = 1e-3  # of a row's first norm: below, the sum above is round-off of its terms


class LeanDoRALinear(DoRALinear):
    """mlx-lm's DoRA layer with the norms by the formula above: no dense copy of the weight."""

    @staticmethod
    def from_base(
        linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> "LeanDoRALinear":
        return LeanDoRALinear(linear, r, dropout, scale)

    def __init__(self, linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> None:
        nn.Module.__init__(self)  # the parent's own draws a random dense layer of this size first
        self.set_linear(linear)
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        bound = 1 / math.sqrt(in_dims(linear))
        self.lora_a = mx.random.uniform(-bound, bound, (in_dims(linear), r))
        self.lora_b = mx.zeros((r, linear.weight.shape[0]))

    def set_linear(self, linear: Any) -> None:
        """Adapt this frozen layer: m starts as its row norms, which are kept beside, not saved."""
        self.linear = linear
        self.m = mx.array(self.first_norm_O())

    def __call__(self, x: mx.array) -> mx.array:
        """c·W x + s·c·(x A) B + bias with c = m / norm, as c·(W x + bias) + ... + (1 - c)·bias."""
        y = self.linear(x)
        if not isinstance(self.scale, mx.array) and self.scale == 0:
            return y
        norm_O = self.norm_O()
        turned_on = (norm_O > DEAD) & (self.scale != 0)
        # c - 1, not c: exactly 0 at the start, by whatever arithmetic, and then y passes unchanged
        excess_O = mx.where(turned_on, (self.m - norm_O) / mx.maximum(norm_O, DEAD), 0)
        branch = (self.dropout(x) @ self.lora_a) @ (self.scale * (1 + excess_O) * self.lora_b)
        if "bias" in self.linear:
            branch = branch - excess_O * self.linear.bias
        return ((1 + excess_O) * y + branch).astype(y.dtype)

    def first_norm_O(self) -> mx.array:
        """Row norms [O] of the frozen layer, taken anew only where another layer was put there."""
        if self.__dict__.get("_first", (None,))[0] is not self.linear:
            self.__dict__["_first"] = self.linear, row_norms(self.linear)
        return self.__dict__["_first"][1]

    def norm_O(self) -> mx.array:
        """Row norms [O] of the adapted weight, constant to the gradient: one product of R rows."""
        kept = self.__dict__.get("_kept")
        if kept and all(old is new for old, new in zip(kept[0], self.state_of_norm(), strict=True)):
            return kept[1]
        wa_OR = without_bias(self.linear)(self.lora_a.astype(mx.float32).T).T
        new_O = adapted_norms(self.first_norm_O(), wa_OR, self.lora_a, self.lora_b, self.scale)
        return mx.stop_gradient(new_O)

    def state_of_norm(self) -> tuple[Any, ...]:
        """All that `norm_O` depends on."""
        return self.linear, self.lora_a, self.lora_b, self.scale


DORA = LeanDoRALinear


def without_bias(linear: Any) -> Any:
    """The same layer, sharing its arrays, less its bias."""
    if "bias" not in linear:
        return linear
    bare = copy.copy(linear)
    del bare["bias"]
    return bare


def row_norms(linear: Any) -> mx.array:
    """Norms [O] of the rows of a layer's weight, float32, a block of rows at a time."""
    rows = max(1, BLOCK // in_dims(linear))
    norms = []
    for start in range(0, linear.weight.shape[0], rows):
        block = dense_weight(linear, slice(start, start + rows))
        norms.append(mx.linalg.norm(block, axis=1))
        mx.eval(norms[-1])  # lazily, every block would be unpacked before the first is reduced
    return mx.concatenate(norms)


def adapted_norms(
    norm_O: mx.array, wa_OR: mx.array, a_IR: mx.array, b_RO: mx.array, scale: Any
) -> mx.array:
    """Norms [O] of W + scale·(a b)ᵀ from those of W and the product W a, exact where b is zero."""
    a_IR, b_RO = a_IR.astype(mx.float32), b_RO.astype(mx.float32)
    gram_RR = a_IR.T @ a_IR
    growth_O = scale * ((2 * wa_OR.T + scale * (gram_RR @ b_RO)) * b_RO).sum(axis=0)
    new_O = mx.sqrt(mx.maximum(norm_O**2 + growth_O, 0))
    new_O = norm_O + growth_O / mx.maximum(norm_O + new_O, DEAD)
    return mx.maximum(new_O, FLOOR * norm_O)


def to_dora(model: nn.Module) -> None:
    """Make every LoRA layer a DoRA layer with the same factors. AdapterError names the misfits."""
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if "lora_a" in m}
    misfits = [
        f"{name} ({type(layer).__name__})"
        for name, layer in layers.items()
        if not isinstance(layer, LoRALinear)
    ]
    if misfits:
        raise AdapterError(
            f"DoRA is for linear layers; these are of another kind: {', '.join(misfits)}",
            "Leave them out of `keys`, or train LoRA.",
        )
    model.update_modules(tree_unflatten([(name, dora_of(m)) for name, m in layers.items()]))


def dora_of(lora: Any) -> LeanDoRALinear:
    """A DoRA layer over the same frozen layer, with the LoRA layer's factors, dropout and scale."""
    layer = LeanDoRALinear(lora.linear, lora.lora_a.shape[1], scale=lora.scale)
    layer.lora_a, layer.lora_b, layer.dropout = lora.lora_a, lora.lora_b, lora.dropout
    return layer


@contextlib.contextmanager
def frozen_norms(model: nn.Module) -> Iterator[None]:
    """Inside, norms are computed once, not in every forward: for decoding.

    A factor or scale that is replaced inside is noticed; an array changed in place is not.
    """
    layers: list[Any] = [m for _, m in model.named_modules() if isinstance(m, LeanDoRALinear)]
    try:
        for layer in layers:
            layer.__dict__["_kept"] = layer.state_of_norm(), layer.norm_O()
        mx.eval([layer.__dict__["_kept"][1] for layer in layers])
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_kept", None)
