"""Stands in for the core's `exec`: the same descriptors and statuses, and the host instead of a container.

Run as a program it is the `exec` process. `tests/host/test_jupyter_kernels.py` checks the same with the core.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

running: list[SimpleNamespace] = []


def container(name: str, **config: object) -> SimpleNamespace:
    annotations = {"dev.mlenv.environment": name, "dev.mlenv.lock": "sha256:1"}
    own = {"annotations": annotations, "process": {"cwd": "/", "env": ["IMAGE=yes"]}, "mounts": [], **config}
    return SimpleNamespace(id="0" * 64, name=name, environment=name, config=own)


def containers(*, all: bool = True) -> list[SimpleNamespace]:  # noqa: A002 - the core's parameter
    return running


def exec_command(container, args, *, env, inherited, cwd=None, pid_fd=None, lifeline_fd=None):
    names = [*inherited, *(f"{name}={value}" for name, value in env.items())]
    variables = [word for name in names for word in ("--env", name)]
    command = [sys.executable if args[0] == "python" else args[0], *args[1:]]
    return [
        sys.executable,
        __file__,
        str(pid_fd),
        str(lifeline_fd),
        *variables,
        "--cwd",
        cwd or "/",
        "--",
        *command,
    ]


def main() -> int:
    pid_fd, lifeline_fd = int(sys.argv[1]), int(sys.argv[2])
    end = sys.argv.index("--")
    options, command = sys.argv[3:end], sys.argv[end + 1 :]
    pairs = zip(options[::2], options[1::2], strict=True)
    words = [word if "=" in word else f"{word}={os.environ[word]}" for flag, word in pairs if flag == "--env"]
    env = dict(word.split("=", 1) for word in words)
    home = {"HOME": os.environ["HOME"], "PATH": os.environ["PATH"]}
    try:
        child = subprocess.Popen(command, env={**home, **env}, cwd=options[-1], start_new_session=True)
    except FileNotFoundError:
        sys.stderr.write(f"`{command[0]}` was not found\n")
        return 127
    os.write(pid_fd, f"{child.pid}\n".encode())
    os.close(pid_fd)
    threading.Thread(target=end_with, args=(lifeline_fd, child), daemon=True).start()
    status = child.wait()
    return 128 - status if status < 0 else status


def end_with(lifeline_fd: int, child: subprocess.Popen) -> None:
    os.read(lifeline_fd, 1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
