"""Each text is what uv 0.13 printed for a case that was tried, except where a comment says otherwise."""

from __future__ import annotations

import pytest

from mlenv.errors import IndexUnreachableError, PackageNotFoundError, ResolveError
from mlenv.resolve import uv

NO_SOLUTION = "error: No solution found when resolving dependencies\n  cause: "
MISSING = NO_SOLUTION + (
    "Because no-such-package was not found in the package registry and you require no-such-package, we "
    "can conclude "
    "that your requirements are unsatisfiable.\n"
)
NO_VERSION = NO_SOLUTION + (
    "Because there is no version of numpy==99 and you require numpy==99, we can conclude that your "
    "requirements are "
    "unsatisfiable.\n"
)
WRONG_PYTHON = NO_SOLUTION + (
    "Because scipy==1.17.0 has no wheels with a matching Python implementation tag (e.g., `cp39`) and "
    "you require "
    "scipy==1.17.0, we can conclude that your requirements are unsatisfiable.\n\n"
    "hint: You require CPython 3.9 (`cp39`), but we only found wheels for `scipy` (v1.17.0) with the "
    "following Python "
    "implementation tag: `cp311`\n"
)
ONLY_SOURCE = NO_SOLUTION + (
    "Because all versions of visdom have no usable wheels and you require visdom, we can conclude that your "
    "requirements are unsatisfiable.\n\n"
    "hint: Wheels are required for `visdom` because building from source is disabled for all packages\n"
)
CONFLICT = NO_SOLUTION + (
    "Because torch==1.7.1 depends on numpy and you require torch==1.7.1, numpy<1 and numpy>2, we can "
    "conclude that "
    "your requirements are unsatisfiable.\n"
)
REFUSED = """\
error: Request failed after 3 retries in 6.8s
  cause: Failed to fetch: http://127.0.0.1:9/simple/numpy/
  cause: error sending request for url (http://127.0.0.1:9/simple/numpy/)
  cause: client error (Connect)
  cause: tcp connect error
  cause: Connection refused (os error 111)
"""
# uv before 0.10 drew boxes and broke lines; made up from its documentation
BOXED = """\
  \N{MULTIPLICATION SIGN} No solution found when resolving dependencies:
  ╰─▶ Because no-such-package was not found in the package registry and you
      require no-such-package, we can conclude that your requirements are
      unsatisfiable.
"""


def explain(said):
    return uv.explain(uv.UvError(said), python="3.9.2", platform="x86_64-manylinux_2_31")


@pytest.mark.parametrize("said", [MISSING, BOXED])
def test_a_package_that_no_index_has(said):
    error = explain(said)
    assert isinstance(error, PackageNotFoundError)
    assert error.message == "no package index of this host has `no-such-package`"
    assert "you require no-such-package, we can conclude" in error.cause


def test_a_version_that_no_index_has():
    error = explain(NO_VERSION)
    assert isinstance(error, PackageNotFoundError)
    assert error.message == "no package index of this host has `numpy==99`"
    assert uv.missing_pin(uv.UvError(NO_VERSION)) == ("numpy", "99")
    assert uv.missing_pin(uv.UvError(MISSING)) is None


def test_no_wheel_for_this_python_says_which_exist():
    error = explain(WRONG_PYTHON)
    assert (type(error), error.code) == (ResolveError, "no-wheel")
    assert error.message == "`scipy` 1.17.0 has no wheel for Python 3.9.2 on x86_64-manylinux_2_31"
    assert "`cp311`" in error.hint


def test_a_package_that_is_only_there_as_source():
    error = explain(ONLY_SOURCE)
    assert error.code == "no-wheel"
    assert error.message.startswith("`visdom` has no wheel")


def test_a_conflict_keeps_uvs_explanation():
    error = explain(CONFLICT)
    assert error.code == "conflict"
    assert "torch==1.7.1 depends on numpy" in error.cause


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("Connection refused (os error 111)", "index-unreachable"),
        ("invalid peer certificate: UnknownIssuer", "index-tls"),
        ("operation timed out", "index-timeout"),
        ("HTTP status client error (401 Unauthorized) for url", "index-denied"),
        ("unsuccessful tunnel", "index-unreachable"),
    ],
)
def test_why_an_index_did_not_answer_is_told_apart(reason, code):
    error = explain(REFUSED.replace("Connection refused (os error 111)", reason))
    assert isinstance(error, IndexUnreachableError)
    assert error.code == code
    assert "`http://127.0.0.1:9/simple/numpy/`" in error.message
    assert reason in error.cause


def test_anything_else_is_passed_on_as_uv_said_it():
    error = explain("error: Failed to parse: `numpy=`\n")
    assert error.code == "uv-failed"
    assert "Failed to parse" in error.cause
