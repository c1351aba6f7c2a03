"""The unpacker: where files go, what they hold, and what it refuses."""

from __future__ import annotations

import csv
import hashlib
import struct
import zipfile

import pytest
from image_makers import record_row, write_wheel

from mlenv.errors import BadWheelError
from mlenv.image.layer import write_layer
from mlenv.image.wheel import MTIME_ORIGIN, tree_key, unpack_wheel

SITE = "opt/env/lib/python3.11/site-packages"


def unpacked(tmp_path, wheel):
    root = tmp_path / "root"
    root.mkdir()
    return root, unpack_wheel(wheel, root, python="3.11")


def files_of(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_files_lie_where_an_installer_puts_them(tmp_path):
    wheel = write_wheel(
        tmp_path,
        files={
            "demo-1.0.data/scripts/tool": b"#!python\nprint(1)\n",
            "demo-1.0.data/scripts/shell": b"#!/bin/sh\n",
            "demo-1.0.data/data/share/demo/x.txt": b"x",
            "demo-1.0.data/headers/demo.h": b"h",
            "demo-1.0.data/platlib/fast.so": b"so",
            "demo-1.0.data/purelib/slow.py": b"slow = 1\n",
        },
    )
    root, _ = unpacked(tmp_path, wheel)
    assert files_of(root) == [
        "opt/env/bin/shell",
        "opt/env/bin/tool",
        "opt/env/include/site/python3.11/demo/demo.h",
        f"{SITE}/demo-1.0.dist-info/INSTALLER",
        f"{SITE}/demo-1.0.dist-info/METADATA",
        f"{SITE}/demo-1.0.dist-info/RECORD",
        f"{SITE}/demo-1.0.dist-info/WHEEL",
        f"{SITE}/demo/__init__.py",
        f"{SITE}/fast.so",
        f"{SITE}/slow.py",
        "opt/env/share/demo/x.txt",
    ]
    assert (root / "opt/env/bin/tool").read_bytes() == b"#!/opt/env/bin/python\nprint(1)\n"
    assert (root / "opt/env/bin/shell").read_bytes() == b"#!/bin/sh\n"
    assert (root / "opt/env/bin/shell").stat().st_mode & 0o777 == 0o755


def test_entry_points_become_scripts_of_the_environment(tmp_path):
    points = b"[console_scripts]\nRun-It = demo.cli:main\n"
    points += b"[gui_scripts]\nwin = demo:App.start [extra]\n[other]\nx = y:z\n"
    wheel = write_wheel(tmp_path, files={"demo-1.0.dist-info/entry_points.txt": points})
    root, _ = unpacked(tmp_path, wheel)
    scripts = {path.name: path.read_text() for path in (root / "opt/env/bin").iterdir()}
    assert sorted(scripts) == ["Run-It", "win"]
    assert scripts["Run-It"].startswith("#!/opt/env/bin/python\n")
    assert "from demo.cli import main\n" in scripts["Run-It"]
    assert "sys.exit(main())" in scripts["Run-It"]
    assert "from demo import App\n" in scripts["win"]
    assert "sys.exit(App.start())" in scripts["win"]
    compile(scripts["win"], "win", "exec")


def test_record_lists_every_file_with_its_hash(tmp_path):
    wheel = write_wheel(
        tmp_path,
        files={
            "demo-1.0.data/scripts/tool": b"#!python\n",
            "demo-1.0.dist-info/entry_points.txt": b"[console_scripts]\nrun = demo:main\n",
        },
    )
    root, _ = unpacked(tmp_path, wheel)
    site = root / SITE
    rows = list(csv.reader((site / "demo-1.0.dist-info/RECORD").read_text().splitlines()))
    assert rows == sorted(rows)
    assert {(site / row[0]).resolve() for row in rows} == {path for path in root.rglob("*") if path.is_file()}
    for name, digest, size in rows:
        if name.endswith("RECORD"):
            assert (digest, size) == ("", "")
        else:
            content = (site / name).read_bytes()
            assert record_row(name, content) == f"{name},{digest},{size}\n"


def test_modes_keep_only_whether_a_file_can_be_run(tmp_path):
    wheel = write_wheel(
        tmp_path, files={"demo/run": b"x", "demo/data": b"y"}, modes={"demo/run": 0o6711, "demo/data": 0o666}
    )
    root, _ = unpacked(tmp_path, wheel)
    assert (root / SITE / "demo/run").stat().st_mode & 0o7777 == 0o755
    assert (root / SITE / "demo/data").stat().st_mode & 0o7777 == 0o644


def test_times_follow_from_the_content_alone(tmp_path):
    wheel = write_wheel(tmp_path, files={"demo/a.py": b"a = 1\n", "demo/b.py": b"a = 2\n"})
    root, _ = unpacked(tmp_path, wheel)
    times = [(root / SITE / "demo" / name).stat().st_mtime for name in ("a.py", "b.py")]
    assert times[0] != times[1]
    assert all(MTIME_ORIGIN <= each < MTIME_ORIGIN + 2**24 for each in times)
    assert (root / SITE / "demo").stat().st_mtime == MTIME_ORIGIN


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_facts_are_those_of_the_tree_on_the_disk(tmp_path, compression):
    content = bytes(range(256)) * 12_000
    wheel = write_wheel(tmp_path, files={"demo/big.bin": content, "demo/empty": b""}, compression=compression)
    root, facts = unpacked(tmp_path, wheel)
    assert write_layer([root]) == facts
    assert (root / SITE / "demo/big.bin").read_bytes() == content
    assert f"{hashlib.sha256(content).hexdigest()} {SITE}/demo/big.bin\0".encode() in facts.index


def test_zip64_is_read(tmp_path):
    path = write_wheel(tmp_path)
    with zipfile.ZipFile(path) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in members:
            with archive.open(info, "w", force_zip64=True) as file:
                file.write(data)
    root, _ = unpacked(tmp_path, path)
    assert (root / SITE / "demo/__init__.py").read_bytes() == b"value = 1\n"


def test_key_depends_on_wheel_and_python():
    keys = {tree_key("a" * 64, "3.11"), tree_key("b" * 64, "3.11"), tree_key("a" * 64, "3.9")}
    assert len(keys) == 3


def test_a_file_that_record_does_not_list_is_kept(tmp_path):
    record = "demo-1.0.dist-info/RECORD,,\n"
    root, _ = unpacked(tmp_path, write_wheel(tmp_path, record=record))
    assert (root / SITE / "demo/__init__.py").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../evil.py",
        "/abs.py",
        "demo/../../evil.py",
        "demo//x.py",
        "a\\b.py",
        "demo/new\nline.py",
        "demo/.wh.x",
    ],
)
def test_paths_out_of_the_tree_are_refused(tmp_path, name):
    wheel = write_wheel(tmp_path, files={name: b"x"})
    with pytest.raises(BadWheelError):
        unpacked(tmp_path, wheel)
    assert files_of(tmp_path / "root") == []
    assert not (tmp_path / "evil.py").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"demo-1.0.data/strange/x": b"x"},
        {"demo-1.0.data/scripts": b"x"},
        {"demo-1.0.dist-info/entry_points.txt": b"[console_scripts]\nrun = demo\n"},
        {"demo-1.0.dist-info/entry_points.txt": b"[console_scripts]\n../run = demo:main\n"},
        {"demo": b"a file where a directory is"},
        {"other-1.0.dist-info/RECORD": b""},
    ],
)
def test_what_no_installer_can_place_is_refused(tmp_path, files):
    with pytest.raises(BadWheelError):
        unpacked(tmp_path, write_wheel(tmp_path, files=files))


def test_a_file_that_is_not_what_record_says_is_refused(tmp_path):
    record = record_row("demo/__init__.py", b"other\n")
    with pytest.raises(BadWheelError, match="RECORD"):
        unpacked(tmp_path, write_wheel(tmp_path, record=record))


def test_weak_hashes_in_record_are_refused(tmp_path):
    with pytest.raises(BadWheelError, match="md5"):
        unpacked(tmp_path, write_wheel(tmp_path, record="demo/__init__.py,md5=x,10\n"))


def test_a_damaged_file_is_refused(tmp_path):
    wheel = write_wheel(tmp_path, record="", compression=zipfile.ZIP_STORED)
    wheel.write_bytes(wheel.read_bytes().replace(b"value = 1\n", b"value = 2\n"))
    with pytest.raises(BadWheelError, match="checksum"):
        unpacked(tmp_path, wheel)


def test_a_bomb_is_refused_before_anything_is_written(tmp_path):
    wheel = write_wheel(tmp_path, files={"demo/zeros": bytes(90 << 20)})
    assert wheel.stat().st_size < 200_000
    with pytest.raises(BadWheelError, match="claim"):
        unpacked(tmp_path, wheel)
    assert files_of(tmp_path / "root") == []


@pytest.mark.parametrize("claimed", [1000, 0x7FFFFF])
def test_a_file_of_another_length_than_it_claims_is_refused(tmp_path, claimed):
    real = (1 << 20) + 12345
    wheel = write_wheel(tmp_path, files={"demo/zeros": bytes(real)})
    data = wheel.read_bytes()
    assert data.count(struct.pack("<L", real)) == 2
    wheel.write_bytes(data.replace(struct.pack("<L", real), struct.pack("<L", claimed)))
    with pytest.raises(BadWheelError, match="than it claims"):
        unpacked(tmp_path, wheel)


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_wheel_is_refused(tmp_path, content):
    wheel = tmp_path / "demo-1.0-py3-none-any.whl"
    wheel.write_bytes(content)
    with pytest.raises(BadWheelError):
        unpacked(tmp_path, wheel)
