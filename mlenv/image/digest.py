"""Digests: the names of everything in an image.

A digest is written `sha256:` and 64 lower-case hexadecimal digits.
Source: OCI image-spec, descriptor.md, Digests.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from mlenv.errors import ImageError

if TYPE_CHECKING:
    from pathlib import Path

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z")
_CHUNK = 1 << 20


def digest_of(content: bytes) -> str:
    """Return the digest of some bytes."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def encoded(digest: str) -> str:
    """Return the hexadecimal part of a digest.

    Raises: ImageError where it is no sha256 digest, so that it can be used as a file name.
    """
    match = _DIGEST.match(digest)
    if match is None:
        raise ImageError(
            f"`{digest}` is not a digest", hint="a digest is `sha256:` and 64 hexadecimal digits"
        )
    return match[1]


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read once from front to back."""
    sha256 = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
