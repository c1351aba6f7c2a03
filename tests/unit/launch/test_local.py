"""What a spec and an image ask of a container."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from mlenv.container import config as oci
from mlenv.errors import MlenvError, UsageError
from mlenv.launch import local
from mlenv.launch.local import Options, bundle_config, hostname, limited, outline_options, spec_options
from mlenv.progress import SilentProgress
from mlenv.spec.reader import read_outline, read_spec


@dataclass
class StoredImage:
    """What `bundle_config` needs of an image."""

    name: str = "quickstart"
    layers: tuple[Path, ...] = (Path("/store/base"), Path("/store/wheel"))
    config: dict[str, Any] = field(default_factory=dict)


def image(**config: Any) -> Any:
    return StoredImage(config={"config": config})


def bundle(stored: Any, **options: Any) -> dict[str, Any]:
    return bundle_config(stored, Options(**options), progress=SilentProgress())


def write_spec(directory: Path, text: str) -> Path:
    path = directory / "x.yaml"
    path.write_text(text)
    return path


class TestImageConfiguration:
    """OCI image-spec, conversion.md: how an image's configuration becomes a process."""

    def test_entrypoint_comes_before_cmd(self):
        process = bundle(image(Entrypoint=["/init"], Cmd=["serve", "-v"]))["process"]
        assert process["args"] == ["/init", "serve", "-v"]

    def test_arguments_replace_cmd_and_keep_the_entrypoint(self):
        process = bundle(image(Entrypoint=["/init"], Cmd=["serve"]), args=("true",))["process"]
        assert process["args"] == ["/init", "true"]

    def test_an_image_without_a_command_asks_for_one(self):
        with pytest.raises(UsageError, match="names no command"):
            bundle(image())

    def test_options_win_over_the_images_environment(self):
        process = bundle(image(Cmd=["sh"], Env=["A=1", "B=2=3"]), env={"A": "9"})["process"]
        assert {"A=9", "B=2=3"} <= set(process["env"])
        assert "A=1" not in process["env"]

    @pytest.mark.parametrize(("asked", "expected"), [(None, "/work"), ("/here", "/here")])
    def test_the_working_directory(self, asked, expected):
        assert bundle(image(Cmd=["sh"], WorkingDir="/work"), cwd=asked)["process"]["cwd"] == expected

    def test_layers_and_names_ride_in_annotations(self):
        annotations = bundle(image(Cmd=["sh"]), annotations={oci.ENVIRONMENT: "x"})["annotations"]
        assert annotations[oci.IMAGE] == "quickstart"
        assert annotations[oci.ENVIRONMENT] == "x"
        assert annotations["dev.mlenv.layers"] == '["/store/base","/store/wheel"]'.replace(",", ", ") or (
            annotations["dev.mlenv.layers"] == '["/store/base","/store/wheel"]'
        )


class TestSpecOptions:
    def test_everything_a_spec_says_of_its_container_arrives(self, tmp_path):
        (tmp_path / "data").mkdir()
        path = write_spec(
            tmp_path,
            "env: {A: '1'}\nports: ['8097:80']\nnetwork: none\n"
            "mounts: [{source: ./data, target: /data, readonly: true}]\n"
            "resources: {memory: 1GiB, cpus: 2, shm: 1MiB, pids: 99}\ngpus: none\n",
        )
        options = spec_options(read_spec(path))
        assert options.env == {"A": "1"}
        assert options.ports == [oci.Port(host_ip="127.0.0.1", host_port=8097, container_port=80)]
        assert options.network == "none"
        assert options.mounts == [
            oci.Mount(source=tmp_path / "data", target=PurePosixPath("/data"), readonly=True)
        ]
        assert options.resources == oci.Resources(memory=2**30, cpus=2.0, pids=99, shm=2**20)
        assert options.gpus is not None
        assert options.gpus.mode == "none"

    def test_a_published_port_takes_the_place_of_the_specs(self, tmp_path):
        spec = read_spec(write_spec(tmp_path, "ports: ['8097:80', '8098:81']\n"))
        asked = oci.Port(host_port=9000, container_port=80)
        assert [port.host_port for port in spec_options(spec, publish=[asked]).ports] == [9000, 8098]

    def test_a_missing_mount_source_is_named(self, tmp_path):
        spec = read_spec(write_spec(tmp_path, "mounts: [{source: ./gone, target: /data}]\n"))
        with pytest.raises(MlenvError, match=r"gone` of .*x\.yaml` does not exist") as raised:
            spec_options(spec)
        assert raised.value.code == "mount-source-missing"

    def test_a_spec_that_shapes_no_container_needs_no_model(self, tmp_path, monkeypatch):
        monkeypatch.setattr(local, "read_spec", lambda _: pytest.fail("the model was read"))
        path = write_spec(tmp_path, "name: quick\npython: '3.11'\npackages: [numpy]\n")
        assert outline_options(read_outline(path)).hostname == "quick"

    def test_both_ways_agree(self, tmp_path):
        path = write_spec(tmp_path, "python: '3.11'\n")
        by_model, by_file = spec_options(read_spec(path)), outline_options(read_outline(path))
        assert (by_file.hostname, by_file.gpus, by_file.network) == (
            by_model.hostname,
            by_model.gpus,
            by_model.network,
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart", "quickstart"),
        ("pytorch-1.7_cu101", "pytorch-1-7-cu101"),
        ("ü", "mlenv"),
        ("a" * 80, "a" * 63),
    ],
)
def test_a_host_name_is_one_of_rfc_1123(name, expected):
    assert hostname(name) == expected


def test_limits_that_are_not_given_keep_their_defaults():
    assert limited(oci.Resources(pids=5), memory=None, pids=None, cpus=1.5) == oci.Resources(pids=5, cpus=1.5)


def test_folders_inside_another_are_mounted_once():
    folders = [Path("/a/b"), Path("/a"), Path("/c"), Path("/a")]
    assert local._outermost(folders) == [Path("/a"), Path("/c")]
