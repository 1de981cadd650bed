"""What corruption is, and how it is seen in seconds. `mlx_lora.check(...)` runs the check."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """`check` names this folder and the public function; calling the folder is the function."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from mlx_lora.check.gate import check

        return check(*args, **options)


sys.modules[__name__].__class__ = _Callable
