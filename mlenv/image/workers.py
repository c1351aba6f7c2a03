"""Unpacking wheels in processes of their own: Python's lock would let threads wait for each other.

A worker is a fresh interpreter that reads one job per line on stdin and answers one line on stdout, both
JSON. It ends when its stdin does, so it outlives its parent by one wheel at most.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlenv.errors import BadWheelError, ImageError
from mlenv.image.layer import LayerFacts
from mlenv.image.wheel import unpack_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from mlenv.image.workers import serve; serve()"
"""A worker finds modules where its parent does, and nowhere else: -I alone would forget PYTHONPATH."""


class Workers:
    """Processes that unpack wheels; a job goes to the one that is free."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._free: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        for process in processes:
            self._free.put(process)

    def unpack(self, wheel: Path, root: Path, *, python: str) -> LayerFacts:
        """Unpack a wheel as `mlenv.image.wheel.unpack_wheel` does; may be called from several threads.

        Raises: BadWheelError, OSError, ImageError where a worker was killed.
        """
        process = self._free.get()
        try:
            answer = _ask(process, {"wheel": str(wheel), "root": str(root), "python": python})
        finally:
            self._free.put(process)
        return _facts(answer)


@contextmanager
def workers(count: int) -> Iterator[Workers]:
    """Give `count` workers; they are ended when the block is left, whatever they are doing."""
    with ExitStack() as stack:
        yield Workers([stack.enter_context(_worker()) for _ in range(count)])


@contextmanager
def _worker() -> Iterator[subprocess.Popen[str]]:
    # A session of its own, so that Ctrl-C reaches only the parent, which then ends the worker.
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _PROGRAM, *(path for path in sys.path if path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _ask(process: subprocess.Popen[str], job: dict[str, str]) -> dict[str, Any]:
    jobs, answers = process.stdin, process.stdout
    if jobs is None or answers is None:
        raise ValueError("a worker is started with pipes")
    try:
        jobs.write(json.dumps(job) + "\n")
        jobs.flush()
        answer: dict[str, Any] = json.loads(answers.readline())
    except (BrokenPipeError, ValueError) as error:
        raise ImageError(
            f"unpacking `{Path(job['wheel']).name}` ended early",
            cause="its process was killed, perhaps for want of memory",
            hint="run the command again: what is finished is kept",
        ) from error
    return answer


def _facts(answer: dict[str, Any]) -> LayerFacts:
    match answer:
        case {"facts": facts, "index": index}:
            return LayerFacts(**facts, index=os.fsencode(index))
        case {"bad_wheel": arguments}:
            raise BadWheelError(arguments["message"], cause=arguments["cause"], hint=arguments["hint"])
        case {"os_error": arguments}:
            raise OSError(*arguments)
        case _:
            raise ImageError(f"an unpacking process answered {answer!r}")


def serve() -> None:
    """Answer jobs until there are no more; what a worker's process runs."""
    for line in sys.stdin:
        job = json.loads(line)
        sys.stdout.write(json.dumps(_answer(job)) + "\n")
        sys.stdout.flush()


def _answer(job: dict[str, str]) -> dict[str, Any]:
    try:
        facts = unpack_wheel(Path(job["wheel"]), Path(job["root"]), python=job["python"])
    except BadWheelError as error:
        return {"bad_wheel": {"message": error.message, "cause": error.cause, "hint": error.hint}}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror, error.filename]}
    return {"facts": facts.meta, "index": os.fsdecode(facts.index)}
