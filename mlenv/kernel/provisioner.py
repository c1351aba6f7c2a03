"""The kernel provisioner that Jupyter calls for the kernels of environments.

Entry point `mlenv` of the group `jupyter_client.kernel_provisioners`. A kernelspec chooses it with
`metadata.kernel_provisioner`: `{"provisioner_name": "mlenv", "config": {"environment": …, "lock": …}}`.
Source: jupyter_client documentation, "Customizing the kernel's runtime environment with kernel provisioning".
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Unicode

from mlenv.container.state import start_time
from mlenv.errors import KernelError
from mlenv.kernel import folders
from mlenv.kernel.connection import Connection, new_connection
from mlenv.kernel.process import KernelProcess, running_container, start_kernel
from mlenv.kernel.variables import Variables, container_variables, kernel_variables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jupyter_client.connect import KernelConnectionInfo
    from jupyter_client.manager import KernelManager

    from mlenv.container.lifecycle import Container

_STDIO = ("stdin", "stdout", "stderr")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a kernel runs: its container, and its directory there."""

    container: Container
    connection: Connection


class MlenvProvisioner(KernelProvisionerBase):
    """Starts a kernel in its environment's running container and signals it from the host."""

    environment = Unicode(help="The environment whose container runs the kernel.", config=True)
    lock = Unicode(help="The digest of the lock the kernelspec was written for.", config=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._kernel: KernelProcess | None = None
        self._place: _Place | None = None
        self._cwd: Path | None = None
        self._adopted: tuple[int, int] | None = None

    @property
    def has_process(self) -> bool:
        """Whether a kernel was launched and its end has not been waited for."""
        return self._kernel is not None or self._adopted is not None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Find the container, make the kernel's sockets' directory, and return what `launch_kernel` needs.

        Raises: KernelError where the environment is not running.
        """
        container = running_container(self.environment)
        self._note_other_lock(container)
        connection = self._connection_in(container)
        self._place = _Place(container=container, connection=connection)
        self.connection_info = _as_manager_has_it(connection.document)
        arguments = kwargs.pop("extra_arguments", None) or []
        command = ["python", "-m", "ipykernel_launcher", "-f", str(connection.file), *arguments]
        return await super().pre_launch(cmd=command, **kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start `cmd` in the container and return where it listens, once it does.

        Raises: KernelError with the end of the kernel's stderr.
        """
        if self._place is None:
            raise KernelError("`launch_kernel` was called before `pre_launch`")
        config = self._place.container.config
        self._adopted = None
        try:
            self._kernel = await start_kernel(
                self._place.container,
                cmd,
                connection=self._place.connection,
                variables=self._variables(config, kwargs.get("env", os.environ)),
                cwd=self._folder(config, kwargs.get("cwd")),
                stdio={name: kwargs[name] for name in _STDIO if kwargs.get(name) is not None},
            )
        except BaseException:
            await self.cleanup()  # KernelManager does not, when a launch fails
            raise
        return self.connection_info

    async def poll(self) -> int | None:
        """Return None while the kernel runs, else its exit status."""
        if self._kernel is not None:
            return self._kernel.poll()
        if self._adopted is not None:
            return None if start_time(self._adopted[0]) == self._adopted[1] else 1
        return 0

    async def wait(self) -> int | None:
        """Return the kernel's exit status once it has ended."""
        if self._kernel is None:
            status = await self.poll()
            self._adopted = None
            return status
        status = await self._kernel.wait()
        self._let_go()
        return status

    async def send_signal(self, signum: int) -> None:
        """Send a signal to the kernel's process group; 0 asks nothing and does nothing."""
        if signum == 0:
            return
        if self._kernel is not None:
            self._kernel.send_signal(signum)
        elif self._adopted is not None and start_time(self._adopted[0]) == self._adopted[1]:
            os.killpg(os.getpgid(self._adopted[0]), signum)

    async def kill(self, restart: bool = False) -> None:  # noqa: FBT001, FBT002 - the base class's
        """End the kernel and what its cells started in its process group, at once."""
        del restart
        await self.send_signal(signal.SIGKILL)

    async def terminate(self, restart: bool = False) -> None:  # noqa: FBT001, FBT002
        """Ask the kernel to end."""
        del restart
        await self.send_signal(signal.SIGTERM)

    async def cleanup(self, restart: bool = False) -> None:  # noqa: FBT001, FBT002
        """Remove the kernel's directory, unless a restart will use it again. May be called twice."""
        self._let_go()
        if not restart and self._place is not None:
            self._place.connection.remove()
            self._place = None

    async def get_provisioner_info(self) -> dict[str, Any]:
        """Return what another process needs to find this kernel again."""
        info = await super().get_provisioner_info()
        pid = self._kernel.host_pid if self._kernel else self._adopted[0] if self._adopted else None
        connection = self._place.connection if self._place else None
        info.update(
            environment=self.environment,
            pid=pid,
            start_time=start_time(pid) if pid else None,
            directory=str(connection.directory) if connection else None,
            first_port=connection.first_port if connection else None,
            cwd=str(self._cwd) if self._cwd else None,
        )
        return info

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Take a kernel over that another process launched; its exit status stays unknown to us."""
        await super().load_provisioner_info(provisioner_info)
        self.environment = provisioner_info["environment"]
        self._cwd = Path(provisioner_info["cwd"]) if provisioner_info["cwd"] else None
        if provisioner_info["pid"] and provisioner_info["start_time"]:
            self._adopted = (provisioner_info["pid"], provisioner_info["start_time"])
        if provisioner_info["directory"]:
            connection = Connection(
                directory=Path(provisioner_info["directory"]),
                first_port=provisioner_info["first_port"],
                signing=_signing(self.connection_info),
            )
            self._place = _Place(container=running_container(self.environment), connection=connection)

    def resolve_path(self, path_str: str) -> str | None:
        """Return the host's path of a file the kernel names, or None where the host cannot see it."""
        if self._place is None:
            return None
        path = Path(path_str)
        if path.is_absolute():
            resolved = folders.host_path(self._place.container.config, PurePosixPath(path))
        else:
            resolved = self._cwd / path if self._cwd else None
        return resolved.resolve().as_posix() if resolved and resolved.exists() else None

    def _connection_in(self, container: Container) -> Connection:
        """Return the directory a restart uses again, or a new one where the container is another."""
        if self._place is not None:
            if self._place.container.id == container.id:
                return self._place.connection
            self._place.connection.remove()
        session = cast("KernelManager", self.parent).session
        signing = {"key": session.key.decode(), "signature_scheme": session.signature_scheme}
        return new_connection(container.id, signing)

    def _variables(self, config: Mapping[str, Any], host: Mapping[str, str]) -> Variables:
        named = self.kernel_spec.env if self.kernel_spec else {}
        kernelspec = {name: host[name] for name in named if name in host}
        return kernel_variables(host, container=container_variables(config), kernelspec=kernelspec)

    def _folder(self, config: Mapping[str, Any], requested: str | Path | None) -> PurePosixPath | None:
        """Return the kernel's working directory in the container; None means the container's own."""
        wanted = Path(requested or Path.cwd()).absolute()
        inside = folders.container_path(config, wanted)
        if inside is not None:
            self._cwd = wanted
            return inside
        own = PurePosixPath(config["process"].get("cwd", "/"))
        self.log.warning(
            "`%s` is not mounted in environment `%s`, so its kernel works in `%s`; run `mlenv up %s` in that "
            "folder, or add it to `mounts:` of the spec",
            *(wanted, self.environment, own, self.environment),
        )
        self._cwd = folders.host_path(config, own)
        return None

    def _note_other_lock(self, container: Container) -> None:
        running = container.config.get("annotations", {}).get("dev.mlenv.lock", "")
        if self.lock and running and running != self.lock:
            message = "environment `%s` runs lock %s, and its kernelspec was written for %s"
            self.log.warning(message, self.environment, running, self.lock)

    def _let_go(self) -> None:
        if self._kernel is not None:
            self._kernel.close()
        self._kernel = None
        self._adopted = None


def _as_manager_has_it(document: Mapping[str, Any]) -> KernelConnectionInfo:
    """Return a connection document with its key as bytes, as KernelManager compares it."""
    return cast("KernelConnectionInfo", {**document, "key": document["key"].encode()})


def _signing(info: KernelConnectionInfo) -> dict[str, str]:
    """Return the signing half of a connection document as text."""
    key: str | bytes = info["key"]
    text = key.decode() if isinstance(key, bytes) else key
    return {"key": text, "signature_scheme": info["signature_scheme"]}
