"""The files that a spec is made of besides itself: requirements files and local packages, as digests.

They belong to the spec's digest: a changed requirement or line of a local package makes its lock stale.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mlenv.spec.sources import LOCK_SUFFIX, is_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES = 512 * 2**20
MAX_FILES = 50_000
"""Most that the local package of a spec may hold; more is data that lies in the wrong place."""

_REQUIREMENTS_READ = 2**20
"""Characters of a requirements file that are searched for further files."""

_SKIPPED = frozenset(
    (
        ".git",
        ".hg",
        ".svn",
        "__pycache__",
        ".venv",
        "venv",
        ".tox",
        ".nox",
        "node_modules",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
        ".ipynb_checkpoints",
        ".hypothesis",
    )
)
_SKIPPED_AT_TOP = frozenset(("build", "dist", "envs"))
"""Not part of a package's source; `envs` holds the specs and locks themselves."""
_SKIPPED_ENDINGS = (".pyc", ".pyo", ".ipynb", LOCK_SUFFIX)
"""Files that change while an environment is used; a lock must not make itself stale."""

_INCLUDED = re.compile(r"(?:-r|-c|--requirement|--constraint)(?:\s+|=)?(?P<path>[^\s=]\S*)")
_EDITABLE = re.compile(r"(?:-e|--editable)(?:\s+|=)(?P<path>\S+)")


class TooLargeError(Exception):
    """A local package that holds more than a package can."""


def digests(data: Any, directory: Path) -> dict[str, str]:
    """Return the digest of every file and package that a spec's data name, by the path as it is written.

    What is missing has the digest "missing": reading the spec reports it. Raises: TooLargeError.
    """
    if not isinstance(data, dict):
        return {}
    found: dict[str, str] = {}
    requirements = data.get("requirements")
    if isinstance(requirements, str) and requirements:
        _add_requirements(requirements, directory, found)
    packages = data.get("packages")
    for package in packages if isinstance(packages, list) else ():
        if isinstance(package, str) and is_local(package):
            found[package] = source_digest(directory / local_path(package))
    return found


def is_local(requirement: str) -> bool:
    """Tell whether a requirement is a path: `.`, `./x` or `../x`, with extras at will."""
    return re.match(r"\.{1,2}(/|\[|$)", requirement) is not None


def local_path(requirement: str) -> str:
    """Return the path of a local package without its extras."""
    return requirement.split("[", 1)[0]


def source_digest(path: Path) -> str:
    """Return the digest of a local package: of a file its bytes, of a directory every name and file in it.

    Raises: TooLargeError.
    """
    if not is_directory(path):
        return _file_digest(path)
    total = sha256()
    size = 0
    for count, (name, file) in enumerate(_files(path)):
        size += _size(file)
        if count >= MAX_FILES or size > MAX_BYTES:
            raise TooLargeError(f"`{path}` holds more than {MAX_FILES} files or {MAX_BYTES >> 20} MiB")
        total.update(f"{name}\0{_entry_digest(file)}\n".encode("utf-8", "surrogateescape"))
    return "sha256:" + total.hexdigest()


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a package's source in the order of their names, links not followed."""
    for directory, folders, names in os.walk(root):
        at_top = directory == str(root)
        skipped = _SKIPPED | _SKIPPED_AT_TOP if at_top else _SKIPPED
        folders[:] = sorted(
            name for name in folders if name not in skipped and not name.endswith(".egg-info")
        )
        links = [name for name in folders if Path(directory, name).is_symlink()]
        for name in sorted([*names, *links]):
            if not name.endswith(_SKIPPED_ENDINGS):
                path = Path(directory, name)
                yield path.relative_to(root).as_posix(), path


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # as below
        return 0


def _entry_digest(path: Path) -> str:
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            return f"link:{path.readlink()}"
    except FileNotFoundError:  # removed since its directory was listed
        return "missing"
    executable = "x" if status.st_mode & 0o100 else "-"
    return f"{executable}:{_file_digest(path)}"


def _file_digest(path: Path) -> str:
    """Return the digest of a file's bytes; only regular files are opened, so that no pipe blocks."""
    total = sha256()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):  # not there, not ours to read, or no path at all
        return "missing"
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return "missing"
        while chunk := file.read(2**20):
            total.update(chunk)
    return "sha256:" + total.hexdigest()


def _add_requirements(name: str, directory: Path, found: dict[str, str]) -> None:
    """Add a requirements file and all that it includes. Source: pip, Requirements File Format."""
    if name in found:
        return
    path = directory / name
    found[name] = _file_digest(path)
    if found[name] == "missing":
        return
    folder = PurePosixPath(name).parent
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_REQUIREMENTS_READ)
    for line in _logical_lines(text):
        if match := _INCLUDED.match(line):
            if "://" not in match["path"]:
                _add_requirements(posixpath.normpath(folder / match["path"]), directory, found)
            continue
        match = _EDITABLE.match(line)
        package = match["path"] if match else line.split()[0]
        if is_local(package):
            # pip reads these relative to where it runs, which is the spec's directory
            found[package] = source_digest(directory / local_path(package))


def _logical_lines(text: str) -> Iterator[str]:
    for line in re.sub(r"\\\r?\n", "", text).splitlines():
        stripped = re.sub(r"(^|\s+)#.*$", "", line).strip()
        if stripped:
            yield stripped
