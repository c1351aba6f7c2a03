"""The JSON Schema for editors and the reference page, both generated from the model.

`python -m mlenv.spec.schema` writes both; a test checks that they are fresh.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlenv.spec.model import (
    CONFLICTS_WITH_IMAGE,
    BaseSpec,
    GpuRequest,
    KernelSpec,
    MountSpec,
    ResourceSpec,
    Spec,
)

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

SCHEMA_PATH = Path(__file__).with_name("spec.schema.json")
REFERENCE_PATH = Path(__file__).parents[2] / "docs" / "reference-spec.md"

_PARTS: dict[str, type[BaseModel]] = {
    "base": BaseSpec,
    "mounts": MountSpec,
    "gpus": GpuRequest,
    "resources": ResourceSpec,
    "kernel": KernelSpec,
}

_INTRODUCTION = """\
# The environment spec

Generated from `mlenv/spec/model.py` by `python -m mlenv.spec.schema`; do not edit.

A spec is one YAML mapping in `envs/NAME.yaml`. Every key is optional; unknown and duplicate keys are faults.
For completion and checks in an editor, begin the file with

```yaml
# yaml-language-server: $schema=PATH/TO/mlenv/spec/spec.schema.json
```

- **Values are texts first.** `python: 3.10` is 3.10, never 3.1; `no` stays `no`. Quotes do no harm.
- **Sizes** are a number and a unit. `kB`, `MB`, `GB`, `TB` are powers of 1000 (16GB = 16 000 000 000
  bytes); `KiB`, `MiB`, `GiB`, `TiB` are powers of 1024, and so is one letter alone, as in Docker's `-m
  512m` (16g = 16GiB = 17 179 869 184 bytes).
- **Anchors and aliases** (`&x`, `*x`) are read; merge keys (`<<`) and tags of other types are not.
- **The lock** `NAME.lock.json` lies beside the spec and belongs into git. It matches a spec by the
  spec's digest, which covers every value but `name` and `description`, the bytes of requirements files
  and the sources of local packages (without notebooks, caches, `build/`, `dist/` and `envs/`).
  Comments, quoting and the order of keys do not matter.
"""


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a spec, for editors, whose YAML readers make numbers of some texts."""
    schema: dict[str, Any] = _tidy(Spec.model_json_schema(by_alias=True))
    schema.pop("required")  # the name: a file has one already
    schema["dependentSchemas"] = {"image": {"properties": dict.fromkeys(CONFLICTS_WITH_IMAGE, False)}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mlenv environment spec",
        **schema,
    }


def schema_text() -> str:
    """Return the schema as the text of its file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def reference_text() -> str:
    """Return the reference page of the spec in Markdown."""
    sections = [_section(name, field) for name, field in _fields(Spec)]
    return "\n".join([_INTRODUCTION, "## Keys\n", *sections])


def write() -> None:
    """Write the schema and, in a checkout of the repository, the reference page."""
    SCHEMA_PATH.write_text(schema_text(), encoding="utf-8")
    if REFERENCE_PATH.parent.is_dir():
        REFERENCE_PATH.write_text(reference_text(), encoding="utf-8")


def _tidy(schema: Any) -> Any:
    """Return a schema without what pydantic adds for itself: titles, null, empty defaults."""
    if isinstance(schema, list):
        return [_tidy(element) for element in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: _tidy(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
        and not (key == "default" and value in (None, [], {}, ""))
    }
    choices = [choice for choice in kept.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        del kept["anyOf"]
        kept.update(choices[0])
    return kept


def _fields(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    return [(field.alias or name, field) for name, field in model.model_fields.items()]


def _section(name: str, field: FieldInfo) -> str:
    examples = "\n".join(f"{name}: {_yaml(example)}" for example in field.examples or ())
    lines = [f"### `{name}`\n", f"{field.description}{_default(field)}\n", f"```yaml\n{examples}\n```\n"]
    if name in _PARTS:
        lines.append(_table(_PARTS[name]))
    return "\n".join(lines)


def _table(model: type[BaseModel]) -> str:
    """Return the keys of a mapping as a table."""
    rows = [
        f"| `{name}` | {field.description}{_default(field)} | `{_yaml((field.examples or [''])[0])}` |"
        for name, field in _fields(model)
    ]
    return "\n".join([f"{model.__doc__}\n", "| key | meaning | example |", "|---|---|---|", *rows, ""])


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default in (None, "", ()) or field.default_factory is not None:
        return ""
    return f" Default: `{_yaml(field.default)}`."


def _yaml(value: Any) -> str:
    """Return a value as YAML on one line; texts that other readers take for something else are quoted."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(content)}" for key, content in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(element) for element in value) + "]"
    is_plain = re.fullmatch(
        r"[A-Za-z./][A-Za-z0-9 ./_-]*|[a-z.]+[A-Za-z0-9./_:-]*|[0-9]+[A-Za-z]+", str(value)
    )
    return str(value) if is_plain else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    write()
