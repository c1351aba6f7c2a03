"""Write the reference pages that come from the code: `python docs/generate.py`; a test compares them."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections import defaultdict
from pathlib import Path

import click

from mlenv import errors
from mlenv.cli.main import COMMANDS

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "mlenv"
ERRORS_INTRODUCTION = """\
Every failure has a stable code: `error[CODE]` in the terminal, `error.code` with `--json`. The exit status is
what the command ends with; `run` and `exec` pass on the status of the command inside where it started."""
NOTICE = "<!-- Written by docs/generate.py from {}; change that, then run it. -->"


def main() -> None:
    """Write every page."""
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def pages() -> dict[Path, str]:
    """Return each generated page and the text it should have."""
    return {
        DOCS / "reference" / "commands.md": commands_page(),
        DOCS / "reference" / "errors.md": errors_page(),
    }


def commands_page() -> str:
    """Return the reference of the command line."""
    parts = [
        NOTICE.format("the commands"),
        "# Commands",
        "`mlenv COMMAND --help` says the same in a terminal.",
    ]
    parts.append(
        "\n".join(f"- [`mlenv {name}`](#mlenv-{name}): {short}" for name, (_, short) in COMMANDS.items())
    )
    for name, (module, _) in COMMANDS.items():
        parts += command_part(importlib.import_module(module).command, f"mlenv {name}", "##")
    return "\n\n".join(parts) + "\n"


def command_part(command: click.Command, title: str, level: str) -> list[str]:
    """Return one command's paragraphs, and those of its subcommands below it."""
    context = click.Context(command, info_name=title)
    usage = " ".join([title, *command.collect_usage_pieces(context)])
    parts = [f"{level} {title}", f"```\n{usage}\n```", *help_paragraphs(command.help or "")]
    if rows := option_rows(command, context):
        parts.append("\n".join(["| option | |", "|---|---|", *rows]))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            sub = command.get_command(context, name)
            if sub is not None:
                parts += command_part(sub, f"{title} {name}", level + "#")
    return parts


def help_paragraphs(text: str) -> list[str]:
    """Return a command's help as Markdown; a paragraph with click's mark keeps its lines."""
    found = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            kept = textwrap.dedent(paragraph.removeprefix("\b").strip("\n"))
            found.append(f"```\n{kept}\n```")
        else:
            found.append(" ".join(paragraph.split()))
    return [paragraph for paragraph in found if paragraph]


def option_rows(command: click.Command, context: click.Context) -> list[str]:
    """Return the table rows of a command's options."""
    options = [each for each in command.get_params(context) if isinstance(each, click.Option)]
    return [
        f"| `{spelling(option)}` | {(option.help or '').replace('|', chr(92) + '|')} |"
        for option in options
        if "--help" not in option.opts and not option.hidden
    ]


def spelling(option: click.Option) -> str:
    """Return how an option is typed."""
    names = ", ".join([*option.opts, *option.secondary_opts])
    if option.is_flag or option.count:
        return names
    return f"{names} {option.metavar or option.type.name.split()[0].upper()}".replace("|", "\\|")


def errors_page() -> str:
    """Return the reference of the errors: every class with its code, and every finer code that is raised."""
    finer = codes_by_class()
    parts = [
        NOTICE.format("mlenv/errors.py and the places that raise"),
        "# Errors",
        ERRORS_INTRODUCTION,
    ]
    for kind in classes():
        heading = f"## {kind.__name__}"
        facts = f"Code `{kind.code}`, exit status {kind.exit_status}{_above(kind)}."
        parts += [heading, facts, inspect.cleandoc(kind.__doc__ or "")]
        if codes := sorted(finer[kind.__name__] - {kind.code}):
            parts.append("Finer codes: " + ", ".join(f"`{code}`" for code in codes) + ".")
    return "\n\n".join(parts) + "\n"


def _above(kind: type[errors.MlenvError]) -> str:
    parent = kind.__bases__[0].__name__
    return f"; a [`{parent}`](#{parent.lower()})" if parent != "Exception" else ""


def classes() -> list[type[errors.MlenvError]]:
    """Return the error classes in the order of their file."""
    members = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    kinds = [kind for kind in members if issubclass(kind, errors.MlenvError)]
    return sorted(kinds, key=lambda kind: inspect.getsourcelines(kind)[1])


def codes_by_class() -> dict[str, set[str]]:
    """Return the codes given as `code=` where an error is made, by the class's name."""
    found: dict[str, set[str]] = defaultdict(set)
    names = {kind.__name__ for kind in classes()}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and _called(node) in names:
                for keyword in node.keywords:
                    if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                        found[_called(node)].add(str(keyword.value.value))
    return found


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


if __name__ == "__main__":
    main()
