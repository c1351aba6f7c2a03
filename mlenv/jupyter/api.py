"""The few calls of Jupyter Server's REST API that mlenv makes.

Source: jupyter_server documentation, "The REST API".
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any

from mlenv.errors import JupyterError

if TYPE_CHECKING:
    from mlenv.jupyter.server import Server

_KERNEL_END = 30.0
"""Seconds a kernel has to end: Jupyter gives it five before it kills it, and the answer comes after that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningKernel:
    """A kernel a server runs: its id, its kernelspec's name, and `busy`, `idle` or `starting`."""

    id: str
    name: str
    state: str


def request(port: int, token: str, method: str, path: str, *, timeout: float = 10.0) -> tuple[int, Any]:
    """Return the status and the JSON of an answer (None where there is no body).

    Raises: OSError where nobody listens; HTTPException or ValueError where it is not Jupyter.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, headers={"Authorization": f"token {token}"})
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    is_json = answer.headers.get_content_type() == "application/json"
    return answer.status, json.loads(body) if body and is_json else None


def answers(port: int, token: str) -> bool:
    """Return whether a Jupyter server that knows `token` listens on the port."""
    try:
        status, document = request(port, token, "GET", "/api/status")
    except (OSError, HTTPException, ValueError):
        return False
    return status == HTTPStatus.OK and isinstance(document, dict) and "started" in document


def kernels(server: Server) -> tuple[RunningKernel, ...]:
    """Return the kernels a server runs.

    Raises: JupyterError where it does not answer.
    """
    document = _call(server, "GET", "/api/kernels")
    return tuple(
        RunningKernel(id=item["id"], name=item["name"], state=item["execution_state"]) for item in document
    )


def shutdown_kernels(server: Server, kernel_name: str) -> tuple[RunningKernel, ...]:
    """End the kernels of one environment, and return those it ended.

    Raises: JupyterError where the server does not answer.
    """
    found = tuple(kernel for kernel in kernels(server) if kernel.name == kernel_name.lower())
    if found:
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda kernel: _end_kernel(server, kernel), found))
    return found


def _end_kernel(server: Server, kernel: RunningKernel) -> None:
    _call(server, "DELETE", f"/api/kernels/{kernel.id}", timeout=_KERNEL_END, gone_is_fine=True)


def _call(
    server: Server, method: str, path: str, *, timeout: float = 10.0, gone_is_fine: bool = False
) -> Any:
    try:
        status, document = request(server.port, server.token, method, path, timeout=timeout)
    except (OSError, HTTPException, ValueError) as error:
        raise JupyterError(
            f"the Jupyter server on port {server.port} does not answer",
            cause=f"{method} {path}: {type(error).__name__}: {error}",
            hint=f"end it with `kill {server.pid}`, which ends its kernels too",
            code="jupyter-unreachable",
        ) from error
    if status >= HTTPStatus.BAD_REQUEST and not (gone_is_fine and status == HTTPStatus.NOT_FOUND):
        message = document.get("message") if isinstance(document, dict) else None
        raise JupyterError(
            f"the Jupyter server refused {method} {path}",
            cause=f"HTTP {status}: {message}",
            code="jupyter-refused",
        )
    return document
