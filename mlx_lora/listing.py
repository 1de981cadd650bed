"""What there is, from the tables and the docstrings."""

from collections.abc import Sequence

from mlx_lora.adapter.inits import HARMLESS, REBASING, inits
from mlx_lora.adapter.schedules import schedules
from mlx_lora.check.gates import gates
from mlx_lora.errors import UnknownNameError, near
from mlx_lora.recipes import recipes
from mlx_lora.registry import Table, first_line
from mlx_lora.rewards.parts import judges
from mlx_lora.rl.advantages import advantages
from mlx_lora.rl.fitness import fitnesses
from mlx_lora.rl.losses import losses
from mlx_lora.rl.monitor import watchers
from mlx_lora.ship.ranks import rules
from mlx_lora.spectral.alerts import alerts
from mlx_lora.spectral.metrics import metrics
from mlx_lora.tasks import describe

Entry = dict[str, str]


def listing(kinds: Sequence[str], kind: str | None) -> dict[str, list[Entry]]:
    """Entries by kind; one kind when named. UnknownNameError for a kind that is none."""
    if kind is not None and kind not in kinds:
        raise UnknownNameError(f"there is no list of {kind!r}", near(kind, kinds))
    return {k: entries(k) for k in kinds if kind in (None, k)}


def entries(kind: str) -> list[Entry]:
    if kind == "configs":
        return [{"name": n, "about": about} for n, about in recipes().items()]
    if kind == "tasks":
        return [{"name": n, "about": about} for n, about in describe().items()]
    if kind == "inits":
        return [e | {"note": harm(e["name"])} for e in of_table(inits)]
    tables: dict[str, list[Table]] = {
        "schedules": [schedules],
        "rewards": [judges],
        "losses": [losses],
        "advantages": [advantages],
        "fitness": [fitnesses],
        "metrics": [metrics],
        "alerts": [alerts, watchers],
        "gates": [gates],
        "rules": [rules],
    }
    return [e for table in tables[kind] for e in of_table(table)]


def harm(init: str) -> str:
    """What an init claims about the model before training."""
    if init in REBASING:
        return "changes the base"
    forfeit = HARMLESS.get(init)
    unless = f" unless {forfeit}" if forfeit else ""
    return f"harmless{unless}" if init in HARMLESS else "changes the model"


def of_table(table: Table) -> list[Entry]:
    return [{"name": name, "about": first_line(table[name])} for name in table]
