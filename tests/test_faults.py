"""The table of faults: 45 rows, each held by a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from medm import limits

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "faults.md").read_text("utf-8")
ROWS = {
    int(row): [cell.strip() for cell in rest.split(" | ")]
    for row, rest in re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
}


def test_every_row_is_there() -> None:
    assert sorted(ROWS) == list(range(1, 46))
    assert all(len(cells) == 4 and all(cells) for cells in ROWS.values())


@pytest.mark.parametrize("row", range(1, 46))
def test_the_test_of_a_row_exists(row: int) -> None:
    file, _, name = ROWS[row][3].strip("`").partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_page_gives_every_limit_with_its_default() -> None:
    source = (ROOT / "medm" / "limits.py").read_text("utf-8")
    given = dict(re.findall(r"^\| `(MEDM_\w+)` \| ([\d,]+) \|", PAGE, re.MULTILINE))
    known = dict(re.findall(r'^(\w+) = _setting\("(MEDM_\w+)"', source, re.MULTILINE))
    assert given.keys() == set(known.values())
    for constant, name in known.items():
        assert int(given[name].replace(",", "")) == getattr(limits, constant), name
