"""How long work reports itself, without knowing who shows it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Step(Protocol):
    """One piece of work that is under way."""

    def advance(self, amount: int = 1) -> None:
        """Add `amount` (bytes or items, as the step's unit says) to what is done."""

    def describe(self, detail: str) -> None:
        """Show what is being worked on."""


class Progress(Protocol):
    """Receives steps and remarks; the command line shows them on stderr."""

    def step(
        self, title: str, *, total: int | None = None, unit: str = "items"
    ) -> AbstractContextManager[Step]:
        """Begin a step; `total` in `unit` ("bytes" or "items"), None where it is not known."""

    def note(self, message: str) -> None:
        """Tell the user something that is not an error."""


class SilentStep:
    """A step that nobody watches."""

    def advance(self, amount: int = 1) -> None:
        """Do nothing with `amount`."""

    def describe(self, detail: str) -> None:
        """Do nothing with `detail`."""


class SilentProgress:
    """Progress that nobody watches."""

    def step(
        self, title: str, *, total: int | None = None, unit: str = "items"
    ) -> AbstractContextManager[SilentStep]:
        """Return a step that shows nothing."""
        del title, total, unit
        return nullcontext(SilentStep())

    def note(self, message: str) -> None:
        """Drop the message."""
        del message
