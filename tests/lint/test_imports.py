"""Who may import whom, and who owns which sharp tool. The drawing is in docs/explanation/architecture.md."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "mlenv"

BASE = {"errors", "paths", "progress"}
NEIGHBOURS = {"resolve", "image", "container"}
MAY_IMPORT = {
    "errors": set(),
    "paths": {"errors"},
    "progress": set(),
    "spec": BASE,
    "lock": BASE | {"spec"},
    "container": BASE,
    "image": BASE | {"lock", "spec"},
    "resolve": BASE | {"lock", "spec"},
    "launch": BASE | {"lock", "spec"} | NEIGHBOURS,
    "environment": BASE | {"lock", "spec", "launch"} | NEIGHBOURS,
    "kernel": BASE | {"lock", "spec", "launch", "environment"} | NEIGHBOURS,
    "jupyter": BASE | {"lock", "spec", "launch", "environment", "kernel"} | NEIGHBOURS,
    "cli": BASE | {"lock", "spec", "launch", "environment", "kernel", "jupyter"} | NEIGHBOURS,
    "__init__": set(),
    "__main__": {"cli"},
}
"""Each room and the rooms it may import besides itself; `container` imports the base alone."""

JUPYTER = {
    "ipykernel",
    "jupyter_client",
    "jupyter_core",
    "jupyter_server",
    "jupyterlab",
    "nbformat",
    "traitlets",
    "zmq",
}
OWNERS = {
    "ctypes": {"container/syscalls.py", "container/init.py"},
    "_ctypes": {"container/syscalls.py"},
    "pyroute2": {"container/net.py"},
    "pynvml": {"container/gpu/nvidia.py"},
    "click": {"cli/"},
    "rich": {"cli/"},
    "pydantic": {"spec/"},
    "yaml": {"spec/", "resolve/"},
    "urllib3": {"image/", "resolve/", "jupyter/"},
    **{name: {"kernel/", "jupyter/"} for name in JUPYTER},
}
"""Each library that only some places may import: files, or directories that end with a slash."""

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_bytes(), module)


def room(module: str) -> str:
    return module.split("/", maxsplit=1)[0].removesuffix(".py")


def imported(module: str) -> set[str]:
    """Return the dotted names that a module imports anywhere in it, lazily or not."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(module: str) -> set[str]:
    parts = (name.split(".") for name in imported(module) if name.split(".")[0] == "mlenv")
    return {part[1] for part in parts if len(part) > 1} - {room(module), "__version__"}


def owned_by(module: str, places: set[str]) -> bool:
    return any(module == place or (place.endswith("/") and module.startswith(place)) for place in places)


def test_every_module_is_in_a_room_of_the_table() -> None:
    assert {room(module) for module in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert rooms_imported(module) <= MAY_IMPORT[room(module)]


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_sharp_tool_has_one_owner(library: str) -> None:
    users = {module for module in MODULES if any(name.split(".")[0] == library for name in imported(module))}
    assert {module for module in users if not owned_by(module, OWNERS[library])} == set()


def test_only_declared_libraries_are_imported() -> None:
    declared = (REPOSITORY / "pyproject.toml").read_text().split("[project.optional-dependencies]")[0]
    names = {"nvidia-ml-py": "pynvml", "pyyaml": "yaml"}
    known = {
        line.split(">")[0].strip(' "').lower() for line in declared.splitlines() if line.startswith('  "')
    }
    known = {names.get(name, name.replace("-", "_")) for name in known}
    used = {name.split(".")[0] for module in MODULES for name in imported(module)}
    comes_with = {"jupyter_core": "jupyter_client", "traitlets": "jupyter_client", "zmq": "jupyter_client"}
    outside = {
        comes_with.get(name, name) for name in used - {"mlenv", "__future__"} - sys.stdlib_module_names
    }
    assert outside <= known


def test_only_render_prints() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module in MODULES
        if module != "cli/render.py"
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_stays_readable(module: str) -> None:
    lines = (PACKAGE / module).read_text().count("\n")
    assert lines <= 600, f"{module} has {lines} lines: find the seam and split it"


@pytest.mark.parametrize("module", MODULES)
def test_names_are_the_standards(module: str) -> None:
    assert not {"utils", "util", "helpers", "helper", "common", "manager", "misc"} & set(
        Path(module).with_suffix("").parts
    )


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_swallowed(module: str) -> None:
    """A bare or blanket `except` that does not raise hides what went wrong."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ExceptHandler) and _is_blanket(node):
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            ends = any(
                isinstance(inner, ast.Call) and "_exit" in ast.unparse(inner.func) for inner in ast.walk(node)
            )
            assert raises or ends or _reports(node), f"{module}:{node.lineno} swallows every exception"


def _is_blanket(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")


def _reports(handler: ast.ExceptHandler) -> bool:
    """Return whether the handler hands the exception it caught to somebody."""
    return handler.name is not None and any(
        isinstance(inner, ast.Name) and inner.id == handler.name for inner in ast.walk(handler)
    )
