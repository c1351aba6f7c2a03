"""References: what a user calls an image.

`NAME[:TAG][@DIGEST]`, or the digest alone, or its first hexadecimal digits.
Source: distribution-spec, spec.md, Pulling manifests (grammar of name and tag).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlenv.errors import UsageError

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?"
_REFERENCE = re.compile(
    rf"(?P<name>{_HOST}{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?\Z"
)
_DIGEST_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{6,64})\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A name with what narrows it down."""

    name: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        """Return the reference as it is written."""
        tag = f":{self.tag}" if self.tag else ""
        return self.name + tag + (f"@{self.digest}" if self.digest else "")


def parse(text: str) -> Reference:
    """Read a reference.

    Raises: UsageError where it is none.
    """
    match = _REFERENCE.match(text)
    if match is None:
        raise UsageError(
            f"`{text}` is not an image reference",
            cause="names are lower-case words joined by `.`, `_`, `-` and `/`",
            hint="write NAME, NAME:TAG or NAME@sha256:DIGEST; `mlenv images` lists what there is",
        )
    return Reference(name=match["name"], tag=match["tag"], digest=match["digest"])


def digest_prefix(text: str) -> str | None:
    """Return the hexadecimal digits where `text` is a digest or the start of one (6 digits or more)."""
    match = _DIGEST_PREFIX.match(text)
    return match[1] if match else None
