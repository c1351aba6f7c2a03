"""Why the resolver chose what it chose, as plain data for the command line to show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """One choice: about what (`subject`), what was taken and why; what was `rejected`, each with why."""

    subject: str
    choice: str
    because: str
    rejected: tuple[str, ...] = ()
