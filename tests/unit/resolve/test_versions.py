from __future__ import annotations

import pytest

from mlenv.errors import ImpossibleCombinationError
from mlenv.resolve.versions import Wanted, has_prefix


@pytest.mark.parametrize(
    ("text", "version", "fits"),
    [
        (None, "1.7.1", True),
        ("1.7", "1.7.1", True),
        ("1.7", "1.10.0", False),
        ("1.1", "1.10.0", False),
        ("3.10", "3.10.4", True),
        ("3.1", "3.10.4", False),
        ("3.11.2", "3.11.2", True),
        ("3.11.2", "3.11.20", False),
        (">=2.1,<2.4", "2.3.1", True),
        (">=2.1,<2.4", "2.4.0", False),
        ("~=2.1.0", "2.1.2", True),
    ],
)
def test_a_spec_asks_for_a_prefix_an_exact_version_or_a_range(text, version, fits):
    assert Wanted(key="python", text=text).allows(version) is fits


@pytest.mark.parametrize(
    ("text", "minor", "fits"),
    [("3.8", "3.8", True), (">=3.9.4,<3.10", "3.9", True), (">3.9,<3.10", "3.8", False)],
)
def test_a_minor_release_fits_when_some_patch_of_it_does(text, minor, fits):
    assert Wanted(key="python", text=text).allows_minor(minor) is fits


def test_seven_one_is_no_prefix_of_seven_ten():
    assert has_prefix("7.1.2", "7.1")
    assert not has_prefix("7.10.2", "7.1")


def test_a_text_that_is_no_version_names_its_key():
    with pytest.raises(ImpossibleCombinationError) as caught:
        Wanted(key="pytorch", text="latest").allows("2.0.0")
    assert caught.value.code == "invalid-version"
    assert "pytorch: latest" in caught.value.message
