"""The images of a store: what they are called, how large they are, and what of that is theirs alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlenv.errors import ImageNotFoundError
from mlenv.image.build import Image, load_image
from mlenv.image.digest import encoded
from mlenv.image.reference import digest_prefix, parse
from mlenv.image.store import tree_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlenv.image.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """An image in a list: bytes of all its files (`size`) and of those in no other image (`unique`)."""

    name: str
    digest: str
    lock: str
    size: int
    unique: int

    @property
    def shared(self) -> int:
        """Bytes of the files that other named images use too."""
        return self.size - self.unique


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskUsage:
    """Bytes on the disk, bytecode included: of what only this image uses, and of what others use too."""

    unique: int
    shared: int


def images(store: Store) -> list[Summary]:
    """Return the named images, sorted by name."""
    records = {name: _record(store, entry["digest"], name) for name, entry in sorted(store.index().items())}
    users = _users(records.items())
    sizes = {key: _tree_size(store, key) for key in users}
    summaries = []
    for name, record in records.items():
        trees = _trees(record)
        # Two names of one image share it with each other and nobody else.
        own = [key for key in trees if users[key] == {record["digest"]}]
        summaries.append(
            Summary(
                name=name,
                digest=record["digest"],
                lock=record["lock"],
                size=sum(sizes[key] for key in trees),
                unique=sum(sizes[key] for key in own),
            )
        )
    return summaries


def find_image(store: Store, reference: str) -> Image:
    """Return an image by its name, its digest or the start of one.

    Raises: ImageNotFoundError, UsageError where `reference` can be neither.
    """
    names = store.index()
    if reference in names:
        return load_image(store, names[reference]["digest"], name=reference)
    prefix = digest_prefix(reference)
    if prefix is not None:
        found = {
            entry["digest"]: name
            for name, entry in names.items()
            if encoded(entry["digest"]).startswith(prefix)
        }
        if len(found) == 1:
            digest, name = found.popitem()
            return load_image(store, digest, name=name)
    wanted = parse(reference)
    entry = names.get(wanted.name) if wanted.tag in {None, "latest"} else None
    if entry is None or wanted.digest not in {None, entry["digest"]}:
        raise ImageNotFoundError(
            f"there is no image `{reference}`",
            hint="`mlenv images` lists what there is; `mlenv build NAME` makes one",
        )
    return load_image(store, entry["digest"], name=wanted.name)


def disk_usage(store: Store, image: Image) -> DiskUsage:
    """Measure what an image takes on the disk, and how much of that it shares with the other named images."""
    others = {
        key
        for name, entry in store.index().items()
        if entry["digest"] != image.digest
        for key in _trees(_record(store, entry["digest"], name))
    }
    unique = sum(_disk_bytes(store, key) for key in image.trees if key not in others)
    shared = sum(_disk_bytes(store, key) for key in image.trees if key in others)
    return DiskUsage(unique=unique, shared=shared)


def _disk_bytes(store: Store, key: str) -> int:
    bytecode = store.root / "pyc" / encoded(key)
    return tree_bytes(store.tree_dir(key)) + (tree_bytes(bytecode) if bytecode.is_dir() else 0)


def _record(store: Store, digest: str, name: str) -> dict[str, Any]:
    record: dict[str, Any] | None = store.read_json(store.image_record(digest))
    if record is None:
        raise ImageNotFoundError(f"the store has no record of the image `{name}`", hint=f"mlenv build {name}")
    return record


def _trees(record: dict[str, Any]) -> list[str]:
    return [key for layer in record["layers"] for key in layer["trees"]]


def _users(records: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, set[str]]:
    """Return for each tree the digests of the images it is part of."""
    users: dict[str, set[str]] = {}
    for _, record in records:
        for key in _trees(record):
            users.setdefault(key, set()).add(record["digest"])
    return users


def _tree_size(store: Store, key: str) -> int:
    tree = store.tree(key)
    return tree.size if tree is not None else 0
