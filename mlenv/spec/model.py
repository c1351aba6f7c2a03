"""The environment spec as values: what `envs/NAME.yaml` can say; reference and JSON Schema come from here.

Texts come in as they were written (`3.10` is never 3.1) and each field turns them into its value. The reader
adds the places of faults; a starting kernel reads specs without this module, because pydantic costs 100 ms.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from mlenv.spec import values
from mlenv.spec.values import (
    BadValueError,
    GpuSelection,
    PortSpec,
    parse_gpus,
    parse_port,
    parse_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "CONFLICTS_WITH_IMAGE",
    "BadValueError",
    "BaseSpec",
    "GpuRequest",
    "GpuSelection",
    "KernelSpec",
    "MountSpec",
    "PortSpec",
    "ResourceSpec",
    "Spec",
    "parse_gpus",
    "parse_port",
    "parse_size",
]

CONFLICTS_WITH_IMAGE = ("python", "pytorch", "cuda", "cudnn", "packages", "requirements", "apt", "base")
"""Keys that say how an image is made, and so cannot stand beside `image`."""

_MIN_MEMORY = 6 * 2**20
"""Bytes; less cannot start a process. Source: docker-run(1), `--memory`."""

_BASE_PATTERN = "^debian:(" + "|".join([*values.DEBIAN, *values.DEBIAN.values()]) + ")$"
_APT_PATTERN = r"^[a-z0-9][a-z0-9+.-]+(=\S+)?$"
_VERSION_PATTERN = r"^[0-9][0-9A-Za-z.+!*-]*$|[<>=!~]"
_SIZE_PATTERN = r"^[0-9]+(\.[0-9]+)? ?([kKmMgGtT]?[iI]?[bB]|[kKmMgGtT][iI]?)?$"


def _text(pattern: str | None = None, **more: Any) -> WithJsonSchema:
    """Return the schema of a text that YAML readers of other programs may take for a number."""
    return WithJsonSchema({"type": ["string", "number"], **({"pattern": pattern} if pattern else {}), **more})


def _words(*words: str | bool) -> WithJsonSchema:
    """Return the schema of a text that is one of a few words."""
    return WithJsonSchema({"enum": list(words)})


def _optional(check: Callable[[str], str | None]) -> Callable[[str | None], str | None]:
    """Return a check that lets None, the default, through."""
    return lambda text: None if text is None else check(text)


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _whole_number(value: object) -> object:
    return values.whole_number(value) if isinstance(value, str) else value


def _cpus(value: object) -> object:
    return values.cpus(value) if isinstance(value, str) else value


def _boolean(value: object) -> object:
    return values.boolean(value) if isinstance(value, str) else value


def _port(value: object) -> PortSpec:
    if isinstance(value, str):
        return parse_port(value)
    if isinstance(value, PortSpec):
        return value
    raise BadValueError("a port is written as one text", 'write `"8097:8097"`, the host\'s port first')


def _gpu_count(value: object) -> object:
    if isinstance(value, str) and value not in ("all", "none"):
        return values.whole_number(value, hint="write a number, or `all`; for no GPU `gpus: none`")
    return value


def _interrupt_mode(text: str) -> str:
    return values.one_of(text, ("signal", "message"))


def _enough_memory(size: int | None) -> int | None:
    if size is not None and size < _MIN_MEMORY:
        raise BadValueError(f"{size} bytes are too little to start anything", "add a unit: `16GB`")
    return size


Text = Annotated[str, _text()]
Name = Annotated[str, AfterValidator(values.name), _text(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
Boolean = Annotated[
    bool, BeforeValidator(_boolean), _words("true", "True", "TRUE", "false", "False", "FALSE", True, False)
]
Variable = Annotated[str, AfterValidator(values.variable)]
Variables = dict[Variable, Annotated[str, WithJsonSchema({"type": ["string", "number", "boolean"]})]]
Package = Annotated[
    str, AfterValidator(values.requirement), WithJsonSchema({"type": "string", "minLength": 1})
]
AptPackage = Annotated[
    str, AfterValidator(values.apt), WithJsonSchema({"type": "string", "pattern": _APT_PATTERN})
]
Port = Annotated[
    PortSpec, BeforeValidator(_port), WithJsonSchema({"type": "string", "pattern": r"^([^:]*|\[.*\]):[0-9]+"})
]
GpuId = Annotated[str, AfterValidator(values.gpu_id), WithJsonSchema({"type": ["string", "integer"]})]


def _or_short(*short: dict[str, Any]) -> Any:
    """Return a change of a mapping's schema that allows short forms beside it."""

    def widen(schema: dict[str, Any]) -> None:
        full = dict(schema)
        schema.clear()
        schema["anyOf"] = [*short, full]

    return widen


class _Part(BaseModel):
    """A mapping of the spec: its keys are all there are, its values do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseSpec(_Part):
    """The operating system below everything else."""

    model_config = ConfigDict(json_schema_extra=_or_short({"type": "string", "pattern": _BASE_PATTERN}))

    name: Annotated[str, AfterValidator(values.base), _text(_BASE_PATTERN)] = Field(
        description="Debian's release by number or code name.", examples=["debian:12", "debian:bookworm"]
    )
    mirror: Annotated[
        str | None,
        AfterValidator(_optional(values.mirror)),
        WithJsonSchema({"type": "string", "pattern": "^(https?|file)://"}),
    ] = Field(
        default=None,
        description="Where Debian's packages come from; absent = as the host's apt is configured.",
        examples=["https://mirror.example/debian"],
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class MountSpec(_Part):
    """A directory or file of the host, seen in the container."""

    model_config = ConfigDict(json_schema_extra=_or_short({"type": "string", "pattern": ":/"}))

    source: Annotated[str, AfterValidator(values.mount_source), _text()] = Field(
        description="Path on the host: relative to the spec, absolute, or below `~`.", examples=["./data"]
    )
    target: Annotated[str, AfterValidator(values.mount_target), _text("^/")] = Field(
        description="Absolute path in the container.", examples=["/data"]
    )
    readonly: Boolean = Field(
        default=False, description="Whether the container may only read it.", examples=["true"]
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return values.mount(value) if isinstance(value, str) else value

    def host_path(self, spec_directory: Path) -> Path:
        """Return the source as a path of the host; a relative one counts from the spec's directory."""
        return spec_directory / Path(self.source).expanduser()


class GpuRequest(_Part):
    """The GPUs that the container sees: `auto`, `all`, `none`, how many, or which."""

    model_config = ConfigDict(
        json_schema_extra=_or_short(
            {"enum": ["auto", "all", "none"]},
            {"type": ["string", "integer"], "pattern": "^[0-9]+$", "minimum": 1},
            {"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 1},
        )
    )

    count: Annotated[
        int | Literal["all", "none"] | None,
        BeforeValidator(_gpu_count),
        WithJsonSchema({"type": ["string", "integer"], "pattern": "^(all|none|[0-9]+)$", "minimum": 1}),
    ] = Field(
        default=None,
        description="How many GPUs, or `all`; absent = one or more that are there.",
        examples=["1"],
    )
    ids: tuple[GpuId, ...] = Field(
        default=(), description="Which GPUs, by index or UUID; instead of `count`.", examples=[["0", "1"]]
    )
    memory: Annotated[int | None, BeforeValidator(_size), _text(_SIZE_PATTERN)] = Field(
        default=None, description="Memory that each GPU has at least.", examples=["20GB"]
    )

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, value: object) -> object:
        if isinstance(value, str):
            value = parse_gpus(value)
        if isinstance(value, list):
            value = values.gpu_ids(value) if not value else {"ids": value}
        if isinstance(value, GpuSelection):
            count = {"auto": None, "ids": None, "count": value.count}.get(value.mode, value.mode)
            return {"count": count, "ids": list(value.ids), "memory": value.memory}
        return value

    @model_validator(mode="after")
    def _one_of_count_and_ids(self) -> GpuRequest:
        if self.ids and self.count is not None:
            raise BadValueError("`count` and `ids` cannot stand together", "remove `count`")
        if self.ids:
            values.gpu_ids(self.ids)
        return self

    @property
    def selection(self) -> GpuSelection:
        """Return the request as a selection."""
        if self.ids:
            return GpuSelection(mode="ids", ids=self.ids, memory=self.memory)
        if isinstance(self.count, int):
            return GpuSelection(mode="count", count=self.count, memory=self.memory)
        return GpuSelection(mode=self.count or "auto", memory=self.memory)


class ResourceSpec(_Part):
    """Limits of the container. Sizes: `GB` is 10^9 bytes, `GiB` and the single letter `g` are 2^30."""

    memory: Annotated[
        int | None, BeforeValidator(_size), AfterValidator(_enough_memory), _text(_SIZE_PATTERN)
    ] = Field(
        default=None,
        description="Memory; the container's processes are killed above it.",
        examples=["16GB", "16GiB"],
    )
    cpus: Annotated[
        float | None, BeforeValidator(_cpus), _text(r"^[0-9]+(\.[0-9]+)?$", exclusiveMinimum=0)
    ] = Field(default=None, description="CPUs' worth of time; need not be whole.", examples=["4", "1.5"])
    shm: Annotated[int | None, BeforeValidator(_size), _text(_SIZE_PATTERN)] = Field(
        default=None,
        description="Size of `/dev/shm`, which DataLoader workers pass tensors through.",
        examples=["4GB"],
    )
    pids: Annotated[int | None, BeforeValidator(_whole_number), _text(r"^[0-9]+$", minimum=1)] = Field(
        default=None, description="Processes and threads at once.", examples=["4096"]
    )


class KernelSpec(_Part):
    """How the environment appears in Jupyter."""

    display_name: Annotated[str | None, AfterValidator(_optional(values.line)), _text()] = Field(
        default=None,
        description="Name in the launcher; absent = made from the spec's name.",
        examples=["PyTorch 1.7"],
    )
    env: Variables = Field(
        default_factory=dict,
        description="Variables of kernels only, over those of `env`.",
        examples=[{"CUDA_LAUNCH_BLOCKING": "1"}],
    )
    interrupt_mode: Annotated[str, AfterValidator(_interrupt_mode), _words("signal", "message")] = Field(
        default="signal",
        description="How a running cell is interrupted: SIGINT, or a message.",
        examples=["signal"],
    )


class Spec(_Part):
    """An environment: what it is made of, and how its container runs. Every key is optional."""

    name: Name = Field(
        description="The environment's name; absent = the file's name.", examples=["pytorch-1.7-cu101"]
    )
    description: Text = Field(
        default="", description="One line for people.", examples=["PyTorch 1.7 for CUDA 10.1"]
    )
    python: Annotated[str | None, AfterValidator(_optional(values.python)), _text(_VERSION_PATTERN)] = Field(
        default=None,
        description="Python version or range; absent = one that the packages have wheels for.",
        examples=["3.8", ">=3.9,<3.12"],
    )
    pytorch: Annotated[
        str | None, AfterValidator(_optional(values.pytorch)), _text(_VERSION_PATTERN + "|^none$")
    ] = Field(
        default=None,
        description='PyTorch version or range, `"1.7"` = the newest 1.7.x; `none` or absent = no PyTorch.',
        examples=["1.7", "2.13.0", "none"],
    )
    cuda: Annotated[
        str | None, AfterValidator(_optional(values.cuda)), _text(r"^cpu$|^[0-9]+\.[0-9]+(\.[0-9]+)?$")
    ] = Field(
        default=None,
        description="CUDA version of the PyTorch build, or `cpu`; absent = the best for the GPUs found.",
        examples=["10.1", "cpu"],
    )
    cudnn: Annotated[
        str | None, AfterValidator(_optional(values.cudnn)), _text(r"^[0-9]+(\.[0-9]+){0,3}$")
    ] = Field(
        default=None,
        description='A check on the chosen PyTorch build\'s cuDNN; `"7"` matches 7.6.3.',
        examples=["7.6"],
    )
    packages: tuple[Package, ...] = Field(
        default=(),
        description="Python packages as pip reads them (PEP 508), local ones as paths seen from the spec.",
        examples=[["torchvision", "visdom>=0.1.8", "./libs/mypkg"]],
    )
    requirements: Annotated[str | None, AfterValidator(_optional(values.relative_file)), _text("^[^/~]")] = (
        Field(
            default=None,
            description="A requirements file, relative to the spec.",
            examples=["requirements.txt"],
        )
    )
    apt: tuple[AptPackage, ...] = Field(
        default=(), description="Debian packages, with `=VERSION` at will.", examples=[["git", "libgl1"]]
    )
    base_system: BaseSpec | None = Field(
        default=None,
        alias="base",
        description="Operating system below everything else; absent = the newest that the wheels run on.",
        examples=["debian:12", {"name": "debian:12", "mirror": "https://mirror.example/debian"}],
    )
    image: Annotated[str | None, AfterValidator(_optional(values.image)), _text()] = Field(
        default=None,
        description="An OCI image to use as it is, instead of the keys that say how to make one.",
        examples=["localhost:5000/course/pytorch:1.7.1-cuda11.0-cudnn8-runtime"],
    )
    build: tuple[
        Annotated[str, AfterValidator(values.command), WithJsonSchema({"type": "string", "minLength": 1})],
        ...,
    ] = Field(
        default=(),
        description="Shell commands run inside while building, one layer each.",
        examples=[["python -m nltk.downloader punkt"]],
    )
    env: Variables = Field(
        default_factory=dict, description="Environment variables.", examples=[{"OMP_NUM_THREADS": "4"}]
    )
    ports: tuple[Port, ...] = Field(
        default=(),
        description="Ports to publish, `[ADDRESS:]HOST:CONTAINER[/tcp|udp]`; on 127.0.0.1 by default.",
        examples=[["8097:8097"]],
    )
    mounts: tuple[MountSpec, ...] = Field(
        default=(),
        description="Directories and files of the host; `SOURCE:TARGET[:ro]` is the short form.",
        examples=[[{"source": "./data", "target": "/data", "readonly": "true"}]],
    )
    gpu_request: GpuRequest = Field(
        default_factory=GpuRequest,
        alias="gpus",
        description="GPUs: `auto` (default: those there are), `all`, `none`, a number, a list, a mapping.",
        examples=["auto", "1", ["0", "1"], {"count": "1", "memory": "20GB"}],
    )
    resources: ResourceSpec = Field(
        default_factory=ResourceSpec,
        description="Limits; absent = those of the host.",
        examples=[{"memory": "16GB", "cpus": "4", "shm": "4GB", "pids": "4096"}],
    )
    network: Annotated[str, AfterValidator(values.network), _words(*values.NETWORKS)] = Field(
        default="private",
        description="`private` reaches out and is reached through `ports`; `none`; `host`: the host's own.",
        examples=["private"],
    )
    kernel: KernelSpec = Field(
        default_factory=KernelSpec,
        description="The environment as a Jupyter kernel.",
        examples=[{"display_name": "PyTorch 1.7 (CUDA 10.1)"}],
    )

    _path: Path | None = PrivateAttr(default=None)
    _digest: str | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Keep the path and the digest of the document that the spec was read from."""
        if isinstance(context, dict):
            self._path = context["path"]
            self._digest = context["digest"]

    @property
    def base(self) -> str | None:
        """Return the base's name, "debian:12" or the like, None where the spec leaves it open."""
        return self.base_system.name if self.base_system else None

    @property
    def mirror(self) -> str | None:
        """Return the Debian mirror that the spec names, None where the host's is used."""
        return self.base_system.mirror if self.base_system else None

    @property
    def gpus(self) -> GpuSelection:
        """Return which GPUs the container gets."""
        return self.gpu_request.selection

    @property
    def path(self) -> Path:
        """Return the file that the spec was read from; of one made in code, where it would lie."""
        return self._path or Path(f"{self.name}.yaml").absolute()

    @property
    def digest(self) -> str:
        """Return the document's digest ("sha256:…"); of a spec made in code, that of its values."""
        if self._digest is not None:
            return self._digest
        content = self.model_dump(mode="json", exclude={"name", "description"})
        return "sha256:" + sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def requirements_path(self) -> Path | None:
        """Return the requirements file, None where the spec names none."""
        return self.path.parent / self.requirements if self.requirements is not None else None
