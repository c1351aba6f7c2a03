"""A Jupyter front end without a screen: what JupyterLab says over REST and WebSocket, and nothing else.

Source: jupyter_server documentation, "The REST API"; "WebSocket kernel wire protocols", the default (JSON).
"""

from __future__ import annotations

import http.client
import json
import time
import uuid
from typing import Any

import websocket

DEADLINE = 120.0


class FrontEnd:
    """A browser's connection to one server; `port` and `token` are those of the URL that `up` prints."""

    def __init__(self, port: int, token: str) -> None:
        self.port = port
        self.token = token

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        try:
            connection.request(
                method,
                path,
                body=None if body is None else json.dumps(body),
                headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(text) if text else None

    def kernelspecs(self) -> dict[str, str]:
        """Return the display name of each kernel the launcher shows."""
        found = self.call("GET", "/api/kernelspecs")[1]["kernelspecs"]
        return {name: entry["spec"]["display_name"] for name, entry in found.items()}

    def kernels(self) -> list[dict[str, Any]]:
        return self.call("GET", "/api/kernels")[1]

    def open_notebook(self, path: str, kernel_name: str) -> Kernel:
        """Choose a kernel for a notebook, as the launcher does."""
        body = {
            "path": path,
            "name": path.rpartition("/")[2],
            "type": "notebook",
            "kernel": {"name": kernel_name},
        }
        status, session = self.call("POST", "/api/sessions", body)
        assert status == 201, session
        return Kernel(self, session["kernel"]["id"])


class Cell:
    """What a cell brought: `text` of its streams, `value` of its last expression, `error`'s name."""

    def __init__(self) -> None:
        self.text = ""
        self.value = ""
        self.error = ""
        self.media: set[str] = set()
        self.status = ""
        self._idle = False

    def take(self, message: dict[str, Any]) -> None:
        kind, content = message["header"]["msg_type"], message["content"]
        if kind == "stream":
            self.text += content["text"]
        elif kind in ("execute_result", "display_data"):
            self.media |= set(content["data"])
            self.value = content["data"].get("text/plain", "")
        elif kind == "error":
            self.error = content["ename"]
        elif kind == "execute_reply":
            self.status = content["status"]
        elif kind == "status" and content["execution_state"] == "idle":
            self._idle = True

    @property
    def is_done(self) -> bool:
        return bool(self.status) and self._idle


class Kernel:
    """One kernel and its WebSocket."""

    def __init__(self, front_end: FrontEnd, kernel_id: str) -> None:
        self.front_end = front_end
        self.id = kernel_id
        self._session = uuid.uuid4().hex
        self._socket = self._connect()

    def _connect(self) -> websocket.WebSocket:
        address = f"ws://127.0.0.1:{self.front_end.port}/api/kernels/{self.id}/channels"
        header = [f"Authorization: token {self.front_end.token}"]
        return websocket.create_connection(
            f"{address}?session_id={self._session}", header=header, timeout=DEADLINE
        )

    def send(self, channel: str, kind: str, content: dict[str, Any]) -> str:
        header = {"msg_id": uuid.uuid4().hex, "session": self._session, "username": "", "version": "5.3"}
        message = {"header": {**header, "msg_type": kind}, "parent_header": {}, "metadata": {}, "buffers": []}
        self._socket.send(json.dumps({**message, "channel": channel, "content": content}))
        return header["msg_id"]

    def messages(self, parent: str | None = None):
        """Yield what the kernel says, about one request or about anything, until the deadline."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            kind, data = self._socket.recv_data(control_frame=True)  # a ping must not hide the deadline
            if kind != websocket.ABNF.OPCODE_TEXT:
                continue
            message = json.loads(data)
            if parent is None or message["parent_header"].get("msg_id") == parent:
                yield message
        raise AssertionError("the kernel said nothing more before the deadline")

    def begin(self, code: str) -> str:
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}}
        return self.send("shell", "execute_request", {**content, "allow_stdin": True, "stop_on_error": True})

    def finish(self, request: str, *, answer: str = "") -> Cell:
        """Collect a cell's messages to its end; `answer` is typed where it asks for input."""
        cell = Cell()
        for message in self.messages(request):
            if message["header"]["msg_type"] == "input_request":
                cell.text += message["content"]["prompt"]
                self.send("stdin", "input_reply", {"value": answer})
            cell.take(message)
            if cell.is_done:
                return cell
        raise AssertionError

    def run(self, code: str, *, answer: str = "") -> Cell:
        return self.finish(self.begin(code), answer=answer)

    def wait_for_text(self, request: str, text: str) -> None:
        """Return when a running cell has printed `text`."""
        seen = ""
        for message in self.messages(request):
            seen += message["content"].get("text", "")
            if text in seen:
                return

    def wait_for_state(self, state: str) -> None:
        """Return when the server says that the kernel is in `state` (`restarting`, `dead`, …)."""
        for message in self.messages():
            if message["header"]["msg_type"] == "status" and message["content"]["execution_state"] == state:
                return

    def interrupt(self) -> None:
        assert self.front_end.call("POST", f"/api/kernels/{self.id}/interrupt")[0] == 204

    def restart(self) -> None:
        status, model = self.front_end.call("POST", f"/api/kernels/{self.id}/restart")
        assert (status, model["id"]) == (200, self.id)
        self.reconnect()

    def reconnect(self) -> None:
        """Leave and come back: the server then waits until the kernel is heard on all channels.

        Without it a cell may run before the new kernel's output has a listener, and its end is never heard.
        """
        self._socket.close()
        self._socket = self._connect()

    def shut_down(self) -> None:
        assert self.front_end.call("DELETE", f"/api/kernels/{self.id}")[0] == 204
        self.close()

    def close(self) -> None:
        """Leave the kernel to itself, as a closed tab does."""
        self._socket.close()
