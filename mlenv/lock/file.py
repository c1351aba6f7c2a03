"""`NAME.lock.json`: read a lock as untrusted input, write it whole or not at all.

A lock comes with a repository that somebody else wrote, so every field is checked (`mlenv.lock.parse`) before
a path is joined or a file fetched: types, digests, and that no name leads out of the directory it is used in.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from mlenv.errors import LockError
from mlenv.lock import canonical
from mlenv.spec.sources import LOCK_SUFFIX, lock_path

if TYPE_CHECKING:
    from pathlib import Path

    from mlenv.lock.model import Lock

MAX_BYTES = 32 * 2**20
"""Largest lock that is read, in bytes; one of a thousand packages has 0.3 MB."""


class LockStatus(str, Enum):
    """How the lock beside a spec stands to the spec."""

    MISSING = "missing"
    STALE = "stale"
    MATCHING = "matching"

    @property
    def is_usable(self) -> bool:
        """Whether the environment can be built from the lock."""
        return self is LockStatus.MATCHING


@dataclass(frozen=True, kw_only=True, slots=True)
class LockState:
    """The lock that belongs to a spec, or was made from an older form of it (`STALE`), or None."""

    path: Path
    status: LockStatus
    lock: Lock | None


def canonical_bytes(lock: Lock) -> bytes:
    """Return the bytes of the lock's file."""
    return canonical.dump(lock)


def lock_state(path: Path, spec_digest: str) -> LockState:
    """Return what is known about a lock; `path` is the lock's, or that of the spec it lies beside.

    Raises: LockError where there is a lock and it is damaged.
    """
    place = path if path.name.endswith(LOCK_SUFFIX) else lock_path(path)
    if not os.path.lexists(place):
        return LockState(path=place, status=LockStatus.MISSING, lock=None)
    lock = read_lock(place)
    status = LockStatus.MATCHING if lock.spec == spec_digest else LockStatus.STALE
    return LockState(path=place, status=status, lock=lock)


def matching_lock(path: Path, spec_digest: str) -> Lock | None:
    """Return the lock at `path` (or beside the spec at `path`) if it was made from this very spec.

    Raises: LockError where there is a lock and it is damaged.
    """
    state = lock_state(path, spec_digest)
    return state.lock if state.status.is_usable else None


def matching_digest(path: Path, spec_digest: str) -> tuple[str, str] | None:
    """Return name and digest of the lock at `path` if it was made from this very spec, by its bytes alone.

    For whoever knows the digests of locks that have been read before: nothing else of it is checked here,
    and the model of a lock, 10 ms of a command's start, is not loaded. None for a lock that cannot be read.
    """
    try:
        content = _read(path)
        known = json.loads(content)
        if known["spec"] != spec_digest:
            return None
        return str(known["name"]), canonical.digest(content)
    except (LockError, ValueError, LookupError, TypeError, RecursionError):
        return None


def read_lock(path: Path) -> Lock:
    """Return the lock in a file.

    Raises: LockError, with the line or the field at fault.
    """
    return parse_lock(_read(path), path=path)


def parse_lock(content: bytes, *, path: Path) -> Lock:
    """Return the lock that `content` spells; `path` is where it came from, for messages.

    Raises: LockError, with the line or the field at fault.
    """
    from mlenv.lock.parse import LockFault, parse

    try:
        return parse(content)
    except LockFault as fault:
        raise LockError(
            f"`{path}` is not a lock that can be used", cause=str(fault), hint=fault.hint or _remake(path)
        ) from None


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock durably: a reader sees the old file or the new one, whole. An equal file is left alone.

    Raises: LockError where the lock would not be readable again; OSError where the file cannot be written.
    """
    content = canonical_bytes(lock)
    if parse_lock(content, path=path) != lock:
        raise LockError(f"the lock for `{path}` does not survive being written", code="invalid-lock")
    target = path.resolve()
    if target.is_file() and target.read_bytes() == content:
        return
    temporary = target.with_name(f".{target.name}.{os.urandom(6).hex()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, content)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()
        raise
    _sync_directory(target.parent)


def _write_synced(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remake(path: Path) -> str:
    name = path.name.removesuffix(LOCK_SUFFIX)
    return f"make it anew with `mlenv lock {name}`, or take `{path.name}` from git again"


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
                return file.read(MAX_BYTES + 1)
    except OSError as refusal:
        raise LockError(
            f"the lock `{path}` cannot be read", cause=refusal.strerror, hint=_remake(path)
        ) from refusal
    reason = f"it is larger than {MAX_BYTES} bytes" if stat.S_ISREG(status.st_mode) else "it is not a file"
    raise LockError(f"the lock `{path}` cannot be read", cause=reason, hint=_remake(path))
