"""A document against the model: what pydantic and the cross-checks find, as faults at their places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from mlenv.spec import inputs
from mlenv.spec.faults import Fault, quote
from mlenv.spec.model import (
    CONFLICTS_WITH_IMAGE,
    BaseSpec,
    GpuRequest,
    KernelSpec,
    MountSpec,
    ResourceSpec,
    Spec,
)
from mlenv.spec.nodes import Mapping, Node, Place, Scalar, Sequence
from mlenv.spec.sources import is_directory, is_file
from mlenv.spec.values import BadValueError, did_you_mean, parse_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mlenv.spec.reader import Document

_PARTS: dict[str, type[BaseModel]] = {
    "resources": ResourceSpec,
    "base": BaseSpec,
    "mounts": MountSpec,
    "gpus": GpuRequest,
    "kernel": KernelSpec,
}

_SYNONYMS = {
    "dependencies": "packages",
    "pip": "packages",
    "torch": "pytorch",
    "environment": "env",
    "volumes": "mounts",
    "from": "base",
    "os": "base",
    "run": "build",
    "steps": "build",
    "gpu": "gpus",
    "apt_packages": "apt",
    "python_version": "python",
    "device_ids": "ids",
    "read_only": "readonly",
    "src": "source",
    "dst": "target",
    "destination": "target",
    "mem": "memory",
    "shm_size": "shm",
    "pids_limit": "pids",
}
"""What other tools call our keys."""


def check(document: Document) -> tuple[Spec | None, list[Fault]]:
    """Return the spec that a document spells, None where a value is wrong, and every fault found."""
    root = document.root
    faults = [*_conflicts(root), *_missing_files(document)]
    data = dict(document.data)
    data.setdefault("name", document.path.stem)
    try:
        context = {"path": document.path, "digest": document.digest}
        return Spec.model_validate(data, context=context), [*faults, *_twice(root)]
    except ValidationError as error:
        found = (_fault(root, fault) for fault in error.errors(include_url=False))
        return None, [*faults, *found, *_twice(root)]


def keys_of(model: type[BaseModel]) -> list[str]:
    """Return the keys that a mapping of the spec has."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _fault(root: Mapping, error: Any) -> Fault:  # noqa: PLR0911 - a table of kinds
    """Return one of pydantic's errors as a fault."""
    location: tuple[str | int, ...] = error["loc"]
    node, path, key_place = _find(root, location)
    label = _label(path)
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(path, key_place or node.place)
        case "missing":
            return _at(node.place, f"{label or 'this'} has no `{location[-1]}`", f"add `{location[-1]}:`")
        case _ if location[-1:] == ("[key]",):
            return _bad_value(key_place or node.place, "", error)
        case _ if path == () and location == ("name",):
            reason = "the file's name is no name for an environment"
            return _at(Place(line=1, column=1), reason, "add a line `name: NAME`")
        case _ if isinstance(node, Scalar) and node.is_empty:
            return _at(key_place or node.place, f"{label} has no value", "write one, or remove it")
        case "value_error":
            return _bad_value(node.place, label, error)
        case _:
            return _wrong_kind(node, label, error["type"])


def _bad_value(place: Place, label: str, error: Any) -> Fault:
    reason = error["ctx"]["error"]
    message = f"{label}: {reason}" if label else str(reason)
    return _at(place, message, reason.hint if isinstance(reason, BadValueError) else None)


def _wrong_kind(node: Node, label: str, kind: str) -> Fault:
    """Return the fault of a text, list or mapping where another of them must stand."""
    if kind in ("tuple_type", "list_type"):
        wanted = "a list"
    elif kind in ("dict_type", "model_type", "model_attributes_type", "mapping_type"):
        wanted = "a mapping"
    else:
        wanted = "a text"
    hint = None
    if wanted == "a list" and isinstance(node, Scalar):
        hint = f"write `[{node.text}]`"
    elif wanted == "a list" and isinstance(node, Mapping):
        hint = "begin each line with `- `"
    elif (
        wanted == "a text"
        and isinstance(node, Sequence)
        and len(node.items) == 1
        and isinstance(node.items[0], Scalar)
    ):
        hint = f'write `"{node.items[0].text}"` without brackets'
    elif wanted == "a mapping":
        hint = "write `KEY: value` lines below it"
    return _at(node.place, f"{label} must be {wanted}, not {_kind(node)}", hint)


def _kind(node: Node) -> str:
    if isinstance(node, Scalar):
        return f"the text {quote(node.text)}"
    return "a list" if isinstance(node, Sequence) else "a mapping"


def _unknown_key(path: tuple[str | int, ...], place: Place) -> Fault:
    """Return the fault of a key that no one reads, with the nearest that is, or where it belongs."""
    key = str(path[-1])
    parent = path[:-1]
    model = _PARTS[str(parent[0])] if parent else Spec
    keys = keys_of(model)
    synonym = _SYNONYMS.get(key.lower().replace("-", "_"))
    homes = [name for name, part in _PARTS.items() if key in keys_of(part)] if not parent else []
    if synonym in keys:
        hint: str | None = f"write `{synonym}`"
    elif near := did_you_mean(key, keys):
        hint = near
    elif homes:
        hint = "it belongs below " + " or ".join(f"`{home}:`" for home in homes)
    elif parent and key in keys_of(Spec):
        hint = "it belongs to the top level"
    else:
        hint = "known here: " + ", ".join(keys)
    where = f" in {_label(parent)}" if parent else ""
    return _at(place, f"unknown key {quote(key)}{where}", hint)


def _find(root: Mapping, location: tuple[str | int, ...]) -> tuple[Node, tuple[str | int, ...], Place | None]:
    """Return the node at a location, as far as the document has it, that path, and its last key's place."""
    node: Node = root
    path: tuple[str | int, ...] = ()
    key_place: Place | None = None
    for part in location:
        if isinstance(node, Mapping) and isinstance(part, str) and part in node.items:
            key_place, node = node.keys[part], node.items[part]
        elif isinstance(node, Sequence) and isinstance(part, int) and part < len(node.items):
            key_place, node = None, node.items[part]
        else:
            continue
        path += (part,)
    return node, path, key_place


def _label(path: tuple[str | int, ...]) -> str:
    """Return a path as messages show it: `mounts[0].target`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    return quote(text) if text else ""


def _conflicts(root: Mapping) -> Iterator[Fault]:
    """Yield the keys that say how to make an image, where the image itself is given."""
    if "image" not in root.items:
        return
    for key in CONFLICTS_WITH_IMAGE:
        if key in root.items:
            hint = f"remove `{key}`, or `image` (line {root.keys['image'].line})"
            yield _at(root.keys[key], f"`{key}` cannot stand beside `image`, which is used as it is", hint)


def _missing_files(document: Document) -> Iterator[Fault]:
    """Yield the requirements file and the local packages that are not there."""
    directory = document.path.parent
    requirements = document.root.items.get("requirements")
    if (
        isinstance(requirements, Scalar)
        and requirements.text
        and not requirements.text.startswith(("/", "~"))
    ):
        path = directory / requirements.text
        if not is_file(path):
            hint = "the path counts from the spec's directory"
            yield _at(requirements.place, f"there is no file {quote(requirements.text)}", hint)
    packages = document.root.items.get("packages")
    for item in packages.items if isinstance(packages, Sequence) else ():
        if isinstance(item, Scalar) and inputs.is_local(item.text):
            yield from _missing_package(item, directory / inputs.local_path(item.text))


def _missing_package(item: Scalar, path: Path) -> Iterator[Fault]:
    if not (is_file(path) or is_directory(path)):
        yield _at(
            item.place, f"there is no package {quote(item.text)}", "the path counts from the spec's directory"
        )
    elif is_directory(path) and not any(is_file(path / name) for name in ("pyproject.toml", "setup.py")):
        yield _at(
            item.place,
            f"{quote(item.text)} is not a Python package",
            "it needs a `pyproject.toml` or a `setup.py`",
        )


def _twice(root: Mapping) -> Iterator[Fault]:
    """Yield ports and mount targets that are taken by an entry before them."""
    yield from _repeated(root.items.get("ports"), _host_port, "the host port")
    yield from _repeated(root.items.get("mounts"), _target, "the target")


def _repeated(items: Node | None, identity: Any, what: str) -> Iterator[Fault]:
    seen: dict[Any, Place] = {}
    for item in items.items if isinstance(items, Sequence) else ():
        found = identity(item)
        if found is None:
            continue
        if found in seen:
            yield _at(
                item.place, f"{what} {quote(str(found[0]))} is taken", f"line {seen[found].line} has it too"
            )
        seen.setdefault(found, item.place)


def _host_port(item: Node) -> tuple[Any, ...] | None:
    try:
        port = parse_port(item.text) if isinstance(item, Scalar) else None
    except BadValueError:
        return None  # reported by the model
    return (port.host_port, port.host_ip, port.protocol) if port else None


def _target(item: Node) -> tuple[Any, ...] | None:
    if isinstance(item, Mapping):
        target = item.items.get("target")
        return (target.text.rstrip("/"),) if isinstance(target, Scalar) else None
    parts = item.text.split(":") if isinstance(item, Scalar) else []
    return (parts[1].rstrip("/"),) if len(parts) > 1 else None


def _at(place: Place, message: str, hint: str | None = None) -> Fault:
    return Fault(line=place.line, column=place.column, width=place.width, message=message, hint=hint)
