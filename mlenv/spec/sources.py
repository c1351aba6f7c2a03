"""Which file a name means: where specs are looked for, and where a spec's lock lies."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from mlenv import paths
from mlenv.errors import SpecNotFoundError, UsageError

SUFFIXES = (".yaml", ".yml")
LOCK_SUFFIX = ".lock.json"
FOLDER = "envs"
"""The folder of a project that holds its specs."""

_REMOTE = re.compile(r"(gh:|git\+|[a-z][a-z0-9+.-]*://|[A-Za-z0-9._-]+@[A-Za-z0-9._-]+:)")
_GITHUB = re.compile(r"gh:(?P<repository>[^/@]+/[^/@]+)(@(?P<ref>.+?))?(//(?P<path>.+))?")
_GIT = re.compile(r"git\+(?P<url>[a-z+]+://[^#]*?)(@(?P<ref>[^@/#:]+))?(#(?P<path>.+))?")


def lock_path(spec_path: Path) -> Path:
    """Return where a spec's lock lies: `NAME.lock.json` beside `NAME.yaml`."""
    stem = spec_path.stem if spec_path.suffix in SUFFIXES else spec_path.name
    return spec_path.with_name(stem + LOCK_SUFFIX)


def locate(name: str, *, cwd: Path) -> Path:
    """Return the spec that a name, a path to a YAML file, or a directory means, seen from `cwd`.

    Raises: SpecNotFoundError, with where it looked and the nearest names; UsageError for a remote spec.
    """
    if _REMOTE.match(name):
        raise _remote_spec(name)
    if name in ("", ".", "..") or "/" in name or name.startswith("~") or name.endswith(SUFFIXES):
        return _at_path(name, cwd=cwd)
    for directory in search_path(cwd):
        for suffix in SUFFIXES:
            candidate = directory / (name + suffix)
            if is_file(candidate):
                return candidate
    raise _unknown_name(name, cwd=cwd)


def search_path(cwd: Path) -> list[Path]:
    """Return the directories where a bare name is looked for, first to last, each once."""
    repository = _repository(cwd)
    project = [repository / FOLDER] if repository else []
    candidates = [cwd / FOLDER, *project, paths.config_dir() / FOLDER, paths.catalog_dir()]
    unique = {os.path.realpath(directory): directory for directory in reversed(candidates)}
    return [directory for directory in candidates if unique[os.path.realpath(directory)] is directory]


def catalog(cwd: Path | None = None) -> list[tuple[str, Path]]:
    """Return every name that can be used in `cwd` (default: the current directory) with its file, by name."""
    found: dict[str, Path] = {}
    for directory in search_path(cwd or Path.cwd()):
        for path in _specs_in(directory):
            found.setdefault(path.stem, path)
    return sorted(found.items())


def is_file(path: Path) -> bool:
    """Tell whether there is a file; one in a directory that is closed to us counts as none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # not allowed to look; a path that cannot be
        return False


def is_directory(path: Path) -> bool:
    """Tell whether there is a directory; one in a directory that is closed to us counts as none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # as above
        return False


def display(path: Path) -> str:
    """Return a path as messages show it: relative where it lies below the current directory."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, FileNotFoundError):  # outside; or the current directory was removed
        return str(path)


def _specs_in(directory: Path) -> list[Path]:
    """Return the specs of a directory in order; none where it is missing or closed to us."""
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError:
        return []
    chosen = {Path(name).stem: name for name in reversed(names) if name.endswith(SUFFIXES) and name[0] != "."}
    return [directory / name for name in sorted(chosen.values())]


def _repository(directory: Path) -> Path | None:
    """Return the root of the git repository around a directory: where `.git` lies (a file in a worktree)."""
    for candidate in (directory, *directory.parents):
        if os.path.lexists(candidate / ".git"):
            return candidate
    return None


def _at_path(name: str, *, cwd: Path) -> Path:
    path = cwd / Path(name).expanduser()
    if is_directory(path):
        return _in_directory(path)
    if os.path.lexists(path):
        return path
    from difflib import get_close_matches

    near = get_close_matches(path.name, [spec.name for spec in _specs_in(path.parent)], n=3)
    suggestion = _did_you_mean([str(Path(name).with_name(other)) for other in near])
    raise SpecNotFoundError(
        f"there is no file `{name}`",
        cause=f"looked in `{path.parent}`",
        hint=suggestion or "`mlenv envs` lists the known specs",
    )


def _in_directory(path: Path) -> Path:
    """Return the one spec of the nearest `envs/` in a directory or above it, inside its repository."""
    start = Path(os.path.normpath(path.absolute()))
    top = _repository(start)
    for directory in (start, *start.parents):
        folder = directory if directory.name == FOLDER else directory / FOLDER
        found = _specs_in(folder)
        if len(found) == 1:
            return found[0]
        if found:
            raise _several(folder, found)
        if directory == top:
            break
    raise SpecNotFoundError(
        f"no `{FOLDER}/` with a spec in `{path}` or above it",
        hint=f"write one to `{FOLDER}/NAME.yaml`, or name a spec: `mlenv envs` lists them",
    )


def _several(folder: Path, found: list[Path]) -> SpecNotFoundError:
    names = "\n".join(display(path) for path in found)
    return SpecNotFoundError(
        f"`{display(folder)}` holds {len(found)} specs",
        cause=names,
        hint=f"say which one, as in `{shlex.quote(display(found[0]))}`",
    )


def _unknown_name(name: str, *, cwd: Path) -> SpecNotFoundError:
    looked = "\n".join(str(directory) for directory in search_path(cwd))
    known = [known_name for known_name, _ in catalog(cwd)]
    if is_directory(cwd / name):
        hint = f"for the directory write `./{name}`"
    else:
        from difflib import get_close_matches

        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = _did_you_mean(near) or f"write it to `{FOLDER}/{name}.yaml`; `mlenv envs` lists what there is"
    return SpecNotFoundError(f"no environment is called `{name}`", cause=f"looked in\n{looked}", hint=hint)


def _did_you_mean(names: list[str]) -> str:
    return "did you mean " + " or ".join(f"`{name}`" for name in names) + "?" if names else ""


def _remote_spec(name: str) -> UsageError:
    return UsageError(
        f"`{name}` is not on this machine",
        cause="this version of mlenv reads specs from files",
        hint=_clone_line(name),
    )


def _clone_line(name: str) -> str:
    """Return the commands that bring a remote spec here."""
    match = _GITHUB.fullmatch(name) or _GIT.fullmatch(name)
    if match is None:
        is_file = name.startswith("http") and name.endswith(SUFFIXES)
        address = shlex.quote(name.removeprefix("git+"))
        return f"curl -fLO {address}" if is_file else f"git clone {address}"
    found = match.groupdict()
    url = found.get("url") or f"https://github.com/{found['repository']}.git"
    branch = f"--branch {shlex.quote(found['ref'])} " if found["ref"] else ""
    folder = url.rstrip("/").rsplit("/", 1)[-1].removesuffix(".git")
    use = shlex.quote(f"{folder}/{found['path']}" if found["path"] else f"./{folder}")
    return f"git clone {branch}{shlex.quote(url)} && mlenv up {use}"
