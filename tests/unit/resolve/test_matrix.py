from __future__ import annotations

import pytest

from mlenv.resolve.matrix import load


@pytest.fixture(scope="module")
def matrix():
    return load()


def test_releases_are_typed_and_newest_first(matrix):
    assert len(matrix.releases) == 52
    assert (matrix.releases[0].version, matrix.releases[-1].version) == ("2.15.0", "1.0.0")
    release = next(release for release in matrix.releases if release.version == "1.7.1")
    assert release.pythons == ("3.6", "3.7", "3.8", "3.9")
    assert (release.default, release.glibc, release.torchvision) == ("cu102", "2.17", "0.8.2")
    assert release.pins == ("numpy<2",)
    variant = release.variants["cu101"]
    assert (variant.cuda, variant.cudnn, variant.sm, variant.ptx) == (
        "10.1",
        "7.6.3",
        (37, 50, 60, 70, 75),
        (),
    )


def test_every_default_is_a_variant_and_free_threaded_pythons_are_left_out(matrix):
    assert [row.version for row in matrix.releases if row.default not in row.variants] == []
    assert not any(python.endswith("t") for row in matrix.releases for python in row.pythons)


def test_what_nobody_recorded_is_none_and_not_the_text_null(matrix):
    release = next(release for release in matrix.releases if release.version == "1.0.0")
    assert release.variants["cu100"].sm is None
    assert release.torchaudio is None
    assert matrix.drivers["13.5"] is None
    assert matrix.bases["alpine"].glibc is None


def test_cudnn_ranges_become_the_cuda_versions_inside(matrix):
    assert matrix.cudnn["7.1.4"].cuda == ("8.0", "9.0", "9.2")
    assert matrix.cudnn["8.5.0"].cuda == ("10.2", *(f"11.{minor}" for minor in range(8)))
    assert (matrix.cudnn["8.5.0"].min_sm, matrix.cudnn["7.1.4"].min_sm) == (35, 0)


def test_gpu_models_from_general_knowledge_lose_their_mark(matrix):
    assert matrix.capabilities["Tesla T4"] == "7.5"
    assert matrix.capabilities["NVIDIA H20"] == "9.0"
