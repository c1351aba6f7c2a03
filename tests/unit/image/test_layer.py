"""The canonical tar, read back by Python's tarfile, and the reader, fed by it."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile

import pytest

from mlenv.errors import ImageError
from mlenv.image.layer import Entry, LayerWriter, tree_entries, write_layer
from mlenv.image.unpack import unpack_layer

LONG = "d" * 90 + "/" + "e" * 90
TOO_LONG = "f" * 120 + "/" + "g" * 120


def packed(*roots):
    parts = []
    facts = write_layer(roots, parts.append)
    return b"".join(parts), facts


def unpacked(data, root, **options):
    root.mkdir()
    unpack_layer(io.BytesIO(data).read, root, **options)
    return root


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name in ("a", LONG, TOO_LONG, "locked"):
        (root / name).mkdir(parents=True)
    (root / "a/file").write_bytes(b"content")
    (root / "a/link").symlink_to("../" + "x" * 150)
    (root / "a/same").hardlink_to(root / "a/file")
    (root / LONG / "name").write_bytes(b"1")
    (root / TOO_LONG / "näme").write_bytes(b"22")
    (root / "a-b").write_bytes(bytes(3000))
    (root / "a-b").chmod(0o4755)
    os.mkfifo(root / "pipe", 0o640)
    for path in [*root.rglob("*")]:
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    (root / "locked").chmod(0o700)
    return root


def test_another_reader_finds_the_same_tree(tree):
    data, facts = packed(tree)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
        assert tar.extractfile("a-b").read() == bytes(3000)
    assert [each.name for each in members] == sorted((each.name for each in members), key=os.fsencode)
    found = {each.name: each for each in members}
    assert set(found) == {str(path.relative_to(tree)) for path in tree.rglob("*")}
    assert {(each.uid, each.gid, each.uname, each.gname) for each in members} == {(0, 0, "", "")}
    assert found["a/link"].linkname == "../" + "x" * 150
    assert (found["a/same"].type, found["a/same"].linkname) == (tarfile.LNKTYPE, "a/file")
    assert found["a-b"].mode == 0o4755
    assert found["pipe"].isfifo()
    assert {each.mtime for each in members} == {1_600_000_000}
    assert facts.diff_id == "sha256:" + hashlib.sha256(data).hexdigest()
    assert facts.tar_size == len(data)
    assert (facts.files, facts.size) == (4, 7 + 1 + 2 + 3000)


def test_pax_headers_only_where_ustar_cannot_say_it(tree):
    data, _ = packed(tree)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        with_pax = {each.name: set(each.pax_headers) for each in tar if each.pax_headers}
    assert with_pax == {
        "a/link": {"linkpath"},
        "f" * 120: {"path"},
        TOO_LONG: {"path"},
        f"{TOO_LONG}/näme": {"path"},
    }


def test_equal_trees_give_equal_bytes_whatever_their_order(tmp_path):
    names = [f"f{number}" for number in range(20)]
    for copy, order in (("one", names), ("two", names[::-1])):
        (tmp_path / copy).mkdir()
        for name in order:
            (tmp_path / copy / name).write_text(name)
            os.utime(tmp_path / copy / name, (1, 1))
    assert packed(tmp_path / "one") == packed(tmp_path / "two")


def test_reading_back_gives_the_same_layer(tree, tmp_path):
    data, facts = packed(tree)
    copy = unpacked(data, tmp_path / "copy")
    assert [entry for entry, _ in tree_entries(copy)] == [entry for entry, _ in tree_entries(tree)]
    assert packed(copy) == (data, facts)
    assert (copy / "a/same").samefile(copy / "a/file")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_others_are_read(tree, tmp_path, form):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        tar.add(tree, arcname=".")
    copy = unpacked(buffer.getvalue(), tmp_path / "copy")
    assert packed(copy)[1] == packed(tree)[1]


def test_later_trees_lie_over_earlier_ones(tmp_path):
    for name, content in (("low", {"d/x": "1", "d/y": "1", "e/z": "1"}), ("high", {"d/x": "2", "e": "file"})):
        for path, text in content.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
    data, _ = packed(tmp_path / "low", tmp_path / "high")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {each.name: tar.extractfile(each).read() if each.isfile() else None for each in tar}
    assert found == {"d": None, "d/x": b"2", "d/y": b"1", "e": b"file"}


def test_entries_out_of_order_are_refused():
    writer = LayerWriter()
    writer.add(Entry(path="b"))
    with pytest.raises(ImageError, match="out of order"):
        writer.add(Entry(path="a"))


def test_a_file_that_changes_while_it_is_read_is_refused():
    with pytest.raises(ImageError, match="changed"):
        LayerWriter().add(Entry(path="a", size=3), [b"four"])


def test_names_that_mean_a_removal_are_refused(tmp_path):
    (tmp_path / ".wh.x").touch()
    with pytest.raises(ImageError, match="removal"):
        tree_entries(tmp_path)


def test_sockets_are_left_out(tmp_path):
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    assert tree_entries(tmp_path) == []


@pytest.mark.parametrize("length", [1, 511, 512, 700, 1024 + 10])
def test_a_tar_that_ends_early_is_refused(tree, tmp_path, length):
    data, _ = packed(tree)
    with pytest.raises(ImageError, match="ends in the middle"):
        unpacked(data[:length], tmp_path / "copy")


def test_a_tar_with_a_wrong_checksum_is_refused(tree, tmp_path):
    data, _ = packed(tree)
    with pytest.raises(ImageError, match="checksum"):
        unpacked(b"A" + data[1:], tmp_path / "copy")


def test_directory_modes_are_set_last(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, mode in (("d", tarfile.DIRTYPE, 0o500), ("d/f", tarfile.REGTYPE, 0o600)):
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, mode
            tar.addfile(member)
    copy = unpacked(buffer.getvalue(), tmp_path / "copy")
    assert (copy / "d").stat().st_mode & 0o777 == 0o500
    assert (copy / "d/f").exists()
