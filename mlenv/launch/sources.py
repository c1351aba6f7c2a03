"""Where the bytes a lock pins come from on this host: its package indexes and its Debian mirrors."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from mlenv.spec.reader import read_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mlenv.lock.model import DebPackage, Lock, PythonLock, Wheel


class HostSources:
    """Answers with addresses; looks them up when the first is asked for, never for what is stored."""

    def __init__(self, lock: Lock, *, spec_path: Path, mirror: str | None) -> None:
        self._lock, self._spec_path, self._mirror = lock, spec_path, mirror

    @cached_property
    def _wheels(self) -> Mapping[str, str]:
        from mlenv.resolve.wheels import locate

        return locate(self._lock, directory=self._spec_path.parent)

    @cached_property
    def _mirrors(self) -> Mapping[str, str]:
        from mlenv.resolve.debian import mirrors

        if self._lock.base is None:
            return {}
        return mirrors(self._lock.base.name, mirror=self._mirror or read_spec(self._spec_path).mirror)

    def wheel_url(self, wheel: Wheel) -> str:
        """Return where a wheel can be fetched."""
        return self._wheels[wheel.sha256]

    def python_archive(self, python: PythonLock, directory: Path) -> Path:
        """Fetch a standalone CPython's archive into `directory`."""
        from mlenv.resolve.python import fetch

        return fetch(python, directory)

    def deb_url(self, package: DebPackage) -> str:
        """Return where a Debian package can be fetched."""
        from mlenv.resolve.debian import deb_url

        return deb_url(package, self._mirrors)
