from __future__ import annotations

from mlenv.resolve.choice import Build
from mlenv.resolve.matrix import load
from mlenv.resolve.resolver import place
from mlenv.resolve.wheels import torch_requirements


def build(version, tag):
    release = next(release for release in load().releases if release.version == version)
    return Build(release=release, variant=release.variants[tag])


def test_a_build_of_its_own_index_is_pinned_with_its_family():
    requirements, constraints = torch_requirements(build("1.7.1", "cu101"))
    assert requirements == ("torch===1.7.1+cu101",)
    assert constraints == ("numpy<2", "torchvision===0.8.2+cu101", "torchaudio==0.7.2")


def test_pypis_own_build_cannot_be_replaced_by_a_local_version():
    requirements, constraints = torch_requirements(build("2.13.0", "cu130"))
    assert requirements == ("torch===2.13.0",)
    assert constraints == ("torchvision===0.28.0", "torchaudio==2.11.0")


def test_an_edit_names_the_line_of_its_key(tmp_path, monkeypatch):
    spec = tmp_path / "envs" / "x.yaml"
    spec.parent.mkdir()
    spec.write_text('# cudnn: old\nname: x\n"cuda": "10.1"\ncudnn: "7.1"\n')
    monkeypatch.chdir(tmp_path)
    assert place(spec, "cudnn") == "envs/x.yaml:4"
    assert place(spec, "cuda") == "envs/x.yaml:3"
    assert place(spec, "python") == "envs/x.yaml"
