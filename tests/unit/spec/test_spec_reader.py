"""Reading specs: values, places, every fault at once, and inputs that are no spec at all."""

# ruff: noqa: E501, ISC004 - tables of texts are compared line by line

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mlenv.errors import InvalidSpecError, SpecNotFoundError
from mlenv.spec import nodes
from mlenv.spec.model import GpuSelection, PortSpec, Spec
from mlenv.spec.reader import MAX_BYTES, read_document, read_spec

FULL = """\
# yaml-language-server: $schema=x
name: pytorch-1.7-cu101
description: PyTorch 1.7 for CUDA 10.1, as in the course
python: "3.8"
pytorch: "1.7"
cuda: "10.1"
cudnn: "7.6"
packages: [torchvision, "visdom>=0.1.8", ./libs/mypkg]
requirements: requirements.txt
apt: [git, libgl1, "curl=7.88.1-10+deb12u8"]
base: debian:12
build: ["python -m nltk.downloader punkt"]
env: {OMP_NUM_THREADS: "4", EMPTY: }
ports: ["8097:8097", "0.0.0.0:6006:6006/udp", "[::1]:1:2"]
mounts: [{source: ./data, target: /data/, readonly: true}, "~/models:/models:ro", "./out:/out"]
gpus: auto
resources: {memory: 16GB, cpus: 4, shm: 4g, pids: 4096}
network: private
kernel: {display_name: "PyTorch 1.7 (CUDA 10.1)", env: {A: b}, interrupt_mode: message}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "libs" / "mypkg").mkdir(parents=True)
    (tmp_path / "libs" / "mypkg" / "pyproject.toml").touch()
    (tmp_path / "requirements.txt").write_text("numpy\n")
    return tmp_path


def test_the_whole_interface_is_read(project: Path, read: Callable[[str], Spec]) -> None:
    spec = read(FULL)
    assert (spec.name, spec.python, spec.pytorch, spec.cuda, spec.cudnn) == (
        "pytorch-1.7-cu101",
        "3.8",
        "1.7",
        "10.1",
        "7.6",
    )
    assert spec.packages == ("torchvision", "visdom>=0.1.8", "./libs/mypkg")
    assert spec.apt == ("git", "libgl1", "curl=7.88.1-10+deb12u8")
    assert (spec.base, spec.mirror, spec.image) == ("debian:12", None, None)
    assert spec.requirements_path == project / "requirements.txt"
    assert spec.env == {"OMP_NUM_THREADS": "4", "EMPTY": ""}
    assert spec.ports == (
        PortSpec(host_ip="127.0.0.1", host_port=8097, container_port=8097, protocol="tcp"),
        PortSpec(host_ip="0.0.0.0", host_port=6006, container_port=6006, protocol="udp"),  # noqa: S104 - asked for
        PortSpec(host_ip="::1", host_port=1, container_port=2),
    )
    assert [(m.source, m.target, m.readonly) for m in spec.mounts] == [
        ("./data", "/data", True),
        ("~/models", "/models", True),
        ("./out", "/out", False),
    ]
    assert spec.mounts[0].host_path(spec.path.parent) == project / "data"
    assert spec.mounts[1].host_path(spec.path.parent) == Path.home() / "models"
    assert spec.resources.model_dump() == {"memory": 16 * 10**9, "cpus": 4.0, "shm": 4 * 2**30, "pids": 4096}
    assert spec.kernel.model_dump() == {
        "display_name": "PyTorch 1.7 (CUDA 10.1)",
        "env": {"A": "b"},
        "interrupt_mode": "message",
    }
    assert (spec.network, spec.gpus) == ("private", GpuSelection())
    assert spec.build == ("python -m nltk.downloader punkt",)
    assert spec.path == project / "x.yaml"
    assert spec.digest == read_document(spec.path).digest


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("python: 3.10\n", "python", "3.10"),
        ("pytorch: 1.10\n", "pytorch", "1.10"),
        ("pytorch: none\n", "pytorch", None),
        ("cuda: 11.0\n", "cuda", "11.0"),
        ("env: {A: no, B: 1e3, C: 0x10, D: 22:22, E: ~, F: 2020-01-01}\n", "env", None),
        ("base: debian:bookworm\n", "base", "debian:12"),
        ("base: {name: debian:11, mirror: https://mirror.example/debian}\n", "mirror", "https://mirror.example/debian"),
        ("name: no\n", "name", "no"),
        ("{}\n", "name", "x"),
        ("image: localhost:5000/course/pytorch:1.7@sha256:" + "0" * 64 + "\n", "image", None),
        ("packages: &p [numpy]\nbuild: *p\n", "build", ("numpy",)),
        ("gpus: 2\n", "gpus", GpuSelection(mode="count", count=2)),
        ("gpus: none\n", "gpus", GpuSelection(mode="none")),
        ("gpus: [0, GPU-6e7b5a3c-aa]\n", "gpus", GpuSelection(mode="ids", ids=("0", "GPU-6e7b5a3c-aa"))),
        (
            "gpus: {count: 1, memory: 20GB}\n",
            "gpus",
            GpuSelection(mode="count", count=1, memory=20 * 10**9),
        ),
        ("gpus: {count: all}\n", "gpus", GpuSelection(mode="all")),
        ("gpus: {memory: 8GiB}\n", "gpus", GpuSelection(mode="auto", memory=8 * 2**30)),
        ("gpus: {ids: [1]}\n", "gpus", GpuSelection(mode="ids", ids=("1",))),
        ("\ufeffpython: 3.9\r\nnetwork: host\r\n", "network", "host"),
        ("python: !!str 3.10\n", "python", "3.10"),
        ("python: !!float 3.10\n", "python", "3.10"),
        ("packages: ['pkg @ git+https://example.org/x.git@main', 'a[b]>=1; python_version < \"3.9\"']\n", "apt", ()),
    ],
)  # fmt: skip
def test_values(read: Callable[[str], Spec], text: str, field: str, value: object) -> None:
    spec = read(text)
    if value is not None or field == "pytorch":
        assert getattr(spec, field) == value


def test_scalars_stay_as_they_are_written(read: Callable[[str], Spec]) -> None:
    spec = read("env: {A: no, B: 1e3, C: 0x10, D: 22:22, E: ~, F: 2020-01-01, G: 3.10}\n")
    assert spec.env == {
        "A": "no",
        "B": "1e3",
        "C": "0x10",
        "D": "22:22",
        "E": "~",
        "F": "2020-01-01",
        "G": "3.10",
    }


FAULTS = {
    # keys
    "pyton: 3.8": ["1:1: unknown key `pyton` = did you mean `python`?"],
    "Packages: [a]": ["1:1: unknown key `Packages` = did you mean `packages`?"],
    "dependencies: [a]": ["1:1: unknown key `dependencies` = write `packages`"],
    "volumes: []": ["1:1: unknown key `volumes` = write `mounts`"],
    "shm: 4GB": ["1:1: unknown key `shm` = it belongs below `resources:`"],
    "resources: {cpu: 4}": ["1:13: unknown key `cpu` in `resources` = did you mean `cpus`?"],
    "resources: {python: 3}": ["1:13: unknown key `python` in `resources` = it belongs to the top level"],
    "mounts: [{source: a, target: /b, typ: x}]": [
        "1:34: unknown key `typ` in `mounts[0]` = known here: source, target, readonly"
    ],
    "python: 3.8\npython: 3.9": ["2:1: the key `python` stands twice = line 1 has it too: keep one"],
    "env:\n  A: 1\n  B: 2\n  A: 3": ["4:3: the key `A` stands twice = line 2 has it too: keep one"],
    "mounts: [{source: a, target: /b, source: c}]": [
        "1:34: the key `source` stands twice = line 1 has it too: keep one"
    ],
    "? [a]\n: b": ["1:3: a key must be a text = write `key: value`"],
    "<<: {python: 3}": ["1:1: merge keys (`<<`) are not read in a spec = write the keys out"],
    # kinds
    "python: [3.8]": ['1:9: `python` must be a text, not a list = write `"3.8"` without brackets'],
    "python: {a: b}": ["1:9: `python` must be a text, not a mapping"],
    "packages: numpy": ["1:11: `packages` must be a list, not the text `numpy` = write `[numpy]`"],
    "packages: {numpy: 1}": ["1:11: `packages` must be a list, not a mapping = begin each line with `- `"],
    "packages: [[a]]": [
        '1:12: `packages[0]` must be a text, not a list = write `"a"` without brackets'
    ],
    "env: [A=1]": ["1:6: `env` must be a mapping, not a list = write `KEY: value` lines below it"],
    "env: {A: [x]}": ['1:10: `env.A` must be a text, not a list = write `"x"` without brackets'],
    "resources: 16g": [
        "1:12: `resources` must be a mapping, not the text `16g` = write `KEY: value` lines below it"
    ],
    "ports: [{host: 1}]": [
        "1:9: `ports[0]`: a port is written as one text = write `\"8097:8097\"`, the host's port first"
    ],
    "python:": ["1:1: `python` has no value = write one, or remove it"],
    "packages:\n": ["1:1: `packages` has no value = write one, or remove it"],
    "kernel: {display_name: }": ["1:10: `kernel.display_name` has no value = write one, or remove it"],
    "mounts: [{source: a}]": ["1:10: `mounts[0]` has no `target` = add `target:`"],
    "base: {mirror: https://mirror.example}": ["1:7: `base` has no `name` = add `name:`"],
    # values
    "name: my env": [
        "1:7: `name`: `my env` is not a name: letters, digits, `-`, `_` and `.`, 63 at most = write `my-env`"
    ],
    "cuda: cu101": ['1:7: `cuda`: `cu101` is not a CUDA version = write `"10.1"`'],
    "python: ^3.8": [
        '1:9: `python`: `^3.8` is neither a version nor a range = write `"3.8"` or a range like `">=3.8"`'
    ],
    "python: 2.7": ["1:9: `python`: Python 2.7 is not supported = write a version of Python 3"],
    "packages: ['numpy=1.2']": [
        "1:12: `packages[0]`: `numpy=1.2` is not a requirement: "
        'Expected semicolon (after name with no version specifier) or end = write `"numpy==1.2"`'
    ],
    "packages: [-e ./x]": ["1:12: `packages[0]`: `-e ./x` is not a requirement = leave `-e` out: write `./x`"],
    "packages: ['git+https://example.org/x']": [
        "1:12: `packages[0]`: `git+https://example.org/x` is not a requirement"
        " = name it: `NAME @ git+https://example.org/x`"
    ],
    "packages: [./gone]": [
        "1:12: there is no package `./gone` = the path counts from the spec's directory"
    ],
    "requirements: gone.txt": [
        "1:15: there is no file `gone.txt` = the path counts from the spec's directory"
    ],
    "apt: [Git]": ["1:7: `apt[0]`: `Git` is not the name of a Debian package = write `git`"],
    "base: debian:bookwurm": [
        "1:7: `base`: `debian:bookwurm` is not a base = did you mean `debian:bookworm`?"
    ],
    "base: {name: debian:12, mirror: 'https://u:p@mirror.example'}": [
        "1:33: `base.mirror`: a spec must not hold credentials = keep them in apt's `auth.conf`, which is honoured"
    ],
    "network: privat": ["1:10: `network`: `privat` is none of private, none, host = did you mean `private`?"],
    "env: {1A: x}": [
        "1:7: `1A` cannot be a variable's name = use letters, digits and `_`, no digit first"
    ],
    "resources: {memory: 16}": [
        "1:21: `resources.memory`: 16 bytes are too little to start anything = add a unit: `16GB`"
    ],
    "gpus: {count: 1, ids: [0]}": ["1:7: `gpus`: `count` and `ids` cannot stand together = remove `count`"],
    "gpus: []": ["1:7: `gpus`: the list of GPUs is empty = write `none` for no GPU"],
    "gpus: [0, 0]": ["1:7: `gpus`: the GPU `0` is listed twice = list each once"],
    "gpus: 0": ["1:7: `gpus`: `0` is not a whole number above 0 = write `none` for no GPU"],
    "kernel: {interrupt_mode: signl}": [
        "1:26: `kernel.interrupt_mode`: `signl` is none of signal, message = did you mean `signal`?"
    ],
    "mounts: [{source: a, target: data}]": [
        "1:30: `mounts[0].target`: `data` is not an absolute path = write `/data`"
    ],
    "mounts: [{source: a, target: /b, readonly: yes}]": [
        "1:44: `mounts[0].readonly`: `yes` is neither true nor false = write `true`"
    ],
    "mounts: ['a:/b', {source: c, target: /b}]": [
        "1:18: the target `/b` is taken = line 1 has it too"
    ],
    "ports: ['1:1', '127.0.0.1:1:2']": ["1:16: the host port `1` is taken = line 1 has it too"],
    # several keys against each other
    "image: a/b\npackages: [numpy]\npython: 3.8": [
        "2:1: `packages` cannot stand beside `image`, which is used as it is"
        " = remove `packages`, or `image` (line 1)",
        "3:1: `python` cannot stand beside `image`, which is used as it is"
        " = remove `python`, or `image` (line 1)",
    ],
    # form
    "a: *b": [
        "1:1: unknown key `a` = known here: name, description, python, pytorch, cuda, cudnn, packages, "
        "requirements, apt, base, image, build, env, ports, mounts, gpus, resources, network, kernel",
        "1:4: the alias `*b` has no anchor before it"
        " = mark a value with `&b`, or quote a text that begins with `*`",
    ],
    "env: &e {A: *e}": [
        "1:13: the alias `*e` stands inside the value it names = write the value out",
    ],
    "name: !!python/object:os.system x": [
        "1:7: the tag `!!python/object:os.system` is not read in a spec"
        " = remove the tag; quote the value if it begins with `!`"
    ],
    "env: !!set {A}": [
        "1:6: the tag `!!set` is not read in a spec = remove the tag; quote the value if it begins with `!`"
    ],
    'env: {A: "x\\0"}': ["1:10: a NUL character cannot stand in a value = remove the `\\0`"],
    "name: a\x1b[31m": [
        "1:8: the character U+001B cannot stand in a spec"
        " = remove it: it is invisible or changes how the line is shown"
    ],
    "name: a\u202eb": [
        "1:8: the character U+202E cannot stand in a spec"
        " = remove it: it is invisible or changes how the line is shown"
    ],
    "python: 3.8\n---\npython: 3.9": ["2:1: a spec is one YAML document = remove the second `---`"],
    "- a": [
        "1:1: a spec is a mapping of `key: value` lines"
        ' = begin with a line such as `python: "3.11"` or `packages: [numpy]`'
    ],
    "": ['1:1: the spec is empty = begin with a line such as `python: "3.11"` or `packages: [numpy]`'],
    "# nothing\n---\n": [
        '1:1: the spec is empty = begin with a line such as `python: "3.11"` or `packages: [numpy]`'
    ],
}  # fmt: skip


@pytest.mark.parametrize("text", list(FAULTS))
def test_a_fault_has_its_place_and_its_remedy(faults: Callable[[str], list[str]], text: str) -> None:
    assert faults(text) == FAULTS[text]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("env:\n\tA: 1\n", "2:1", "a tab indents this line = indent with spaces"),
        ("python: a: b\n", "1:10", "mapping values are not allowed"),
        ("packages: [a, b\nenv: {}\n", "2:4", "(while parsing a flow sequence that begins in line 1)"),
        ("name: 'a\n", "2:1", "found unexpected end of stream"),
        ("name: @x\n", "1:7", "quote the value"),
        ("é: 'ü' x\n", "1:8", "quote a value that begins with a quote or bracket"),
        ("- a\nb: 1\n", "2:1", "a list and keys cannot stand at the same level"),
        ('name: "\\q"\n', "1:", "unknown escape character"),
        ("%YAML 3.0\n---\na: 1\n", "1:1", "remove the `%YAML` line"),
        ("a: !x!y z\n", "1:4", "undefined tag handle"),
        ("[" * 5000, "1:17", "nested more than 16 levels deep"),
        ("env: " + "{a: " * 20 + "}" * 20, "1:", "nested more than 16 levels deep"),
    ],
)
def test_malformed_yaml_is_reported_at_the_scanners_mark(
    faults: Callable[[str], list[str]], text: str, place: str, words: str
) -> None:
    found = faults(text)
    assert any(fault.startswith(place) and words in fault for fault in found), found


def test_all_faults_come_together_in_the_order_of_the_file(faults: Callable[[str], list[str]]) -> None:
    text = """\
pyton: 3.8
apt: [Git, A_B]
ports: ['8097', ':x', '0:1', '1:70000', '1-2:1-2', 'x:1:1']
resources: {memory: 16XB, cpus: many, pids: -1}
image: a/UPPER
image: b
env: {A: !t x, 2: y}
"""
    places = [tuple(map(int, fault.split(":", 2)[:2])) for fault in faults(text)]
    assert places == sorted(places)
    assert [line for line, _ in places] == [1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 5, 6, 7, 7]


def test_the_line_is_shown_with_a_caret_below_the_fault(write: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        read_spec(write("python: 3.11\nenv: {A: 日本, 1x: y}\n"))
    assert str(caught.value) == (
        "error[invalid-spec]: `x.yaml` has a fault\n"
        "x.yaml:2:14: `1x` cannot be a variable's name\n"
        "  2 | env: {A: 日本, 1x: y}\n"
        "    |                ^^\n"
        "    = hint: use letters, digits and `_`, no digit first"
    )
    assert (caught.value.code, caught.value.exit_status) == ("invalid-spec", 2)


def test_a_long_line_is_shown_around_the_fault(write: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        read_spec(write(f"packages: [{'numpy, ' * 200}-x, {'numpy, ' * 200}numpy]\n"))
    lines = caught.value.message.splitlines()
    source, pointer = lines[2], lines[3]
    assert len(source) < 110
    assert source[pointer.index("^") : pointer.rindex("^") + 1] == "-x"


def test_a_yaml_bomb_fails_at_once(faults: Callable[[str], list[str]]) -> None:
    levels = ["env: {a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    found = faults(",\n".join(levels) + "}\n")
    assert any(f"more than {nodes.MAX_NODES} values" in fault for fault in found), found


def test_a_file_that_is_not_utf8_is_refused_at_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes("name: a\ndescription: é".encode() + b"\xff\n")
    with pytest.raises(InvalidSpecError, match=r"x\.yaml:2:15: the byte 0xff is not UTF-8"):
        read_spec(path)
    path.write_bytes("name: a\n".encode("utf-16"))
    with pytest.raises(InvalidSpecError) as caught:
        read_spec(path)
    assert caught.value.hint == "save it as UTF-8"


@pytest.mark.parametrize("reader", [read_spec, read_document])
def test_what_is_no_file_is_refused(tmp_path: Path, reader: Callable[[Path], object]) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        reader(tmp_path)
    assert caught.value.cause == "it is a directory"
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    with pytest.raises(InvalidSpecError) as caught:
        reader(pipe)
    assert caught.value.cause == "it is not a regular file"
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(InvalidSpecError) as caught:
        reader(large)
    assert caught.value.cause == "it is larger than 256 KiB"
    with pytest.raises(SpecNotFoundError):
        reader(tmp_path / "gone.yaml")
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    with pytest.raises(InvalidSpecError, match="cannot be read"):
        reader(loop)


def test_an_unreadable_spec_is_refused(tmp_path: Path) -> None:
    """Root may read everything, so the reading is done by another user where this is root."""
    path = tmp_path / "x.yaml"
    path.write_text("python: 3.8\n")
    path.chmod(0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                for folder in (tmp_path, *tmp_path.parents[:2]):  # below the system's /tmp
                    folder.chmod(folder.stat().st_mode | 0o055)
                os.setuid(65534)
            read_document(path)
        except InvalidSpecError as fault:
            status = 0 if fault.cause == "Permission denied" else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_whose_name_is_no_environment_needs_a_name(tmp_path: Path) -> None:
    path = tmp_path / "my env.yaml"
    path.write_text("python: 3.8\n")
    with pytest.raises(InvalidSpecError, match=r":1:1: the file's name is no name for an environment"):
        read_spec(path)
    path.write_text("name: mine\n")
    assert read_spec(path).name == "mine"


def test_a_document_is_read_without_heavy_modules(write: Callable[[str], Path]) -> None:
    """A starting kernel reads a document; pydantic costs it 100 ms and jsonschema seconds."""
    path = write("python: 3.8\npackages: [numpy]\n")
    script = (
        "import sys; from pathlib import Path; from mlenv.spec.reader import read_document; "
        "from mlenv.lock.file import lock_state; "
        f"d = read_document(Path({str(path)!r})); lock_state(d.path, d.digest); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "yaml" in loaded
    assert loaded & {"pydantic", "jsonschema", "packaging", "asyncio", "logging", "urllib.request"} == set()


def test_values_of_the_command_line_are_read_without_pydantic() -> None:
    script = "import sys; from mlenv.spec.values import parse_port; parse_port('1:2'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"pydantic", "yaml"} & set(done.stdout.split()) == set()


def test_pythons_own_yaml_reader_finds_the_same(
    write: Callable[[str], Path], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyYAML may be built without libyaml."""
    fast = read_document(write(FULL))
    monkeypatch.setattr(nodes, "_Loader", yaml.BaseLoader)
    assert read_document(write(FULL)) == fast
    with pytest.raises(InvalidSpecError, match=r"x\.yaml:2:1: malformed YAML: a tab indents this line"):
        read_document(write("env:\n\tA: 1\n"))


def test_a_document_is_checked_for_its_form_alone(write: Callable[[str], Path]) -> None:
    assert read_document(write("pyton: [x]\n")).data == {"pyton": ["x"]}
    with pytest.raises(InvalidSpecError, match="stands twice"):
        read_document(write("a: 1\na: 2\n"))


def test_a_spec_can_be_made_in_code() -> None:
    spec = Spec(name="x", python="3.11", packages=("numpy",))
    assert spec.digest == Spec(name="y", description="other", python="3.11", packages=("numpy",)).digest
    assert spec.digest != Spec(name="x", python="3.12", packages=("numpy",)).digest
    assert spec.path.name == "x.yaml"
