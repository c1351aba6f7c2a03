"""What a user's container is given, asked from a process that is one: prints one JSON object.

Started as root, which lays out a host with an uplink, a name server on its loopback and a /dev/net/tun that
users may open; then it becomes uid 12345 and starts a container's network with the helper it is given.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import networks

from mlenv.container import companion, forward, namespaces, net, syscalls
from mlenv.container.config import Port
from mlenv.container.state import is_alive

UID = 12345


def lay_out(directory: str) -> None:
    """Give this process mounts of its own: a tun device for users, a resolv.conf that names the loopback."""
    networks.sh(f"""
        mount --make-rprivate /
        mount -t tmpfs tmpfs {directory}
        mknod {directory}/tun c 10 200
        chmod 666 {directory}/tun
        mount --bind {directory}/tun /dev/net/tun
        echo nameserver 127.0.0.1 > {directory}/resolv.conf
        mount --bind {directory}/resolv.conf /etc/resolv.conf
        mkdir {directory}/state
        chown {UID} {directory}/state
    """)


def python() -> str:
    """Return an interpreter that the user may execute; root's own often lies in its home."""
    return next(path for path in (sys.executable, "/usr/bin/python3") if os.access(path, os.X_OK))


def become_user() -> None:
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
    syscalls.set_dumpable(1)


def container() -> int:
    """Fork a process with a user and a network namespace, as the core does; it dies with this one."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        syscalls.set_parent_death_signal(signal.SIGKILL)
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {UID} 1")
        Path("/proc/self/gid_map").write_text(f"0 {UID} 1")
        syscalls.unshare(syscalls.CLONE_NEWNET)
        os.write(tell, b"\0")
        signal.pause()
    os.read(ready, 1)
    return pid


def inside(pid: int, *args: str) -> str:
    line = ["nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials", *args]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]


def serve_published(pid: int, directory: str) -> str:
    """Publish a server on the container's loopback and return what a client on the host hears."""
    listeners = forward.bind([Port(host_ip="127.0.0.1", host_port=0, container_port=80, protocol="tcp")])
    running = forward.start(listeners, pid, rootless=True, log=f"{directory}/forward.log")
    forward.close(listeners)
    serve = "import socket; s = socket.create_server(('127.0.0.1', 80)); print('up', flush=True); "
    serve += "s.accept()[0].sendall(b'published'); input()"
    address = ("127.0.0.1", listeners[0].host_port)
    ask = f"import socket; print(socket.create_connection({address}, 9).recv(99).decode())"
    join = ["nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials"]
    with networks.process(*join, python(), "-c", serve):
        heard = subprocess.run(
            [python(), "-c", ask], capture_output=True, text=True, check=True
        ).stdout.strip()
    companion.end(running)
    return heard


def killed_shim(directory: str) -> list[bool]:
    """Return which of a killed shim's companions were there before, and which a moment after."""
    reading, writing = os.pipe()
    shim = os.fork()
    if shim == 0:
        pid = container()
        state = net.setup("private", "b" * 64, pid, rootless=True, state_dir=directory)
        listeners = forward.bind([Port(host_ip="127.0.0.1", host_port=0, container_port=80, protocol="tcp")])
        running = forward.start(listeners, pid, rootless=True, log=f"{directory}/forward.log")
        os.write(writing, json.dumps([running, *([state["process"]] if "process" in state else [])]).encode())
        signal.pause()
    companions = json.loads(os.read(reading, 65536))
    before = all(is_alive(found) for found in companions)
    os.kill(shim, signal.SIGKILL)
    os.waitpid(shim, 0)
    networks.until(lambda: not any(is_alive(found) for found in companions), "the companions end")
    return [before, any(is_alive(found) for found in companions)]


def restricted_to(helper: str) -> None:
    """Hide every helper but one."""
    find = namespaces.find_program
    namespaces.find_program = lambda name: find(name) if name == helper else None


def main(helper: str, directory: str) -> None:
    restricted_to(helper)
    with contextlib.ExitStack() as stack:
        stack.enter_context(networks.host())
        lay_out(directory)
        stack.enter_context(networks.process(sys.executable, "-c", networks.NAME_SERVER, "127.0.0.1"))
        private = (
            "import socket; s = socket.create_server(('127.0.0.1', 7777)); print('up', flush=True); input()"
        )
        stack.enter_context(networks.process(sys.executable, "-c", private))
        become_user()
        try:
            print(json.dumps(ask_all(directory + "/state")), flush=True)  # noqa: T201 - for the test
        except BaseException:  # noqa: BLE001 - root's processes keep an ordinary exit waiting
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # the user may not end what root started: it ends with us, the first of our pid namespace


def ask_all(directory: str) -> dict:
    pid = container()
    state = net.setup("private", "a" * 64, pid, rootless=True, state_dir=directory)
    gateway = inside(pid, "sh", "-c", "ip route show default | cut -d' ' -f3")
    reach = "import socket, sys; socket.create_connection((sys.argv[1], 7777), 3); print('reached')"
    said = {
        "state": state,
        "left": sorted(path.name for path in Path(directory).iterdir()),
        "loopback": "UP" in inside(pid, "ip", "link", "show", "lo"),
        "outside": inside(pid, python(), "-c", networks.ASK),
        "name": inside(pid, python(), "-c", networks.ASK_NAME, net.DNS_FORWARDER, "example.org"),
        "resolv.conf": net.resolv_conf("private").decode(),
        "host loopback by gateway": inside(pid, python(), "-c", reach, gateway or "192.0.2.9"),
        "published": serve_published(pid, directory),
        "killed shim": killed_shim(directory),
    }
    net.teardown(state)
    net.teardown(state)
    said["helper left"] = "process" in state and is_alive(state["process"])
    return said


if __name__ == "__main__":
    main(*sys.argv[1:])
