"""The generated schema and reference are fresh, and say the same as the reader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mlenv import paths
from mlenv.spec import schema
from mlenv.spec.reader import read_document, read_spec

CATALOG = sorted(paths.catalog_dir().glob("*.y*ml"))
VALIDATOR = jsonschema.Draft202012Validator(schema.json_schema())


def errors(data: Any) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(data)]


def test_the_shipped_files_are_fresh() -> None:
    """After a change of the model: `python -m mlenv.spec.schema`."""
    assert schema.SCHEMA_PATH.read_text(encoding="utf-8") == schema.schema_text()
    assert schema.REFERENCE_PATH.read_text(encoding="utf-8") == schema.reference_text()


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema.json_schema())


def test_every_key_is_described_with_an_example() -> None:
    described = schema.json_schema()["properties"]
    for part in schema.json_schema()["$defs"].values():
        full = part["anyOf"][-1] if "anyOf" in part else part
        described = {**described, **full["properties"]}
    assert [key for key, value in described.items() if not (value["description"] and value["examples"])] == []


def test_there_is_a_catalog() -> None:
    assert CATALOG


@pytest.mark.parametrize("path", CATALOG, ids=lambda path: path.stem)
def test_every_spec_of_the_catalog_is_valid_for_the_reader_and_for_editors(path: Path) -> None:
    assert read_spec(path).name == path.stem
    assert errors(read_document(path).data) == []
    assert errors(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


def examples() -> list[str]:
    text = schema.reference_text().split("## Keys", 1)[1]
    return [
        line for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]


@pytest.mark.parametrize("line", examples())
def test_every_example_of_the_reference_is_a_spec(tmp_path: Path, line: str) -> None:
    (tmp_path / "libs" / "mypkg").mkdir(parents=True)
    (tmp_path / "libs" / "mypkg" / "setup.py").touch()
    (tmp_path / "requirements.txt").touch()
    path = tmp_path / "x.yaml"
    path.write_text(line + "\n")
    read_spec(path)
    assert errors(yaml.safe_load(line)) == []


@pytest.mark.parametrize(
    "text",
    [
        "pyton: 3",
        "python: [3]",
        "packages: numpy",
        "apt: [Git]",
        "base: debian:10",
        "base: {mirror: 'https://x'}",
        "image: a\npackages: [b]",
        "ports: ['8097']",
        "mounts: [{source: a}]",
        "mounts: [a]",
        "gpus: some",
        "gpus: {cnt: 1}",
        "resources: {memory: 16XB}",
        "resources: {cpus: 0}",
        "network: bridge",
        "kernel: {interrupt_mode: x}",
        "env: [A]",
        "env: {A: []}",
        "name: a b",
        "cuda: cu101",
        "python:",
    ],
)
def test_editors_see_common_faults_too(text: str) -> None:
    assert errors(yaml.safe_load(text))
