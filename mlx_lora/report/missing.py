"""A part that a page does not have, and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Missing:
    """What is not there, as a clause: "no step is logged"."""

    why: str
