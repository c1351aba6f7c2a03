"""Read a spec: as an outline (its data and digest), as a document, or whole as a `Spec` with its faults.

`read_outline` is what a starting container uses: it reads no YAML that has been read before, as importing
PyYAML alone takes 15 of the 100 ms of `mlenv run`. `read_document` adds places, `read_spec` the model.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from mlenv import paths
from mlenv.errors import InvalidSpecError, SpecNotFoundError
from mlenv.spec import inputs
from mlenv.spec.sources import display

if TYPE_CHECKING:
    from pathlib import Path

    from mlenv.spec.faults import Fault
    from mlenv.spec.model import Spec
    from mlenv.spec.nodes import Mapping

MAX_BYTES = 256 * 2**10
"""Largest spec that is read, in bytes."""

_NOT_IN_DIGEST = ("name", "description")
"""What people call an environment does not change what it is made of."""


_OUTLINES = "specs-1"
"""Where, in the cache, the data of texts are kept that have been read; the number is that of their form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """A spec's data and digest, as in `Document`."""

    path: Path
    data: dict[str, Any]
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A spec as it is written.

    `data`: dicts, lists and texts. `digest` ("sha256:…") covers every value of `data` but the name and the
    description, the bytes of the requirements files, and the sources of local packages; formatting, comments
    and the order of keys do not matter.
    """

    path: Path
    text: str
    data: dict[str, Any]
    digest: str
    root: Mapping


def read_outline(path: Path) -> Outline:
    """Return a spec's data and digest; what its text says is kept in the cache under the text's own digest.

    Raises: SpecNotFoundError; InvalidSpecError with every fault of the form.
    """
    text = _text(path)
    place = paths.cache_dir() / _OUTLINES / f"{sha256(text.encode()).hexdigest()}.json"
    data = _kept(place)
    if data is None:
        document = read_document(path)
        data = document.data
        if document.text == text:  # and not edited in between
            _keep(place, data)
    return Outline(path=path, data=data, digest=_digest(data, path))


def _kept(place: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(place.read_bytes())
    except (OSError, ValueError):  # not there, or damaged: the spec itself is read
        return None
    return data if isinstance(data, dict) else None


def _keep(place: Path, data: dict[str, Any]) -> None:
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data), "utf-8")
        temporary.replace(place)
    except OSError:  # a cache that cannot be written costs time and nothing else
        return


def read_document(path: Path) -> Document:
    """Return a spec as it is written, checked for its form alone: neither keys nor values.

    Raises: SpecNotFoundError; InvalidSpecError with every fault of the form.
    """
    document, faults = _read(path)
    if faults:
        from mlenv.spec.faults import invalid_spec

        raise invalid_spec(path, document.text, faults)
    return document


def read_spec(path: Path) -> Spec:
    """Return the spec in a file.

    Raises: SpecNotFoundError; InvalidSpecError with every fault: form, unknown keys, values, missing files.
    """
    from mlenv.spec.check import check
    from mlenv.spec.faults import invalid_spec

    document, faults = _read(path)
    spec, more = check(document)
    if spec is None or faults or more:
        raise invalid_spec(path, document.text, [*faults, *more])
    return spec


def _read(path: Path) -> tuple[Document, tuple[Fault, ...]]:
    from mlenv.spec.nodes import plain, read_tree

    text = _text(path)
    tree = read_tree(text)
    data = plain(tree.root)
    document = Document(path=path, text=text, data=data, digest=_digest(data, path), root=tree.root)
    return document, tree.faults


def _digest(data: dict[str, Any], path: Path) -> str:
    try:
        files = inputs.digests(data, path.parent)
    except inputs.TooLargeError as fault:
        raise InvalidSpecError(
            f"a local package of `{display(path)}` is too large",
            cause=str(fault),
            hint="move data out of the package's directory",
        ) from fault
    kept = {key: value for key, value in data.items() if key not in _NOT_IN_DIGEST}
    content = json.dumps({"files": files, "spec": kept}, sort_keys=True, separators=(",", ":"))
    return "sha256:" + sha256(content.encode("ascii")).hexdigest()


def _text(path: Path) -> str:
    """Return a spec's text.

    Raises: SpecNotFoundError; InvalidSpecError for what is no text file of a spec's size.
    """
    content = _bytes(path)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _unreadable(path, "it is UTF-16", "save it as UTF-8")
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as fault:
        from mlenv.spec.faults import Fault, invalid_spec

        text = content.decode("utf-8", "replace")
        before = content[: fault.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        wrong = Fault(
            line=line,
            column=column,
            message=f"the byte 0x{content[fault.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
        )
        raise invalid_spec(path, text, [wrong]) from None


def _bytes(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            content = file.read(MAX_BYTES + 1) if stat.S_ISREG(mode) else b""
    except (FileNotFoundError, NotADirectoryError):
        raise SpecNotFoundError(
            f"there is no file `{display(path)}`", hint="`mlenv envs` lists the known specs"
        ) from None
    except IsADirectoryError:
        mode, content = stat.S_IFDIR, b""
    except OSError as refusal:
        raise _unreadable(path, refusal.strerror or str(refusal), "make it readable for you") from refusal
    if stat.S_ISDIR(mode):
        raise _unreadable(path, "it is a directory", "name the YAML file in it")
    if not stat.S_ISREG(mode):
        raise _unreadable(path, "it is not a regular file", "write the spec to a file")
    if len(content) > MAX_BYTES:
        raise _unreadable(
            path,
            f"it is larger than {MAX_BYTES >> 10} KiB",
            "a spec takes a few lines: is it the file you meant?",
        )
    return content


def _unreadable(path: Path, reason: str, hint: str) -> InvalidSpecError:
    return InvalidSpecError(f"the spec `{display(path)}` cannot be read", cause=reason, hint=hint)
