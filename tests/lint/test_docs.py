"""Documents that cannot drift: generated pages are fresh, links lead somewhere, commands exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
NAMES = [page.relative_to(REPOSITORY).as_posix() for page in PAGES]

FIRST = "./setup.sh && .venv/bin/mlenv up quickstart"
SECOND = "./setup.sh --test && .venv/bin/python -m pytest"


@cache
def generator() -> ModuleType:
    found = importlib.util.spec_from_file_location("generate", REPOSITORY / "docs" / "generate.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands.md", "errors.md"])
def test_a_generated_page_is_fresh(name: str) -> None:
    pages = {path.name: (path, text) for path, text in generator().pages().items()}
    path, text = pages[name]
    assert path.read_text() == text, "run `python docs/generate.py`"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(file), f"{target}: {file.name} has no such heading"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    shell = [text for kind, text in blocks if kind in ("", "sh", "console")]
    return [line.removeprefix("$ ") for text in shell for line in text.splitlines()]


def test_readme_begins_with_the_two_commands() -> None:
    assert [line for line in shell_lines(REPOSITORY / "README.md") if "setup.sh" in line][:2] == [
        FIRST,
        SECOND,
    ]


def test_ci_runs_the_second_command() -> None:
    assert (REPOSITORY / ".ci" / "run").read_text().splitlines()[-1] == SECOND


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_documents_exist(page: Path) -> None:
    """Every `mlenv WORD` that a document shows is a command, with options that the command has."""
    text = page.read_text()
    shown = re.findall(r"`(?:\.venv/bin/)?mlenv ([a-z][^`]*)`", text)
    shown += [
        found[1] for line in shell_lines(page) if (found := re.search(r"(?:^|[ /])mlenv ([a-z].*)", line))
    ]
    for words in shown:
        assert words.split()[0] in known(), f"`mlenv {words}` in {page.name}"


def test_hints_name_commands_that_exist() -> None:
    wrong = []
    for path in sorted((REPOSITORY / "mlenv").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.keyword) and node.arg in ("hint", "cause"):
                named = re.findall(r"(?:`|^f?['\"])mlenv ([a-z]+)\b", ast.unparse(node.value))
                wrong += [
                    f"{path.name}:{node.value.lineno}: mlenv {name}" for name in named if name not in known()
                ]
    assert wrong == []


def known() -> set[str]:
    return set(generator().COMMANDS)


def test_every_error_code_is_explained_where_users_look() -> None:
    """The codes that most users meet have an entry in the troubleshooting page."""
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    for code in ("port-in-use", "index-unreachable", "impossible-combination", "invalid-spec", "disk-full"):
        assert f"`{code}`" in text or f"[{code}]" in text
