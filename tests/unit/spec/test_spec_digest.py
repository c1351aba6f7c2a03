"""What makes a lock stale: values and the files that a spec names, nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlenv.errors import InvalidSpecError
from mlenv.spec import inputs
from mlenv.spec.reader import read_document

SPEC = 'python: "3.10"\npackages: [numpy, ./lib]\nrequirements: requirements.txt\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "lib" / "src").mkdir(parents=True)
    (tmp_path / "lib" / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "lib" / "src" / "a.py").write_text("a = 1\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "requirements.txt").write_text(
        "-r more/other.txt  # see there\n-c more/constraints.txt\nscipy\n"
    )
    (tmp_path / "more" / "other.txt").write_text("-r ../requirements.txt\npandas\n-e ./tool\n")
    (tmp_path / "more" / "constraints.txt").write_text("pandas<3\n")
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "setup.py").write_text("")
    (tmp_path / "x.yaml").write_text(SPEC)
    return tmp_path


def digest(project: Path, text: str = SPEC) -> str:
    (project / "x.yaml").write_text(text)
    return read_document(project / "x.yaml").digest


@pytest.mark.parametrize(
    "text",
    [
        "# a comment\n" + SPEC,
        SPEC.replace('"3.10"', "3.10"),
        SPEC.replace("[numpy, ./lib]", "\n  - numpy\n  - './lib'"),
        "\n".join(reversed(SPEC.splitlines())) + "\n",
        SPEC.replace("\n", "\r\n"),
        SPEC + "name: other\ndescription: told differently\n",
    ],
)
def test_form_and_names_do_not_matter(project: Path, text: str) -> None:
    assert digest(project, text) == digest(project)


@pytest.mark.parametrize(
    "text",
    [
        SPEC.replace("3.10", "3.1"),
        SPEC.replace("numpy", "numpy>=1"),
        SPEC.replace("numpy, ./lib", "./lib, numpy"),
        SPEC + "network: private\n",
        SPEC.replace("packages", "apt"),
    ],
)
def test_every_value_matters(project: Path, text: str) -> None:
    assert digest(project, text) != digest(project)


@pytest.mark.parametrize(
    "name",
    [
        "requirements.txt",
        "more/other.txt",
        "more/constraints.txt",
        "lib/src/a.py",
        "lib/new.py",
        "tool/setup.py",
    ],
)
def test_files_that_the_spec_names_matter(project: Path, name: str) -> None:
    before = digest(project)
    with (project / name).open("a") as file:
        file.write("# changed\n")
    changed = digest(project)
    assert changed != before
    (project / name).unlink()
    assert digest(project) != changed


@pytest.mark.parametrize(
    "name",
    ["lib/.git/HEAD", "lib/src/__pycache__/a.pyc", "lib/build/x", "lib/x.egg-info/PKG-INFO",
     "lib/x.lock.json", "lib/notes.ipynb", "lib/envs/x.yaml", "unrelated.txt"],
)  # fmt: skip
def test_what_changes_in_use_does_not_matter(project: Path, name: str) -> None:
    before = digest(project)
    (project / name).parent.mkdir(parents=True, exist_ok=True)
    (project / name).write_text("x")
    assert digest(project) == before


def test_links_count_by_where_they_point_and_are_not_followed(project: Path) -> None:
    (project / "lib" / "loop").symlink_to(".")
    before = digest(project)
    (project / "lib" / "loop").unlink()
    assert digest(project) != before
    (project / "lib" / "loop").symlink_to("src")
    assert digest(project) != before


def test_the_mode_that_python_packages_keep_matters(project: Path) -> None:
    before = digest(project)
    (project / "lib" / "src" / "a.py").chmod(0o755)
    assert digest(project) != before


def test_pipes_are_not_opened(project: Path) -> None:
    os.mkfifo(project / "lib" / "pipe")
    assert digest(project) == digest(project)


def test_a_package_with_too_much_in_it_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_FILES", 1)
    with pytest.raises(InvalidSpecError) as caught:
        digest(project)
    assert caught.value.hint == "move data out of the package's directory"


def test_malformed_values_do_not_stop_the_reading(project: Path) -> None:
    for text in ("packages: x\nrequirements: [a]\n", "packages: [[a], {b: c}]\n", "requirements: gone.txt\n"):
        assert digest(project, text).startswith("sha256:")
