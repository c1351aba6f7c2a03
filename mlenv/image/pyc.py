"""Bytecode: companion trees with nothing but `__pycache__`, so that imports are fast and digests stay equal.

Bytecode differs from run to run for a few modules, so it is never part of a layer. It is compiled in the
container by its own interpreter, with the paths of the container, once per tree, and mounted right above its
tree.

Source: PEP 552 (unchecked hash-based pycs), PEP 3147.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mlenv.errors import ImageError
from mlenv.image.bootstrap import PATH, log_tail
from mlenv.image.digest import encoded
from mlenv.image.store import suppress_exists

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlenv.image.runner import Runner
    from mlenv.image.store import Store, Tree

_OUT = "/mnt"

# Runs in the container, so it is self-contained and understands Python 3.6. Reads lines "NUMBER PATH" and
# compiles each file to OUT/NUMBER/…; every second, third, … line goes to another process. What does not
# compile is left out: packages ship templates and files of other Pythons.
_PROGRAM = """\
import importlib.util, os, py_compile, sys
out, workers = sys.argv[1], int(sys.argv[2])
with open(out + "/list", encoding="utf-8", errors="surrogateescape") as file:
    lines = file.read().split("\\0")[:-1]
children = []
for worker in range(1, workers):
    child = os.fork()
    if child == 0:
        children = None
        break
    children.append(child)
else:
    worker = 0
for line in lines[worker::workers]:
    number, _, path = line.partition(" ")
    try:
        py_compile.compile(
            path, cfile=out + "/" + number + importlib.util.cache_from_source(path), doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    except (py_compile.PyCompileError, UnicodeError, ValueError, RecursionError, MemoryError):
        pass
if children is None:
    os._exit(0)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def python_tag(version: str) -> str:
    """Return the tag of the bytecode of a Python: "cpython-311" for "3.11.2" (PEP 3147)."""
    major, minor = version.split(".")[:2]
    return f"cpython-{major}{minor}"


def companion(store: Store, key: str, tag: str) -> Path:
    """Return where the bytecode of a tree lies or would lie."""
    return store.root / "pyc" / encoded(key) / tag / "fs"


def keep(store: Store, key: str, tag: str, work: Path) -> None:
    """Give the finished bytecode in `work` its name; what another process made first stays."""
    target = companion(store, key, tag)
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress_exists():
        work.rename(target)


def without_bytecode(store: Store, trees: Sequence[Tree], tag: str) -> list[Tree]:
    """Return the trees whose modules have not been compiled yet."""
    return [tree for tree in trees if not companion(store, tree.key, tag).exists()]


def compile_trees(
    store: Store, trees: Sequence[Tree], *, tag: str, interpreter: str, workers: int, run: Runner
) -> None:
    """Compile in one container whatever of `trees` (bottom first) has no bytecode yet.

    Raises: ImageError where the interpreter itself fails.
    """
    missing = without_bytecode(store, trees, tag)
    with store.workspace() as work:
        out, upper = work / "out", work / "upper"
        upper.mkdir()
        for number in range(len(missing)):
            (out / str(number)).mkdir(parents=True)
        (out / "list").write_bytes(_listing(store, missing))
        status = run.run(
            [interpreter, "-I", "-S", "-c", _PROGRAM, _OUT, str(workers)],
            layers=[tree.fs for tree in trees],
            upper=upper,
            env={"PATH": PATH, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},
            mounts=[(out, _OUT)],
            log=work / "log",
        )
        if status != 0:
            raise ImageError(f"compiling bytecode failed with status {status}", cause=log_tail(work / "log"))
        for number, tree in enumerate(missing):
            keep(store, tree.key, tag, out / str(number))


def _listing(store: Store, trees: Sequence[Tree]) -> bytes:
    """Return the sources to compile, as records "NUMBER PATH" that end with NUL."""
    records = [
        f"{number} /{path}\0"
        for number, tree in enumerate(trees)
        for path, _ in store.tree_index(tree.key)
        if path.endswith(".py") and _is_importable(path)
    ]
    return os.fsencode("".join(records))


def _is_importable(path: str) -> bool:
    return path.startswith(("usr/lib/python3", "opt/env/lib/", "opt/python/lib/"))
