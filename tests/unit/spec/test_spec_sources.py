"""Which file a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlenv import paths
from mlenv.errors import SpecNotFoundError, UsageError
from mlenv.spec.sources import catalog, locate, lock_path, search_path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A directory in a repository, the configuration's and the shipped catalog, each with an `envs` place."""
    monkeypatch.setenv("MLENV_HOME", str(tmp_path / "home"))
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(paths, "catalog_dir", lambda: shipped)
    repository = tmp_path / "repository"
    found = {
        "cwd": repository / "sub" / "envs",
        "repository": repository / "envs",
        "config": tmp_path / "home" / "config" / "envs",
        "shipped": shipped,
    }
    for place in found.values():
        place.mkdir(parents=True)
    (repository / ".git").mkdir()
    monkeypatch.chdir(repository / "sub")
    return found


def put(place: Path, *names: str) -> None:
    for name in names:
        (place / name).write_text("python: 3.8\n")


def test_a_bare_name_is_looked_for_in_order(places: dict[str, Path]) -> None:
    cwd = places["cwd"].parent
    for place in reversed(places.values()):
        put(place, "x.yaml")
        assert locate("x", cwd=cwd) == place / "x.yaml"
    assert catalog() == [("x", places["cwd"] / "x.yaml")]
    assert search_path(cwd) == list(places.values())


def test_the_repository_is_found_from_anywhere_below_and_by_a_file(places: dict[str, Path]) -> None:
    git = places["repository"].parent / ".git"
    git.rmdir()
    git.write_text("gitdir: elsewhere\n")  # as in a worktree
    put(places["repository"], "x.yml")
    deep = places["cwd"].parent / "a" / "b"
    deep.mkdir(parents=True)
    assert locate("x", cwd=deep) == places["repository"] / "x.yml"
    assert locate("x", cwd=places["repository"].parent) == places["repository"] / "x.yml"


def test_the_shipped_catalog_is_listed_with_the_users_own_first(places: dict[str, Path]) -> None:
    put(places["shipped"], "a.yaml", "b.yaml", ".hidden.yaml", "notes.txt", "a.lock.json")
    put(places["cwd"], "b.yml", "b.yaml")
    assert catalog(places["cwd"].parent) == [
        ("a", places["shipped"] / "a.yaml"),
        ("b", places["cwd"] / "b.yaml"),
    ]


@pytest.mark.parametrize(
    "name", ["./envs/x.yaml", "envs/x.yaml", "../sub/envs/x.yaml", "../sub", ".", "./envs", ".."]
)
def test_paths_and_directories(places: dict[str, Path], name: str) -> None:
    put(places["repository" if name == ".." else "cwd"], "x.yaml")
    found = locate(name, cwd=places["cwd"].parent)
    assert found.samefile(places["repository" if name == ".." else "cwd"] / "x.yaml")


def test_a_directory_finds_the_envs_above_it_inside_its_repository(places: dict[str, Path]) -> None:
    inner = places["cwd"].parent / "inner"
    inner.mkdir()
    put(places["cwd"], "x.yaml")
    assert locate("./inner", cwd=inner.parent) == places["cwd"] / "x.yaml"
    (inner / ".git").mkdir()
    with pytest.raises(SpecNotFoundError, match="no `envs/` with a spec in"):
        locate("./inner", cwd=inner.parent)


def test_several_specs_of_a_directory_are_listed(places: dict[str, Path]) -> None:
    put(places["cwd"], "a.yaml", "b.yaml")
    with pytest.raises(SpecNotFoundError) as caught:
        locate(".", cwd=places["cwd"].parent)
    assert caught.value.message == "`envs` holds 2 specs"
    assert caught.value.cause == "envs/a.yaml\nenvs/b.yaml"
    assert caught.value.hint == "say which one, as in `envs/a.yaml`"


def test_an_unknown_name_says_where_it_was_looked_for_and_what_is_near(places: dict[str, Path]) -> None:
    put(places["shipped"], "pytorch-1.7-cu101.yaml", "quickstart.yaml")
    with pytest.raises(SpecNotFoundError) as caught:
        locate("pytorch-1.7-cu110", cwd=places["cwd"].parent)
    assert caught.value.message == "no environment is called `pytorch-1.7-cu110`"
    assert caught.value.cause == "looked in\n" + "\n".join(map(str, places.values()))
    assert caught.value.hint == "did you mean `pytorch-1.7-cu101`?"
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("zzz", "write it to `envs/zzz.yaml`; `mlenv envs` lists what there is"),
        ("envs", "for the directory write `./envs`"),
        ("./envs/quikstart.yaml", "did you mean `envs/quickstart.yaml`?"),
        ("./gone/x.yaml", "`mlenv envs` lists the known specs"),
        ("a\0b", "write it to `envs/a\0b.yaml`; `mlenv envs` lists what there is"),
        ("x" * 300, f"write it to `envs/{'x' * 300}.yaml`; `mlenv envs` lists what there is"),
    ],
)
def test_what_is_not_there(places: dict[str, Path], name: str, hint: str) -> None:
    put(places["cwd"], "quickstart.yaml")
    with pytest.raises(SpecNotFoundError) as caught:
        locate(name, cwd=places["cwd"].parent)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gh:A/project", "git clone https://github.com/A/project.git && mlenv up ./project"),
        (
            "gh:A/project@v1//envs/x.yaml",
            "git clone --branch v1 https://github.com/A/project.git && mlenv up project/envs/x.yaml",
        ),
        (
            "git+https://example.org/r.git@main#envs/x.yaml",
            "git clone --branch main https://example.org/r.git && mlenv up r/envs/x.yaml",
        ),
        ("git+file:///srv/r.git", "git clone file:///srv/r.git && mlenv up ./r"),
        ("https://example.org/x.yaml", "curl -fLO https://example.org/x.yaml"),
        ("https://example.org/r.git", "git clone https://example.org/r.git"),
        ("git@example.org:a/b.git", "git clone git@example.org:a/b.git"),
        ("https://example.org/$(rm x)", "git clone 'https://example.org/$(rm x)'"),
    ],
)
def test_a_remote_spec_is_refused_with_the_line_that_brings_it_here(
    tmp_path: Path, name: str, line: str
) -> None:
    with pytest.raises(UsageError) as caught:
        locate(name, cwd=tmp_path)
    assert caught.value.hint == line
    assert caught.value.cause == "this version of mlenv reads specs from files"


def test_the_lock_lies_beside_the_spec() -> None:
    assert lock_path(Path("/a/x.yaml")) == Path("/a/x.lock.json")
    assert lock_path(Path("/a/pytorch-1.7.yml")) == Path("/a/pytorch-1.7.lock.json")
    assert lock_path(Path("/a/pytorch-1.7")) == Path("/a/pytorch-1.7.lock.json")
