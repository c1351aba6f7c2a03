from __future__ import annotations

import pytest

from mlenv.errors import ResolveError
from mlenv.resolve import tags

PURE = "x-1-py3-none-any.whl"
OLD = "x-1-cp39-cp39-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
NEW = "x-1-cp39-cp39-manylinux_2_28_x86_64.whl"
NEWEST = "x-1-cp39-cp39-manylinux_2_34_x86_64.whl"
MUSL = "x-1-cp39-cp39-musllinux_1_2_x86_64.whl"
ABI3 = "x-1-cp36-abi3-manylinux2010_x86_64.whl"
PLAIN = "x-1-cp39-cp39-linux_x86_64.whl"


@pytest.mark.parametrize(
    ("files", "glibc", "best"),
    [
        ([PURE, OLD, NEW], "2.31", NEW),
        ([PURE, OLD, NEW], "2.27", OLD),
        ([PURE, OLD, NEWEST], "2.31", OLD),
        ([PURE, MUSL], "2.31", PURE),
        ([PURE, ABI3], "2.31", ABI3),
        ([PURE, PLAIN], "2.31", PLAIN),
        (["x-1-1-py3-none-any.whl", "x-1-2-py3-none-any.whl", PURE], "2.31", "x-1-2-py3-none-any.whl"),
    ],
)
def test_the_target_takes_its_most_specific_wheel(files, glibc, best):
    ranks = tags.supported("3.9.2", "amd64", glibc)
    assert tags.best(files, ranks) == best
    assert tags.best(files[::-1], ranks) == best


@pytest.mark.parametrize(
    "file", [MUSL, NEWEST, "x-1-cp310-cp310-manylinux_2_17_x86_64.whl", "x-1-cp39-cp39-win_amd64.whl"]
)
def test_what_the_target_cannot_load_is_never_taken(file):
    with pytest.raises(ResolveError) as caught:
        tags.best([file], tags.supported("3.9.2", "amd64", "2.31"))
    assert caught.value.code == "no-wheel"
    assert file in caught.value.cause


def test_pythons_before_3_8_carry_the_pymalloc_flag():
    ranks = tags.supported("3.7.17", "amd64", "2.31")
    assert tags.best(["x-1-cp37-cp37m-linux_x86_64.whl"], ranks)


@pytest.mark.parametrize(
    ("glibc", "platform"),
    [("2.17", "2_17"), ("2.30", "2_28"), ("2.31", "2_31"), ("2.36", "2_36"), ("2.41", "2_40")],
)
def test_uv_is_told_the_newest_platform_it_knows_that_the_base_satisfies(glibc, platform):
    assert tags.uv_platform("amd64", glibc) == f"x86_64-manylinux_{platform}"
