"""`python -m mlenv.kernel launch NAME -f FILE`: the kernelspec's argv, for front ends without provisioners.

Runs in place of the kernel: it ends when the kernel does, with its status, and the kernel ends when it does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from mlenv.errors import KernelError, MlenvError
from mlenv.kernel.bridge import Bridge
from mlenv.kernel.connection import new_connection
from mlenv.kernel.folders import container_path
from mlenv.kernel.process import KernelProcess, running_container, start_kernel
from mlenv.kernel.variables import container_variables, kernel_variables

_SIGNING = ("key", "signature_scheme", "kernel_name", "jupyter_session", "curve_publickey", "curve_secretkey")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m mlenv.kernel")
    commands = parser.add_subparsers(dest="command", required=True)
    launch = commands.add_parser("launch", help="run a kernel in its environment")
    launch.add_argument("environment", metavar="NAME")
    launch.add_argument("-f", dest="connection_file", type=Path, required=True, metavar="FILE")
    arguments, extra = parser.parse_known_args()
    try:
        status = asyncio.run(run(arguments.environment, arguments.connection_file, extra))
    except MlenvError as error:
        sys.exit(str(error))
    sys.exit(status if status >= 0 else 128 - status)


async def run(environment: str, connection_file: Path, extra: list[str]) -> int:
    """Run a kernel for the addresses in `connection_file`; return its exit status, negative for a signal.

    Raises: KernelError where the environment is not running, or its kernel does not start.
    """
    endpoint = _read(connection_file)
    container = running_container(environment)
    connection = new_connection(container.id, {name: endpoint[name] for name in _SIGNING if name in endpoint})
    bridge = Bridge(endpoint, connection)
    try:
        await bridge.open()
        kernel = await start_kernel(
            container,
            ["python", "-m", "ipykernel_launcher", "-f", str(connection.file), *extra],
            connection=connection,
            variables=kernel_variables(
                os.environ, container=container_variables(container.config), kernelspec={}
            ),
            cwd=container_path(container.config, Path.cwd()),
            stdio={},
        )
        await bridge.serve()
        return await _until_end(kernel)
    finally:
        await bridge.close()
        connection.remove()


async def _until_end(kernel: KernelProcess) -> int:
    """Pass signals on until the kernel ends, and end it when our parent does."""
    loop = asyncio.get_running_loop()
    for number in _FORWARDED:
        loop.add_signal_handler(number, kernel.send_signal, number)
    parent = os.pidfd_open(os.getppid())
    loop.add_reader(parent, kernel.close)
    try:
        return await kernel.wait()
    finally:
        loop.remove_reader(parent)
        os.close(parent)
        kernel.close()


def _read(connection_file: Path) -> dict[str, Any]:
    try:
        document = json.loads(connection_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KernelError(
            f"connection file `{connection_file}` cannot be read", cause=str(error), code="connection-file"
        ) from error
    if document.get("transport") not in ("tcp", "ipc"):
        raise KernelError(
            f"transport `{document.get('transport')}` is neither tcp nor ipc",
            cause=f"`{connection_file}` asks for it",
            code="connection-file",
        )
    return document  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
