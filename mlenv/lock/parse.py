"""Untrusted JSON bytes to a lock: every type, digest and path is checked before anything uses it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from mlenv.lock.model import (
    ARCHIVES,
    SCHEMA,
    BaseLock,
    DebPackage,
    ImageLock,
    Lock,
    Platform,
    PythonLock,
    TorchLock,
    Wheel,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeVar

    T = TypeVar("T")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+:~!_-]*")
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9-]*")
_POOL_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~:%/-]*\.deb")
_FILENAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+!~-]*\.(whl|tar\.gz|zip)")
_REFERENCE = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:/@\[\]-]*")
_SHOWN = 60
"""Characters of a wrong value that a message shows."""
_CONFLICT = ("<<<<<<< ", "=======", ">>>>>>> ")


class LockFault(Exception):  # noqa: N818 - a finding; file.py turns it into LockError
    """What is wrong with a lock, and where."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def parse(content: bytes) -> Lock:
    """Return the lock that JSON spells.

    Raises: LockFault, naming the line or the field.
    """
    return _lock(_Object(_json(content), ""))


def _json(content: bytes) -> Any:
    """Return what JSON text says; duplicate keys and NaN are faults. Source: RFC 8259, sections 4 and 6."""
    try:
        text = content.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        raise LockFault(f"line {line} is not UTF-8") from None
    except json.JSONDecodeError as fault:
        raise _damage(text, fault) from None
    except RecursionError:
        raise LockFault("it is nested too deeply") from None
    except ValueError as fault:  # a number of more digits than Python converts
        raise LockFault(f"it is not JSON: {fault}") from None


def _damage(text: str, fault: json.JSONDecodeError) -> LockFault:
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if line.startswith(_CONFLICT):
            return LockFault(
                f"line {number} is the mark of a git merge conflict",
                hint="finish the merge of the spec, then lock it again",
            )
    return LockFault(f"line {fault.lineno}, column {fault.colno}: {fault.msg}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise LockFault(f"the key `{_short(key)}` stands twice in one object")
        found[key] = value
    return found


def _no_constant(word: str) -> None:
    raise LockFault(f"`{word}` is not JSON")


def _short(value: object) -> str:
    """Return a value as JSON, shortened for a message."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


class _Object:
    """A JSON object whose fields are taken one by one, by type; `done` refuses what is left over."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise LockFault(f"{f'`{where}`' if where else 'it'} is not an object but {_short(value)}")
        self._fields = dict(value)
        self._where = where

    def place(self, key: str) -> str:
        """Return the path of a field, as messages show it."""
        return f"{self._where}.{key}" if self._where else key

    def fault(self, key: str, value: object, wanted: str) -> LockFault:
        """Return the fault of a field that is not what it must be."""
        return LockFault(f"`{self.place(key)}` is {_short(value)}, not {wanted}")

    def take(self, key: str) -> Any:
        """Remove and return a field, None where it is absent."""
        return self._fields.pop(key, None)

    def text(self, key: str, form: re.Pattern[str] | None = None, wanted: str = "a text") -> str:
        """Return a text field that matches `form` as a whole."""
        value = self.take(key)
        if value is None:
            raise LockFault(f"`{self.place(key)}` is missing")
        if not isinstance(value, str) or "\0" in value or (form and not form.fullmatch(value)):
            raise self.fault(key, value, wanted)
        return value

    def optional_text(
        self, key: str, form: re.Pattern[str] | None = None, wanted: str = "a text"
    ) -> str | None:
        """Return a text field, None where it is absent."""
        return None if self._fields.get(key) is None else self.text(key, form, wanted)

    def whole_number(self, key: str) -> int:
        """Return a field that is an integer, 0 or more."""
        value = self.take(key)
        if value is None:
            raise LockFault(f"`{self.place(key)}` is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.fault(key, value, "a whole number")
        return value

    def elements(self, key: str) -> list[Any]:
        """Return a list, empty where it is absent."""
        value = self.take(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.fault(key, value, "a list")
        return value

    def objects(self, key: str, read: Callable[[_Object], T]) -> tuple[T, ...]:
        """Return a list of objects, each read with `read`."""
        numbered = enumerate(self.elements(key))
        return tuple(read(_Object(element, f"{self.place(key)}[{index}]")) for index, element in numbered)

    def optional_object(self, key: str, read: Callable[[_Object], T]) -> T | None:
        """Return an object read with `read`, None where it is absent."""
        value = self.take(key)
        return None if value is None else read(_Object(value, self.place(key)))

    def done(self) -> None:
        """Refuse the fields that nothing took: a lock of this schema has no others."""
        if self._fields:
            raise LockFault(f"`{self.place(next(iter(self._fields)))}` is not a field of a lock")


def _lock(source: _Object) -> Lock:
    schema = source.take("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise LockFault(
            f"its schema is {_short(schema)}; this mlenv reads schema {SCHEMA}",
            hint="update mlenv" if isinstance(schema, int) and schema > SCHEMA else None,
        )
    lock = Lock(
        schema=SCHEMA,
        name=source.text("name", _NAME, "a name"),
        spec=source.text("spec", _DIGEST, "a sha256 digest"),
        platform=_required(source, "platform", _platform),
        base=source.optional_object("base", _base),
        apt=source.objects("apt", _deb_package),
        python=source.optional_object("python", _python),
        pytorch=source.optional_object("pytorch", _torch),
        wheels=source.objects("wheels", _wheel),
        build=_texts(source, "build"),
        image=source.optional_object("image", _image),
    )
    source.done()
    if lock.image is None and (lock.base is None or lock.python is None):
        raise LockFault("it has neither an `image` nor a `base` with a `python`")
    _once("wheels", (wheel.name for wheel in lock.wheels))
    debs = (*(lock.base.packages if lock.base else ()), *lock.apt)
    _once("apt", (f"{package.name}:{package.architecture}" for package in debs))
    return lock


def _once(field: str, names: Iterable[str]) -> None:
    """Refuse a package that is pinned twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise LockFault(f"`{field}` pins {name} twice")
        seen.add(name)


def _required(source: _Object, key: str, read: Callable[[_Object], T]) -> T:
    value = source.optional_object(key, read)
    if value is None:
        raise LockFault(f"`{source.place(key)}` is missing")
    return value


def _texts(source: _Object, key: str) -> tuple[str, ...]:
    elements = source.elements(key)
    for index, element in enumerate(elements):
        if not isinstance(element, str) or "\0" in element:
            raise source.fault(f"{key}[{index}]", element, "a text")
    return tuple(elements)


def _platform(source: _Object) -> Platform:
    platform = Platform(
        os=source.text("os", _ARCHITECTURE, "an operating system's name"),
        architecture=source.text("architecture", _ARCHITECTURE, "an architecture's name"),
        glibc=source.optional_text("glibc", _VERSION, "a version"),
    )
    source.done()
    return platform


def _base(source: _Object) -> BaseLock:
    base = BaseLock(
        name=source.text("name", re.compile(r"[a-z0-9][a-z0-9.:-]*"), "a base's name"),
        suite=source.text("suite", _ARCHITECTURE, "a suite's name"),
        packages=source.objects("packages", _deb_package),
    )
    source.done()
    return base


def _deb_package(source: _Object) -> DebPackage:
    package = DebPackage(
        name=source.text("name", _NAME, "a package's name"),
        version=source.text("version", _VERSION, "a version"),
        architecture=source.text("architecture", _ARCHITECTURE, "an architecture's name"),
        path=source.text("path", _POOL_PATH, "a path below a mirror that ends in .deb"),
        archive=source.text("archive", re.compile("|".join(ARCHIVES)), " or ".join(ARCHIVES)),
        sha256=source.text("sha256", _SHA256, "a sha256 in hex"),
        size=source.whole_number("size"),
    )
    if any(part in ("", ".", "..") for part in package.path.split("/")):
        raise source.fault("path", package.path, "a path that stays below its mirror")
    source.done()
    return package


def _python(source: _Object) -> PythonLock:
    python = PythonLock(
        version=source.text("version", _VERSION, "a version"),
        source=source.text("source", re.compile(r"[a-z0-9][a-z0-9.:-]*"), "a base's name or `standalone`"),
        interpreter=source.text("interpreter", re.compile(r"/[A-Za-z0-9._+/-]+"), "an absolute path"),
        key=source.optional_text("key", _NAME, "a uv key"),
        sha256=source.optional_text("sha256", _SHA256, "a sha256 in hex"),
    )
    if any(part in ("", ".", "..") for part in python.interpreter[1:].split("/")):
        raise source.fault("interpreter", python.interpreter, "a path without `..`")
    source.done()
    return python


def _torch(source: _Object) -> TorchLock:
    torch = TorchLock(
        version=source.text("version", _VERSION, "a version"),
        variant=source.text("variant", _NAME, "a variant's name"),
        cuda=source.optional_text("cuda", _VERSION, "a version"),
        cudnn=source.optional_text("cudnn", _VERSION, "a version"),
        sm=_capabilities(source, "sm"),
        ptx=_capabilities(source, "ptx"),
        min_driver=source.optional_text("min_driver", _VERSION, "a version"),
    )
    source.done()
    return torch


def _capabilities(source: _Object, key: str) -> tuple[int, ...]:
    elements = source.elements(key)
    for index, element in enumerate(elements):
        if isinstance(element, bool) or not isinstance(element, int) or element <= 0:
            raise source.fault(f"{key}[{index}]", element, "a compute capability")
    return tuple(elements)


def _wheel(source: _Object) -> Wheel:
    wheel = Wheel(
        name=source.text("name", _NAME, "a package's name"),
        version=source.text("version", _VERSION, "a version"),
        filename=source.text("filename", _FILENAME, "a wheel's file name"),
        sha256=source.text("sha256", _SHA256, "a sha256 in hex"),
        size=source.whole_number("size"),
        path=source.optional_text("path"),
    )
    if wheel.path is not None and not _is_local_source(wheel.path):
        raise source.fault("path", wheel.path, "a relative path like `./libs/mypkg`")
    source.done()
    return wheel


def _is_local_source(path: str) -> bool:
    """Tell whether a path is relative with `..` at most in front, as a spec spells its local packages."""
    parts = path.rstrip("/").split("/")
    while parts and parts[0] in (".", ".."):
        parts.pop(0)
    return bool(path) and not path.startswith("/") and not any(part in ("", ".", "..") for part in parts)


def _image(source: _Object) -> ImageLock:
    image = ImageLock(
        reference=source.text("reference", _REFERENCE, "an image reference"),
        digest=source.text("digest", _DIGEST, "a sha256 digest"),
    )
    source.done()
    return image
