from __future__ import annotations

from typing import Any

import pytest

from medm.config import validate
from medm.data.options import DataOptions, SourceOptions
from medm.errors import RecipeError


def data(**fields: Any) -> DataOptions:
    return validate(DataOptions, fields, source="r.yaml")


def test_a_recipe_section_becomes_options() -> None:
    options = data(train=[{"path": "a.json", "root": "images", "weight": 2.0}], bad_records="skip")
    assert options.train == [SourceOptions(path="a.json", root="images", weight=2.0)]
    assert (options.max_length, options.too_long, options.bad_records) == (2048, "error", "skip")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"train": [{"path": "a", "weight": 1.0}, {"path": "b"}]},
            r"weights are set for \['a'\] but not for \['b'\]",
        ),
        ({"train": [{"path": "a", "weight": 0.0}]}, r"train\.0\.weight: expected"),
        ({"train": [{"path": "a", "wieght": 1.0}]}, "did you mean 'weight'"),
        ({"train": [{"path": "a"}], "draws": 5}, "draws: needs a weight"),
        ({"packing": True, "max_length": None}, "packing: needs max_length"),
        ({"packing": True, "order": "length"}, "order: length saves padding"),
        ({"too_long": "cut"}, "too_long: expected"),
        ({"augment": {"image": {"rotat": 3.0}}}, "did you mean 'rotate'"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        data(**fields)


def test_every_field_says_what_it_does() -> None:
    for schema in (SourceOptions, DataOptions):
        assert all(field.description for field in schema.model_fields.values())
