"""The one way a value is written as JSON: equal values give equal bytes, a changed package changes one line.

Keys are sorted, objects are indented by two, each element of a list stands on a line of its own, absent
(None) fields are left out, everything is ASCII, and the last line ends.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any


def dump(value: object) -> bytes:
    """Return a dataclass of texts, integers, tuples and dataclasses in its canonical bytes."""
    return (_block(_plain(value), "") + "\n").encode("ascii")


def digest(content: bytes) -> str:
    """Return the digest of `content` as OCI spells it. Source: OCI image-spec descriptor.md, Digests."""
    return "sha256:" + sha256(content).hexdigest()


def _plain(value: object) -> Any:
    """Return a value as dicts, lists, texts and numbers."""
    if is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {name: _plain(content) for name, content in pairs if content is not None}
    if isinstance(value, (tuple, list)):
        return [_plain(element) for element in value]
    return value


def _block(value: Any, indent: str) -> str:
    """Return objects and lists over several lines, each element of a list on one."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{deeper}{json.dumps(key)}: {_block(value[key], deeper)}" for key in sorted(value)]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value:
        lines = [deeper + json.dumps(element, sort_keys=True) for element in value]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(value)
