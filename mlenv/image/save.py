"""Saving an image: an OCI layout as one tar, or as a directory, that every other tool reads.

The layers are made anew from the trees; each must have the digest its image was recorded with, so a tree that
somebody changed cannot leave the store unnoticed. The tar is an `oci-archive`: skopeo, podman and
`docker load` (25 and later)
take it.

Source: OCI image-spec, image-layout.md; containers-transports(5), oci-archive.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from mlenv.errors import StoreError
from mlenv.image.digest import canonical_json, encoded
from mlenv.image.images import find_image
from mlenv.image.layer import BLOCK, Entry, LayerFacts, header, write_layer
from mlenv.image.store import INDEX_TYPE, MANIFEST_TYPE, REF_NAME, Store, explain_os_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_LAYOUT = b'{"imageLayoutVersion": "1.0.0"}\n'


class _Target(Protocol):
    """Where the files of a layout go, in the order they are given."""

    def file(self, name: str, content: bytes) -> None: ...

    def stream(
        self, name: str, size: int, produce: Callable[[Callable[[bytes], object]], LayerFacts]
    ) -> LayerFacts: ...


def save(store: Store, reference: str, stream: BinaryIO) -> None:
    """Write an image to `stream` as an OCI archive.

    Raises: ImageNotFoundError, StoreError where a tree is not what it was, ImageError.
    """
    target = _Archive(stream)
    _save(store, reference, target)
    target.finish()


def save_directory(store: Store, reference: str, directory: Path) -> None:
    """Write an image as an OCI layout into a new directory; nothing stays of it where that fails.

    Raises: as `save`.
    """
    with explain_os_errors(f"the image cannot be saved to `{directory}`"):
        directory.mkdir(parents=True)
    try:
        with explain_os_errors(f"the image cannot be saved to `{directory}`"):
            _save(store, reference, _Directory(directory))
    except BaseException:
        shutil.rmtree(directory)
        raise


def _save(store: Store, reference: str, target: _Target) -> None:
    with store.reading():
        image = find_image(store, reference)
        record = store.read_json(store.image_record(image.digest))
        manifest = store.blob_path(image.digest).read_bytes()
        config = canonical_json(record["config"])
        target.file("oci-layout", _LAYOUT)
        target.file("index.json", _index(image.name, image.digest, len(manifest)))
        target.file(f"blobs/sha256/{encoded(image.digest)}", manifest)
        target.file(f"blobs/sha256/{encoded(_config_digest(manifest))}", config)
        written: set[str] = set()
        for layer in record["layers"]:
            if layer["diff_id"] not in written:
                _save_layer(store, layer, target)
                written.add(layer["diff_id"])


def _config_digest(manifest: bytes) -> str:
    digest: str = json.loads(manifest)["config"]["digest"]
    return digest


def _index(name: str, digest: str, size: int) -> bytes:
    entry = {"mediaType": MANIFEST_TYPE, "digest": digest, "size": size, "annotations": {REF_NAME: name}}
    return canonical_json({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}) + b"\n"


def _save_layer(store: Store, layer: dict[str, Any], target: _Target) -> None:
    roots = [_root(store, key) for key in layer["trees"]]
    name = f"blobs/sha256/{encoded(layer['diff_id'])}"
    facts = target.stream(name, layer["size"], lambda write: write_layer(roots, write))
    if facts.diff_id != layer["diff_id"]:
        raise StoreError(
            f"a layer of the image has changed in the store: {facts.diff_id} instead of {layer['diff_id']}",
            cause="one of these was written to: " + ", ".join(str(root) for root in roots[:4]),
            hint=f"remove it and build again: rm -r {roots[0].parent}",
        )


def _root(store: Store, key: str) -> Path:
    tree = store.tree(key)
    if tree is None:
        raise StoreError(f"the tree {key} is missing from the store", hint="build the image again")
    return tree.fs


class _Archive:
    """A layout as one tar."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def file(self, name: str, content: bytes) -> None:
        self._stream.write(
            header(Entry(path=name, size=len(content))) + content + b"\0" * (-len(content) % BLOCK)
        )

    def stream(
        self, name: str, size: int, produce: Callable[[Callable[[bytes], object]], LayerFacts]
    ) -> LayerFacts:
        """Write a file whose size is known before its content; a wrong one shows in the digest."""
        self._stream.write(header(Entry(path=name, size=size)))
        facts = produce(self._stream.write)
        self._stream.write(b"\0" * (-facts.tar_size % BLOCK))
        return facts

    def finish(self) -> None:
        self._stream.write(b"\0" * (2 * BLOCK))


class _Directory:
    """A layout as files."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def file(self, name: str, content: bytes) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def stream(
        self, name: str, size: int, produce: Callable[[Callable[[bytes], object]], LayerFacts]
    ) -> LayerFacts:
        del size
        path = self._root / name
        with path.open("wb") as file:
            return produce(file.write)
