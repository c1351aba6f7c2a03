"""Bases: which packages come first, and what is taken out of a finished tree."""

from __future__ import annotations

import os

import pytest
from image_makers import write_deb

from mlenv.errors import ImageError
from mlenv.image.bootstrap import clear_leftovers, essential_closure, merged_usr, move_bytecode, normalise
from mlenv.image.deb import data_tar, read_control
from mlenv.image.unpack import unpack_layer


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_a_package_is_read(tmp_path, compression):
    path = write_deb(
        tmp_path,
        "demo",
        depends="a (>= 1), b | c:any",
        files={"lib/x": b"x", "etc/y": b"y"},
        compression=compression,
    )
    control = read_control(path)
    assert (control.name, control.is_essential) == ("demo", False)
    assert control.names_in("Depends") == {"a", "b", "c"}
    (tmp_path / "root").mkdir()
    with data_tar(path) as tar:
        unpack_layer(tar.read, tmp_path / "root", rename=merged_usr)
    assert (tmp_path / "root/usr/lib/x").read_bytes() == b"x"
    assert (tmp_path / "root/etc/y").read_bytes() == b"y"


@pytest.mark.parametrize("content", [b"", b"not a package", b"!<arch>\n"])
def test_what_is_no_package_is_refused(tmp_path, content):
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.deb"):
        read_control(tmp_path / "x.deb")


def test_essential_packages_bring_what_they_depend_on(tmp_path):
    debs = [
        write_deb(tmp_path, "bash", essential=True, depends="libtinfo6, missing"),
        write_deb(tmp_path, "libtinfo6", depends="libc6"),
        write_deb(tmp_path, "libc6"),
        write_deb(tmp_path, "python3", depends="libc6"),
    ]
    controls = {deb.name: read_control(deb) for deb in debs}
    assert essential_closure(controls) == {"bash_1_all.deb", "libtinfo6_1_all.deb", "libc6_1_all.deb"}


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("bin/sh", "usr/bin/sh"),
        ("lib", ""),
        ("lib64/ld.so", "usr/lib64/ld.so"),
        ("library/x", "library/x"),
        ("etc", "etc"),
    ],
)
def test_older_packages_land_below_usr(path, place):
    assert merged_usr(path) == place


def test_what_the_work_left_is_cleared(tmp_path):
    for name in (
        "var/log/dpkg.log",
        "var/lib/dpkg/status-old",
        "etc/.pwd.lock",
        "tmp/x/y",
        "run/z",
        "var/log/kept.log",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "var/log/kept.log"
    ]
    assert (tmp_path / "tmp").is_dir()


def test_times_of_the_build_become_the_epoch(tmp_path):
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    started = root.stat().st_mtime
    (root / "d/new").touch()
    (root / "d/link").symlink_to("new")
    (root / "d/old").touch()
    os.utime(root / "d/old", (1000, 1000))
    normalise(root, tmp_path / "pyc", epoch=5000, started=started)
    found = {name: (root / name).lstat().st_mtime for name in ("d", "d/new", "d/link", "d/old")}
    assert found == {"d": 5000, "d/new": 5000, "d/link": 5000, "d/old": 1000}


def test_modes_that_depend_on_a_lost_group_are_dropped(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for name, mode in (("setgid", 0o2755), ("setuid", 0o4755), ("both", 0o6755)):
        (root / name).touch()
        (root / name).chmod(mode)
    normalise(root, tmp_path / "pyc", epoch=1, started=0)
    assert {path.name: path.stat().st_mode & 0o7777 for path in root.iterdir()} == {
        "setgid": 0o755,
        "setuid": 0o4755,
        "both": 0o6755,
    }


def test_password_dates_do_not_come_from_the_clock(tmp_path):
    shadow = tmp_path / "root/etc/shadow"
    shadow.parent.mkdir(parents=True)
    shadow.write_text("root:*:20729:0:99999:7:::\n_apt:!:20750::::::\n")
    shadow.chmod(0o640)
    normalise(tmp_path / "root", tmp_path / "pyc", epoch=86400 * 10, started=0)
    assert shadow.read_text() == "root:*:10:0:99999:7:::\n_apt:!:10::::::\n"
    assert shadow.stat().st_mode & 0o777 == 0o640


def test_bytecode_moves_beside_the_tree(tmp_path):
    root = tmp_path / "root"
    (root / "a/__pycache__").mkdir(parents=True)
    (root / "a/__pycache__/x.pyc").touch()
    (root / "a/x.py").touch()
    move_bytecode(root, tmp_path / "pyc")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.py*"))] == [
        "pyc/a/__pycache__/x.pyc",
        "root/a/x.py",
    ]
