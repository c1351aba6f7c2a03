"""What holds for every layer, whatever is in it."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mlenv.errors import ImageError
from mlenv.image.layer import OPAQUE, WHITEOUT, tree_entries, write_layer
from mlenv.image.unpack import unpack_layer

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cs",)),
    min_size=1,
    max_size=60,
).filter(lambda name: name not in {".", ".."} and not name.startswith(WHITEOUT) and len(name.encode()) < 200)
FILES = st.tuples(
    st.just("file"), st.binary(max_size=2000), st.sampled_from([0o644, 0o755, 0o4755, 0o600, 0o400])
)
LINKS = st.tuples(st.just("link"), NAMES, st.none())
WHITEOUTS = st.tuples(st.just("whiteout"), st.none(), st.none())
TREES = st.recursive(
    st.dictionaries(NAMES, st.one_of(FILES, LINKS), max_size=4),
    lambda inner: st.dictionaries(NAMES, st.one_of(FILES, LINKS, inner), max_size=4),
    max_leaves=12,
)


@contextmanager
def scratch():
    root = Path(tempfile.mkdtemp(prefix="mlenv-layer-"))
    try:
        yield root
    finally:
        shutil.rmtree(root)


def build(tree, root):
    root.mkdir()
    for name, node in tree.items():
        path = root / name
        if isinstance(node, dict):
            build(node, path)
        elif node[0] == "file":
            path.write_bytes(node[1])
            path.chmod(node[2])
        elif node[0] == "link":
            path.symlink_to(node[1])
        else:
            os.mknod(path, stat.S_IFCHR, 0)
        if not path.is_symlink():
            os.utime(path, (1_500_000_000, 1_500_000_000))


def packed(root):
    parts = []
    return write_layer([root], parts.append), b"".join(parts)


class TestCanonicalLayers:
    """OCI image-spec, layer.md, Representing Changes: a layer says all of a tree, in one way."""

    @settings(max_examples=60, deadline=None)
    @given(TREES)
    def test_a_tree_survives_packing_and_unpacking(self, tree):
        with scratch() as root:
            build(tree, root / "one")
            facts, data = packed(root / "one")
            (root / "two").mkdir()
            unpack_layer(io.BytesIO(data).read, root / "two")
            again, again_data = packed(root / "two")
            assert [entry for entry, _ in tree_entries(root / "two")] == [
                entry for entry, _ in tree_entries(root / "one")
            ]
            assert (again, again_data) == (facts, data)

    @settings(max_examples=40, deadline=None)
    @given(TREES)
    def test_another_reader_agrees(self, tree):
        with scratch() as root:
            build(tree, root / "one")
            _, data = packed(root / "one")
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                found = {each.name: tar.extractfile(each).read() for each in tar if each.isfile()}
            expected = {
                str(path.relative_to(root / "one")): path.read_bytes()
                for path in (root / "one").rglob("*")
                if path.is_file() and not path.is_symlink()
            }
            assert found == expected


class TestWhiteouts:
    """OCI image-spec, layer.md, Whiteouts; overlayfs.rst, whiteouts and opaque directories."""

    @settings(max_examples=40, deadline=None)
    @given(
        st.dictionaries(
            NAMES, st.one_of(FILES, WHITEOUTS, st.dictionaries(NAMES, WHITEOUTS, max_size=2)), max_size=5
        ),
        st.randoms(use_true_random=False),
    )
    def test_removals_survive_in_any_order(self, tree, random):
        with scratch() as root:
            build(tree, root / "one")
            facts, data = packed(root / "one")
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                members = [(each, tar.extractfile(each).read() if each.isfile() else b"") for each in tar]
            assert not [each for each, _ in members if each.ischr()]
            random.shuffle(members)
            shuffled = io.BytesIO()
            with tarfile.open(fileobj=shuffled, mode="w") as tar:
                for member, content in members:
                    tar.addfile(member, io.BytesIO(content))
            (root / "two").mkdir()
            unpack_layer(io.BytesIO(shuffled.getvalue()).read, root / "two")
            assert packed(root / "two")[0] == facts

    @given(st.permutations([OPAQUE, "kept", WHITEOUT + "gone"]))
    @settings(max_examples=6, deadline=None)
    def test_an_opaque_directory_may_come_in_any_order(self, names):
        with scratch() as root:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for name in names:
                    tar.addfile(tarfile.TarInfo(f"d/{name}"))
            (root / "two").mkdir()
            unpack_layer(io.BytesIO(buffer.getvalue()).read, root / "two")
            found = {entry.path for entry, _ in tree_entries(root / "two")}
            assert found == {"d", f"d/{OPAQUE}", "d/kept", f"d/{WHITEOUT}gone"}


PARTS = st.sampled_from(["..", ".", "", "a", "b", "link", "etc"])
PATHS = st.lists(PARTS, min_size=1, max_size=5).map("/".join)
MEMBERS = st.lists(
    st.tuples(
        PATHS, st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE]), PATHS
    ),
    min_size=1,
    max_size=8,
)


class TestTraversal:
    """A layer is untrusted input: whatever it names, nothing outside its directory changes."""

    @settings(max_examples=300, deadline=None)
    @given(MEMBERS)
    def test_nothing_outside_is_touched(self, members):
        with scratch() as root:
            (root / "outside").mkdir()
            (root / "outside/secret").write_text("secret")
            (root / "in").mkdir()
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, "../outside"
                tar.addfile(link)
                for name, kind, target in [
                    *members,
                    ("link/secret", tarfile.REGTYPE, ""),
                    ("link/x", tarfile.DIRTYPE, ""),
                ]:
                    member = tarfile.TarInfo(name)
                    member.type, member.linkname = (
                        kind,
                        target if kind in {tarfile.SYMTYPE, tarfile.LNKTYPE} else "",
                    )
                    tar.addfile(member)
            try:
                unpack_layer(io.BytesIO(buffer.getvalue()).read, root / "in")
            except (ImageError, OSError):
                refused = True
            else:
                refused = False
            assert refused
            assert [path.name for path in (root / "outside").iterdir()] == ["secret"]
            assert (root / "outside/secret").read_text() == "secret"
            assert (root / "outside/secret").stat().st_nlink == 1
            assert sorted(path.name for path in root.iterdir()) == ["in", "outside"]
