"""The documentation site: every page is in it, and its links lead somewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it; a page that is not in the navigation and a dead link are errors.

    Not with --quiet, which counts no warnings.
    """
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_and_can_be_searched(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        folder = site if page.stem == "index" else site / page.stem
        assert (folder / "index.html").is_file()
        assert page.stem == "index" or f'"location":"{page.stem}/"' in index


def test_nothing_is_fetched_from_other_hosts(site: Path) -> None:
    page = (site / "index.html").read_text()
    assert "fonts.googleapis" not in page
    assert "Not for clinical use" in page
