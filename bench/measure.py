"""Timing: contenders that do the same work, interleaved in one run, in a new random order each round."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles


class UnusableError(Exception):
    """A contender that this machine cannot run, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to do the work: `run` is timed, `prepare` and `clean` around it are not."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    clean: Callable[[], object] = lambda: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a row promises: at most `most` times `peer`, or `most` seconds where `peer` is None."""

    row: str
    peer: str | None
    most: float


@dataclass(kw_only=True, slots=True)
class Section:
    """One kind of work: times in seconds by contender, what could not take part, and what was promised."""

    title: str
    times: dict[str, list[float]]
    unusable: dict[str, str] = field(default_factory=dict)
    targets: Sequence[Target] = ()
    notes: list[str] = field(default_factory=list)


def race(
    title: str, contenders: Sequence[Contender], *, rounds: int, targets: Sequence[Target] = ()
) -> Section:
    """Time every contender `rounds` times after one untimed run each, without those that fail that."""
    section = Section(title=title, times={}, targets=targets)
    able = []
    for contender in contenders:
        try:
            _once(contender)
        except (UnusableError, OSError) as error:
            section.unusable[contender.name] = str(error)
        else:
            able.append(contender)
            section.times[contender.name] = []
    for number in range(rounds):
        progress(f"{title}: round {number + 1} of {rounds}")
        for contender in random.sample(able, len(able)):
            section.times[contender.name].append(_once(contender))
    return section


def _once(contender: Contender) -> float:
    contender.prepare()
    try:
        begin = time.perf_counter()
        contender.run()
        return time.perf_counter() - begin
    finally:
        contender.clean()


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def call(
    *args: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    seconds: float = 1800,
) -> str:
    """Run a command and return its output. Raises: UnusableError with its last words."""
    done = subprocess.run(
        args, env=env, cwd=cwd, input=stdin or b"", capture_output=True, timeout=seconds, check=False
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        last = " / ".join(line.strip() for line in said[-3:]) or "nothing"
        raise UnusableError(f"`{Path(args[0]).name}` ended with {done.returncode}, saying {last}")
    return done.stdout.decode(errors="replace")


def progress(message: str) -> None:
    """Say on standard error what is being done."""
    sys.stderr.write(f"bench: {message}\n")


def table(section: Section) -> str:
    """Return a section as text: medians with quartiles, ratios to the first row, the promises."""
    lines = [section.title, "-" * len(section.title)]
    width = max(map(len, [*section.times, *section.unusable, "row"]))
    base = next(iter(section.times.values()), [])
    lines.append(f"{'row':<{width}} {'median':>10} {'p25 - p75':>19} {'n':>3} {'ratio':>7}")
    for name, times in section.times.items():
        low, high = spread(times)
        ratio = median(times) / median(base)
        lines.append(
            f"{name:<{width}} {show(median(times)):>10} {show(low) + ' - ' + show(high):>19}"
            f" {len(times):>3} {ratio:>7.2f}"
        )
    lines += [f"{name:<{width}} {'not run: ' + why}" for name, why in section.unusable.items()]
    lines += [f"target: {verdict(section, target)}" for target in section.targets]
    return "\n".join([*lines, *(f"note: {note}" for note in section.notes)])


def verdict(section: Section, target: Target) -> str:
    """Return a promise, what was measured, and whether it was kept."""
    ours = section.times.get(target.row)
    theirs = [1.0] if target.peer is None else section.times.get(target.peer)
    promise = f"{target.row} <= {target.most:g} " + ("s" if target.peer is None else f"x {target.peer}")
    if not ours or not theirs:
        return f"{promise}: not measured"
    found = median(ours) / median(theirs)
    return f"{promise}: {found:.3g}, {'met' if found <= target.most else 'MISSED'}"


def spread(times: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile."""
    if len(times) == 1:
        return times[0], times[0]
    quarter, _, three = quantiles(times, n=4, method="inclusive")
    return quarter, three


def show(seconds: float) -> str:
    """Return a duration with the unit that suits its size."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
