"""JSON by its C half alone: the `json` module costs 11 ms of imports that a container's start has not."""

from __future__ import annotations

import os

from mlenv.container import frames

try:
    import _json
except ImportError:  # an interpreter without the C accelerator
    _json = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Rules:
    """What `_json.make_scanner` asks of a decoder."""

    strict = True
    object_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}  # noqa: RUF012 - the scanner's own key cache

    @staticmethod
    def object_pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return the object, refusing a key that is there twice."""
        members = dict(pairs)
        if len(members) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key `{double}` is there twice")
        return members

    @staticmethod
    def parse_constant(name: str) -> float:
        """Refuse what JSON has not."""
        raise ValueError(f"`{name}` is not JSON")


def parse(text: str) -> Any:
    """Return the value that `text` is the JSON of.

    Raises: ValueError for anything else, a repeated key included.
    """
    if _json is None:
        return _parse_slowly(text)
    stripped = text.strip(" \t\r\n")
    try:
        value, end = _json.make_scanner(_Rules())(stripped, 0)  # type: ignore[arg-type]
    except (StopIteration, SystemError):  # the scanner reports through a class of `json`, which is not loaded
        return _parse_slowly(text)
    if end != len(stripped):
        raise ValueError(f"something follows the JSON value at character {end}")
    return value


def _parse_slowly(text: str) -> Any:
    import json

    return json.loads(text, object_pairs_hook=_Rules.object_pairs_hook)


def serialise(value: Any) -> bytes:
    """Return `value` as canonical JSON (sorted keys) with a newline at its end."""
    if _json is None:
        import json

        return json.dumps(value, sort_keys=True).encode() + b"\n"
    encode = _json.make_encoder(
        {}, _refuse, _json.encode_basestring_ascii, None, ": ", ", ", True, False, False
    )
    return "".join(encode(value, 0)).encode() + b"\n"


def _refuse(value: object) -> Any:
    raise TypeError(f"{type(value).__name__} is not JSON")


def read(path: str) -> Any:
    """Return the JSON value in the file `path`. Raises: OSError; ValueError for what is not JSON."""
    with open(path, "rb", buffering=0) as file:
        return parse(file.read().decode())


def write(path: str, value: Any, *, durable: bool = False) -> None:
    """Replace the file `path` by the JSON of `value` in one step, mode 0600.

    `durable`: it is whole after a power cut too, for the price of waiting for the disk. Raises: OSError.
    """
    content = serialise(value)
    temporary = f"{path}.{os.getpid()}.tmp"
    target_fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        frames.write_all(target_fd, content)
        if durable:
            os.fsync(target_fd)
    except OSError:
        os.unlink(temporary)
        raise
    finally:
        os.close(target_fd)
    os.rename(temporary, path)
