"""What a check found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was checked, whether it held, and the figures it rests on."""

    what: str
    holds: bool
    figures: str
