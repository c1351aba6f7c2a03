"""YAML text to a tree of texts, lists and mappings that know their places, with every fault of its form.

Built from libyaml's events rather than PyYAML's composer: depth, size and aliases are bounded while reading,
duplicate keys and foreign tags are found at every level, and reading goes on after them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from mlenv.spec.faults import Fault, lines_of, quote

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_DEPTH = 16
"""Levels of nesting; a spec uses four."""
MAX_NODES = 20_000
"""Values in a spec, counted with every alias written out."""

_Loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

_CORE = "tag:yaml.org,2002:"
_SCALAR_TAGS = frozenset(_CORE + word for word in ("str", "int", "float", "bool", "null"))

_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
    "|[\u202a-\u202e\u2066-\u2069]"
)
"""Not printable in YAML (YAML 1.2.2, section 5.1), or showing text in another order than it is read."""

_GAP = re.compile(r"(?:\s|(?<=\s)#[^\n]*)*")
"""Spaces and comments between two tokens."""

_ALIGN = "indent keys of one mapping alike; quote a value that begins with a quote or bracket"
_REMEDIES = {
    "mapping values are not allowed": "indent keys alike, and quote a value that holds `: `",
    "found unexpected end of stream": "close the quote",
    "expected ',' or ']'": "close the list with `]`",
    "expected ',' or '}'": "close the mapping with `}`",
    "expected node content": "close the bracket, or quote the value",
    "expected the node content": "close the bracket, or quote the value",
    "expected key": _ALIGN,
    "expected <block end>": _ALIGN,
    "expected '-' indicator": "a list and keys cannot stand at the same level: indent one of them",
    "expected ':'": "write `key: value`",
    "unknown escape character": r"write `\\` for a backslash, or use single quotes",
    "cannot start any token": "quote the value",
    "incompatible YAML document": "remove the `%YAML` line",
    "undefined tag handle": "remove the tag, or quote the value",
}
"""Words of libyaml's and PyYAML's messages, and what to do about them."""


@dataclass(kw_only=True, slots=True)
class Place:
    """Where something stands: `line` and `column` from 1, `width` in characters."""

    line: int
    column: int
    width: int = 1


@dataclass(kw_only=True, slots=True)
class Scalar:
    """A text; `is_empty` where nothing at all was written."""

    place: Place
    text: str
    is_empty: bool = False
    size: int = 1


@dataclass(kw_only=True, slots=True)
class Sequence:
    """A list; `size` counts all values in it, aliases written out."""

    place: Place
    items: list[Node] = field(default_factory=list)
    size: int = 1


@dataclass(kw_only=True, slots=True)
class Mapping:
    """A mapping with the places of its keys; of equal keys the first counts."""

    place: Place
    items: dict[str, Node] = field(default_factory=dict)
    keys: dict[str, Place] = field(default_factory=dict)
    size: int = 1


Node = Scalar | Sequence | Mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """What a text holds: the top mapping (empty where there is none) and the faults of its form."""

    root: Mapping
    faults: tuple[Fault, ...]


def read_tree(text: str) -> Tree:
    """Return the tree of a spec's text with every fault of its form; no text makes it raise."""
    faults = list(_forbidden_characters(text))
    if faults:
        return Tree(root=Mapping(place=Place(line=1, column=1)), faults=tuple(faults))
    reader = _TreeReader(text)
    root = reader.document()
    return Tree(root=root, faults=tuple(reader.faults))


def plain(node: Node) -> Any:
    """Return a node as dicts, lists and texts."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items.items()}
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return node.text


def _forbidden_characters(text: str) -> Iterator[Fault]:
    for number, line in enumerate(lines_of(text), start=1):
        for found in _FORBIDDEN.finditer(line):
            yield Fault(
                line=number,
                column=found.start() + 1,
                message=f"the character U+{ord(found.group()):04X} cannot stand in a spec",
                hint="remove it: it is invisible or changes how the line is shown",
            )


class _Stop(Exception):  # noqa: N818 - ends the reading; the fault is already noted
    """Nothing after this can be read."""


class _TreeReader:
    """Turns libyaml's events into nodes. Source: YAML 1.2.2, section 3.1 (compose)."""

    def __init__(self, text: str) -> None:
        self.faults: list[Fault] = []
        self._text = text
        self._events: Iterator[Any] = yaml.parse(text, Loader=_Loader)
        self._anchors: dict[str, Node] = {}
        self._open: set[str] = set()
        self._end = self._end_before = 0  # indices in the text where the last two events end

    def document(self) -> Mapping:
        """Return the top mapping of the one document, as far as it can be read."""
        root: Node | None = None
        try:
            for event in self._events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if root is not None:
                        self._fault(_place(event), "a spec is one YAML document", "remove the second `---`")
                        break
                    root = self._node(self._next(), depth=1)
        except yaml.MarkedYAMLError as error:
            self.faults.append(self._malformed(error))
        except _Stop:
            pass
        return self._top(root)

    def _next(self) -> Any:
        event = next(self._events)
        self._end_before, self._end = self._end, event.end_mark.index
        return event

    def _top(self, root: Node | None) -> Mapping:
        if isinstance(root, Mapping):
            return root
        is_empty = root is None or (isinstance(root, Scalar) and root.is_empty)
        place = Place(line=1, column=1) if root is None or is_empty else root.place
        if not self.faults:
            message = "the spec is empty" if is_empty else "a spec is a mapping of `key: value` lines"
            self._fault(place, message, 'begin with a line such as `python: "3.11"` or `packages: [numpy]`')
        return Mapping(place=place)

    def _fault(self, place: Place, message: str, hint: str | None = None) -> None:
        self.faults.append(
            Fault(line=place.line, column=place.column, width=place.width, message=message, hint=hint)
        )

    def _node(self, event: Any, *, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if depth > MAX_DEPTH:
            self._fault(
                _place(event), f"nested more than {MAX_DEPTH} levels deep", "no key of a spec is nested so"
            )
            raise _Stop
        if event.anchor:
            self._open.add(event.anchor)
        if isinstance(event, yaml.ScalarEvent):
            node: Node = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(event, depth=depth)
        else:
            node = self._mapping(event, depth=depth)
        if event.anchor:
            self._open.discard(event.anchor)
            self._anchors[event.anchor] = node
        return node

    def _alias(self, event: Any) -> Node:
        node = self._anchors.get(event.anchor)
        if node is not None and event.anchor not in self._open:
            return node
        if event.anchor in self._open:
            message, hint = (
                f"the alias `*{event.anchor}` stands inside the value it names",
                "write the value out",
            )
        else:
            message = f"the alias `*{event.anchor}` has no anchor before it"
            hint = f"mark a value with `&{event.anchor}`, or quote a text that begins with `*`"
        self._fault(_place(event), message, hint)
        return Scalar(place=_place(event), text="", is_empty=True)

    def _scalar(self, event: Any) -> Scalar:
        self._check_tag(event, _SCALAR_TAGS)
        if "\0" in event.value:
            self._fault(_place(event), "a NUL character cannot stand in a value", r"remove the `\0`")
        is_empty = event.value == "" and bool(event.implicit[0])
        place = self._place_of_nothing() if is_empty else _place(event)
        return Scalar(place=place, text=event.value, is_empty=is_empty)

    def _place_of_nothing(self) -> Place:
        """Return where a value is missing: libyaml's mark is that of the next token, maybe lines below."""
        gap = _GAP.match(self._text, self._end_before)
        before = lines_of(self._text[: gap.end() if gap else self._end_before])
        return Place(line=len(before), column=len(before[-1]) + 1)

    def _sequence(self, event: Any, *, depth: int) -> Sequence:
        self._check_tag(event, {_CORE + "seq"})
        node = Sequence(place=_place(event))
        while not isinstance(item := self._next(), yaml.SequenceEndEvent):
            node.items.append(self._node(item, depth=depth + 1))
            node.size += node.items[-1].size
            self._check_size(node.size, item)
        return node

    def _mapping(self, event: Any, *, depth: int) -> Mapping:
        self._check_tag(event, {_CORE + "map"})
        node = Mapping(place=_place(event))
        while not isinstance(key_event := self._next(), yaml.MappingEndEvent):
            key = self._node(key_event, depth=depth + 1)
            value_event = self._next()
            value = self._node(value_event, depth=depth + 1)
            if isinstance(value, Scalar) and value.is_empty:
                value.place = _place(key_event)
            node.size += key.size + value.size
            self._check_size(node.size, value_event)
            self._add(node, key, value, _place(key_event))
        return node

    def _add(self, node: Mapping, key: Node, value: Node, place: Place) -> None:
        """Put a pair into a mapping unless its key is none or stands there already."""
        if not isinstance(key, Scalar):
            self._fault(place, "a key must be a text", "write `key: value`")
        elif key.text == "<<":
            self._fault(place, "merge keys (`<<`) are not read in a spec", "write the keys out")
        elif key.text in node.keys:
            first = node.keys[key.text].line
            self._fault(
                place, f"the key {quote(key.text)} stands twice", f"line {first} has it too: keep one"
            )
        else:
            node.items[key.text] = value
            node.keys[key.text] = place

    def _check_size(self, size: int, event: Any) -> None:
        if size > MAX_NODES:
            message = f"the spec holds more than {MAX_NODES} values when its aliases are written out"
            self._fault(_place(event), message, "remove aliases of aliases")
            raise _Stop

    def _check_tag(self, event: Any, allowed: frozenset[str] | set[str]) -> None:
        if event.tag in (None, "!") or event.tag in allowed:
            return
        tag = event.tag.replace(_CORE, "!!", 1) if event.tag.startswith(_CORE) else event.tag
        self._fault(
            _place(event),
            f"the tag {quote(tag)} is not read in a spec",
            "remove the tag; quote the value if it begins with `!`",
        )

    def _inside(self, line: int, column: int) -> tuple[int, int]:
        """Return a place within the text: libyaml puts its end on a line of its own."""
        lines = lines_of(self._text)
        return (line, column) if line <= len(lines) else (len(lines), len(lines[-1]) + 1)

    def _malformed(self, error: yaml.MarkedYAMLError) -> Fault:
        """Return the fault of text that is not YAML, in the scanner's words and at its mark."""
        mark = error.problem_mark or error.context_mark
        line, column = self._inside(mark.line + 1, mark.column + 1) if mark else (1, 1)
        problem = error.problem or "the text is not YAML"
        hint = next((remedy for words, remedy in _REMEDIES.items() if words in problem), None)
        if "cannot start any token" in problem and mark and self._text[mark.index : mark.index + 1] == "\t":
            problem, hint = "a tab indents this line", "indent with spaces: YAML allows no tabs there"
        begun = error.context_mark
        if begun and error.context and begun.line + 1 != line:
            problem += f" ({error.context} that begins in line {begun.line + 1})"
        return Fault(line=line, column=column, message=f"malformed YAML: {problem}", hint=hint)


def _place(event: Any) -> Place:
    start, end = event.start_mark, event.end_mark
    width = end.column - start.column if end.line == start.line else 1
    return Place(line=start.line + 1, column=start.column + 1, width=max(width, 1))
