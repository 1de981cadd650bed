"""`mlx-lora spectrum`, from names and options to a report, with a bar for what takes long."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lora.errors import ConfigError
from mlx_lora.spectral.alerts import alerts
from mlx_lora.spectral.dynamics import options_of
from mlx_lora.spectral.metrics import LoRAReport
from mlx_lora.spectral.report import LoRAAnalyzer

if TYPE_CHECKING:
    from mlx_lora.progress import Watcher


DYNAMICS = "dynamics"  # no alert, and set like one


def analyze_named(
    adapter: Path,
    model: str | None,
    *,
    deep: bool = False,
    option: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> LoRAReport:
    """The report of an adapter or run folder. `option` is alert.threshold=number, each.

    An option dynamics.name=number is one of `summed_up`.
    """
    if deep and model is None:
        raise ConfigError("--deep compares with the base: name it with --model")
    analyzer = LoRAAnalyzer(adapter, model, trust_remote_code=trust_remote_code)
    limits = thresholds(option)
    asked: dict[str, Any] = {"dynamics": limits.pop(DYNAMICS, None), "alerts": limits}
    if model is None:
        return analyzer.analyze(**asked)
    with Bars() as bars:
        return analyzer.analyze(**asked, deep=deep, tell=bars.tell)


def thresholds(option: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by alert, and those of dynamics; names and keys are judged before any work."""
    if not option:
        return {}
    from mlx_lora.config import parse_options

    found: dict[str, dict[str, Any]] = {}
    for key, value in parse_options(option).items():
        name, _, threshold = key.partition(".")
        if not threshold or isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(
                f"-o {key}: should be alert.threshold=number, like dominance_warning.threshold=0.2"
            )
        found.setdefault(name, {})[threshold] = value
    for name, given in found.items():
        options_of(given) if name == DYNAMICS else alerts.bind(name, given)
    return found


class Bars(ExitStack):
    """A bar for each piece of work, made when it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, Watcher] = {}

    def tell(self, what: str, done: int, total: int) -> None:
        from mlx_lora.progress import console, watch

        if what not in self.made:
            self.close()  # the bar before it is full
            self.made[what] = self.enter_context(watch(console(), what, total, max(1, total // 5)))
        self.made[what].update(done - 1, {})
