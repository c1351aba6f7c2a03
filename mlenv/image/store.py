"""The store: unpacked trees, the images made of them, and how both survive a crash.

    store/
      VERSION  oci-layout  index.json    format; the images' names (org.opencontainers.image.ref.name)
      blobs/sha256/HEX                   manifests and configs
      trees/sha256/AA/HEX/               one immutable tree: fs/, index (its files), meta.json
      pyc/HEX/TAG/fs                     bytecode of a tree, never part of a digest
      layers/HEX.json                    digests of layers that several small trees share
      images/HEX.json  locks/HEX.json    an image's trees; the image of a lock
      tmp/  trash/  flocks/  lock        work under way; work thrown away; locks

Everything is made in `tmp/` and renamed into place, so what has a name is whole. A workspace is held by a
flock that dies with its process; the next one to open the store sweeps what was left. A tree is marked
`unsynced` with the boot it was made in until the file system has been flushed, so a power cut cannot leave a
tree that looks whole.

Source: OCI image-spec, image-layout.md.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import stat
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlenv.errors import StoreError
from mlenv.image.digest import canonical_json, digest_of, encoded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

VERSION = "1\n"
REF_NAME = "org.opencontainers.image.ref.name"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"

_DIRECTORIES = ("blobs/sha256", "trees/sha256", "pyc", "layers", "images", "locks", "tmp", "trash", "flocks")
_counter = itertools.count()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """An unpacked tree: `key` names it, `fs` is its root, `diff_id` the digest of its canonical tar.

    `tar_size` and `size` in bytes: of that tar, and of the files' contents.
    """

    key: str
    fs: Path
    diff_id: str
    tar_size: int
    size: int
    files: int


class Store:
    """The images and trees of one user of one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # --- opening

    def prepare(self) -> None:
        """Make the store where there is none, check its format, sweep what dead processes left.

        Raises: StoreError.
        """
        with explain_os_errors(f"the store `{self.root}` cannot be made"):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.root.stat().st_mode & 0o077:  # made by an older mlenv: images hold setuid programs
                self.root.chmod(0o700)
            for name in _DIRECTORIES:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            self._check_version()
            if not (self.root / "oci-layout").exists():
                self.write(self.root / "oci-layout", b'{"imageLayoutVersion": "1.0.0"}\n')
            self._sweep()

    def _check_version(self) -> None:
        path = self.root / "VERSION"
        if not path.exists():
            self.write(path, VERSION.encode())
        found = path.read_text()
        if found != VERSION:
            raise StoreError(
                f"the store `{self.root}` has format {found.strip()!r}",
                cause=f"this version of mlenv reads format {VERSION.strip()!r}",
                hint="use the mlenv that made it, or set MLENV_HOME to another directory",
            )

    def _sweep(self) -> None:
        """Remove workspaces whose process is gone, and what lies in the trash."""
        for path in (self.root / "tmp").iterdir():
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._discard(path)
                except BlockingIOError:
                    continue
                finally:
                    os.close(descriptor)
        for path in (self.root / "trash").iterdir():
            remove_tree(path)

    # --- locks

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep others from removing anything meanwhile."""
        with self._flock(self.root / "lock", fcntl.LOCK_SH):
            yield

    @contextmanager
    def only_one(self, name: str) -> Iterator[None]:
        """Wait until no other process makes the thing called `name` (a file name)."""
        with self._flock(self.root / "flocks" / name, fcntl.LOCK_EX):
            yield

    @contextmanager
    def _flock(self, path: Path, operation: int) -> Iterator[None]:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, operation)
            yield
        finally:
            os.close(descriptor)

    # --- writing

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """Give an empty directory on the store's file system, gone afterwards whatever happens."""
        path, descriptor = self._new_workspace()
        try:
            yield path
        finally:
            self._discard(path)
            os.close(descriptor)

    def _new_workspace(self) -> tuple[Path, int]:
        while True:
            path = self.root / "tmp" / f"{os.getpid()}-{_start_time()}-{next(_counter)}"
            path.mkdir(mode=0o700)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            # A sweeper may have taken the directory between mkdir and flock.
            if path.exists():
                return path, descriptor
            os.close(descriptor)

    def _discard(self, path: Path) -> None:
        trash = self.root / "trash" / f"{path.name}-{os.getpid()}-{next(_counter)}"
        try:
            path.rename(trash)
        except FileNotFoundError:
            return
        remove_tree(trash)

    def write(self, path: Path, content: bytes) -> None:
        """Write a file whole or not at all, and keep it through a power cut."""
        with self.workspace() as work:
            with (work / "file").open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            (work / "file").replace(path)

    def add_blob(self, content: bytes) -> str:
        """Keep a manifest or config and return its digest."""
        digest = digest_of(content)
        path = self.blob_path(digest)
        if not path.exists():
            self.write(path, content)
        return digest

    def blob_path(self, digest: str) -> Path:
        """Return where a manifest or config lies."""
        return self.root / "blobs" / "sha256" / encoded(digest)

    def read_json(self, path: Path) -> Any:
        """Read one of the store's own files; None where it is missing.

        Raises: StoreError where it is damaged.
        """
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(
                f"`{path}` is damaged", cause=str(error), hint=f"remove it: rm {path}"
            ) from error

    # --- trees

    def tree_dir(self, key: str) -> Path:
        """Return where the tree of this key lies or would lie."""
        name = encoded(key)
        return self.root / "trees" / "sha256" / name[:2] / name

    def tree(self, key: str) -> Tree | None:
        """Return a whole tree; None where it is missing or a power cut may have torn it."""
        directory = self.tree_dir(key)
        try:
            meta = json.loads((directory / "meta.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if self._is_torn(directory):
            return None
        return Tree(
            key=key,
            fs=directory / "fs",
            diff_id=meta["diff_id"],
            tar_size=meta["tar_size"],
            size=meta["size"],
            files=meta["files"],
        )

    def _is_torn(self, directory: Path) -> bool:
        try:
            return (directory / "unsynced").read_text() != _boot_id()
        except FileNotFoundError:
            return False

    def add_tree(self, key: str, work: Path, meta: Mapping[str, Any], index: bytes) -> Tree:
        """Give the finished `work/fs` its name; `index` lists its files (see `mlenv.image.layer`).

        What another process has put there first wins; a torn tree is replaced.
        """
        (work / "index").write_bytes(index)
        (work / "unsynced").write_text(_boot_id())
        (work / "meta.json").write_bytes(canonical_json(dict(meta)) + b"\n")
        directory = self.tree_dir(key)
        directory.parent.mkdir(parents=True, exist_ok=True)
        if self.tree(key) is None:
            self._discard(directory)
            with suppress_exists():
                work.rename(directory)
        found = self.tree(key)
        if found is None:
            raise StoreError(
                f"the tree {key} vanished while it was being stored", hint="run the command again"
            )
        return found

    def tree_index(self, key: str) -> list[tuple[str, str]]:
        """Return (path, sha256 in hex) of every regular file of a tree, sorted by path."""
        content = (self.tree_dir(key) / "index").read_bytes().decode(errors="surrogateescape")
        return [(line[65:], line[:64]) for line in content.split("\0") if line]

    def settle(self, directories: Iterable[Path]) -> None:
        """Flush the file system once, then mark these trees as safe from a power cut."""
        pending = [path for path in (directory / "unsynced" for directory in directories) if path.exists()]
        if not pending:
            return
        import subprocess

        # syncfs(2) without ctypes; an old `sync` without -f flushes every file system instead.
        if subprocess.run(["sync", "-f", self.root], check=False, capture_output=True).returncode != 0:
            os.sync()
        for path in pending:
            path.unlink(missing_ok=True)

    # --- images

    def image_record(self, digest: str) -> Path:
        """Return where the record of an image lies."""
        return self.root / "images" / f"{encoded(digest)}.json"

    def index(self) -> dict[str, dict[str, Any]]:
        """Return the descriptors of the images by name."""
        document = self.read_json(self.root / "index.json") or {"manifests": []}
        return {entry["annotations"][REF_NAME]: entry for entry in document["manifests"]}

    def name_image(self, name: str, descriptor: Mapping[str, Any]) -> None:
        """Let `name` mean this manifest from now on."""
        with self.only_one("index"):
            names = self.index()
            entry = {**descriptor, "annotations": {REF_NAME: name}}
            if names.get(name) == entry:
                return
            names[name] = entry
            manifests = [names[each] for each in sorted(names)]
            document = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests}
            self.write(self.root / "index.json", canonical_json(document) + b"\n")


def remove_tree(path: Path) -> None:
    """Delete a file or a tree, whatever the modes of its directories are; nothing where there is none."""
    import shutil

    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        # Another process sweeps the same trash.
        shutil.rmtree(path, ignore_errors=True)
    except PermissionError:
        _open_directories(path)
        shutil.rmtree(path)


def _open_directories(path: Path) -> None:
    path.chmod(0o700)
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _open_directories(Path(entry.path))


@contextmanager
def suppress_exists() -> Iterator[None]:
    """Let a rename onto something that exists pass: another process was first."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise


@contextmanager
def explain_os_errors(message: str) -> Iterator[None]:
    """Turn an OSError into a StoreError that says what to do.

    Raises: StoreError.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(message, cause=str(error), hint=_remedy(error)) from error


def _remedy(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "free some disk space, or set MLENV_HOME to a directory on a larger disk; then try again"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return "set MLENV_HOME to a directory you can write to"
        case _:
            return "run the command again; if it persists, set MLENV_HOME to a directory on another disk"


def tree_bytes(path: Path) -> int:
    """Return how many bytes a tree takes on the disk, each hard-linked file once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for directory, _, files in os.walk(path):
        for name in (".", *files):
            status = os.lstat(os.path.join(directory, name))  # noqa: PTH118 - hot loop
            identity = (status.st_dev, status.st_ino)
            if identity not in seen or stat.S_ISDIR(status.st_mode):
                seen.add(identity)
                total += status.st_blocks * 512
    return total


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _start_time() -> str:
    """Return this process's start time in clock ticks since boot (proc(5), stat, field 22)."""
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
