"""The printed URL in a real browser: pick the kernel, run a cell, see the answer. Once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from host.browser import chromium
from host.environment_up import environment_up
from requires import requires

pytestmark = requires("overlay", "chromium")
REPOSITORY = Path(__file__).parents[2]
PICTURE = REPOSITORY / "test-artefacts" / "jupyterlab.png"

CARD = '.jp-LauncherCard[data-category="Notebook"]'
IDLE = """!!document.querySelector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status="idle"]')"""
FOCUS = "!!document.activeElement?.closest('.jp-CodeCell .cm-content')"
OUTPUT = "document.querySelector('.jp-OutputArea-output')?.innerText"


def test_the_kernel_is_chosen_in_the_launcher_and_runs_a_cell(
    built_home: Path, tmp_path_factory: pytest.TempPathFactory
):
    project = tmp_path_factory.mktemp("browser")
    shutil.copytree(REPOSITORY / "envs", project / "envs")
    with environment_up(built_home, project, "quickstart") as up, chromium() as page:
        page.open(up.url)
        page.wait_for(f"document.querySelectorAll('{CARD}').length")
        titles = page.value(f"[...document.querySelectorAll('{CARD}')].map(card => card.title)")
        assert len(titles) == 1
        assert titles[0].startswith("quickstart")
        page.click(CARD)
        page.wait_for(IDLE)
        page.click(".jp-CodeCell .cm-content")
        page.wait_for(FOCUS)
        page.type("import platform, sys; print(platform.node(), sys.prefix)")
        page.press_shift_enter()
        assert page.wait_for(OUTPUT).strip() == "quickstart /opt/env"
        page.screenshot(PICTURE)
    assert PICTURE.stat().st_size > 10_000
