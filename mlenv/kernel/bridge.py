"""Carry a front end's endpoints into a kernel's Unix sockets, byte by byte.

For front ends that choose the endpoints themselves (VS Code: TCP ports of 127.0.0.1). ZMTP is the same stream
of bytes on every transport, so nothing here knows about messages. Source: RFC 37/ZMTP 3.1, "Overall
behavior".
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from mlenv.errors import KernelError
from mlenv.kernel.connection import CHANNELS, Connection

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_CHUNK = 1 << 18
_DRAIN = 2.0
"""Seconds a kernel's last words have to reach clients that read slowly."""


class Bridge:
    """A front end's five addresses, each leading to the kernel's socket of that channel.

    `open` takes the addresses, `serve` lets clients in (once the kernel listens), `close` ends it all.
    """

    def __init__(self, endpoint: Mapping[str, Any], connection: Connection) -> None:
        self._endpoint = endpoint
        self._connection = connection
        self._servers: list[asyncio.Server] = []
        self._carries: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Take every address.

        Raises: KernelError where one is taken by somebody else.
        """
        for channel in CHANNELS:
            self._servers.append(await self._bind(channel))

    async def serve(self) -> None:
        """Begin to accept clients."""
        for server in self._servers:
            await server.start_serving()

    async def close(self) -> None:
        """Stop accepting, and give what the kernel sent last time to arrive."""
        for server in self._servers:
            server.close()
        if self._carries:
            _, late = await asyncio.wait(self._carries, timeout=_DRAIN)
            for task in late:
                task.cancel()

    async def _bind(self, channel: str) -> asyncio.Server:
        accept = partial(self._accept, self._connection.socket(channel))
        transport, ip, port = (
            self._endpoint["transport"],
            self._endpoint["ip"],
            self._endpoint[f"{channel}_port"],
        )
        try:
            if transport == "tcp":
                return await asyncio.start_server(accept, ip, port, start_serving=False)
            return await asyncio.start_unix_server(accept, f"{ip}-{port}", start_serving=False)
        except OSError as error:
            raise KernelError(
                f"the front end's {channel} address cannot be used",
                cause=f"{transport} {ip} {port}: {error.strerror}",
                hint="start the kernel again",
                code="address-in-use",
            ) from error

    def _accept(self, target: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_carry(target, reader, writer))
        self._carries.add(task)
        task.add_done_callback(self._carries.discard)


async def _carry(target: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Join one client to the kernel's socket until either side ends."""
    try:
        kernel_reader, kernel_writer = await asyncio.open_unix_connection(target)
    except (ConnectionRefusedError, FileNotFoundError):
        writer.close()  # the kernel has ended; the client sees a closed connection, as from a local kernel
        return
    ways = {
        asyncio.create_task(_copy(reader, kernel_writer)),
        asyncio.create_task(_copy(kernel_reader, writer)),
    }
    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    for end in (writer, kernel_writer):
        end.close()
    await asyncio.wait(ways)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while chunk := await reader.read(_CHUNK):
            writer.write(chunk)
            await writer.drain()
    except (ConnectionResetError, BrokenPipeError):
        return  # the other end is gone, which ends this direction as its end of file does
