"""Every failure mlenv can report, as one tree.

MlenvError
├── UsageError                     exit 2: the command line asks for something impossible
├── InvalidSpecError               exit 2: the YAML spec has faults (all of them, with places)
├── SpecNotFoundError              exit 2
├── ResolveError                   the spec is well-formed but nothing satisfies it
│   ├── ImpossibleCombinationError exit 2
│   ├── PackageNotFoundError
│   └── IndexUnreachableError      an index or mirror did not answer
├── LockError                      the lock is damaged or does not belong to its spec
├── ImageError                     building, storing or exporting an image failed
│   ├── ImageNotFoundError
│   ├── DownloadError              a file did not come, or is not the one that was locked
│   ├── BadWheelError              a wheel is damaged or not what its RECORD says
│   └── StoreError                 the store cannot be written or is damaged
├── ContainerError                 exit 125: the core failed before or around the command
│   ├── NoSuchContainerError
│   ├── NameInUseError
│   ├── PortInUseError
│   ├── GpuNotFoundError
│   └── ContainerStartError        125, 126 not executable, 127 not found
├── KernelError                    a kernel or its kernelspec cannot be used
└── JupyterError                   the Jupyter server cannot be started or reached

An error carries a stable kebab-case `code`, a `message` (what failed), a `cause` (why, from the system) and a
`hint` (what to do). Libraries raise; `cli.main` alone prints and exits.
"""

from __future__ import annotations


class MlenvError(Exception):
    """A failure with a stable code, a cause and a remedy.

    `message` says what failed, with names and paths; `cause` why, as the system said it; `hint` what to do,
    as a command or an edit. `exit_status` is what the command line ends with.
    """

    code = "failed"
    exit_status = 1

    def __init__(
        self, message: str, *, cause: str | None = None, hint: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        """Return the error as the command line shows it, without colour."""
        lines = [f"error[{self.code}]: {self.message}"]
        if self.cause:
            lines.append("  cause: " + self.cause.replace("\n", "\n         "))
        if self.hint:
            lines.append("  hint: " + self.hint.replace("\n", "\n        "))
        return "\n".join(lines)


class UsageError(MlenvError):
    """The command line asks for something that cannot be."""

    code = "usage"
    exit_status = 2


# --- spec


class InvalidSpecError(MlenvError):
    """A spec with faults; the message holds every one as `file:line:column`."""

    code = "invalid-spec"
    exit_status = 2


class SpecNotFoundError(MlenvError):
    """No spec has this name or lies at this path."""

    code = "spec-not-found"
    exit_status = 2


# --- resolve


class ResolveError(MlenvError):
    """A well-formed spec that nothing satisfies."""

    code = "unresolvable"


class ImpossibleCombinationError(ResolveError):
    """Versions that were never built together."""

    code = "impossible-combination"
    exit_status = 2


class PackageNotFoundError(ResolveError):
    """A package, or a version of it, that no configured index has."""

    code = "package-not-found"


class IndexUnreachableError(ResolveError):
    """A package index or mirror that did not answer."""

    code = "index-unreachable"


# --- lock


class LockError(MlenvError):
    """A lock that is damaged or belongs to another spec."""

    code = "invalid-lock"


# --- image


class ImageError(MlenvError):
    """Building, storing or exporting an image failed."""

    code = "image-failed"


class ImageNotFoundError(ImageError):
    """The store has no image of this reference."""

    code = "image-not-found"


class DownloadError(ImageError):
    """A file that could not be fetched, or is not the one that was locked."""

    code = "download-failed"


class BadWheelError(ImageError):
    """A wheel that is damaged or not what its RECORD says."""

    code = "bad-wheel"


class StoreError(ImageError):
    """The store cannot be written, is full, or is damaged."""

    code = "store"


# --- container


class ContainerError(MlenvError):
    """The container core failed before or around the command."""

    code = "container"
    exit_status = 125


class NoSuchContainerError(ContainerError):
    """No container has this name or id."""

    code = "no-such-container"
    exit_status = 1


class NameInUseError(ContainerError):
    """Another container has this name."""

    code = "name-in-use"


class PortInUseError(ContainerError):
    """A host port that something else listens on."""

    code = "port-in-use"


class GpuNotFoundError(ContainerError):
    """A GPU that was asked for and is not there."""

    code = "gpu-not-found"


class ContainerStartError(ContainerError):
    """The command could not be started; `exit_status` is 125, 126 or 127 as Docker's."""

    code = "container-start"

    def __init__(
        self, message: str, *, cause: str | None = None, hint: str | None = None, status: int = 125
    ) -> None:
        super().__init__(message, cause=cause, hint=hint)
        self.exit_status = status


# --- kernel and jupyter


class KernelError(MlenvError):
    """A kernel or its kernelspec cannot be used."""

    code = "kernel"


class JupyterError(MlenvError):
    """The Jupyter server cannot be started or reached."""

    code = "jupyter-server"
