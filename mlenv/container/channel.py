"""What parent and child of a start say to each other, and how a failure travels between them as data."""

from __future__ import annotations

import _socket
import errno
import os
import sys

from mlenv.container import record
from mlenv.errors import ContainerStartError, MlenvError

_MESSAGE_MAX = 65536
_EXIT_FAILED = 125
_EXIT_NOT_EXECUTABLE = 126
_EXIT_NOT_FOUND = 127
NOT_FOUND = (errno.ENOENT, errno.ENOTDIR)
"""What execve says of a program that is not there."""


class Channel:
    """One end of a socket between parent and child: messages with a kind, a text and perhaps a descriptor."""

    __slots__ = ("_returned", "socket")

    def __init__(self, socket: _socket.socket) -> None:
        self.socket = socket
        self._returned: list[tuple[str, str, int | None]] = []

    @staticmethod
    def pair() -> tuple[Channel, Channel]:
        """Return two connected ends, close-on-exec."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        return Channel(ours), Channel(theirs)

    def send(self, kind: str, text: str = "", descriptor: int | None = None) -> None:
        """Send a message. Raises: BrokenPipeError where the other end is gone."""
        ancillary = []
        if descriptor is not None:
            rights = descriptor.to_bytes(4, sys.byteorder)
            ancillary.append((_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights))
        self.socket.sendmsg([f"{kind} {text}".encode()], ancillary, _socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[str, str, int | None]:
        """Return the next message; the kind is empty at the end of the channel."""
        if self._returned:
            return self._returned.pop()
        data, ancillary, _, _ = self.socket.recvmsg(
            _MESSAGE_MAX, _socket.CMSG_SPACE(4), getattr(_socket, "MSG_CMSG_CLOEXEC", 0x40000000)
        )
        descriptor = None
        for level, kind, rights in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                descriptor = int.from_bytes(rights[:4], sys.byteorder)
        word, _, text = data.decode(errors="surrogateescape").partition(" ")
        return word, text, descriptor

    def put_back(self, kind: str, text: str) -> None:
        """Have the next `receive` return this message again."""
        self._returned.append((kind, text, None))

    def close(self) -> None:
        """Close this end."""
        self.socket.close()


def not_executable(program: str, error: OSError) -> ContainerStartError:
    """Return the error for a program that execve refused: 127 where it is not there, 126 else."""
    status = _EXIT_NOT_FOUND if error.errno in NOT_FOUND else _EXIT_NOT_EXECUTABLE
    return ContainerStartError(
        f"cannot execute `{program}`", cause=error.strerror or str(error), status=status
    )


def tell(channel: Channel, error: BaseException) -> None:
    """Send an error to the parent."""
    if isinstance(error, MlenvError):
        fields = {
            "message": error.message,
            "cause": error.cause,
            "hint": error.hint,
            "status": getattr(error, "exit_status", _EXIT_FAILED),
        }
    else:
        fields = {"message": "the container could not be set up", "cause": f"{error}" or type(error).__name__}
    try:
        channel.send("error", record.serialise(fields).decode())
    except OSError:  # the parent is gone: nobody is left to tell
        os._exit(_EXIT_FAILED)


def expect(channel: Channel, kind: str) -> str:
    """Return the text of the next message, which must be of `kind`.

    Raises: ContainerStartError with what the other side reported, or that it ended.
    """
    word, text, _ = channel.receive()
    if word == kind:
        return text
    raise as_error(word, text)


def as_error(word: str, text: str) -> ContainerStartError:
    """Return the error that a message carries, or that it came at all."""
    if word == "error":
        fields = record.parse(text)
        return ContainerStartError(
            fields["message"],
            cause=fields["cause"],
            hint=fields.get("hint"),
            status=fields.get("status", 125),
        )
    if word == "init-error":
        number, _, program = text.partition(" ")
        return not_executable(program, OSError(int(number), os.strerror(int(number))))
    what = f"it said `{word}`" if word else "it ended without a word"
    return ContainerStartError("the container's first process failed", cause=what)


def reported(channel: Channel) -> ContainerStartError:
    """Return what the child said before the channel broke."""
    while True:
        word, text, _ = channel.receive()
        if word in ("error", "init-error", ""):
            return as_error(word, text)


def finish(channel: Channel) -> int | None:
    """Wait until the program has been executed; return the pty's master where there is one."""
    terminal_fd = None
    executed = False
    while True:
        word, text, descriptor = channel.receive()
        if word == "terminal":
            terminal_fd = descriptor
        elif word == "exec":
            executed = True
        elif not word and executed:
            return terminal_fd
        else:
            if terminal_fd is not None:
                os.close(terminal_fd)
            raise as_error(word, text)
