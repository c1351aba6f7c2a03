"""Versions as a spec asks for them: a prefix ("1.7"), an exact one ("1.7.1") or a range (">=2.1,<2.4")."""

from __future__ import annotations

import re
from dataclasses import dataclass

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from mlenv.errors import ImpossibleCombinationError

_PLAIN = re.compile(r"\d+(\.\d+)*")
_MOST_PATCHES = 40
"""More patch releases than any Python minor release has had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a spec's `key` asks for, as written in `text`; no text allows everything."""

    key: str
    text: str | None

    def allows(self, version: str) -> bool:
        """Say whether `version` is one of those asked for; a plain text is a prefix of whole numbers."""
        if self.text is None:
            return True
        if _PLAIN.fullmatch(self.text):
            return has_prefix(version, self.text)
        return self._specifiers().contains(Version(version), prereleases=True)

    def allows_minor(self, minor: str) -> bool:
        """Say whether some patch release of `minor` ("3.11") is one of those asked for."""
        return any(self.allows(f"{minor}.{patch}") for patch in range(_MOST_PATCHES))

    def _specifiers(self) -> SpecifierSet:
        try:
            return SpecifierSet(self.text or "")
        except InvalidSpecifier as error:
            raise ImpossibleCombinationError(
                f"`{self.key}: {self.text}` is neither a version nor a range of versions",
                cause=str(error),
                hint=f'write `{self.key}: "3.11"` or `{self.key}: ">=3.9,<3.12"` with the numbers you mean',
                code="invalid-version",
            ) from error


def has_prefix(version: str, prefix: str) -> bool:
    """Say whether `version` begins with the whole numbers of `prefix`: "7.1" begins 7.1.2 but not 7.10."""
    return numbers(version)[: prefix.count(".") + 1] == numbers(prefix)


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a dotted version, for comparison."""
    return tuple(int(part) for part in version.split("."))
