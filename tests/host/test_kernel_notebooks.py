"""The notebooks of the repository, executed from the first cell to the last in the environments they name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from host.environment_up import mlenv
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from requires import requires

from mlenv.jupyter.kernelspecs import EnvironmentKernelSpecManager

pytestmark = requires("overlay", "index", "mirror")
REPOSITORY = Path(__file__).parents[2]
CELL_TIMEOUT = 300


def executed(home: Path, project: Path, notebook: str, environment: str) -> nbformat.NotebookNode:
    """Return the notebook with its outputs, run in an environment that is up for that long."""
    shutil.copytree(REPOSITORY / "envs", project / "envs")
    document = nbformat.read(REPOSITORY / "notebooks" / notebook, as_version=4)
    mlenv(home, project, "up", environment, "--no-jupyter")
    try:
        manager = AsyncKernelManager(
            kernel_name=environment, kernel_spec_manager=EnvironmentKernelSpecManager()
        )
        client = NotebookClient(
            document, km=manager, timeout=CELL_TIMEOUT, resources={"metadata": {"path": str(project)}}
        )
        return client.execute()
    finally:
        mlenv(home, project, "down", environment)


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture
def home(built_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLENV_HOME", str(built_home))
    return built_home


def test_quickstart_without_pytorch(home: Path, tmp_path: Path) -> None:
    notebook = executed(home, tmp_path, "quickstart.ipynb", "quickstart")
    assert "in quickstart\n" in printed(notebook)
    assert "this environment has no PyTorch" in printed(notebook)
    assert pictures(notebook) == 1


@pytest.mark.timeout(1800)
def test_quickstart_trains_a_model(home: Path, tmp_path: Path) -> None:
    notebook = executed(home, tmp_path, "quickstart.ipynb", "pytorch-2.13-cpu")
    said = printed(notebook)
    assert "PyTorch 2.13.0+cpu on cpu" in said
    assert float(said.partition("has not seen: ")[2].partition("%")[0]) > 95
    assert pictures(notebook) == 2


def test_the_notebook_is_kept_without_outputs_and_names_its_environment() -> None:
    document = json.loads((REPOSITORY / "notebooks" / "quickstart.ipynb").read_text())
    assert document["metadata"]["kernelspec"]["name"] == "pytorch-2.13-cpu"
    assert all(not cell.get("outputs") for cell in document["cells"])
