"""A working folder full of modules that nobody may import."""

from __future__ import annotations

import sys
from pathlib import Path

THIRD_PARTY = (
    "numpy",
    "torch",
    "SimpleITK",
    "pydicom",
    "typer",
    "rich",
    "yaml",
    "transformers",
    "medm",
)


def plant(folder: Path) -> Path:
    """Fill `folder/planted` with a module of every name, each of which leaves a mark when it is
    imported."""
    planted = folder / "planted"
    (planted / "marks").mkdir(parents=True)
    for name in {*sys.stdlib_module_names, *THIRD_PARTY} - {"__future__"}:
        mark = planted / "marks" / name
        (planted / f"{name}.py").write_text(
            f"import os\nos.close(os.open({str(mark)!r}, os.O_CREAT | os.O_WRONLY))\nraise "
            "ImportError('planted')\n"
        )
    return planted


def marks(planted: Path) -> list[str]:
    """Return the names of the planted modules that were imported."""
    return sorted(path.name for path in (planted / "marks").iterdir())
