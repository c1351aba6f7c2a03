"""Texts as values, with the remedy where they are none."""

# ruff: noqa: E501 - tables of texts are compared line by line

from __future__ import annotations

import pytest

from mlenv.spec import values
from mlenv.spec.values import BadValueError, GpuSelection, parse_gpus, parse_port, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16 * 10**9),
        ("16gb", 16 * 10**9),
        ("512MB", 512 * 10**6),
        ("4kB", 4000),
        ("1TB", 10**12),
        ("4GiB", 4 * 2**30),
        ("4Gi", 4 * 2**30),
        ("512M", 512 * 2**20),
        ("512m", 512 * 2**20),
        ("16g", 16 * 2**30),
        ("64k", 64 * 2**10),
        ("1.5GB", 1_500_000_000),
        ("0.1GB", 100_000_000),
        ("16 GB", 16 * 10**9),
        ("1048576", 1048576),
        ("100b", 100),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1e9", "16XB", "0", "0GB", "1,5GB", "16GBs", "inf", "9" * 30, "٣GB"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(BadValueError) as caught:
        parse_size(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("8097:8097", ("127.0.0.1", 8097, 8097, "tcp")),
        ("127.0.0.1:1:2", ("127.0.0.1", 1, 2, "tcp")),
        ("0.0.0.0:1:65535", ("0.0.0.0", 1, 65535, "tcp")),  # noqa: S104 - asked for
        ("[::1]:1:2/udp", ("::1", 1, 2, "udp")),
    ],
)
def test_ports(text: str, port: tuple[str, int, int, str]) -> None:
    found = parse_port(text)
    assert (found.host_ip, found.host_port, found.container_port, found.protocol) == port


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("8097", "`8097` is not HOST:CONTAINER", 'write `"8097:8097"`'),
        (":x", "`:x` has no number as its host port", 'write `"8097:8097"`'),
        (":80", "`:80` has no number as its host port", 'write `"8097:8097"`'),
        ("80:", "`80:` has no number as its container port", 'write `"8097:8097"`'),
        ("0:80", "the host port `0` is not within 1 to 65535", "choose another port"),
        ("80:65536", "the container port `65536` is not within 1 to 65535", "choose another port"),
        ("1-2:1-2", "`1-2:1-2` is a range of ports", "write one entry for each port"),
        ("1:1/sctp", "`sctp` is none of tcp, udp", "write one of them"),
        ("1:1/upd", "`upd` is none of tcp, udp", "did you mean `udp`?"),
        ("localhost:1:1", "`localhost` is not an IP address", "write `127.0.0.1`, `0.0.0.0` or `[::1]`, or leave the address out"),
        ("1:2:3:4", "`1:2:3:4` is not HOST:CONTAINER", 'write `"8097:8097"`, the host\'s port first'),
        ("٨:٨", "`٨:٨` has no number as its host port", 'write `"8097:8097"`'),
        ("1:-1", "`1:-1` has no number as its container port", 'write `"8097:8097"`'),
    ],
)  # fmt: skip
def test_no_ports(text: str, message: str, hint: str) -> None:
    with pytest.raises(BadValueError) as caught:
        parse_port(text)
    assert (str(caught.value), caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        ("auto", GpuSelection()),
        ("all", GpuSelection(mode="all")),
        ("none", GpuSelection(mode="none")),
        ("2", GpuSelection(mode="count", count=2)),
        ("device=0,2", GpuSelection(mode="ids", ids=("0", "2"))),
        ("device=MIG-0a-1", GpuSelection(mode="ids", ids=("MIG-0a-1",))),
    ],
)
def test_gpus(text: str, selection: GpuSelection) -> None:
    assert parse_gpus(text) == selection


@pytest.mark.parametrize("text", ["", "0", "-1", "some", "device=", "device=x", "device=0,0", "1.5"])
def test_no_gpus(text: str) -> None:
    with pytest.raises(BadValueError) as caught:
        parse_gpus(text)
    assert caught.value.hint


GOOD = {
    values.version_or_range: ["3", "3.10", "3.11.2", ">=3.9,<3.12", "==3.11.*", "~=3.9", "1.7.1+cu101", "2.0rc1"],
    values.cuda: ["cpu", "10.1", "11.8", "12.4.1"],
    values.cudnn: ["7", "7.6", "7.6.3", "8.9.7.29"],
    values.requirement: [
        "numpy", "numpy>=1.26,<2", "a[b,c]==1.0; python_version < '3.9'", ".", "..", "./libs/x", "../x", "./x[dev]",
        ".[dev]", "x @ https://example.org/x-1-py3-none-any.whl", "x @ git+https://example.org/x.git@v1",
    ],
    values.apt: ["git", "libgl1", "g++", "libc6-dev", "git=1:2.39.5-0+deb12u1", "7zip=22.01+dfsg-8", "x264~x".replace("~x", "")],
    values.name: ["a", "pytorch-1.7-cu101", "A_b.c", "x" * 63],
    values.variable: ["A", "_a1", "OMP_NUM_THREADS"],
    values.image: [
        "ubuntu", "a/b", "localhost:5000/course/pytorch:1.7.1-cuda11.0-cudnn8-runtime", "localhost:5000/course/pytorch",
        "[::1]:5000/x:y", "a@sha256:" + "0" * 64, "a__b/c--d",
    ],
    values.mirror: ["https://mirror.example/debian", "http://mirror.example:8080/debian/", "file:///srv/mirror"],
    values.cpus: ["4", "1.5", "0.01"],
}  # fmt: skip

BAD = {
    values.version_or_range: ["", "x", "^3.8", "3.8 - 3.10", "3.11.*", "python3.8", "v1.7", ">=", "3,8", "latest"],
    values.python: ["2", "2.7"],
    values.cuda: ["", "10", "cu101", "none", "10.1.2.3", "CPU", "1O.1"],
    values.cudnn: ["", "v7", "7.x"],
    values.requirement: [
        "", "numpy==", "numpy=1", "numpy 1.2", "numpy scipy", "-e ./x", "-r x.txt", "--pre", "/abs/x", "~/x", ".hidden",
        "git+https://example.org/x", "https://example.org/x.whl", "x @ file:///x", "./x y[", "a;b", "numpy\n",
    ],
    values.apt: ["", "g", "Git", "git libgl1", "libgl1:amd64", "-y", "git=", "git=x1", "git>=1", "../x", "git/stable", "git\n"],
    values.name: ["", "-a", "a b", "a/b", "..", "x" * 64, "ü", "a\n"],
    values.variable: ["", "1A", "A-B", "A=B", "Ä", "A\n"],
    values.image: ["", "Ubuntu", "a b", "a:", "http://a/b", "a@sha256:0", "../a", "a//b", "a:b\n"],
    values.mirror: ["", "mirror.example", "ftp://x", "https://u:p@mirror.example/debian", "https://", "https://x y"],
    values.cpus: ["", "0", "-1", "nan", "inf", "1e3", "0.001", "many"],
    values.base: ["", "debian", "debian:10", "debian:sid", "ubuntu:22.04", "debian12", "debian:12 "],
    values.boolean: ["", "yes", "no", "1", "on", "tRue"],
    values.mount_target: ["", "data", "/", "//", "/proc", "/sys/x", "/dev", "/a/../b", "/a\nb", "/./proc/1"],
    values.mount: ["", "a", "a:/b:rx", "a:/b:ro:x", ":/b"],
    values.relative_file: ["", "/etc/passwd", "~/r.txt"],
    values.line: ["", " ", "a\nb", "a\x1b[0m"],
    values.command: ["", " \n"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("check", "text"), [(check, text) for check, texts in GOOD.items() for text in texts]
)
def test_what_is_taken(check: object, text: str) -> None:
    assert callable(check)
    assert str(check(text)) == str(float(text) if check is values.cpus else text)


@pytest.mark.parametrize(("check", "text"), [(check, text) for check, texts in BAD.items() for text in texts])
def test_what_is_refused_with_a_remedy(check: object, text: str) -> None:
    assert callable(check)
    with pytest.raises(BadValueError) as caught:
        check(text)
    assert str(caught.value)
    assert caught.value.hint
    assert "\n" not in caught.value.hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("numpy=1.2", 'write `"numpy==1.2"`'),
        ("numpy 1.2", 'write `"numpy==1.2"`'),
        ("numpy scipy", "write one entry for each: `[numpy, scipy]`"),
        ("-r req.txt", "use the key `requirements: req.txt`"),
        ("--index-url x", "options belong into the host's pip configuration, which is honoured"),
    ],
)
def test_the_remedy_for_a_requirement_fits_its_fault(text: str, hint: str) -> None:
    with pytest.raises(BadValueError) as caught:
        values.requirement(text)
    assert caught.value.hint == hint


def test_debian_releases_have_numbers_and_names() -> None:
    assert [values.base(f"debian:{name}") for name in ("bullseye", "bookworm", "trixie")] == [
        "debian:11",
        "debian:12",
        "debian:13",
    ]
