"""Which variables of the host a kernel sees.

A local kernel inherits everything, and notebooks rely on it (`HF_TOKEN`, `WANDB_PROJECT`). In a container
most variables still mean the same; those that name the host's files, user, displays or interpreters do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_HOST_ONLY_NAMES = frozenset(
    {
        "_",
        "CUDA_HOME",
        "CUDA_PATH",
        "CUDA_VISIBLE_DEVICES",
        "CURL_CA_BUNDLE",
        "DISPLAY",
        "HOME",
        "HOSTNAME",
        "LANG",
        "LANGUAGE",
        "LOGNAME",
        "MAIL",
        "OLDPWD",
        "PATH",
        "PIP_CERT",
        "PIP_CONFIG_FILE",
        "PWD",
        "REQUESTS_CA_BUNDLE",
        "SHELL",
        "SHLVL",
        "SSH_AUTH_SOCK",
        "TEMP",
        "TMP",
        "TMPDIR",
        "USER",
        "WAYLAND_DISPLAY",
        "XAUTHORITY",
    }
)

_HOST_ONLY_PREFIXES = (
    "CONDA",
    "DBUS",
    "JPY_API",
    "JPY_PARENT",
    "JUPYTER",
    "LC_",
    "LD_",
    "MLENV_",
    "NVIDIA_",
    "PYENV",
    "PYTHON",
    "SSL_CERT",
    "SUDO_",
    "UV_",
    "VIRTUAL_ENV",
    "XDG_",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variables:
    """What a kernel sees beside its container's own variables.

    `inherited` come from the front end; they go through our processes' environment, since their values
    (tokens, keys) must not show in `ps`. `explicit` come from the spec; they never touch the environment of a
    process of the host, which an `LD_PRELOAD` among them would take over.
    """

    inherited: Mapping[str, str]
    explicit: Mapping[str, str]


def kernel_variables(
    host: Mapping[str, str], *, container: Mapping[str, str], kernelspec: Mapping[str, str]
) -> Variables:
    """Return the variables to set for a kernel.

    `container` (the image's and the spec's) wins over `host`, and `kernelspec` wins over both.
    """
    explicit = {name: value for name, value in kernelspec.items() if not name.startswith("MLENV_")}
    # ipykernel ends itself when the process of this number is not its parent; 1 switches that watch off, and
    # the container's lifeline does its work (ipykernel/kernelapp.py, init_poller).
    explicit["JPY_PARENT_PID"] = "1"
    decided = container.keys() | explicit.keys()
    inherited = {name: value for name, value in host.items() if _is_portable(name) and name not in decided}
    return Variables(inherited=inherited, explicit=explicit)


def container_variables(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables an OCI runtime config sets for the container's processes."""
    return dict(item.split("=", 1) for item in config["process"].get("env", ()))


def _is_portable(name: str) -> bool:
    return name not in _HOST_ONLY_NAMES and not name.startswith(_HOST_ONLY_PREFIXES)
