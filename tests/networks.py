"""A host of a test's own: a network namespace with an uplink to another one, where a server is the world.

    host 198.51.100.1 --- 198.51.100.2 outside, which answers on port 8000 with its client's address

As root the test's thread itself moves into the host's namespace and back. Nothing of the machine's own
network is touched, and no packet leaves the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mlenv.container import syscalls

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = "198.51.100.2"
PORT = 8000
DEADLINE = 20.0

SERVER = f"""
import socket
server = socket.create_server(("{OUTSIDE}", {PORT}))
print("listening", flush=True)
while True:
    client, address = server.accept()
    client.sendall(address[0].encode())
    client.close()
"""

ASK = f"""
import socket
with socket.create_connection(("{OUTSIDE}", {PORT}), timeout=10) as server:
    print(server.makefile().read())
"""

NAME_SERVER = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 53))
print("listening", flush=True)
while True:
    question, address = server.recvfrom(4096)
    server.sendto(question[:2] + b"answer to " + question[2:], address)
"""

ASK_NAME = """
import socket, sys
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(5)
for attempt in range(4):
    client.sendto(b"\\x12\\x34" + sys.argv[2].encode(), (sys.argv[1], 53))
    try:
        print(client.recv(4096)[2:].decode())
        break
    except socket.timeout:
        continue
"""


def sh(script: str) -> str:
    """Run a script of `ip` and its like; returns what it said."""
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stderr}"
    return done.stdout


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition, up to a deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE:g} s: {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def process(*args: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program until the end of the block; entered once it has printed its first line."""
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            if args[-1] == "cat":
                running.stdin.write("here\n")
                running.stdin.flush()
            assert running.stdout.readline(), f"{args} ended"
            yield running
        finally:
            running.kill()


@contextlib.contextmanager
def moved_back() -> Iterator[None]:
    """Return this thread to the network namespace it is in now."""
    own_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        yield
    finally:
        syscalls.setns(own_fd, syscalls.CLONE_NEWNET)
        os.close(own_fd)


@contextlib.contextmanager
def host() -> Iterator[None]:
    """Move this thread into a host of its own."""
    with moved_back(), process("unshare", "--net", "cat") as outside:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        pid = outside.pid
        sh(f"""
            echo 0 > /proc/sys/net/ipv4/ip_forward
            ip link set lo up
            ip link add uplink type veth peer name outside netns {pid}
            ip address add 198.51.100.1/24 dev uplink
            ip link set uplink up
            nsenter -t {pid} -n ip address add {OUTSIDE}/24 dev outside
            nsenter -t {pid} -n ip link set outside up
            ip route add default via {OUTSIDE}
        """)
        with process("nsenter", "-t", str(pid), "-n", sys.executable, "-c", SERVER):
            yield


@contextlib.contextmanager
def container() -> Iterator[int]:
    """Yield the pid of a process in a network namespace that nobody has set up."""
    with process("unshare", "--net", "cat") as running:
        yield running.pid


def inside(pid: int, *args: str) -> str:
    """Run a program in the network namespace of `pid` and return what it said, stdout and stderr."""
    line = ["nsenter", "-t", str(pid), "-n", *args]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60).stdout


def interfaces() -> dict[str, dict]:
    """Return the interfaces of this thread's namespace, as iproute2 sees them."""
    return {link["ifname"]: link for link in json.loads(sh("ip -json address"))}
