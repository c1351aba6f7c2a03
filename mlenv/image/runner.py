"""The one thing an image build asks of the outside: run a command in a container."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class Runner(Protocol):
    """Runs a command over `layers` (host directories, bottom first), its writes going to `upper`."""

    def run(
        self,
        args: Sequence[str],
        *,
        layers: Sequence[Path],
        upper: Path,
        env: Mapping[str, str],
        cwd: str = "/",
        network: bool = False,
        mounts: Sequence[tuple[Path, str]] = (),
        log: Path,
    ) -> int:
        """Return the command's exit status; its output goes to `log`.

        With no `layers`, `upper` itself is the root. `mounts` are host directories shown at container paths.
        Changes of ownership succeed and do nothing.
        """
