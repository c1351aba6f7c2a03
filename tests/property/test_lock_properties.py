"""Locks: writing and reading are inverse, equal locks have equal bytes, no text makes the reader misbehave."""

# ruff: noqa: E501, PT017 - tables of strategies; what is refused is checked, what is read too

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mlenv.errors import LockError
from mlenv.lock.file import canonical_bytes, parse_lock, read_lock, write_lock
from mlenv.lock.model import BaseLock, DebPackage, ImageLock, Lock, Platform, PythonLock, TorchLock, Wheel

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,20}", fullmatch=True)
VERSIONS = st.from_regex(r"[0-9][A-Za-z0-9.+~-]{0,12}", fullmatch=True)
HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)
DIGESTS = HEX.map("sha256:".__add__)
SIZES = st.integers(min_value=0, max_value=2**63 - 1)
MAYBE_VERSION = st.none() | VERSIONS

DEBS = st.builds(
    DebPackage,
    name=NAMES,
    version=VERSIONS,
    architecture=st.sampled_from(["amd64", "all"]),
    path=st.from_regex(r"pool/main/[a-z]/[a-z0-9+.-]*[a-z]_[0-9]\.deb", fullmatch=True),
    archive=st.sampled_from(["main", "security"]),
    sha256=HEX,
    size=SIZES,
)
WHEELS = st.builds(
    Wheel,
    name=NAMES,
    version=VERSIONS,
    filename=st.from_regex(r"[A-Za-z0-9_]+-[0-9.]+-py3-none-any\.whl", fullmatch=True),
    sha256=HEX,
    size=SIZES,
    path=st.none() | st.sampled_from([".", "..", "./libs/x", "../x", "libs/x/"]),
)
BASES = st.builds(
    BaseLock,
    name=st.sampled_from(["debian:11", "debian:12"]),
    suite=st.sampled_from(["bullseye", "bookworm"]),
    packages=st.lists(DEBS, max_size=3, unique_by=lambda deb: deb.name).map(tuple),
)
LOCKS = st.builds(
    Lock,
    name=NAMES,
    spec=DIGESTS,
    platform=st.builds(Platform, glibc=MAYBE_VERSION),
    base=BASES,
    apt=st.just(()),
    python=st.builds(
        PythonLock,
        version=VERSIONS,
        source=st.sampled_from(["debian:12", "standalone"]),
        interpreter=st.just("/usr/bin/python3.11"),
        key=st.none() | NAMES,
        sha256=st.none() | HEX,
    ),
    pytorch=st.none()
    | st.builds(
        TorchLock,
        version=VERSIONS,
        variant=NAMES,
        cuda=MAYBE_VERSION,
        cudnn=MAYBE_VERSION,
        sm=st.lists(st.integers(1, 200), max_size=4).map(tuple),
        ptx=st.lists(st.integers(1, 200), max_size=4).map(tuple),
        min_driver=MAYBE_VERSION,
    ),
    wheels=st.lists(WHEELS, max_size=4, unique_by=lambda wheel: wheel.name).map(tuple),
    build=st.lists(st.text(st.characters(exclude_characters="\0"), max_size=20), max_size=2).map(tuple),
    image=st.none() | st.builds(ImageLock, reference=st.just("localhost:5000/a/b:c"), digest=DIGESTS),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


class TestLock:
    """A lock holds no times and no order of its own: equal inputs give the same bytes (ARCHITECTURE.md, 8)."""

    @settings(max_examples=40)
    @given(LOCKS)
    def test_round_trip(self, lock: Lock) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "x.lock.json")
            write_lock(path, lock)
            again = read_lock(path)
        assert again == lock
        assert canonical_bytes(again) == canonical_bytes(lock)
        assert again.digest == lock.digest

    @settings(max_examples=40)
    @given(LOCKS)
    def test_canonical_form(self, lock: Lock) -> None:
        """RFC 8259 text, ASCII, one package a line, read by any JSON reader, the same from any order of keys."""
        content = canonical_bytes(lock)
        data = json.loads(content)
        assert content.isascii()
        assert content.endswith(b"\n")
        packages = [*lock.wheels, *(lock.base.packages if lock.base else ())]
        lines = content.decode().splitlines()
        assert sum(1 for line in lines if '"sha256"' in line and line.lstrip().startswith("{")) == len(
            packages
        )
        shuffled = json.dumps(dict(reversed(data.items()))).encode()
        assert canonical_bytes(parse_lock(shuffled, path=Path("x"))) == content

    @settings(max_examples=50)
    @given(LOCKS, LOCKS)
    def test_the_digest_tells_locks_apart(self, one: Lock, other: Lock) -> None:
        assert (one.digest == other.digest) == (one == other)

    @settings(max_examples=75)
    @given(LOCKS, st.data())
    def test_any_field_replaced_by_any_json_is_read_or_refused(self, lock: Lock, data: st.DataObject) -> None:
        document = json.loads(canonical_bytes(lock))
        place = document
        while True:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        place[key] = data.draw(JSON)
        self.read_or_refuse(json.dumps(document).encode())

    @settings(max_examples=75)
    @given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
    def test_any_bytes_are_refused_with_a_reason(self, content: bytes) -> None:
        self.read_or_refuse(content)

    def read_or_refuse(self, content: bytes) -> None:
        try:
            lock = parse_lock(content, path=Path("x.lock.json"))
        except LockError as refusal:
            assert refusal.cause
            assert refusal.hint
        else:
            assert parse_lock(canonical_bytes(lock), path=Path("x.lock.json")) == lock


class TestPaths:
    """No path of a lock leads out of the directory it is used in."""

    PIECES = st.lists(
        st.sampled_from(["..", ".", "", "pool", "a", "/", "\\", "x.deb", "x.whl", "%2e%2e"]), max_size=5
    )

    @settings(max_examples=100)
    @given(PIECES.map("/".join))
    def test_what_is_taken_stays_inside(self, path: str) -> None:
        fields = {
            "name": "a", "version": "1", "architecture": "all", "archive": "main", "sha256": "0" * 64, "size": 1,
        }  # fmt: skip
        wheel = {"name": "a", "version": "1", "sha256": "0" * 64, "size": 1}
        document = {
            "schema": 1, "name": "x", "spec": "sha256:" + "0" * 64, "platform": {"os": "linux", "architecture": "amd64"},
            "image": {"reference": "a", "digest": "sha256:" + "0" * 64},
        }  # fmt: skip
        for key, value in (("apt", {**fields, "path": path}), ("wheels", {**wheel, "filename": path})):
            try:
                lock = parse_lock(json.dumps({**document, key: [value]}).encode(), path=Path("x"))
            except LockError:
                continue
            inside = Path("/cache") / (lock.apt[0].path if key == "apt" else lock.wheels[0].filename)
            assert Path("/cache") in Path(str(inside.resolve())).parents
            assert ".." not in inside.parts
