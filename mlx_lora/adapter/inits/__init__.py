"""Ways to start, one function each. `harmless` ones leave the logits bitwise equal to the base's.

`table.py` holds the tables; every other file here is a theme.
"""

from mlx_lora.adapter.inits import (  # noqa: F401  each fills the table
    calibrated,
    gradient,
    quantized,
    random,
    reference,
)
from mlx_lora.adapter.inits.table import (
    HARMLESS,
    REBASING,
    harmless,
    inits,
    is_harmless,
    is_rebased,
    label,
)

__all__ = ["HARMLESS", "REBASING", "harmless", "inits", "is_harmless", "is_rebased", "label"]
