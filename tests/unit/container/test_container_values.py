"""What is decided before anything is done: bundles, mounts, limits, identities, JSON, frames, keys, logs."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from mlenv.container import (
    attaching,
    bundle,
    cgroups,
    config,
    frames,
    logfile,
    mounts,
    record,
    removal,
    security,
    state,
    syscalls,
)
from mlenv.errors import ContainerError


def made(**wanted: Any) -> dict[str, Any]:
    return config.runtime_config(args=["true"], env={"A": "1"}, **wanted)


# --- configurations


def test_what_is_written_is_what_is_read() -> None:
    assert bundle.check(made(layers=[Path("/a")], ports=[config.Port(host_port=1, container_port=2)])) == []


def test_every_fault_is_told_with_its_place() -> None:
    broken = made()
    broken["process"]["color"] = "red"
    broken["process"]["args"] = [1]
    broken["linux"]["intelRdt"] = {}
    broken["extra"] = 1
    assert sorted(bundle.check(broken)) == [
        "extra: not supported",
        "linux.intelRdt: not supported",
        "process.args[0]: must be of type str",
        "process.color: not supported",
    ]


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        ("ociVersion", "2.0", "is not 1.x"),
        ("process.args", [], "at least one word"),
        ("process.cwd", "x", "absolute"),
        ("process.env", ["A"], "no `=`"),
        ("process.args", ["a\0b"], "NUL"),
        ("mounts", [{"destination": "x"}], "absolute"),
        ("linux.namespaces", [{"type": "time"}], "not supported"),
        ("linux.rootfsPropagation", "shared", "not supported"),
        ("annotations", {"dev.mlenv.layers": '["a"]'}, "absolute"),
        ("annotations", {"dev.mlenv.layers": "x"}, "annotations.dev.mlenv.layers"),
        ("annotations", {"dev.mlenv.network": "x"}, "private"),
        ("annotations", {"dev.mlenv.ports": "{}"}, "array"),
        ("root", None, "must be an object"),
    ],
)
def test_impossible_values(place: str, value: object, fault: str) -> None:
    target = broken = made()
    *parents, last = place.split(".")
    for parent in parents:
        target = target[parent]
    target[last] = value
    assert any(fault in found for found in bundle.check(broken)), bundle.check(broken)


def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="cannot read"):
        bundle.read(str(tmp_path))
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ContainerError) as raised:
        bundle.read(str(tmp_path))
    assert "`a` is there twice" in str(raised.value)


def test_a_user_by_number_and_by_name() -> None:
    assert made(user="5:6")["process"]["user"] == {"uid": 5, "gid": 6}
    assert made(user="bob")["annotations"][bundle.USER] == "bob"
    assert made(user="5")["annotations"][bundle.USER] == "5"


def test_limits_and_devices() -> None:
    edits = {
        "deviceNodes": [{"path": "/dev/null", "permissions": "r"}],
        "env": ["CUDA=1"],
        "mounts": [{"hostPath": "/lib/x.so", "containerPath": "/usr/lib/x.so"}],
        "additionalGids": [44],
    }
    found = made(resources=config.Resources(memory=10, cpus=1.5, pids=7, shm=8), device_edits=edits)
    assert found["linux"]["resources"]["memory"] == {"limit": 10}
    assert found["linux"]["resources"]["cpu"] == {"period": 100000, "quota": 150000}
    assert found["linux"]["resources"]["devices"][-1] == {
        "allow": True, "type": "c", "major": 1, "minor": 3, "access": "r",
    }  # fmt: skip
    assert found["process"]["env"] == ["A=1", "CUDA=1"]
    assert found["process"]["user"]["additionalGids"] == [44]
    assert found["mounts"][-1]["destination"] == "/usr/lib/x.so"
    assert bundle.check(found) == []


def test_a_mount_is_recursive_and_read_only_to_the_last() -> None:
    mount = config.Mount(source=Path("/srv"), target=PurePosixPath("/data"), readonly=True)
    assert made(mounts=[mount])["mounts"][-1]["options"] == ["rbind", "nosuid", "nodev", "rro"]


# --- mounts as values


def read(kind: str, *options: str) -> mounts.Mount:
    return mounts.read_mounts([{"destination": "/x", "type": kind, "source": "s", "options": options}], "/b")[
        0
    ]


def test_options_become_attributes() -> None:
    mount = read("tmpfs", "ro", "nosuid", "nodev", "size=1k", "strictatime")
    assert mount.add == (
        syscalls.MOUNT_ATTR_RDONLY
        | syscalls.MOUNT_ATTR_NOSUID
        | syscalls.MOUNT_ATTR_NODEV
        | syscalls.MOUNT_ATTR_STRICTATIME
    )
    assert mount.data == [("size", "1k")]


def test_the_last_of_two_contradicting_options_wins() -> None:
    assert not read("tmpfs", "ro", "rw").add & syscalls.MOUNT_ATTR_RDONLY
    assert read("tmpfs", "rw", "ro").add & syscalls.MOUNT_ATTR_RDONLY


def test_recursive_options_are_for_all_below() -> None:
    mount = read("bind", "rbind", "rro", "rprivate")
    assert (mount.add, mount.add_all) == (0, syscalls.MOUNT_ATTR_RDONLY)
    assert (mount.recursive, mount.propagation) == (True, syscalls.MS_PRIVATE)
    assert mount.source == "/b/s"


@pytest.mark.parametrize(("kind", "option"), [("bind", "size=1"), ("bind", "idmap"), ("nfs", "ro")])
def test_what_cannot_be_mounted_is_refused(kind: str, option: str) -> None:
    with pytest.raises(ContainerError, match="not supported"):
        read(kind, option)


def test_options_that_the_kernel_would_cut_are_refused(tmp_path: Path) -> None:
    """mount(2) reads one page and drops the rest: an overlay would get wrong layers without an error."""
    with pytest.raises(OSError, match="at most 4000"):
        syscalls.mount(
            "overlay", str(tmp_path), "overlay", 0, "lowerdir=" + ":".join(["/layer/of/some/length"] * 200)
        )


# --- identities and limits


PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# comment
broken
bob:x:7:8:Bob:/home/bob:/bin/sh
9:x:11:12::/nine:/bin/sh
"""
GROUP = b"root:x:0:\nbobs:x:8:\nvideo:x:44:eve,bob\n"


@pytest.mark.parametrize(
    ("text", "uid", "gid", "groups", "home"),
    [
        ("root", 0, 0, [], "/root"),
        ("bob", 7, 8, [44], "/home/bob"),
        ("7", 7, 8, [44], "/home/bob"),
        ("bob:video", 7, 44, [], "/home/bob"),
        ("bob:99", 7, 99, [], "/home/bob"),
        ("1234", 1234, 0, [], None),
        ("1234:5", 1234, 5, [], None),
        ("0:0", 0, 0, [], "/root"),
    ],
)
def test_users_by_the_container_s_files(
    text: str, uid: int, gid: int, groups: list[int], home: str | None
) -> None:
    found = security.look_up(text, PASSWD, GROUP)
    assert (found.uid, found.gid, found.groups, found.home) == (uid, gid, groups, home)


@pytest.mark.parametrize("text", ["eve", "bob:nosuch"])
def test_unknown_names(text: str) -> None:
    with pytest.raises(ContainerError, match="the container has no"):
        security.look_up(text, PASSWD, GROUP)


def test_unknown_capabilities_and_limits() -> None:
    with pytest.raises(ContainerError, match="CAP_FLY"):
        security.mask(["CAP_FLY"])
    with pytest.raises(ContainerError, match="RLIMIT_FUN"):
        security.limit({"type": "RLIMIT_FUN", "soft": 1, "hard": 1})


RESOURCES = {
    "memory": {"limit": 64, "reservation": 32, "swap": 100},
    "cpu": {"quota": 50000, "period": 100000, "shares": 1024},
    "pids": {"limit": 9},
}


def test_limits_of_v1() -> None:
    assert cgroups.limits(1, RESOURCES) == [
        ("memory", "memory.limit_in_bytes", "64"),
        ("memory", "memory.soft_limit_in_bytes", "32"),
        ("memory", "memory.memsw.limit_in_bytes", "100"),
        ("cpu", "cpu.shares", "1024"),
        ("cpu", "cpu.cfs_period_us", "100000"),
        ("cpu", "cpu.cfs_quota_us", "50000"),
        ("pids", "pids.max", "9"),
    ]


def test_limits_of_v2() -> None:
    """cpu.weight of 1024 shares is 39, as in crun and runc; swap is told without the memory in it."""
    assert cgroups.limits(2, RESOURCES) == [
        ("memory", "memory.max", "64"),
        ("memory", "memory.low", "32"),
        ("memory", "memory.swap.max", "36"),
        ("cpu", "cpu.max", "50000 100000"),
        ("cpu", "cpu.weight", "39"),
        ("pids", "pids.max", "9"),
    ]


def test_devices_are_denied_first_and_the_standard_ones_granted_last() -> None:
    nothing = {"allow": False, "access": "rwm"}
    nvidia = {"allow": True, "type": "c", "major": 195, "minor": 0, "access": "rw"}
    rules = cgroups.limits(1, {"devices": [nothing, nvidia]})
    assert rules[0] == ("devices", "devices.deny", "a")
    assert rules[1] == ("devices", "devices.allow", "c 195:0 rw")
    assert ("devices", "devices.allow", "c 1:3 rwm") in rules[2:]


def test_without_cgroups_it_says_what_is_not_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "mode", lambda: "none")
    group = cgroups.plan("x", {"memory": {"limit": 1}})
    cgroups.create(group, {"memory": {"limit": 1}})
    assert group.problems == ["memory is not limited: no cgroups are mounted"]
    group.join(os.getpid())
    group.kill()
    assert group.remove() == []


def test_each_controller_is_told_why_it_limits_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file stands where each controller's directory would be: none can be made below it."""
    for controller in ("memory", "pids"):
        (tmp_path / controller).mkdir()
        (tmp_path / controller / "ours").touch()
    monkeypatch.setattr(cgroups, "ROOT", str(tmp_path))
    monkeypatch.setattr(cgroups, "own_paths", lambda: {"memory": "/ours", "pids": "/ours"})
    resources = {"memory": {"limit": 1}, "pids": {"limit": 1}, "cpu": {"quota": 1}}
    group = cgroups.plan("x", resources)
    cgroups.create(group, resources)
    assert group.problems == [
        f"memory is not limited: {tmp_path}/memory/ours cannot be written: Not a directory",
        "cpu is not limited: the controller is not there",
        f"pids is not limited: {tmp_path}/pids/ours cannot be written: Not a directory",
    ]


# --- JSON, state


@pytest.mark.parametrize(
    "value", [{}, {"b": [1, 2.5, None, True], "a": {"ü": "\udcff"}}, [], "x", {"a": "\n\0\\"}]
)
def test_json_agrees_with_the_json_module(value: Any) -> None:
    text = record.serialise(value).decode()
    assert text == json.dumps(value, sort_keys=True) + "\n"
    assert record.parse(text) == json.loads(text) == value


@pytest.mark.parametrize("text", ["", "{", '{"a":1,"a":1}', "[1 2]", "NaN", "1 2", "tru", '"\n"'])
def test_what_is_not_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        record.parse(text)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = str(tmp_path / "state.json")
    record.write(path, {"a": 1})
    with pytest.raises(TypeError):
        record.write(path, {"a": object()})
    assert record.read(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_a_write_that_the_kernel_takes_in_pieces_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:7]))
    record.write(str(tmp_path / "state.json"), {"name": "a" * 100}, durable=True)
    monkeypatch.undo()
    assert record.read(str(tmp_path / "state.json")) == {"name": "a" * 100}


def test_a_process_is_known_by_more_than_its_pid() -> None:
    mine = state.identity(os.getpid())
    assert mine is not None
    assert state.is_alive(mine)
    assert not state.is_alive({**mine, "start_time": mine["start_time"] + 1})
    assert not state.is_alive({**mine, "boot_id": "another boot"})
    assert not state.is_alive(None)
    assert state.kill_exactly({**mine, "start_time": 1}, 9) is False


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    held = state.lock(str(tmp_path))
    assert held is not None
    assert state.lock(str(tmp_path), wait=False) is None
    os.close(held)
    again = state.lock(str(tmp_path), wait=False)
    assert again is not None
    os.close(again)


# --- frames, keys, log, removal


def test_frames_come_together_from_pieces() -> None:
    sent = frames.frame(b"o", b"hello") + frames.frame(b"x", b"\x07") + frames.frame(b"i")
    reader = frames.Reader()
    found = [message for byte in sent for message in reader.feed(bytes((byte,)))]
    assert found == [(b"o", b"hello"), (b"x", b"\x07"), (b"i", b"")]


def test_a_frame_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        frames.Reader().feed(b"i" + (1 << 24).to_bytes(4, "big"))


@pytest.mark.parametrize(
    ("reads", "passed", "detached"),
    [
        ([b"abc"], b"abc", False),
        ([b"a\x10\x11b"], b"a", True),
        ([b"a\x10", b"\x11"], b"a", True),
        ([b"\x10", b"x"], b"\x10x", False),
        ([b"\x10", b"\x10", b"\x11"], b"\x10", True),
        ([b"\x11\x10"], b"\x11", False),
    ],
)
def test_detach_keys(reads: list[bytes], passed: bytes, *, detached: bool) -> None:
    keys = attaching.DetachKeys()
    assert (b"".join(keys.filter(data) for data in reads), keys.detached) == (passed, detached)


def test_a_log_keeps_bytes_as_they_are(tmp_path: Path) -> None:
    log = logfile.Log(str(tmp_path))
    chunks = [bytes(range(256)), "ü".encode()[:1], "ü".encode()[1:], b"\x1b[31m"]
    for chunk in chunks:
        log.write("stdout", chunk)
    log.close()
    with (tmp_path / "log").open("rb") as lines:
        assert [data for _, _, data in logfile.entries(iter(lines))] == chunks


def test_a_log_is_cut_into_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "FILE_SIZE", 500)
    log = logfile.Log(str(tmp_path))
    for number in range(40):
        log.write("stderr", b"%03d" % number)
    log.close()
    files = logfile.files(str(tmp_path))
    assert [Path(file).name for file in files] == ["log.2", "log.1", "log"]
    assert all(Path(file).stat().st_size <= 500 for file in files)
    found = [
        data
        for file in files
        for _, _, data in logfile.entries(iter(Path(file).read_bytes().splitlines(True)))
    ]
    assert found[-1] == b"039"
    assert found == sorted(found)


def test_a_full_disk_loses_the_log_only() -> None:
    log = logfile.Log.__new__(logfile.Log)
    log._fd, log._size, log._path, log.lost = os.open("/dev/full", os.O_WRONLY), 0, "/dev/full", 0
    log.write("stdout", b"12345")
    log.close()
    assert log.lost == 5


def test_a_tree_nobody_may_enter_is_deleted(tmp_path: Path) -> None:
    deep = tmp_path / "doomed" / "work" / "work"
    deep.mkdir(parents=True)
    (deep / "file").touch()
    (tmp_path / "kept").mkdir()
    (deep / "link").symlink_to(tmp_path / "kept")
    deep.chmod(0)
    deep.parent.chmod(0o500)
    removal.remove(str(tmp_path / "doomed"))
    removal.remove(str(tmp_path / "doomed"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
