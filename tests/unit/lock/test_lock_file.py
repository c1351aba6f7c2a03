"""The lock's file: canonical bytes, damage, and what a stranger might put into it."""

# ruff: noqa: E501, ISC004 - tables of texts are compared line by line

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlenv.errors import LockError
from mlenv.lock import canonical
from mlenv.lock.file import (
    LockStatus,
    canonical_bytes,
    lock_state,
    matching_digest,
    matching_lock,
    parse_lock,
    read_lock,
    write_lock,
)
from mlenv.lock.model import (
    BaseLock,
    DebPackage,
    ImageLock,
    Lock,
    Platform,
    PythonLock,
    TorchLock,
    Wheel,
)

HEX = "0123456789abcdef" * 4
DIGEST = "sha256:" + HEX

DEB = DebPackage(
    name="libgl1",
    version="1:1.6.0-1",
    architecture="amd64",
    path="pool/main/libg/libglvnd/libgl1_1.6.0-1_amd64.deb",
    archive="main",
    sha256=HEX,
    size=88_000,
)
LOCK = Lock(
    name="pytorch-1.7",
    spec=DIGEST,
    platform=Platform(glibc="2.36"),
    base=BaseLock(name="debian:12", suite="bookworm", packages=(replace(DEB, name="base-files"),)),
    apt=(DEB,),
    python=PythonLock(version="3.11.2", source="debian:12", interpreter="/usr/bin/python3.11"),
    pytorch=TorchLock(
        version="1.7.1", variant="cu101", cuda="10.1", cudnn="7.6.3", sm=(37, 75), ptx=(37,), min_driver="418.39"
    ),
    wheels=(
        Wheel(name="numpy", version="1.26.4", filename="numpy-1.26.4-cp311-cp311-linux_x86_64.whl", sha256=HEX, size=9),
        Wheel(name="torch", version="1.7.1+cu101", filename="torch-1.7.1+cu101-cp38.whl", sha256=HEX, size=10),
        Wheel(name="mypkg", version="0.1", filename="mypkg-0.1-py3-none-any.whl", sha256=HEX, size=1, path="../libs/mypkg"),
    ),
    build=("echo é",),
)  # fmt: skip


def changed(*path: str | int, value: Any) -> bytes:
    """Return the lock's JSON with one field replaced; None removes it."""
    data = json.loads(canonical_bytes(LOCK))
    place = data
    for part in path[:-1]:
        place = place[part]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(data).encode()


def test_a_lock_is_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.lock.json"
    write_lock(path, LOCK)
    assert read_lock(path) == LOCK
    assert path.read_bytes() == canonical_bytes(LOCK)
    assert LOCK.digest == canonical.digest(path.read_bytes())
    assert [entry.name for entry in path.parent.iterdir()] == ["x.lock.json"]


def test_a_matching_lock_is_known_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.lock.json"
    write_lock(path, LOCK)
    assert matching_digest(path, LOCK.spec) == (LOCK.name, LOCK.digest)
    assert matching_digest(path, "sha256:" + "0" * 64) is None
    assert matching_digest(tmp_path / "missing", LOCK.spec) is None
    for content in (b"[]", b"{", b"[" * 10000, b"{}", b'{"spec": "%s"}' % LOCK.spec.encode(), b"\xff"):
        path.write_bytes(content)
        assert matching_digest(path, LOCK.spec) is None
    path.write_bytes(changed("name", value="another"))
    assert matching_digest(path, LOCK.spec) != ("another", LOCK.digest)


def test_each_package_stands_on_a_line_of_its_own() -> None:
    before = canonical_bytes(LOCK).decode().splitlines()
    wheels = (replace(LOCK.wheels[0], version="2.0.0"), *LOCK.wheels[1:])
    after = canonical_bytes(replace(LOCK, wheels=wheels)).decode().splitlines()
    assert [(old, new) for old, new in zip(before, after, strict=True) if old != new] == [
        (
            '    {"filename": "numpy-1.26.4-cp311-cp311-linux_x86_64.whl", "name": "numpy", '
            f'"sha256": "{HEX}", "size": 9, "version": "1.26.4"}},',
            '    {"filename": "numpy-1.26.4-cp311-cp311-linux_x86_64.whl", "name": "numpy", '
            f'"sha256": "{HEX}", "size": 9, "version": "2.0.0"}},',
        )
    ]
    assert canonical_bytes(LOCK).endswith(b"}\n")
    assert canonical_bytes(LOCK).isascii()


def test_an_image_alone_is_a_lock(tmp_path: Path) -> None:
    lock = Lock(
        name="x",
        spec=DIGEST,
        platform=Platform(),
        image=ImageLock(reference="[::1]:5000/a/b:c", digest=DIGEST),
    )
    write_lock(tmp_path / "x.lock.json", lock)
    assert read_lock(tmp_path / "x.lock.json") == lock


def test_an_equal_lock_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "x.lock.json"
    write_lock(path, LOCK)
    before = path.stat()
    write_lock(path, LOCK)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_link_to_a_lock_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.lock.json").symlink_to("real.lock.json")
    write_lock(tmp_path / "link.lock.json", LOCK)
    assert (tmp_path / "link.lock.json").is_symlink()
    assert read_lock(tmp_path / "real.lock.json") == LOCK


@pytest.mark.parametrize("step", ["fsync", "write", "replace"])
def test_a_write_that_fails_leaves_the_old_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "x.lock.json"
    write_lock(path, LOCK)
    before = path.read_bytes()

    def fail(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        *{"fsync": (os, "fsync"), "write": (os, "fdopen"), "replace": (Path, "replace")}[step], fail
    )
    with pytest.raises(OSError, match="No space left"):
        write_lock(path, replace(LOCK, name="other"))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.lock.json"]


def test_a_lock_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    wrong = replace(LOCK, apt=(replace(DEB, path="../../etc/x.deb"),))
    with pytest.raises(LockError, match="is not a lock"):
        write_lock(tmp_path / "x.lock.json", wrong)
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_a_lock_says_whether_it_belongs_to_the_spec(tmp_path: Path) -> None:
    spec = tmp_path / "x.yaml"
    assert lock_state(spec, DIGEST).status is LockStatus.MISSING
    assert matching_lock(spec, DIGEST) is None
    write_lock(tmp_path / "x.lock.json", LOCK)
    for path in (spec, tmp_path / "x.lock.json"):
        state = lock_state(path, DIGEST)
        assert (state.status, state.lock, state.path) == (LockStatus.MATCHING, LOCK, tmp_path / "x.lock.json")
        assert matching_lock(path, DIGEST) == LOCK
    other = lock_state(spec, "sha256:" + "f" * 64)
    assert (other.status, other.lock, other.status.is_usable) == (LockStatus.STALE, LOCK, False)
    assert matching_lock(spec, "sha256:" + "f" * 64) is None


def test_a_damaged_lock_is_never_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.lock.json").write_text("{\n")
    with pytest.raises(LockError) as caught:
        matching_lock(tmp_path / "x.yaml", DIGEST)
    assert caught.value.hint == "make it anew with `mlenv lock x`, or take `x.lock.json` from git again"
    (tmp_path / "x.lock.json").unlink()
    (tmp_path / "x.lock.json").symlink_to("gone")
    with pytest.raises(LockError, match="cannot be read"):
        matching_lock(tmp_path / "x.yaml", DIGEST)


DAMAGE = {
    b"": "line 1, column 1: Expecting value",
    b'{\n  "schema": 1,\n': "line 3, column 1: Expecting property name enclosed in double quotes",
    b'{"a": 1,\n"a": 2}': 'the key `"a"` stands twice in one object',
    b'{\n<<<<<<< HEAD\n"a": 1\n=======\n': "line 2 is the mark of a git merge conflict",
    b'{\n"a": "\xff"}': "line 2 is not UTF-8",
    b'{"schema": NaN}': "`NaN` is not JSON",
    b"[" * 100_000: "it is nested too deeply",
    b'{"schema": ' + b"1" * 5000 + b"}": "it is not JSON: Exceeds the limit (4300 digits) for integer string conversion: "
    "value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit",
    b"[]": "it is not an object but []",
    b"{}": "its schema is null; this mlenv reads schema 1",
    b'{"schema": true}': "its schema is true; this mlenv reads schema 1",
    b'{"schema": 2}': "its schema is 2; this mlenv reads schema 1",
}  # fmt: skip


@pytest.mark.parametrize("content", list(DAMAGE), ids=range(len(DAMAGE)))
def test_damage_is_named(content: bytes) -> None:
    with pytest.raises(LockError) as caught:
        parse_lock(content, path=Path("x.lock.json"))
    assert caught.value.cause == DAMAGE[content]
    assert caught.value.hint
    assert caught.value.code == "invalid-lock"


def test_the_remedy_for_a_newer_lock_is_a_newer_mlenv() -> None:
    with pytest.raises(LockError) as caught:
        parse_lock(b'{"schema": 2}', path=Path("x.lock.json"))
    assert caught.value.hint == "update mlenv"


WRONG: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("name",), 1, "`name` is 1, not a name"),
    (("name",), "../x", '`name` is "../x", not a name'),
    (("name",), None, "`name` is missing"),
    (("spec",), HEX, f'`spec` is "{HEX[:58]}…, not a sha256 digest'),
    (("spec",), "sha256:" + HEX.upper(), f'`spec` is "sha256:{HEX.upper()[:51]}…, not a sha256 digest'),
    (("platform",), None, "`platform` is missing"),
    (("platform",), [], "`platform` is not an object but []"),
    (("platform", "os"), "li nux", '`platform.os` is "li nux", not an operating system\'s name'),
    (("extra",), 1, "`extra` is not a field of a lock"),
    (("wheels", 0, "url"), "https://x", "`wheels[0].url` is not a field of a lock"),
    (("wheels",), {}, "`wheels` is {}, not a list"),
    (("wheels", 0), "x", '`wheels[0]` is not an object but "x"'),
    (("wheels", 0, "filename"), "../x.whl", '`wheels[0].filename` is "../x.whl", not a wheel\'s file name'),
    (("wheels", 0, "filename"), "a/b.whl", '`wheels[0].filename` is "a/b.whl", not a wheel\'s file name'),
    (("wheels", 0, "filename"), "a\\b.whl", '`wheels[0].filename` is "a\\\\b.whl", not a wheel\'s file name'),
    (("wheels", 0, "filename"), ".x.whl", '`wheels[0].filename` is ".x.whl", not a wheel\'s file name'),
    (("wheels", 0, "filename"), "x.exe", '`wheels[0].filename` is "x.exe", not a wheel\'s file name'),
    (("wheels", 0, "filename"), "x.whl\n", '`wheels[0].filename` is "x.whl\\n", not a wheel\'s file name'),
    (("wheels", 0, "sha256"), HEX[:-1], f'`wheels[0].sha256` is "{HEX[:58]}…, not a sha256 in hex'),
    (("wheels", 0, "size"), -1, "`wheels[0].size` is -1, not a whole number"),
    (("wheels", 0, "size"), 1.5, "`wheels[0].size` is 1.5, not a whole number"),
    (("wheels", 0, "size"), True, "`wheels[0].size` is true, not a whole number"),
    (("wheels", 0, "size"), "9", '`wheels[0].size` is "9", not a whole number'),
    (("wheels", 0, "path"), "/etc", '`wheels[0].path` is "/etc", not a relative path like `./libs/mypkg`'),
    (("wheels", 0, "path"), "./a/../../x", '`wheels[0].path` is "./a/../../x", not a relative path like `./libs/mypkg`'),
    (("wheels", 0, "path"), "", '`wheels[0].path` is "", not a relative path like `./libs/mypkg`'),
    (("wheels", 0, "path"), "a\0b", '`wheels[0].path` is "a\\u0000b", not a text'),
    (("wheels", 1, "name"), "numpy", "`wheels` pins numpy twice"),
    (("apt", 0, "name"), "base-files", "`apt` pins base-files:amd64 twice"),
    (("apt", 0, "path"), "/pool/x.deb", '`apt[0].path` is "/pool/x.deb", not a path below a mirror that ends in .deb'),
    (("apt", 0, "path"), "pool/../../x.deb", '`apt[0].path` is "pool/../../x.deb", not a path that stays below its mirror'),
    (("apt", 0, "path"), "pool//x.deb", '`apt[0].path` is "pool//x.deb", not a path that stays below its mirror'),
    (("apt", 0, "path"), "http://h/x.deb", '`apt[0].path` is "http://h/x.deb", not a path that stays below its mirror'),
    (("apt", 0, "path"), "pool/x.deb?y", '`apt[0].path` is "pool/x.deb?y", not a path below a mirror that ends in .deb'),
    (("apt", 0, "archive"), "other", '`apt[0].archive` is "other", not main or security'),
    (("base", "suite"), "a b", '`base.suite` is "a b", not a suite\'s name'),
    (("base",), None, "it has neither an `image` nor a `base` with a `python`"),
    (("python", "interpreter"), "/usr/../x", '`python.interpreter` is "/usr/../x", not a path without `..`'),
    (("python", "interpreter"), "usr/bin", '`python.interpreter` is "usr/bin", not an absolute path'),
    (("pytorch", "sm", 0), "75", '`pytorch.sm[0]` is "75", not a compute capability'),
    (("build", 0), 1, "`build[0]` is 1, not a text"),
    (("image",), {"reference": "-x", "digest": DIGEST}, '`image.reference` is "-x", not an image reference'),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "cause"), WRONG)
def test_every_field_is_checked(path: tuple[str | int, ...], value: Any, cause: str) -> None:
    with pytest.raises(LockError) as caught:
        parse_lock(changed(*path, value=value), path=Path("x.lock.json"))
    assert caught.value.cause == cause


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for name, make in (("d", Path.mkdir), ("p", os.mkfifo)):
        path = tmp_path / f"{name}.lock.json"
        make(path)
        with pytest.raises(LockError, match="cannot be read"):
            read_lock(path)
    with pytest.raises(LockError) as caught:
        read_lock(tmp_path / "gone.lock.json")
    assert caught.value.cause == "No such file or directory"
