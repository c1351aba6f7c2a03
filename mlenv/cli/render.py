"""The only printer: stdout is data, stderr is conversation."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from mlenv.progress import SilentStep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlenv.errors import MlenvError
    from mlenv.progress import Progress, Step

SCHEMA = 1
"""Version of the JSON objects; fields are added, not removed."""

_PLAIN_INTERVAL = 10.0
"""Seconds between two progress lines of one step where stderr is no terminal."""


def data(text: str) -> None:
    """Print a line of data."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def json_data(fields: dict[str, Any]) -> None:
    """Print one JSON object with the schema number."""
    sys.stdout.write(json.dumps({"schema": SCHEMA, **fields}, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header in aligned columns, as Docker does."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        data("   ".join(cells).rstrip())


def note(message: str) -> None:
    """Say something that is not data and not an error."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def error(fault: MlenvError, *, as_json: bool = False) -> None:
    """Print an error: on stderr for people, as one object on stdout where `--json` was asked for."""
    if as_json:
        fields = {"code": fault.code, "message": fault.message, "cause": fault.cause, "hint": fault.hint}
        json_data({"error": fields})
        return
    text = str(fault)
    if _coloured(sys.stderr):
        head, _, rest = text.partition(":")
        text = f"\x1b[1;31m{head}\x1b[0m:{rest}"
    note(text)


def _coloured(stream: Any) -> bool:
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def size(count: int) -> str:
    """Return bytes as people read them: decimal units, three digits."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:  # noqa: PLR2004 - decimal units
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def age(then: float, now: float) -> str:
    """Return how long ago `then` (seconds since the epoch) was, as Docker words it."""
    seconds = max(0, int(now - then))
    for length, word in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= length or length == 1:
            count = seconds // length
            return f"{count} {word}{'' if count == 1 else 's'}"
    raise AssertionError(seconds)


def progress() -> Progress:
    """Return bars on a terminal, plain lines elsewhere."""
    return _Bars() if _coloured(sys.stderr) else _Lines()


class _Lines:
    """One line when a step begins, one every ten seconds, one when it ends."""

    @contextlib.contextmanager
    def step(self, title: str, *, total: int | None = None, unit: str = "items") -> Iterator[Step]:
        note(f"{title}{'' if total is None else f' ({_amount(total, unit)})'}")
        line = _Line(title, total, unit)
        yield line
        line.finish()

    def note(self, message: str) -> None:
        note(message)


class _Line(SilentStep):
    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0
        self._began = self._said = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said >= _PLAIN_INTERVAL:
            self._said = now
            note(f"{self._title}: {self._state(now)}")

    def _state(self, now: float) -> str:
        rate = self._done / max(now - self._began, 0.001)
        text = f"{_amount(self._done, self._unit)}, {_amount(int(rate), self._unit)}/s"
        if self._total and rate:
            left = max(0, self._total - self._done) / rate
            text = f"{text}, about {left:.0f} s left"
        return text

    def finish(self) -> None:
        spent = time.monotonic() - self._began
        if spent >= 1:
            note(f"{self._title}: done in {spent:.1f} s")


def _amount(count: int, unit: str) -> str:
    return size(count) if unit == "bytes" else str(count)


class _Bars:
    """Bars with bytes, rate and time left."""

    @contextlib.contextmanager
    def step(self, title: str, *, total: int | None = None, unit: str = "items") -> Iterator[Step]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        counting = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
        columns = (
            "{task.description}",
            BarColumn(),
            *counting,
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(title, total=total, detail="")
            yield _Bar(bars, task)
        note(title)

    def note(self, message: str) -> None:
        note(message)


class _Bar:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._task, amount)

    def describe(self, detail: str) -> None:
        self._bars.update(self._task, detail=detail)
