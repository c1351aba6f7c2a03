"""Control groups: limits, accounting, and the end of everything a container left running.

A container's group lies below the group that mlenv itself runs in, so limits that are already in force
stay so. v1: one directory per controller; v2: one directory; where neither can be written the container
runs without, and `Group.problems` says which limit is not in force.

Source: Documentation/admin-guide/cgroup-v1, cgroup-v2.rst; OCI runtime-spec 1.0.2 config-linux.md
"Control groups".
"""

from __future__ import annotations

import errno
import os

from mlenv.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

ROOT = "/sys/fs/cgroup"
V1_CONTROLLERS = ("cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids")
_MAX = "max"
_MISSING = "the controller is not there"
_CPU_SHARES_MAX = 262144


class Group:
    """A container's control groups: directories by controller (v1), or one under the empty name (v2)."""

    __slots__ = ("directories", "problems", "version")

    def __init__(self, version: int, directories: dict[str, str], problems: list[str] | None = None) -> None:
        self.version = version
        self.directories = directories
        self.problems = problems if problems is not None else []

    def members(self) -> list[tuple[str, str]]:
        """Return (controller, directory) of each."""
        return list(self.directories.items())

    @property
    def joins_itself(self) -> bool:
        """Whether a process moves itself in: who writes 0 to v1's `tasks` needs no lock of all groups.

        Any other way in waits 15 ms for an RCU grace period.
        Source: kernel/cgroup/cgroup.c, cgroup_procs_write_start.
        """
        return self.version == 1

    def join(self, pid: int) -> None:
        """Move the process `pid` in (v2). A process that has ended is no error."""
        for directory in self.directories.values():
            try:
                _write(os.path.join(directory, "cgroup.procs"), str(pid))
            except ProcessLookupError:
                return
            except OSError as error:
                self.problems.append(f"{directory}: {error.strerror}")

    def join_self(self) -> list[str]:
        """Move this process in (v1) and return what went wrong."""
        problems = []
        for controller, directory in self.directories.items():
            try:
                _write(os.path.join(directory, "tasks"), "0")
            except OSError as error:
                problems.append(f"cgroup {controller} is not joined: {error.strerror}")
        return problems

    def open_members(self) -> list[int]:
        """Return the files that take members, opened: that outlives a change of namespaces."""
        name = "tasks" if self.joins_itself else "cgroup.procs"
        opened = []
        for directory in self.directories.values():
            try:
                opened.append(os.open(os.path.join(directory, name), os.O_WRONLY | os.O_CLOEXEC))
            except OSError as error:
                self.problems.append(f"{directory}: {error.strerror}")
        return opened

    def pids(self) -> list[int]:
        """Return every process in the group or below it."""
        for directory in self.directories.values():
            found: list[int] = []
            for parent, _, files in os.walk(directory):
                if "cgroup.procs" in files:
                    found += [int(line) for line in _read(os.path.join(parent, "cgroup.procs")).split()]
            if found:  # elsewhere are the same; but a process may have joined a part of them
                return found
        return []

    def kill(self) -> None:
        """Send SIGKILL to every process of the group until a pass finds no new one: none forks away."""
        if self.version == 2:  # noqa: PLR2004 - the version
            try:
                _write(os.path.join(self.directories[""], "cgroup.kill"), "1")
            except OSError:  # before Linux 5.14: one by one
                self._kill_each()
            return
        frozen = self._freeze("FROZEN")
        self._kill_each()
        if frozen:
            self._freeze("THAWED")

    def _freeze(self, state: str) -> bool:
        directory = self.directories.get("freezer")
        if directory is None:
            return False
        try:
            _write(os.path.join(directory, "freezer.state"), state)
        except OSError:
            return False
        return True

    def _kill_each(self) -> None:
        killed: set[int] = set()
        while True:
            remaining = [pid for pid in self.pids() if pid not in killed and pid != os.getpid()]
            if not remaining:
                return
            for pid in remaining:
                killed.add(pid)
                try:
                    os.kill(pid, 9)
                except (ProcessLookupError, PermissionError):
                    continue

    def out_of_memory_kills(self) -> int:
        """Return how many processes the kernel killed for memory; to be read before `remove`."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"  # noqa: PLR2004
        directory = self.directories.get("" if self.version == 2 else "memory")  # noqa: PLR2004
        if directory is None:
            return 0
        for line in _read(os.path.join(directory, name)).splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def remove(self) -> list[str]:
        """Delete the directories, and return those that something still holds."""
        held = []
        for directory in self.directories.values():
            try:
                _remove_tree(directory)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    held.append(f"{directory}: {error.strerror}")
        return held


def _remove_tree(directory: str) -> None:
    """Remove a group and those made below it. A group is empty a moment after its last process is reaped."""
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return
        for entry in os.scandir(directory):
            if entry.is_dir(follow_symlinks=False):
                _remove_tree(entry.path)
        os.rmdir(directory)


def _write(path: str, *values: str) -> None:
    """Write values into a control file, one write(2) each as the kernel wants them."""
    file_fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for value in values:
            os.write(file_fd, value.encode())
    finally:
        os.close(file_fd)


def _read(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode()
    except OSError:
        return ""


def own_paths() -> dict[str, str]:
    """Return this process's group path by controller; v2's has the empty name. Source: cgroups(7)."""
    paths: dict[str, str] = {}
    for line in _read("/proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            paths[name] = path
    return paths


def mode() -> str:
    """Return `v1`, `v2` or `none`: what is mounted on this host."""
    if os.path.exists(f"{ROOT}/cgroup.controllers"):
        return "v2"
    if any(os.path.isdir(f"{ROOT}/{controller}") for controller in V1_CONTROLLERS):
        return "v1"
    return "none"


def plan(container_id: str, resources: Mapping[str, Any], *, path: str | None = None) -> Group:
    """Return the container's groups, not made yet, so that whoever cleans up can know them first.

    `path` is OCI's cgroupsPath. In version 2 the group stands beside our own and not in it: a group with
    processes gives its children no controllers. Source: Linux cgroup-v2, No Internal Process Constraint.
    """
    kind = mode()
    name = path or f"mlenv-{container_id[:12]}"
    if kind == "none":
        return Group(0, {}, _unmet(resources, {}, "no cgroups are mounted"))
    own = own_paths()
    if kind == "v2":
        return Group(2, {"": _directory(ROOT, os.path.dirname(own.get("", "/")), name)})
    pins_cpus = {"cpus", "mems"} <= set(resources.get("cpu", {}))  # a cpuset without both takes no process
    return Group(
        1,
        {
            controller: _directory(f"{ROOT}/{controller}", own.get(controller, "/"), name)
            for controller in V1_CONTROLLERS
            if os.path.isdir(f"{ROOT}/{controller}") and (controller != "cpuset" or pins_cpus)
        },
    )


def _directory(root: str, own: str, name: str) -> str:
    return f"{root}{name}" if name.startswith("/") else f"{root}{own.rstrip('/')}/{name}"


def create(group: Group, resources: Mapping[str, Any]) -> None:
    """Make a planned group's directories and set its limits.

    A directory that cannot be made leaves the group; what is not limited then is told in its problems.
    Raises: ContainerError for a limit that the kernel refuses as wrong, with nothing left behind.
    """
    refused: dict[str, str] = {}
    for controller, directory in list(group.directories.items()):
        try:
            os.makedirs(directory, 0o755, exist_ok=True)
        except OSError as error:
            refused[controller] = f"{os.path.dirname(directory)} cannot be written: {error.strerror}"
            del group.directories[controller]
    if refused and not group.directories:
        group.problems += _unmet(resources, refused, refused.get("", _MISSING))
        return
    try:
        if group.version == 2:  # noqa: PLR2004 - the version
            _enable_controllers(os.path.dirname(group.directories[""]))
        _limit(group, resources, refused)
    except BaseException:
        group.remove()
        raise


def _enable_controllers(parent: str) -> None:
    available = _read(f"{parent}/cgroup.controllers").split()
    for controller in ("cpu", "memory", "pids"):
        if controller in available:
            try:
                _write(f"{parent}/cgroup.subtree_control", f"+{controller}")
            except OSError:  # the parent has processes of its own: the limit shows up as a problem below
                continue


def _unmet(resources: Mapping[str, Any], refused: Mapping[str, str], why: str) -> list[str]:
    """Return what is not limited and why: what `refused` says of the controller, else `why`."""
    wanted = [key for key in ("memory", "cpu", "pids") if resources.get(key)]
    return [f"{key} is not limited: {refused.get(key, why)}" for key in wanted]


def open_devices(group: Group, resources: Mapping[str, Any]) -> list[str]:
    """Return a problem where device rules are asked for and none are in force."""
    if not resources.get("devices") or "devices" in group.directories:
        return []
    why = "version 1 of control groups, which has device rules, is not to be had here"
    return [f"devices are not limited: {why}; the container's root opens every device that it finds or makes"]


def _limit(group: Group, resources: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    if not group.directories:
        return
    for controller, file, values in _by_file(limits(group.version, resources)):
        directory = group.directories.get("" if group.version == 2 else controller)  # noqa: PLR2004
        if directory is None:
            why = refused.get(controller, _MISSING)
            if controller != "devices":  # `open_devices` tells whom that concerns
                group.problems.append(f"{controller} is not limited: {why}")
            continue
        try:
            _write(os.path.join(directory, file), *values)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise ContainerError(
                    f"the kernel refuses the limit `{file} = {' '.join(values)}`", cause=str(error.strerror)
                ) from error
            group.problems.append(f"{controller} is not limited: {file}: {error.strerror}")


def _by_file(entries: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, list[str]]]:
    """Return (controller, file, values) in order: v1's dozen device rules go into a file opened once."""
    grouped: list[tuple[str, str, list[str]]] = []
    for controller, file, value in entries:
        if grouped and grouped[-1][:2] == (controller, file):
            grouped[-1][2].append(value)
        else:
            grouped.append((controller, file, [value]))
    return grouped


def limits(version: int, resources: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (controller, file, value) of everything that `resources` asks for."""
    entries = _memory_limits(version, resources.get("memory", {}))
    entries += _cpu_limits(version, resources.get("cpu", {}))
    pids = resources.get("pids", {}).get("limit")
    if pids is not None:
        entries.append(("pids", "pids.max", str(pids) if pids > 0 else _MAX))
    if version == 1:
        entries += _device_rules(resources.get("devices", ()))
    return entries


def _memory_limits(version: int, memory: Mapping[str, int]) -> list[tuple[str, str, str]]:
    files = {
        1: {"limit": "memory.limit_in_bytes", "reservation": "memory.soft_limit_in_bytes"},
        2: {"limit": "memory.max", "reservation": "memory.low"},
    }[version]
    entries = [("memory", files[key], str(memory[key])) for key in ("limit", "reservation") if key in memory]
    if "swap" in memory:
        if version == 1:
            entries.append(("memory", "memory.memsw.limit_in_bytes", str(memory["swap"])))
        else:
            entries.append(("memory", "memory.swap.max", str(memory["swap"] - memory.get("limit", 0))))
    return entries


def _cpu_limits(version: int, cpu: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    entries: list[tuple[str, str, str]] = []
    if version == 1:
        names = {"shares": "cpu.shares", "period": "cpu.cfs_period_us", "quota": "cpu.cfs_quota_us"}
        entries += [("cpu", file, str(cpu[key])) for key, file in names.items() if key in cpu]
    else:
        if "quota" in cpu or "period" in cpu:
            quota = cpu.get("quota", -1)
            entries.append(("cpu", "cpu.max", f"{quota if quota > 0 else _MAX} {cpu.get('period', 100000)}"))
        if "shares" in cpu:  # the range 2..262144 onto 1..10000, as every OCI runtime does
            weight = 1 + (cpu["shares"] - 2) * 9999 // (_CPU_SHARES_MAX - 2)
            entries.append(("cpu", "cpu.weight", str(weight)))
    entries += [("cpuset", f"cpuset.{key}", cpu[key]) for key in ("cpus", "mems") if key in cpu]
    return entries


_STANDARD_DEVICES = (
    "c *:* m",
    "b *:* m",
    *(f"c 1:{minor} rwm" for minor in (3, 5, 7, 8, 9)),
    "c 5:0 rwm",
    "c 5:1 rwm",
    "c 5:2 rwm",
    "c 136:* rwm",
)
"""What every container may open: null zero full random urandom tty console ptmx pts; nodes may be made, not
opened."""


def _device_rules(rules: Any) -> list[tuple[str, str, str]]:
    entries = []
    for rule in rules:
        kind = rule.get("type", "a")
        numbers = ":".join(str(rule[key]) if rule.get(key, -1) >= 0 else "*" for key in ("major", "minor"))
        text = "a" if kind == "a" else f"{kind} {numbers} {rule.get('access', 'rwm')}"
        entries.append(("devices", f"devices.{'allow' if rule.get('allow') else 'deny'}", text))
    if rules:
        entries += [("devices", "devices.allow", text) for text in _STANDARD_DEVICES]
    return entries
