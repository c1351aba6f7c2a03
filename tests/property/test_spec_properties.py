"""Specs: any text is read or refused with places, and what the reader takes the schema takes too."""

# ruff: noqa: E501, PT017 - tables of strategies; what is refused is checked, what is read too

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlenv.errors import InvalidSpecError
from mlenv.spec import schema
from mlenv.spec.model import Spec
from mlenv.spec.nodes import plain, read_tree
from mlenv.spec.reader import read_document, read_spec
from mlenv.spec.values import UNITS, BadValueError, parse_port, parse_size

KEYS = sorted(schema.json_schema()["properties"])
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
VERSIONS = st.from_regex(r"3\.[0-9]{1,2}(\.[0-9])?", fullmatch=True)
SIZES = st.builds(
    "{}{}".format, st.integers(6 * 2**20, 2**40), st.sampled_from(["", "k", "kB", "KiB", "b", "Ki"])
)
PORTS = st.builds("{}:{}".format, st.integers(1, 65535), st.integers(1, 65535))
TARGETS = st.from_regex(r"/[a-z]{5,9}(/[a-z]+)?", fullmatch=True)
WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), max_size=12)
MOUNTS = st.fixed_dictionaries(
    {"source": st.sampled_from(["./a", "/b", "~/c"]), "target": TARGETS},
    optional={"readonly": st.sampled_from(["true", "false", "True"])},
)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "name": NAMES,
    "description": WORDS,
    "python": VERSIONS | VERSIONS.map(">={},<4".format),
    "pytorch": VERSIONS | st.just("none"),
    "cuda": st.sampled_from(["cpu", "10.1", "12.4.1"]),
    "cudnn": st.sampled_from(["7", "7.6", "8.9.7"]),
    "packages": st.lists(NAMES.map(lambda name: re.sub(r"[^A-Za-z0-9]+$", "", name) + ">=1")),
    "apt": st.lists(st.from_regex(r"[a-z0-9][a-z0-9+.-]{1,9}(=[0-9]\.[0-9]-[0-9])?", fullmatch=True)),
    "base": st.sampled_from(["debian:11", "debian:trixie", {"name": "debian:12", "mirror": "https://m.example/debian"}]),
    "build": st.lists(WORDS.filter(str.strip)),
    "env": st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True), WORDS),
    "ports": st.lists(PORTS, unique_by=lambda port: port.split(":")[0]),
    "mounts": st.lists(MOUNTS, unique_by=lambda mount: mount["target"], max_size=3),
    "gpus": st.sampled_from(["auto", "all", "none", "2", ["0", "GPU-1a"], {"count": "1", "memory": "20GB"}, {"count": "all"}]),
    "resources": st.fixed_dictionaries(
        {}, optional={"memory": SIZES, "shm": SIZES, "cpus": st.sampled_from(["4", "0.5"]), "pids": st.just("4096")}
    ),
    "network": st.sampled_from(["private", "none", "host"]),
    "kernel": st.fixed_dictionaries(
        {}, optional={"display_name": WORDS.filter(str.strip), "interrupt_mode": st.sampled_from(["signal", "message"])}
    ),
}  # fmt: skip
GOOD_SPECS = st.fixed_dictionaries({}, optional=GOOD).filter(bool)
VALIDATOR = jsonschema.Draft202012Validator(schema.json_schema())

TEXTS = st.text(max_size=80) | st.lists(
    st.sampled_from([*KEYS, ":", ": ", "\n", "  ", "- ", "[", "]", "{", "}", "&a ", "*a", "<<", "!!", "'", '"', "#",
                     "|", ">", "\t", "\r\n", "%", "---\n", "...", "? ", ",", "x", "3.10", "\x85", "\u2028", "\ufeff"]),
    max_size=25,
).map("".join)  # fmt: skip


@contextmanager
def spec_file(text: str | bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        yield path


def read(data: dict[str, Any]) -> Spec:
    with spec_file(yaml.dump(data, Dumper=yaml.SafeDumper, allow_unicode=True)) as path:
        return read_spec(path)


class TestReader:
    """Every fault has a place in the file (INTERFACE.md, The environment spec)."""

    @settings(max_examples=150)
    @given(TEXTS)
    @example("packages:\n  -\n  - # none\n  - x\n")
    @example("a: &a [*a]\n")
    @example("? - x\n: y\n")
    def test_any_text_is_read_or_refused_inside_itself(self, text: str) -> None:
        tree = read_tree(text.encode(errors="replace").decode())
        lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", text)
        for fault in tree.faults:
            assert 1 <= fault.line <= len(lines)
            assert 1 <= fault.column <= len(lines[fault.line - 1]) + 1
            assert fault.message

    @settings(max_examples=100)
    @given(TEXTS | st.binary(max_size=60))
    def test_reading_raises_nothing_else(self, text: str | bytes) -> None:
        content = text if isinstance(text, bytes) else text.encode(errors="replace")
        with spec_file(content) as path:
            try:
                read_spec(path)
            except InvalidSpecError as refusal:
                assert re.search(r"x\.yaml:[0-9]+:[0-9]+: |cannot be read", refusal.message)
                assert refusal.message.isprintable() or "\x1b" not in refusal.message

    @settings(max_examples=75)
    @given(st.dictionaries(st.sampled_from(KEYS), st.recursive(
        st.text(max_size=6), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2)
    ), min_size=1))  # fmt: skip
    def test_any_values_are_read_or_refused(self, data: dict[str, Any]) -> None:
        try:
            read(data)
        except InvalidSpecError as refusal:
            assert "x.yaml:" in refusal.message

    @settings(max_examples=75)
    @given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=2, max_size=5))
    def test_every_duplicate_key_is_found(self, keys: list[str]) -> None:
        """YAML 1.2.2, section 3.2.1.3: the keys of a mapping are unique."""
        for text in (
            "\n".join(f"{key}: 1" for key in keys),
            "x: {" + ", ".join(f"{key}: 1" for key in keys) + "}",
        ):
            found = [fault for fault in read_tree(text).faults if "stands twice" in fault.message]
            assert len(found) == len(keys) - len(set(keys))


class TestSpec:
    """What the reader takes is what was written, and valid for editors."""

    @settings(max_examples=100)
    @given(GOOD_SPECS)
    def test_good_specs_are_read_and_fit_the_schema(self, data: dict[str, Any]) -> None:
        spec = read(data)
        assert (spec.python, spec.cuda, spec.cudnn) == (
            data.get("python"),
            data.get("cuda"),
            data.get("cudnn"),
        )
        assert spec.packages == tuple(data.get("packages", ()))
        assert spec.env == data.get("env", {})
        assert len(spec.ports) == len(data.get("ports", ()))
        assert [error.message for error in VALIDATOR.iter_errors(data)] == []

    @settings(max_examples=40)
    @given(GOOD_SPECS, st.randoms(use_true_random=False))
    def test_the_order_of_keys_does_not_matter_to_the_digest(self, data: dict[str, Any], random: Any) -> None:
        keys = list(data)
        random.shuffle(keys)
        assert read(data).digest == read({key: data[key] for key in keys}).digest

    @settings(max_examples=40)
    @given(GOOD_SPECS, GOOD_SPECS)
    def test_the_digest_tells_specs_apart(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        kept = [
            {key: value for key, value in data.items() if key not in ("name", "description")}
            for data in (one, other)
        ]
        assert (digest(one) == digest(other)) == (kept[0] == kept[1])

    @settings(max_examples=50)
    @given(
        st.recursive(
            WORDS,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
            max_leaves=9,
        )
    )
    def test_texts_come_out_as_they_went_in(self, value: Any) -> None:
        """YAML 1.2.2, section 10.1 (failsafe schema): scalars are strings."""
        text = yaml.dump({"x": value}, Dumper=yaml.SafeDumper, allow_unicode=True, default_flow_style=None)
        tree = read_tree(text)
        if not tree.faults:
            assert plain(tree.root) == {"x": value}
        else:
            assert any("<<" in fault.message for fault in tree.faults), tree.faults


def digest(data: dict[str, Any]) -> str:
    with spec_file(yaml.dump(data, Dumper=yaml.SafeDumper, allow_unicode=True)) as path:
        return read_document(path).digest


class TestValues:
    """Sizes: SI and IEC 80000-13 units. Ports: 1 to 65535 (RFC 6335, section 6)."""

    @given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.booleans())
    def test_sizes_are_number_times_unit(self, number: int, unit: str, upper: bool) -> None:  # noqa: FBT001 - drawn
        assert parse_size(f"{number}{unit.upper() if upper else unit}") == number * UNITS[unit]

    @given(st.text(max_size=12) | st.from_regex(r"[0-9:./a-z\[\]-]{0,14}", fullmatch=True))
    def test_any_text_is_a_value_or_refused(self, text: str) -> None:
        for parse in (parse_size, parse_port):
            try:
                functools.partial(parse, text)()
            except BadValueError as refusal:
                assert refusal.hint

    @given(st.integers(-10, 70000), st.integers(-10, 70000))
    def test_ports_are_within_their_range(self, host: int, container: int) -> None:
        try:
            port = parse_port(f"{host}:{container}")
        except BadValueError:
            assert not (1 <= host <= 65535 and 1 <= container <= 65535)
        else:
            assert (port.host_port, port.container_port) == (host, container)
