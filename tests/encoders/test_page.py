"""The blocks of docs/encoders.md are encoders of recipes, and its names are those that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from medm.imaging import preprocess_from_dict
from medm.models.vision import encoder_options

PAGE = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text("utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_recipe_takes_the_block(block: str) -> None:
    written = yaml.safe_load(block)["encoder"]
    options = encoder_options(written, source="docs/encoders.md").model_dump()
    assert {key: options[key] for key in written} == written


@pytest.mark.parametrize("line", re.findall(r"^medm data preview .*$", PAGE, re.MULTILINE))
def test_a_convention_of_the_page_exists(line: str) -> None:
    kind = "volume" if ".nii" in line else "image"
    preprocess_from_dict({"kind": kind, "convention": line.rpartition("=")[2]})
