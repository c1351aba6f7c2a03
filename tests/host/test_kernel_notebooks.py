"""The notebooks of the repository, executed from the first cell to the last in the environments they name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from host.environment_up import kernel_directories, mlenv
from nbclient import NotebookClient
from requires import requires

pytestmark = requires("overlay", "index", "mirror")
REPOSITORY = Path(__file__).parents[2]
CELL_TIMEOUT = 300


def quickstart() -> nbformat.NotebookNode:
    return nbformat.read(REPOSITORY / "notebooks" / "quickstart.ipynb", as_version=4)


def executed(
    home: Path, project: Path, document: nbformat.NotebookNode, environment: str
) -> nbformat.NotebookNode:
    """Return the notebook with its outputs, run in an environment that is up for that long."""
    shutil.copytree(REPOSITORY / "envs", project / "envs")
    mlenv(home, project, "up", environment, "--no-jupyter")
    try:
        client = NotebookClient(
            document,
            kernel_name=environment,
            timeout=CELL_TIMEOUT,
            resources={"metadata": {"path": str(project)}},
        )
        return client.execute()
    finally:
        mlenv(home, project, "down", environment)
        assert kernel_directories(home) == []


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture
def built(built_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home with `quickstart` built, whose kernels this process finds as any Jupyter tool would."""
    monkeypatch.setenv("MLENV_HOME", str(built_home))
    monkeypatch.setenv("JUPYTER_PATH", str(built_home / "jupyter"))
    return built_home


def test_quickstart_without_pytorch(built: Path, tmp_path: Path) -> None:
    notebook = executed(built, tmp_path, quickstart(), "quickstart")
    assert "in quickstart\n" in printed(notebook)
    assert "this environment has no PyTorch" in printed(notebook)
    assert pictures(notebook) == 1


@requires("torch-cpu")
@pytest.mark.timeout(1800)
def test_quickstart_trains_a_model(built: Path, tmp_path: Path) -> None:
    notebook = executed(built, tmp_path, quickstart(), "pytorch-2.13-cpu")
    said = printed(notebook)
    assert "PyTorch 2.13.0+cpu on cpu" in said
    assert float(said.partition("has not seen: ")[2].partition("%")[0]) > 95
    assert pictures(notebook) == 2


@pytest.mark.timeout(1800)
def test_pytorch_of_2020_answers_from_its_kernel(built: Path, tmp_path: Path) -> None:
    """PyTorch 1.7.1 for CUDA 10.2, on the system and with the NumPy of its time."""
    code = """
import sys, numpy, torch
print(torch.__version__, torch.version.cuda, numpy.__version__[0], sys.version_info[:2])
print(open("/etc/debian_version").read()[:2], (torch.ones(2, 3) @ torch.ones(3, 2)).sum().item())
"""
    document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook = executed(built, tmp_path, document, "pytorch-1.7-cu102")
    assert printed(notebook) == "1.7.1 10.2 1 (3, 9)\n11 12.0\n"


def test_the_notebook_is_kept_without_outputs_and_names_its_environment() -> None:
    document = json.loads((REPOSITORY / "notebooks" / "quickstart.ipynb").read_text())
    assert document["metadata"]["kernelspec"]["name"] == "pytorch-2.13-cpu"
    assert all(not cell.get("outputs") for cell in document["cells"])
