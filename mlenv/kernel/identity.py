"""Tell a process from a later one that has its number."""

from __future__ import annotations

from pathlib import Path

_ENDED = (b"Z", b"X")
_START_TIME = 18


def start_time(pid: int) -> int | None:
    """Return when a process started in clock ticks since boot, or None where none runs (a zombie has ended).

    Source: proc_pid_stat(5), field 22; the name (field 2) may hold anything, so fields count from its end.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *numbers = stat.rpartition(b")")[2].split()
    return None if state in _ENDED else int(numbers[_START_TIME])


def boot_id() -> str:
    """Return the identity of this boot; start times of different boots do not compare."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
