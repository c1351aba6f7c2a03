"""Run things on this machine: build steps in throw-away containers, environments in containers that stay."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mlenv import paths
from mlenv.container import config as oci
from mlenv.container import lifecycle
from mlenv.errors import MlenvError, UsageError
from mlenv.spec.reader import read_spec
from mlenv.spec.values import GpuSelection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack

    from mlenv.image.build import Image
    from mlenv.lock.model import Lock
    from mlenv.progress import Progress
    from mlenv.spec.model import MountSpec, PortSpec, Spec
    from mlenv.spec.reader import Outline

IDLE = ("sleep", "infinity")
"""What an environment's container runs while kernels come and go."""

_RUNTIME_KEYS = frozenset({"env", "ports", "mounts", "gpus", "resources", "network"})
"""The keys of a spec that shape its container rather than its image."""


class LocalRunner:
    """Runs build steps in containers of this machine's core (the `Runner` of `image.build`)."""

    def run(
        self,
        args: Sequence[str],
        *,
        layers: Sequence[Path],
        upper: Path,
        env: Mapping[str, str],
        cwd: str = "/",
        network: bool = False,
        mounts: Sequence[tuple[Path, str]] = (),
        log: Path,
    ) -> int:
        """Run `args` and return their exit status; both their streams go to `log`."""
        config = oci.runtime_config(
            args=list(args),
            env=dict(env),
            cwd=cwd,
            hostname="build",
            layers=list(layers),
            upper=upper,
            mounts=[oci.Mount(source=source, target=PurePosixPath(target)) for source, target in mounts],
            network="private" if network else "none",
            ignore_chown=True,
        )
        import tempfile

        with tempfile.TemporaryDirectory(prefix="build-", dir=paths.run_dir()) as folder:
            bundle = Path(folder)
            (bundle / "rootfs").mkdir()
            (bundle / "config.json").write_text(json.dumps(config), "utf-8")
            with log.open("ab") as output:
                return _foreground(bundle, output.fileno())


def _foreground(bundle: Path, output_fd: int) -> int:
    """Run a bundle to its end; Ctrl-C ends the container first and then this call."""
    import subprocess

    core = Path(lifecycle.__file__).with_name("__main__.py")
    command = [
        sys.executable,
        "-I",
        "-S",
        str(core),
        "run",
        "--bundle",
        str(bundle),
        f"build-{os.urandom(6).hex()}",
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output_fd, stderr=output_fd) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a `run` asks for beyond its image; None means the image's or the core's default."""

    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str | None = None
    hostname: str | None = None
    terminal: bool = False
    interactive: bool = False
    mounts: Sequence[oci.Mount] = ()
    ports: Sequence[oci.Port] = ()
    network: str = "private"
    resources: oci.Resources = field(default_factory=oci.Resources)
    readonly: bool = False
    gpus: GpuSelection | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)


def bundle_config(image: Image, options: Options, *, progress: Progress) -> dict[str, Any]:
    """Return the OCI runtime configuration of `image` run with `options`.

    The image's Env, Entrypoint, Cmd, WorkingDir and User apply where the options say nothing.
    Source: OCI image-spec config.md, conversion.md.
    """
    defaults: Mapping[str, Any] = image.config.get("config", {})
    env = dict(item.split("=", 1) for item in defaults.get("Env", ()))
    args = [*defaults.get("Entrypoint", ()), *(options.args or defaults.get("Cmd", ()))]
    if not args:
        raise UsageError(
            f"`{image.name}` names no command of its own", hint=f"give one: `mlenv run {image.name} COMMAND`"
        )
    return oci.runtime_config(
        args=args,
        env={**env, **options.env},
        cwd=options.cwd or defaults.get("WorkingDir") or "/",
        user=options.user or defaults.get("User") or None,
        hostname=options.hostname,
        terminal=options.terminal,
        layers=list(image.layers),
        mounts=list(options.mounts),
        resources=options.resources,
        readonly=options.readonly,
        network=options.network,
        ports=list(options.ports),
        annotations={oci.IMAGE: image.name, **options.annotations},
        device_edits=device_edits(options.gpus, progress=progress),
    )


def device_edits(selection: GpuSelection | None, *, progress: Progress) -> dict[str, Any] | None:
    """Return the CDI edits that give a container the GPUs of `selection`, None where it gets none."""
    if selection is None or selection.mode == "none":
        return None
    from mlenv.container.gpu import cdi

    injection = cdi.inject(
        mode=selection.mode, count=selection.count, ids=selection.ids, memory=selection.memory
    )
    if injection.gpus:
        progress.note(f"GPUs: {', '.join(gpu.name for gpu in injection.gpus)}")
    return injection.edits or None


def spec_options(spec: Spec, *, publish: Sequence[oci.Port] = ()) -> Options:
    """Return what a spec asks of its container, with `publish` before the spec's own ports."""
    taken = {(port.container_port, port.protocol) for port in publish}
    return Options(
        env=spec.env,
        hostname=hostname(spec.name),
        mounts=[_spec_mount(mount, spec.path) for mount in spec.mounts],
        ports=[
            *publish,
            *(_spec_port(port) for port in spec.ports if (port.container_port, port.protocol) not in taken),
        ],
        network=spec.network,
        resources=limited(
            oci.Resources(),
            memory=spec.resources.memory,
            cpus=spec.resources.cpus,
            pids=spec.resources.pids,
            shm=spec.resources.shm,
        ),
        gpus=spec.gpus,
    )


def outline_options(outline: Outline) -> Options:
    """Return what a spec asks of its container, without its model where it asks for nothing.

    For a spec whose lock matches: it was valid when it was locked.
    """
    if outline.data.keys() & _RUNTIME_KEYS:
        return spec_options(read_spec(outline.path))
    return Options(hostname=hostname(outline.data.get("name", outline.path.stem)), gpus=GpuSelection())


def limited(resources: oci.Resources, **limits: Any) -> oci.Resources:
    """Return `resources` with those of `limits` (fields of `Resources`) that are given."""
    return replace(resources, **{name: limit for name, limit in limits.items() if limit is not None})


def start_environment(
    spec: Spec,
    image: Image,
    lock: Lock,
    *,
    folders: Sequence[Path],
    publish: Sequence[oci.Port],
    gpus: GpuSelection | None,
    progress: Progress,
    undo: ExitStack,
) -> lifecycle.Container:
    """Start the container that an environment's kernels live in; `undo` receives its removal.

    `folders` appear inside at their own paths, so that paths in notebooks and tracebacks agree.
    """
    import shutil

    _replace_stopped(spec.name)
    container_id = os.urandom(32).hex()
    kernels = paths.private_dir(paths.kernel_dir(container_id))
    undo.callback(shutil.rmtree, kernels, ignore_errors=True)
    options = spec_options(spec, publish=publish)
    shared = [
        oci.Mount(source=folder, target=PurePosixPath(folder)) for folder in _outermost((*folders, kernels))
    ]
    config = bundle_config(
        image,
        replace(
            options,
            args=IDLE,
            cwd=str(folders[0]) if folders else None,
            mounts=[*shared, *options.mounts],
            gpus=gpus or options.gpus,
            annotations={oci.ENVIRONMENT: spec.name, oci.LOCK: lock.digest},
        ),
        progress=progress,
    )
    container = lifecycle.create(config, name=spec.name, container_id=container_id)
    undo.callback(lifecycle.remove, container, force=True)
    lifecycle.start(container)
    for warning in container.warnings:
        progress.note(f"warning: {warning}")
    return container


def stop_environment(container: lifecycle.Container) -> None:
    """Stop an environment's container and remove it with its kernels' sockets."""
    import shutil

    lifecycle.stop(container, timeout=2.0)
    lifecycle.remove(container, force=True)
    shutil.rmtree(paths.kernel_dir(container.id), ignore_errors=True)


def hostname(name: str) -> str:
    """Return a name as a host name: letters, digits and hyphens, 63 at most (RFC 1123)."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-")[:63] or "mlenv"


def _outermost(folders: Sequence[Path]) -> list[Path]:
    """Return the folders that do not lie in another one, each once, in order."""
    unique = list(dict.fromkeys(folders))
    return [one for one in unique if not any(other in one.parents for other in unique)]


def _spec_mount(mount: MountSpec, spec_path: Path) -> oci.Mount:
    source = (spec_path.parent / Path(mount.source).expanduser()).resolve()
    if not source.exists():
        raise MlenvError(
            f"the mount source `{source}` of `{spec_path}` does not exist",
            hint=f"create it, or change `mounts` in `{spec_path}`",
            code="mount-source-missing",
        )
    return oci.Mount(source=source, target=PurePosixPath(mount.target), readonly=mount.readonly)


def _spec_port(port: PortSpec) -> oci.Port:
    return oci.Port(
        host_ip=port.host_ip,
        host_port=port.host_port,
        container_port=port.container_port,
        protocol=port.protocol,
    )


def _replace_stopped(name: str) -> None:
    """Remove the environment's stopped container, if a reboot or a kill left one."""
    for container in lifecycle.containers():
        if container.environment == name:
            stop_environment(container)
        elif container.name == name:
            raise MlenvError(
                f"a container that is no environment has the name `{name}`",
                hint=f"`mlenv rm {name}`, then `up` again",
                code="name-in-use",
            )
