"""A fault in a spec, and how all of them are shown: place, message, the line with a caret, the remedy."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlenv.errors import InvalidSpecError
from mlenv.spec.sources import display

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""What ends a line. Source: YAML 1.1, section 4.1.4, as libyaml counts them."""

_WINDOW = 96
"""Characters of a source line that are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault; `line` and `column` count from 1 in characters, `width` is how many of them it covers."""

    line: int
    column: int
    width: int = 1
    message: str
    hint: str | None = None


def lines_of(text: str) -> list[str]:
    """Return the lines of a text as YAML counts them."""
    return _BREAK.split(text)


def invalid_spec(path: Path, text: str, faults: Iterable[Fault]) -> InvalidSpecError:
    """Return the error that shows every fault of a spec, in the order of the file, each place once."""
    ordered = _once(faults)
    count = "a fault" if len(ordered) == 1 else f"{len(ordered)} faults"
    shown = display(path)
    lines = lines_of(text)
    blocks = [render(fault, name=shown, lines=lines) for fault in ordered]
    return InvalidSpecError("\n".join([f"`{shown}` has {count}", *blocks]))


def render(fault: Fault, *, name: str, lines: Sequence[str]) -> str:
    """Return one fault as text: `file:line:column: message`, the line, a caret, the remedy."""
    number = str(fault.line)
    margin = " " * len(number)
    shown = [f"{name}:{fault.line}:{fault.column}: {fault.message}"]
    if 0 < fault.line <= len(lines):
        source, pointer = _excerpt(lines[fault.line - 1], fault.column - 1, fault.width)
        shown += [f"  {number} | {source}".rstrip(), f"  {margin} | {pointer}"]
    if fault.hint:
        shown.append(f"  {margin} = hint: {fault.hint}")
    return "\n".join(shown)


def quote(text: str, *, limit: int = 48) -> str:
    """Return a text from a spec for a message: one line without control characters, in backticks."""
    visible = "".join(character if character.isprintable() else "�" for character in text)
    return f"`{visible if len(visible) <= limit else visible[: limit - 1] + '…'}`"


def _once(faults: Iterable[Fault]) -> list[Fault]:
    """Return the faults by place, the first of each place: what follows from it would only repeat it."""
    places: dict[tuple[int, int], Fault] = {}
    for fault in faults:
        places.setdefault((fault.line, fault.column), fault)
    return [places[place] for place in sorted(places)]


def _excerpt(line: str, start: int, width: int) -> tuple[str, str]:
    """Return what is shown of a line, and the carets below `width` characters from `start` (0-based)."""
    first = max(0, min(start - _WINDOW // 2, len(line) - _WINDOW))
    shown = line[first : first + _WINDOW]
    before = shown[: start - first]
    marked = shown[start - first : start - first + max(width, 1)]
    source = (
        ("…" if first else "") + "".join(map(_visible, shown)) + ("…" if first + _WINDOW < len(line) else "")
    )
    indent = (" " if first else "") + " " * sum(map(_cells, before))
    return source, indent + "^" * max(1, sum(map(_cells, marked.rstrip())))


def _visible(character: str) -> str:
    if character == "\t":
        return "→"
    return character if character.isprintable() else "�"


def _cells(character: str) -> int:
    """Return how many columns of a terminal a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
