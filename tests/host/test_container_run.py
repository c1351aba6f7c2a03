"""Containers in the foreground, as root, as a user with subordinate ids and as one without."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from containers import CORE, REPOSITORY, User, make_user
from requires import requires


def lines(text: str) -> list[str]:
    return text.splitlines()


@pytest.fixture
def rootfs(busybox_rootfs: Path) -> dict[str, Any]:
    return {"layers": [str(busybox_rootfs)]}


def test_the_user_is_root_inside(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run("sh", "-c", "id -u; id -g", **rootfs)
    assert (done.returncode, lines(done.stdout)) == (0, ["0", "0"]), done.stderr


def test_it_has_namespaces_of_its_own(user: User, rootfs: dict[str, Any]) -> None:
    kinds = ["cgroup", "ipc", "mnt", "net", "pid", "uts"] + ([] if user.is_root else ["user"])
    done = user.run(
        "sh", "-c", "for n in " + " ".join(kinds) + "; do readlink /proc/self/ns/$n; done", **rootfs
    )
    inside = lines(done.stdout)
    outside = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in kinds]
    assert len(inside) == len(kinds), done.stderr
    assert not set(inside) & set(outside)


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143), ("/nonexistent", 127), ("/etc/passwd", 126)],
)
def test_exit_statuses_are_docker_s(user: User, rootfs: dict[str, Any], script: str, status: int) -> None:
    assert user.run("sh", "-c", script, **rootfs).returncode == status


def test_a_program_that_is_missing_is_127(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run("no-such-program", **rootfs)
    assert done.returncode == 127
    assert "the container has no program `no-such-program`" in done.stderr


def test_a_program_that_is_missing_by_path_is_127(user: User, rootfs: dict[str, Any]) -> None:
    assert user.run("/no/such", **rootfs).returncode == 127


def test_a_file_that_is_no_program_is_126(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run("/etc/passwd", **rootfs)
    assert done.returncode == 126
    assert "Permission denied" in done.stderr


def test_a_working_directory_that_is_missing_is_125(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run("true", cwd="/no/such", **rootfs)
    assert done.returncode == 125
    assert "`/no/such`" in done.stderr


def test_dev_has_the_nodes_and_links_of_oci(user: User, rootfs: dict[str, Any]) -> None:
    script = "cd /dev; stat -c '%n %F %t:%T %a' null zero full random urandom tty; ls -l | grep -e '->'"
    done = user.run("sh", "-c", script, **rootfs)
    assert lines(done.stdout)[:6] == [
        f"{name} character special file {number} 666"
        for name, number in (
            ("null", "1:3"), ("zero", "1:5"), ("full", "1:7"),
            ("random", "1:8"), ("urandom", "1:9"), ("tty", "5:0"),
        )
    ], done.stderr  # fmt: skip
    assert {line.split()[-3] for line in lines(done.stdout)[6:]} == {
        "fd",
        "stdin",
        "stdout",
        "stderr",
        "ptmx",
    }


def test_shm_is_half_of_the_memory_or_what_is_asked(user: User, rootfs: dict[str, Any]) -> None:
    script = "grep ' /dev/shm ' /proc/mounts"
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // 1024
    found = user.run("sh", "-c", script, **rootfs).stdout
    assert abs(int(found.partition("size=")[2].partition("k")[0]) - half) < 1024, found
    asked = user.run("sh", "-c", script, **rootfs, resources={"shm": 8 << 20}).stdout
    assert "size=8192k" in asked


def test_shm_and_mqueue_and_tmp_can_be_written(user: User, busybox_rootfs: Path) -> None:
    own = user.home / "own"
    (own / "tmp").mkdir(parents=True)
    for path in (own, own / "tmp"):
        os.chown(path, user.uid, user.uid)
    layers = [str(busybox_rootfs), str(own)]
    done = user.run(
        "sh", "-c", "touch /dev/shm/a /tmp/b /c && mkdir /d && cat /proc/self/mounts", layers=layers
    )
    assert done.returncode == 0, done.stderr
    assert " /dev/mqueue mqueue " in done.stdout


def test_capabilities_are_the_default_ones(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run("sh", "-c", "grep -e Cap -e NoNew -e Seccomp: /proc/self/status", **rootfs)
    found = dict(line.split() for line in lines(done.stdout))
    wanted = "00000000a00425fb" if user.is_root else "00000000a00405fb"
    assert found == {
        "CapInh:": "0" * 16,
        "CapPrm:": wanted,
        "CapEff:": wanted,
        "CapBnd:": wanted,
        "CapAmb:": "0" * 16,
        "NoNewPrivs:": "1",
        "Seccomp:": "2",
    }


@pytest.mark.parametrize(
    "script", ["unshare -U true", "unshare -m true", "mount -t tmpfs t /tmp", "umount /proc"]
)
def test_nested_namespaces_and_mounts_are_refused(user: User, rootfs: dict[str, Any], script: str) -> None:
    assert user.run("sh", "-c", script, **rootfs).returncode != 0


def test_masked_and_read_only_paths(user: User, rootfs: dict[str, Any]) -> None:
    script = (
        "wc -c < /proc/keys; ls /sys/firmware | wc -l; touch /proc/sys/kernel/domainname 2>/dev/null; echo $?"
    )
    assert lines(user.run("sh", "-c", script, **rootfs).stdout) == ["0", "0", "1"]


def test_the_host_s_files_are_not_reachable(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run(
        "sh", "-c", "ls /; ls /proc/1/fd /proc/1/root 2>&1 | wc -l; ls -l /proc/self/fd | wc -l", **rootfs
    )
    names = lines(done.stdout)[:-2]
    assert names == ["bin", "dev", "etc", "proc", "root", "sys", "tmp"]
    assert int(lines(done.stdout)[-1]) <= 6  # 0 1 2, the directory itself, the header


def test_only_the_standard_streams_are_inherited(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run("sh", "-c", "ls /proc/$$/fd; :", **rootfs)
    assert [fd for fd in done.stdout.split() if int(fd) < 10] == ["0", "1", "2"]


def test_orphans_are_reaped(user: User, rootfs: dict[str, Any]) -> None:
    script = (
        "for i in 1 2 3 4 5; do (sleep 0.05 & ) ; done; usleep 300000; cat /proc/[0-9]*/stat | grep -c ' Z ' "
    )
    assert user.run("sh", "-c", script, **rootfs).stdout.strip() == "0"


def test_pid_1_is_the_reaper_and_cannot_be_looked_into(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run("sh", "-c", "cat /proc/1/comm; readlink /proc/1/exe; echo $$", **rootfs)
    assert lines(done.stdout) == ["mlenv-init", "2"]


def test_hosts_hostname_and_resolv_conf(user: User, rootfs: dict[str, Any]) -> None:
    script = "hostname; cat /etc/hostname; grep -c box7 /etc/hosts; wc -c < /etc/resolv.conf"
    done = user.run("sh", "-c", script, hostname="box7", **rootfs)
    assert lines(done.stdout) == ["box7", "box7", "1", "0"]


def test_the_loopback_is_up_without_a_network(user: User, rootfs: dict[str, Any]) -> None:
    assert user.run("grep", "-c", "lo", "/proc/net/dev", **rootfs).stdout.strip() == "1"
    assert "127.0.0.1" in user.run("cat", "/proc/net/fib_trie", **rootfs).stdout


def test_the_host_s_network_is_the_host_s(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run("readlink", "/proc/self/ns/net", **{**rootfs, "network": "host"})
    assert done.stdout.strip() == str(Path("/proc/self/ns/net").readlink()), done.stderr


def test_a_read_only_root(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run("sh", "-c", "touch /x; touch /dev/shm/x && echo writable", readonly=True, **rootfs)
    assert "Read-only file system" in done.stderr
    assert done.stdout.strip() == "writable"


def test_nothing_is_written_to_the_layers_or_by_the_mount_points(user: User, busybox_rootfs: Path) -> None:
    """What is needed to mount on comes from the lowest layer, so the upper holds what the program wrote."""
    upper = user.home / "upper"
    upper.mkdir()
    os.chown(upper, user.uid, user.uid)
    source = user.home / "data"
    source.mkdir()
    before = sorted(str(path) for path in busybox_rootfs.rglob("*"))
    done = user.run("sh", "-c", "echo hi > /new; ls /deep/er", layers=[str(busybox_rootfs)], upper=str(upper),
                    mounts=[(str(source), "/deep/er", True)])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in upper.rglob("*")] == ["new"]
    assert sorted(str(path) for path in busybox_rootfs.rglob("*")) == before
    work = user.home / "upper.work" / "work"
    if work.exists():
        work.chmod(0o700)  # overlayfs leaves it closed to everyone
        assert list(work.iterdir()) == []


def test_without_layers_upper_is_the_root_itself(user: User, busybox_rootfs: Path) -> None:
    root = user.home / "root"
    shutil.copytree(busybox_rootfs, root, symlinks=True)
    for path in (root, *root.rglob("*")):
        os.chown(path, user.uid, user.uid, follow_symlinks=False)
    done = user.run("sh", "-c", "echo hi > /new", layers=[], upper=str(root))
    assert done.returncode == 0, done.stderr
    assert (root / "new").read_text() == "hi\n"
    assert (root / "new").stat().st_uid == user.uid


def test_read_only_and_writable_mounts(user: User, rootfs: dict[str, Any]) -> None:
    for name in ("in", "out"):
        (user.home / name).mkdir()
        os.chown(user.home / name, user.uid, user.uid)
    (user.home / "in" / "a").write_text("content\n")
    mounts = [(str(user.home / "in"), "/in", True), (str(user.home / "out"), "/out", False)]
    done = user.run("sh", "-c", "cat /in/a > /out/b; touch /in/c", mounts=mounts, **rootfs)
    assert "Read-only file system" in done.stderr
    assert (user.home / "out" / "b").read_text() == "content\n"
    assert (user.home / "out" / "b").stat().st_uid == user.uid


def test_a_file_can_be_mounted(user: User, rootfs: dict[str, Any]) -> None:
    (user.home / "one").write_text("1\n")
    done = user.run("cat", "/opt/x/one", mounts=[(str(user.home / "one"), "/opt/x/one", True)], **rootfs)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("name", ["etc", "proc", "dev", "sys"])
def test_a_link_in_the_image_leads_nowhere_else(user: User, busybox_rootfs: Path, name: str) -> None:
    """An image whose /etc or /proc is a link to the host's must not have mounts made there."""
    layer = user.home / "hostile"
    layer.mkdir()
    target = user.home / "target"
    target.mkdir()
    (layer / name).symlink_to(target)
    for path in (layer, target):
        os.chown(path, user.uid, user.uid)
    done = user.run("true", layers=[str(busybox_rootfs), str(layer)])
    assert done.returncode in (0, 125)
    assert list(target.iterdir()) == []


def test_many_layers_with_long_names(user: User, busybox_rootfs: Path) -> None:
    """149 lowers, names above the 255 bytes that a string option takes; nothing is cut."""
    layers = [str(busybox_rootfs)]
    for number in range(148):
        layer = user.home / ("n" * 120) / ("m" * 120) / str(number)
        layer.mkdir(parents=True)
        (layer / f"file{number}").touch()
        layers.append(str(layer))
    done = user.run("sh", "-c", "ls / | grep -c file", layers=layers)
    assert done.stdout.strip() == "148", done.stderr


def test_upper_layers_win(user: User, busybox_rootfs: Path) -> None:
    for name in ("low", "high"):
        (user.home / name).mkdir()
        (user.home / name / "which").write_text(f"{name}\n")
    layers = [str(busybox_rootfs), str(user.home / "low"), str(user.home / "high")]
    assert user.run("cat", "/which", layers=layers).stdout == "high\n"


def test_a_named_user_of_the_image(ordinary_user: User, rootfs: dict[str, Any]) -> None:
    script = "id -u; id -g; id -G; echo $HOME"
    done = ordinary_user.run("sh", "-c", script, user="bob", **rootfs)
    assert lines(done.stdout) == ["7", "8", "8 50", "/home/bob"], done.stderr


def test_an_unknown_user_is_an_error(user: User, rootfs: dict[str, Any]) -> None:
    done = user.run("true", user="nosuch", **rootfs)
    assert done.returncode == 125
    assert "no user `nosuch`" in done.stderr


def test_chown_can_be_ignored(user: User, rootfs: dict[str, Any]) -> None:
    """Package scripts run with one uid: their chown succeeds and does nothing, in every mode."""
    done = user.run("sh", "-c", "touch /f; chown 12:34 /f && stat -c %u:%g /f", ignore_chown=True, **rootfs)
    assert (done.returncode, done.stdout.strip()) == (0, "0:0"), done.stderr


def test_a_single_user_is_told_why(home: Path, busybox_rootfs: Path) -> None:
    user = make_user("single", home)
    done = user.run("cat", "/proc/self/uid_map", layers=[str(busybox_rootfs)])
    assert done.stdout.split() == ["0", str(user.uid), "1"]


def test_the_limit_of_open_files_is_clamped(user: User, rootfs: dict[str, Any]) -> None:
    """It asks for 1048576; on a machine that allows less it runs with what there is."""
    done = user.run("sh", "-c", "ulimit -Hn; ulimit -c", **rootfs)
    assert done.returncode == 0
    files, core = lines(done.stdout)
    assert 1024 <= int(files) <= 1048576
    assert core == "0"


@requires("root", "cgroup")
def test_limits_are_in_force(home: Path, busybox_rootfs: Path) -> None:
    user = make_user("root", home)
    script = (
        "cd /sys/fs/cgroup; cat memory.max memory/memory.limit_in_bytes pids.max pids/pids.max cpu.max "
        "cpu/cpu.cfs_quota_us 2>/dev/null"
    )
    limits = {"memory": 64 << 20, "pids": 33, "cpus": 1.5}
    done = user.run("sh", "-c", script, layers=[str(busybox_rootfs)], resources=limits)
    assert lines(done.stdout)[0] == str(64 << 20), done.stderr
    assert "33" in lines(done.stdout)
    assert any(line.split()[0] == "150000" for line in lines(done.stdout))


@requires("root", "cgroup")
def test_a_fork_bomb_is_stopped(home: Path, busybox_rootfs: Path) -> None:
    user = make_user("root", home)
    script = "for i in $(seq 40); do sleep 5 & done; echo not reached"
    done = user.run("sh", "-c", script, layers=[str(busybox_rootfs)], resources={"pids": 20})
    assert "fork" in done.stderr
    assert "not reached" not in done.stdout


@requires("root", "cgroup")
def test_a_device_that_is_not_granted_cannot_be_opened(home: Path, busybox_rootfs: Path) -> None:
    """A node can be made with the capability, and not be opened: /dev/kmsg is 1:11."""
    user = make_user("root", home)
    script = "mknod /dev/k c 1 11 && echo made && head -c 1 /dev/k"
    kinds = ("bounding", "effective", "permitted")
    edit = {f"process.capabilities.{kind}": ["CAP_MKNOD"] for kind in kinds}
    done = user.run("sh", "-c", script, layers=[str(busybox_rootfs)], edit=edit)
    assert (done.returncode, done.stdout) == (1, "made\n")
    assert "Operation not permitted" in done.stderr


def test_device_files_are_neither_made_nor_opened(home: Path, busybox_rootfs: Path) -> None:
    """Not even where a control group allows it, and not when an image brings one: 1:3 is the null device."""
    user = make_user("root", home)
    layer = home / "layer"
    layer.mkdir()
    os.mknod(layer / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    layers = [str(busybox_rootfs), str(layer)]
    done = user.run("sh", "-c", "cat /dev/null && echo works; cat /null", layers=layers)
    assert (done.returncode, done.stdout) == (1, "works\n")
    assert "Permission denied" in done.stderr
    done = user.run("mknod", "/dev/mine", "c", "1", "3", layers=layers)
    assert done.returncode == 1
    assert "Operation not permitted" in done.stderr


def test_pid_1_in_python_does_the_same(home: Path, busybox_rootfs: Path) -> None:
    """Where no C compiler was, the interpreter reaps: same statuses, no import after the root is entered."""
    user = make_user("root" if os.geteuid() == 0 else "ranges", home)
    package = home / "copy" / "mlenv"
    shutil.copytree(REPOSITORY / "mlenv", package, ignore=shutil.ignore_patterns("init", "__pycache__"))
    core = str(package / "container" / "__main__.py")
    script = "for i in 1 2 3; do (sleep 0.05 &); done; usleep 200000; cat /proc/1/comm; echo $$; exit 9"
    done = user.run("sh", "-c", script, layers=[str(busybox_rootfs)], core=core)
    assert done.returncode == 9, done.stderr
    assert (
        lines(done.stdout)[:2] == [Path(sys.executable).resolve().name[:15], "2"] or "python" in done.stdout
    )
    assert user.run("sh", "-c", "kill -9 $$", layers=[str(busybox_rootfs)], core=core).returncode == 137
    assert user.run("/nope", layers=[str(busybox_rootfs)], core=core).returncode == 127


def test_a_signal_reaches_the_program(home: Path, busybox_rootfs: Path) -> None:
    user = make_user("root" if os.geteuid() == 0 else "ranges", home)
    script = "trap 'echo got it; exit 5' TERM; echo ready; while :; do usleep 10000; done"
    bundle = home / "bundle"
    made = user.python_script(
        "import json,sys;from pathlib import Path;from mlenv.container import config\n"
        "r=json.load(sys.stdin);b=Path(r['bundle']);(b/'rootfs').mkdir(parents=True)\n"
        "c=config.runtime_config(args=['sh','-c',r['script']],env={'PATH':'/bin'},layers=[Path(r['layer'])],"
        "network='none')\n(b/'config.json').write_text(json.dumps(c))",
        {"bundle": str(bundle), "script": script, "layer": str(busybox_rootfs)},
    )
    assert made.returncode == 0, made.stderr
    command = [user.python, "-I", "-S", str(CORE), "run", "--bundle", str(bundle), "signalled"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=user.environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "got it\n"
        assert process.wait(10) == 5
