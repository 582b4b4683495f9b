"""Regions of records and a model: the way is saved with it, changed by a recipe, and read in
Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import medm
from medm.config import validate
from medm.data.turns import parse_record
from medm.errors import DataError
from medm.models import build, load_processor
from medm.models.lvlm.options import LVLMOptions
from tests import tiny


def section(llm: Path, **changes: Any) -> LVLMOptions:
    return validate(LVLMOptions, tiny.lvlm_section(llm) | changes, source="test")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llm("qwen2.5", tmp_path_factory.mktemp("llm"), max_position_embeddings=1024)


def saved(folder: Path, options: LVLMOptions, **source: Any) -> Path:
    torch.manual_seed(0)
    model, processor = build(options, **source)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_way_is_saved_and_a_recipe_changes_it(llm: Path, tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain", section(llm))
    assert "regions" not in (plain / "processor_config.json").read_text(), "an older medm opens it"
    assert load_processor(str(plain)).regions is None
    drawn = saved(tmp_path / "drawn", section(llm, regions="draw"), init_from=str(plain))
    assert load_processor(str(drawn)).regions == "draw"
    for options, expected in ((section(llm), "draw"), (section(llm, regions="text"), "text")):
        assert build(options, init_from=str(drawn))[1].regions == expected


@pytest.mark.parametrize("way", [None, "draw", "text"])
def test_a_model_answers_a_record_with_regions_in_its_way(
    way: str | None, llm: Path, tmp_path: Path
) -> None:
    Image.new("L", (20, 10), 90).save(tmp_path / "a.png")
    question = {"from": "human", "value": "<image>\nWhat is in <region>?"}
    record = {"image": "a.png", "conversations": [question], "regions": [{"box": [2, 1, 12, 6]}]}
    model = medm.load(saved(tmp_path / "model", section(llm, regions=way)), device="cpu")
    if way is None:
        with pytest.raises(DataError, match=r"model\.regions: draw"):
            model.ask_many([record], root=tmp_path, max_new_tokens=2)
        return
    assert len(model.ask_many([record], root=tmp_path, max_new_tokens=2)) == 1
    outside = {**record, "regions": [{"box": [2, 1, 22, 6]}]}
    with pytest.raises(DataError, match="20 x 10 pixels"):
        model.ask_many([outside], root=tmp_path, max_new_tokens=2)


def test_regions_that_nobody_prepared_are_not_encoded(llm: Path) -> None:
    processor = build(section(llm, regions="draw"))[1]
    question = {"from": "human", "value": "<image>\nWhat is in <region>?"}
    record = {"image": "a.png", "conversations": [question], "regions": [{"point": [1, 2]}]}
    pixels = {"image": [processor.preprocess["image"]]}
    with pytest.raises(DataError, match="neither drawn nor written"):
        processor.encode(parse_record(record, inference=True), pixels, generation=True)
