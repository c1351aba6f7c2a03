"""The command line's frame: statuses, the shape of errors, and how little it imports."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

from mlenv import __version__
from mlenv.cli import main, render
from mlenv.errors import ContainerStartError, MlenvError


def outcome(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main.run(list(words))
    out, err = capfd.readouterr()
    return status, out, err


def raising(fault: BaseException):
    def invoke(words):
        raise fault

    return invoke


def test_version_is_data(capfd):
    assert outcome(capfd, "--version") == (0, f"mlenv {__version__}\n", "")
    assert outcome(capfd, "version") == (0, f"mlenv {__version__}\n", "")


def test_version_as_json_carries_the_schema(capfd):
    status, out, err = outcome(capfd, "version", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {"schema": 1, "version": __version__}


def test_an_unknown_command_is_a_usage_error_with_the_nearest_name(capfd):
    assert outcome(capfd, "upp", "quickstart") == (
        2,
        "",
        "error[usage]: there is no command `upp`\n  hint: did you mean `mlenv up`?\n",
    )


def test_a_missing_argument_is_a_usage_error(capfd):
    status, out, err = outcome(capfd, "up")
    assert (status, out) == (2, "")
    assert err == "error[usage]: Missing argument 'NAME'\n  hint: `mlenv up --help` shows what it takes\n"


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_every_command_helps_with_an_example(capfd, name):
    status, out, _ = outcome(capfd, name, "--help")
    assert status == 0
    if name != "kernel":
        assert f"Example: mlenv {name}" in out


def test_every_command_is_listed(capfd):
    status, out, _ = outcome(capfd, "--help")
    assert status == 0
    for name, (_, help_) in main.COMMANDS.items():
        assert name in out
        assert help_.split()[0] in out


def test_errors_are_conversation_and_json_errors_are_data(capfd, monkeypatch):
    fault = MlenvError("it broke", cause="the disk", hint="`mlenv version`", code="broken")
    monkeypatch.setattr(main, "_invoke", raising(fault))
    assert outcome(capfd, "ps") == (
        1,
        "",
        "error[broken]: it broke\n  cause: the disk\n  hint: `mlenv version`\n",
    )
    status, out, err = outcome(capfd, "ps", "--json")
    assert (status, err) == (1, "")
    assert json.loads(out) == {
        "schema": 1,
        "error": {"code": "broken", "message": "it broke", "cause": "the disk", "hint": "`mlenv version`"},
    }


def test_json_after_a_double_dash_is_the_commands_own(capfd, monkeypatch):
    fault = MlenvError("it broke")
    monkeypatch.setattr(main, "_invoke", raising(fault))
    assert outcome(capfd, "run", "x", "--", "--json") == (125, "", "error[failed]: it broke\n")


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "disk-full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "permission-denied"),
        (ContainerStartError("no such program", status=127), 127, "container-start"),
    ],
)
def test_what_the_system_refuses_gets_a_remedy(capfd, monkeypatch, raised, status, code):
    monkeypatch.setattr(main, "_invoke", raising(raised))
    got, out, err = outcome(capfd, "ps")
    assert (got, out) == (status, "")
    assert err.startswith(f"error[{code}]: ")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("run", "x", "true"), 125),
        (("exec", "x", "true"), 125),
        (("start", "-a", "x"), 125),
        (("start", "x"), 1),
        (("ps",), 1),
    ],
)
def test_a_failure_of_ours_is_never_taken_for_the_commands(capfd, monkeypatch, words, status):
    monkeypatch.setattr(main, "_invoke", raising(MlenvError("it broke")))
    assert outcome(capfd, *words)[0] == status


def test_ctrl_c_is_130(capfd, monkeypatch):
    monkeypatch.setattr(main, "_invoke", raising(KeyboardInterrupt()))
    assert outcome(capfd, "ps") == (130, "", "")


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(main, "_invoke", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        main.run(["ps"])


HEAVY = (
    "pydantic",
    "yaml",
    "rich",
    "jupyter_client",
    "jupyter_server",
    "pyroute2",
    "urllib3",
    "asyncio",
    "zmq",
)


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["ps"], ["images", "--help"], ["run", "--help"]]
)
def test_light_commands_import_nothing_heavy(words, tmp_path):
    probe = (
        "import sys; from mlenv.cli import main\n"
        f"status = main.run({words!r})\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.stderr.write(repr((status, loaded)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        capture_output=True,
        text=True,
        check=False,
        env={"MLENV_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.stderr.endswith("(0, [])"), done.stderr


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (777_000_000, "777 MB"),
        (10**13, "10 TB"),
    ],
)
def test_sizes_are_decimal(count, text):
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 seconds"), (1, "1 second"), (59, "59 seconds"), (60, "1 minute"), (90_000, "1 day")],
)
def test_ages_are_worded_as_docker_does(seconds, text):
    assert render.age(1000.0, 1000.0 + seconds) == text


def test_plain_progress_is_lines_on_stderr(capfd):
    progress = render.progress()
    with progress.step("fetching", total=2_000_000, unit="bytes") as step:
        step.advance(1_000_000)
        step.describe("numpy")
    progress.note("done")
    assert capfd.readouterr() == ("", "fetching (2 MB)\ndone\n")


def test_tables_align(capfd):
    render.table(("NAME", "SIZE"), [("a-long-name", "1 MB"), ("b", "20 MB")])
    assert capfd.readouterr().out == "NAME          SIZE\na-long-name   1 MB\nb             20 MB\n"
