"""Where mlenv keeps things: the store, container state, sockets, caches and configuration.

`MLENV_HOME` moves all of it, so two of them never meet. Without it root uses the system's directories and a
user the XDG ones. Nothing here creates the store; `private_dir` makes a directory only its owner can enter.
"""

from __future__ import annotations

import os
import stat
from hashlib import sha256
from pathlib import Path

from mlenv.errors import MlenvError

SOCKET_PATH_MAX = 107
"""Longest path of a Unix socket in bytes (unix(7): sun_path holds 108 with its NUL)."""

_SOCKET_ROOM = 48
"""Bytes kept free behind a socket directory for container ids and socket names."""


def home() -> Path | None:
    """Return the directory `MLENV_HOME` names, or None."""
    value = os.environ.get("MLENV_HOME")
    return Path(value).absolute() if value else None


def _is_root() -> bool:
    return os.geteuid() == 0


def _xdg(variable: str, default: str) -> Path:
    value = os.environ.get(variable, "")
    return Path(value) if value.startswith("/") else Path.home() / default


def data_dir() -> Path:
    """Return the directory of everything that must survive a reboot."""
    moved = home()
    if moved:
        return moved
    return Path("/var/lib/mlenv") if _is_root() else _xdg("XDG_DATA_HOME", ".local/share") / "mlenv"


def store_dir() -> Path:
    """Return the image store's root."""
    return data_dir() / "store"


def containers_dir() -> Path:
    """Return the directory of the containers' bundles, written layers and logs."""
    return data_dir() / "containers"


def cache_dir() -> Path:
    """Return the directory of what can be deleted at any time."""
    moved = home()
    if moved:
        return moved / "cache"
    return Path("/var/cache/mlenv") if _is_root() else _xdg("XDG_CACHE_HOME", ".cache") / "mlenv"


def config_dir() -> Path:
    """Return the user's configuration directory."""
    moved = home()
    if moved:
        return moved / "config"
    return Path("/etc/mlenv") if _is_root() else _xdg("XDG_CONFIG_HOME", ".config") / "mlenv"


def run_dir() -> Path:
    """Return the directory of live state, made private; it does not survive a reboot.

    Raises: MlenvError where another user owns it.
    """
    moved = home()
    if moved:
        return private_dir(moved / "run")
    if _is_root():
        return private_dir(Path("/run/mlenv"))
    return private_dir(_user_run_root() / "mlenv")


def _user_run_root() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and os.access(runtime, os.W_OK | os.X_OK):
        return Path(runtime)
    return _temporary_dir()


def _temporary_dir() -> Path:
    """Return this user's directory below the system's temporary one, else (/tmp is closed) the data's."""
    temporary = Path(f"/tmp/mlenv-{os.getuid()}")  # noqa: S108 - checked for owner and mode
    if temporary.exists() or os.access(temporary.parent, os.W_OK | os.X_OK):
        return private_dir(temporary)
    return private_dir(data_dir() / "run")


def socket_dir() -> Path:
    """Return a private directory short enough that sockets below it can be bound."""
    natural = run_dir()
    if len(os.fsencode(natural)) <= SOCKET_PATH_MAX - _SOCKET_ROOM:
        return natural
    short = sha256(os.fsencode(natural)).hexdigest()[:8]
    return private_dir(_temporary_dir() / short)


def kernel_dir(container_id: str) -> Path:
    """Return the directory of a container's kernel sockets, at the same path inside and outside."""
    return socket_dir() / "k" / container_id[:12]


def catalog_dir() -> Path:
    """Return the catalog of specs that ships with mlenv."""
    package = Path(__file__).parent
    shipped = package / "catalog"
    return shipped if shipped.is_dir() else package.parent / "envs"


def private_dir(path: Path) -> Path:
    """Make `path` a directory that its owner alone can enter, and return it.

    Raises: MlenvError where it belongs to someone else or is no directory.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise MlenvError(
            f"`{path}` is not a directory of yours",
            cause=f"it belongs to uid {status.st_uid} and this is uid {os.geteuid()}",
            hint="remove it, or set MLENV_HOME to a directory of your own",
            code="unsafe-directory",
        )
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path
