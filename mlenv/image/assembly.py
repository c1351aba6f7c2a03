"""Making an image: the trees that are missing, then the manifest over all of them.

Only `mlenv.image.build` uses this, and only when the store does not have the image yet.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, Any

from mlenv import paths
from mlenv.errors import ImageError
from mlenv.image import bootstrap, pyc
from mlenv.image.digest import canonical_json, digest_of, encoded
from mlenv.image.fetch import Download, apt_proxy, fetch_all, forget
from mlenv.image.layer import LayerFacts, write_layer
from mlenv.image.python import STANDALONE, build_python, build_skeleton, python_key, skeleton_key
from mlenv.image.store import MANIFEST_TYPE, Store, Tree
from mlenv.image.wheel import PREFIX, tree_key, unpack_wheel
from mlenv.image.workers import workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mlenv.image.fetch import Sources
    from mlenv.image.runner import Runner
    from mlenv.lock.model import BaseLock, DebPackage, Lock, PythonLock, Wheel
    from mlenv.progress import Progress

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
LOCK_ANNOTATION = "dev.mlenv.lock"
SPEC_ANNOTATION = "dev.mlenv.spec"

EXPORTED_LAYERS_MAX = 100
"""Layers of one image at most; Docker's overlay2 stops at 125 and others below."""
OWN_LAYER_SIZE = 1_000_000
"""Bytes from which a wheel is a layer of its own."""
BUCKETS = 16
"""Layers that the smaller wheels share, by a hash of their names."""

_SYSTEM_LAYERS = 20
_PROCESSES = 2
_WORKERS_FROM = 4 << 20
"""Bytes of wheels from which processes of their own are worth their start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A tree of an image: `title` for the history, `bucket` (0 to 15) of a small wheel's name."""

    tree: Tree
    title: str
    is_wheel: bool = False
    bucket: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A lock that an image can be built from."""

    lock: Lock
    base: BaseLock
    python: PythonLock


def recipe(lock: Lock) -> Recipe:
    """Return a lock with the parts that a build cannot do without.

    Raises: ImageError where it has none.
    """
    if lock.image is not None or lock.base is None or lock.python is None:
        raise ImageError(
            f"the lock of `{lock.name}` has no base and Python to build from",
            cause="it uses an image as it is, and this version builds images from locked packages",
            hint="give `base` or leave `image` out of the spec",
        )
    return Recipe(lock=lock, base=lock.base, python=lock.python)


def make_trees(
    recipe: Recipe, *, store: Store, sources: Sources, run: Runner, progress: Progress
) -> tuple[Part, ...]:
    """Return the parts of an image, bottom first; missing wheels unpack while the base installs."""
    maker = _Maker(store=store, sources=sources, run=run, progress=progress)
    with maker.wheels(recipe.lock.wheels, recipe.python) as wheels:
        system = maker.system(recipe)
        parts = (*system, *_in_layer_order(wheels()))
    return (*parts, *maker.build_steps(recipe, parts))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Maker:
    """What every step of a build needs."""

    store: Store
    sources: Sources
    run: Runner
    progress: Progress

    @property
    def downloads(self) -> Path:
        return paths.cache_dir() / "downloads"

    def make(self, key: str, build: Callable[[Path], LayerFacts]) -> Tree:
        """Return the tree of a key; where the store has none, `build` makes `fs` in a directory."""
        found = self.store.tree(key)
        if found is not None:
            return found
        with self.store.only_one(encoded(key)):
            found = self.store.tree(key)
            if found is not None:
                return found
            with self.store.workspace() as work:
                tree = work / "tree"
                tree.mkdir()
                facts = build(tree)
                return self.store.add_tree(key, tree, facts.meta, facts.index)

    # --- the operating system

    def system(self, recipe: Recipe) -> list[Part]:
        base, apt, python = recipe.base, recipe.lock.apt, recipe.python
        tag = pyc.python_tag(python.version)
        base_key = bootstrap.base_key(base)
        parts = [Part(tree=self.make(base_key, self._base(base, base_key, tag)), title=f"base {base.name}")]
        if apt:
            key = bootstrap.apt_key(base_key, apt)
            tree = self.make(key, self._apt(apt, parts[0].tree, key, tag))
            parts.append(Part(tree=tree, title="apt " + " ".join(sorted(each.name for each in apt))))
        if python.source == "standalone":
            tree = self.make(python_key(python), self._python(python))
            parts.append(Part(tree=tree, title=f"python {python.version}"))
        skeleton = self.make(skeleton_key(python), _skeleton(python))
        parts.append(Part(tree=skeleton, title=f"environment {PREFIX}"))
        return parts

    def _base(self, base: BaseLock, key: str, tag: str) -> Callable[[Path], LayerFacts]:
        def build(work: Path) -> LayerFacts:
            with self._debs(base.packages, base.name) as debs, self.progress.step(f"install {base.name}"):
                bootstrap.build_base(debs, work, run=self.run)
            return self._installed(work, key, tag)

        return build

    def _apt(
        self, packages: Sequence[DebPackage], base: Tree, key: str, tag: str
    ) -> Callable[[Path], LayerFacts]:
        def build(work: Path) -> LayerFacts:
            with self._debs(packages, "apt packages") as debs, self.progress.step("install apt packages"):
                bootstrap.add_packages(debs, work, layers=[base.fs], run=self.run)
            return self._installed(work, key, tag)

        return build

    def _installed(self, work: Path, key: str, tag: str) -> LayerFacts:
        """Keep the bytecode that maintainer scripts compiled, and read the tree."""
        (work / "log").unlink()
        if (work / "pyc").is_dir():
            pyc.keep(self.store, key, tag, work / "pyc")
        return write_layer([work / "fs"])

    @contextmanager
    def _debs(self, packages: Sequence[DebPackage], title: str) -> Iterator[list[bootstrap.Deb]]:
        """Fetch packages; they are deleted when they are installed, kept when that failed."""
        by_hash = {package.sha256: package for package in packages}
        debs: list[bootstrap.Deb] = []
        downloads = [self._deb_download(package) for package in packages]
        with self.progress.step(
            f"fetch {title}", total=sum(each.size for each in packages), unit="bytes"
        ) as step:
            for download, path in fetch_all(downloads, self.downloads, progress=step):
                debs.append(bootstrap.Deb(package=by_hash[download.sha256], path=path))
        yield debs
        for deb in debs:
            forget(deb.path, self.downloads)

    def _deb_download(self, package: DebPackage) -> Download:
        url = self.sources.deb_url(package)
        name = f"{package.name} {package.version}"
        return Download(url=url, sha256=package.sha256, size=package.size, name=name, proxy=apt_proxy(url))

    def _python(self, python: PythonLock) -> Callable[[Path], LayerFacts]:
        def build(work: Path) -> LayerFacts:
            with self.progress.step(f"fetch python {python.version}"):
                archive = self.sources.python_archive(python, work)
            build_python(archive, work / "fs")
            archive.unlink()
            return write_layer([work / "fs"])

        return build

    # --- wheels

    @contextmanager
    def wheels(self, wheels: Sequence[Wheel], python: PythonLock) -> Iterator[Callable[[], list[Part]]]:
        """Make the trees of wheels in the background; the function that is given waits for them.

        Where the block is left by an exception, what is under way is ended.
        """
        minor = ".".join(python.version.split(".")[:2])
        keys = {wheel.sha256: tree_key(wheel.sha256, minor) for wheel in wheels}
        missing = [wheel for wheel in wheels if self.store.tree(keys[wheel.sha256]) is None]
        with ExitStack() as stack:
            executor = stack.enter_context(ThreadPoolExecutor(1 + _PROCESSES, thread_name_prefix="wheels"))
            batch = _Batch(maker=self, executor=executor, stopped=Event(), keys=keys, python=minor)
            if sum(wheel.size for wheel in missing) >= _WORKERS_FROM:
                batch.unpack = stack.enter_context(workers(_PROCESSES)).unpack
            # Undone in reverse: first stop what is waiting, then end the processes, then join the threads.
            stack.callback(batch.stop)
            made = executor.submit(batch.make, missing) if missing else None

            def wait() -> list[Part]:
                if made is not None:
                    made.result()
                return [self._wheel_part(wheel, keys[wheel.sha256]) for wheel in wheels]

            yield wait

    def _wheel_part(self, wheel: Wheel, key: str) -> Part:
        tree = self.store.tree(key)
        if tree is None:
            raise ImageError(
                f"the tree of `{wheel.filename}` is not in the store", hint="run the command again"
            )
        return Part(
            tree=tree, title=f"{wheel.name} {wheel.version}", is_wheel=True, bucket=_bucket(wheel.name)
        )

    # --- build steps

    def build_steps(self, recipe: Recipe, below: Sequence[Part]) -> list[Part]:
        parts: list[Part] = []
        for command in recipe.lock.build:
            under = [part.tree for part in (*below, *parts)]
            key = digest_of(canonical_json({"build": command, "below": [tree.key for tree in under]}))
            parts.append(
                Part(tree=self.make(key, self._build_step(command, under, recipe.python)), title=command)
            )
        return parts

    def _build_step(
        self, command: str, below: Sequence[Tree], python: PythonLock
    ) -> Callable[[Path], LayerFacts]:
        def build(work: Path) -> LayerFacts:
            with self.progress.step(f"build: {command}"):
                bootstrap.run_build_step(
                    command, work, layers=[tree.fs for tree in below], run=self.run, env=env(python)
                )
            (work / "log").unlink()
            return write_layer([work / "fs"])

        return build


class _Batch:
    """Wheels that are fetched and unpacked together: one thread fetches, the others unpack what has come."""

    def __init__(
        self,
        *,
        maker: _Maker,
        executor: ThreadPoolExecutor,
        stopped: Event,
        keys: Mapping[str, str],
        python: str,
    ) -> None:
        self._maker = maker
        self._executor = executor
        self._stopped = stopped
        self._keys = keys
        self._python = python
        self.unpack: Callable[..., LayerFacts] = unpack_wheel

    def stop(self) -> None:
        """Let nothing new begin."""
        self._stopped.set()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def make(self, wheels: Sequence[Wheel]) -> None:
        """Make the trees of wheels, each as soon as it has come.

        Raises: ImageError, OSError; the first of several.
        """
        maker = self._maker
        downloads = [
            Download(
                url=maker.sources.wheel_url(wheel), sha256=wheel.sha256, size=wheel.size, name=wheel.filename
            )
            for wheel in wheels
        ]
        title = wheels[0].name if len(wheels) == 1 else f"{len(wheels)} packages"
        with maker.progress.step(
            f"fetch and unpack {title}", total=sum(wheel.size for wheel in wheels), unit="bytes"
        ) as step:
            arriving = fetch_all(downloads, maker.downloads, progress=step, stopped=self._stopped)
            jobs = [self._executor.submit(self._make_one, download, path) for download, path in arriving]
            for job in jobs:
                job.result()

    def _make_one(self, download: Download, path: Path) -> None:
        def build(work: Path) -> LayerFacts:
            (work / "fs").mkdir()
            # The download has no name of its own; messages name the wheel.
            named = work.parent / download.name
            named.symlink_to(path)
            return self.unpack(named, work / "fs", python=self._python)

        self._maker.make(self._keys[download.sha256], build)
        forget(path, self._maker.downloads)


def _skeleton(python: PythonLock) -> Callable[[Path], LayerFacts]:
    def build(work: Path) -> LayerFacts:
        build_skeleton(python, work / "fs")
        return write_layer([work / "fs"])

    return build


def _bucket(name: str) -> int:
    return int(digest_of(name.encode())[7:9], 16) % BUCKETS


def _in_layer_order(wheels: Sequence[Part]) -> list[Part]:
    """Order wheels as their layers lie: the large ones as locked, then the buckets, each as locked.

    Mounted here or exported, a later tree hides the same paths of an earlier one alike.
    """
    own = _own_layers(wheels)
    large = [part for part in wheels if part.tree.key in own]
    small = sorted((part for part in wheels if part.tree.key not in own), key=lambda part: part.bucket or 0)
    return [*(replace(part, bucket=None) for part in large), *small]


def _own_layers(wheels: Sequence[Part]) -> set[str]:
    """Return the keys of the wheels that are layers of their own: the largest, as many as can be."""
    large = sorted(
        (part.tree for part in wheels if part.tree.size >= OWN_LAYER_SIZE), key=lambda tree: -tree.size
    )
    return {tree.key for tree in large[: EXPORTED_LAYERS_MAX - BUCKETS - _SYSTEM_LAYERS]}


# --- bytecode


def compile_bytecode(
    python: PythonLock, parts: Sequence[Part], *, store: Store, run: Runner, progress: Progress
) -> None:
    """Compile the modules of every tree that has no bytecode yet."""
    tag = pyc.python_tag(python.version)
    trees = [part.tree for part in parts]
    missing = pyc.without_bytecode(store, trees, tag)
    if missing:
        with progress.step("compile bytecode", total=len(missing)):
            pyc.compile_trees(
                store, trees, tag=tag, interpreter=python.interpreter, workers=os.cpu_count() or 1, run=run
            )


# --- the manifest


def record_image(recipe: Recipe, parts: Sequence[Part], *, store: Store, progress: Progress) -> str:
    """Write the manifest, configuration and records of an image; return the manifest's digest.

    What it is made of is safely on the disk before anything names it.
    """
    lock = recipe.lock
    for conflict in conflicts(store, parts):
        progress.note(conflict)
    store.settle([store.tree_dir(part.tree.key) for part in parts])
    groups = _groups(parts)
    layers = [_layer(store, group) for group in groups]
    config = _config(recipe, groups, layers)
    manifest = _manifest(lock, store.add_blob(canonical_json(config)), len(canonical_json(config)), layers)
    content = canonical_json(manifest)
    digest = store.add_blob(content)
    descriptor = {"mediaType": MANIFEST_TYPE, "digest": digest, "size": len(content)}
    record = {
        "digest": digest,
        "config": config,
        "layers": [
            {"trees": [part.tree.key for part in group], **layer}
            for group, layer in zip(groups, layers, strict=True)
        ],
        "lock": lock.digest,
        "python_tag": pyc.python_tag(recipe.python.version),
        "size": sum(part.tree.size for part in parts),
    }
    store.write(store.image_record(digest), canonical_json(record) + b"\n")
    lock_record = {"image": digest, "descriptor": descriptor}
    store.write(store.root / "locks" / f"{encoded(lock.digest)}.json", canonical_json(lock_record) + b"\n")
    store.name_image(lock.name, descriptor)
    return digest


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts that share a layer: those next to each other of one bucket."""
    groups: list[list[Part]] = []
    for part in parts:
        if groups and part.bucket is not None and groups[-1][0].bucket == part.bucket:
            groups[-1].append(part)
        else:
            groups.append([part])
    if len(groups) > EXPORTED_LAYERS_MAX:
        raise ImageError(
            f"the image would have {len(groups)} layers; others read {EXPORTED_LAYERS_MAX}",
            hint="join build steps with `&&`",
        )
    return groups


def _layer(store: Store, group: Sequence[Part]) -> dict[str, Any]:
    """Return the diffID and size in bytes of the layer of a group."""
    if len(group) == 1:
        return {"diff_id": group[0].tree.diff_id, "size": group[0].tree.tar_size}
    key = digest_of(canonical_json([part.tree.key for part in group]))
    path = store.root / "layers" / f"{encoded(key)}.json"
    found = store.read_json(path)
    if found is None:
        facts = write_layer([part.tree.fs for part in group])
        found = {"diff_id": facts.diff_id, "size": facts.tar_size}
        store.write(path, canonical_json(found) + b"\n")
    return {"diff_id": found["diff_id"], "size": found["size"]}


def _config(
    recipe: Recipe, groups: Sequence[Sequence[Part]], layers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    lock = recipe.lock
    titles = [", ".join(part.title for part in group) for group in groups]
    return {
        "architecture": lock.platform.architecture,
        "os": lock.platform.os,
        "config": {
            "Env": [f"{name}={value}" for name, value in env(recipe.python).items()],
            "Cmd": ["/bin/bash"],
            "WorkingDir": "/",
            "Labels": {LOCK_ANNOTATION: lock.digest, SPEC_ANNOTATION: lock.spec},
        },
        "rootfs": {"type": "layers", "diff_ids": [layer["diff_id"] for layer in layers]},
        "history": [{"created_by": f"mlenv: {title}"} for title in titles],
    }


def _manifest(
    lock: Lock, config: str, config_size: int, layers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": config, "size": config_size},
        "layers": [
            {"mediaType": LAYER_TYPE, "digest": layer["diff_id"], "size": layer["size"]} for layer in layers
        ],
        "annotations": {LOCK_ANNOTATION: lock.digest, SPEC_ANNOTATION: lock.spec},
    }


def env(python: PythonLock) -> dict[str, str]:
    """Return the environment variables of every process in an image."""
    prefixes = [f"{PREFIX}/bin"] + ([f"{STANDALONE}/bin"] if python.source == "standalone" else [])
    return {"PATH": ":".join([*prefixes, bootstrap.PATH]), "LANG": "C.UTF-8", "VIRTUAL_ENV": PREFIX}


def conflicts(store: Store, parts: Sequence[Part]) -> list[str]:
    """Return a line for each pair of wheels with different bytes at one path; the later one is seen."""
    owners: dict[str, tuple[str, str]] = {}
    clashes: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        if not part.is_wheel:
            continue
        for path, sha256 in store.tree_index(part.tree.key):
            before = owners.get(path)
            if before is not None and before[1] != sha256:
                clashes.setdefault((before[0], part.title), []).append(path)
            owners[path] = (part.title, sha256)
    return [
        f"`{later}` hides {len(found)} files of `{earlier}` with others of the same path, such as /{found[0]}"
        for (earlier, later), found in clashes.items()
    ]
