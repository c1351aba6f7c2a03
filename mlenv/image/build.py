"""Images: from a lock to a stack of trees with an OCI manifest.

An image is nothing more than a list: the base, Debian packages over it, an interpreter, an empty environment,
a tree per wheel, a tree per build step. Trees that another image has made are used as they are; what is
missing is fetched and unpacked while the rest is still on its way.

Source: OCI image-spec, config.md, manifest.md, annotations.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlenv.errors import ImageError
from mlenv.image.digest import encoded
from mlenv.image.store import explain_os_errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mlenv.image.fetch import Sources
    from mlenv.image.runner import Runner
    from mlenv.image.store import Store
    from mlenv.lock.model import Lock
    from mlenv.progress import Progress

LAYERS_MAX = 480
"""Directories that one overlay mount is given at most; the kernel's limit is 500 (OVL_MAX_STACK)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A built image.

    `layers` are host directories, bottom first, bytecode included; `config` is the OCI image configuration;
    `size` is the sum of the files in bytes; `trees` are the keys of what it is made of, without bytecode.
    """

    name: str
    digest: str
    layers: tuple[Path, ...]
    trees: tuple[str, ...]
    config: Mapping[str, Any]
    size: int


def ensure_image(
    lock: Lock,
    *,
    store: Store,
    sources: Sources,
    run: Runner,
    progress: Progress,
    bytecode: bool = True,
) -> Image:
    """Return the image of a lock, and make whatever of it the store does not have yet.

    Without `bytecode` modules are compiled by whoever imports them first.
    Raises: ImageError, StoreError.
    """
    with explain_os_errors(f"the image of `{lock.name}` cannot be stored"):
        built = find_built(store, lock.digest, name=lock.name)
        if built is not None:
            return built
        from mlenv.image import assembly

        recipe = assembly.recipe(lock)
        store.prepare()
        with store.reading():
            parts = assembly.make_trees(recipe, store=store, sources=sources, run=run, progress=progress)
            if bytecode:
                assembly.compile_bytecode(recipe.python, parts, store=store, run=run, progress=progress)
            digest = assembly.record_image(recipe, parts, store=store, progress=progress)
        return load_image(store, digest, name=lock.name)


def find_built(store: Store, lock_digest: str, *, name: str) -> Image | None:
    """Return the image of a lock where every part of it is in the store, and let the lock's name mean it."""
    record = store.read_json(store.root / "locks" / f"{encoded(lock_digest)}.json")
    if record is None:
        return None
    image = load_image(store, record["image"], name=name)
    if not all(layer.is_dir() for layer in image.layers):
        return None
    store.name_image(name, record["descriptor"])
    return image


def load_image(store: Store, digest: str, *, name: str) -> Image:
    """Read an image's record from the store.

    Raises: ImageError where there is none.
    """
    record = store.read_json(store.image_record(digest))
    if record is None:
        raise ImageError(
            f"the store has no record of the image {digest}", hint=f"build it again: mlenv build {name}"
        )
    trees = tuple(key for layer in record["layers"] for key in layer["trees"])
    return Image(
        name=name,
        digest=digest,
        layers=_mounted(store, trees, record["python_tag"]),
        trees=trees,
        config=record["config"],
        size=record["size"],
    )


def _mounted(store: Store, trees: Sequence[str], tag: str | None) -> tuple[Path, ...]:
    """Return the directories of trees with their bytecode above them, as many as one mount can take."""
    layers: list[Path] = []
    spare = LAYERS_MAX - len(trees)
    for key in trees:
        layers.append(store.tree_dir(key) / "fs")
        bytecode = store.root / "pyc" / encoded(key) / (tag or "none") / "fs"
        if tag is not None and spare > 0 and os.path.isdir(bytecode):  # noqa: PTH112 - twice as fast
            layers.append(bytecode)
            spare -= 1
    return tuple(layers)
