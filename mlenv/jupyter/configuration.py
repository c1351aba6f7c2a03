"""The server's files: its private directory, its configuration, and the variables that point Jupyter there.

Source: jupyter_core documentation, "Common directories and file locations"; JupyterLab documentation,
"Advanced usage"; jupyter_server documentation, "Config file and command line options".
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from mlenv import paths
from mlenv.kernel.kernelspec import kernels_dir

if TYPE_CHECKING:
    from pathlib import Path


def directory() -> Path:
    """Return the private directory of the server's state, configuration, log and runtime files."""
    return paths.private_dir(paths.run_dir() / "jupyter")


def variables() -> dict[str, str]:
    """Return the server's variables: directories of its own, so that the user's Jupyter stays apart.

    What a user changes in JupyterLab (theme, layout) is kept in `data_dir()/jupyter/lab`.
    """
    kept = paths.data_dir() / "jupyter" / "lab"
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "JPY_"))
    }
    return {
        **inherited,
        "JUPYTER_CONFIG_DIR": str(directory() / "config"),
        "JUPYTER_DATA_DIR": str(kernels_dir().parent),
        "JUPYTER_RUNTIME_DIR": str(directory() / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(kept / "user-settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(kept / "workspaces"),
    }


def configure(root_dir: Path, port: int, token: str) -> None:
    """Write the server's configuration; the token goes here because arguments show in `ps`."""
    config = paths.private_dir(directory() / "config")
    paths.private_dir(config / "labconfig")
    paths.private_dir(directory() / "runtime")
    server = {
        "ServerApp": {
            "ip": "127.0.0.1",
            "port": port,
            "port_retries": 0,
            "root_dir": str(root_dir),
            "open_browser": False,
            "quit_button": True,
            "allow_root": True,
            "kernel_spec_manager_class": "mlenv.jupyter.kernelspecs.EnvironmentKernelSpecManager",
        },
        "IdentityProvider": {"token": token},
    }
    lab = {"LabApp": {"news_url": None, "extension_manager": "readonly"}}
    page = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    write_private(config / "jupyter_server_config.json", server)
    write_private(config / "jupyter_lab_config.json", lab)
    write_private(config / "labconfig" / "page_config.json", page)


def write_private(path: Path, document: dict[str, Any]) -> None:
    """Replace a JSON file as a whole, readable by its owner alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, sort_keys=True)
    temporary.replace(path)
