"""Kinds of model: the way from a recipe to an encoder, and what their outputs hold."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from transformers import AutoModel

import medm.models
from medm.config import validate
from medm.encoders import ENCODERS, EncoderOptions, ViTOptions
from medm.encoders.siglip import SiglipEncoder
from medm.errors import ExportError, RecipeError
from medm.models import MODELS, outputs_of
from medm.models.base import ModelKind
from medm.models.export.export import export
from medm.models.lvlm.build import LVLM
from medm.models.lvlm.modeling import LVLMOutput
from medm.models.lvlm.options import LVLMOptions
from medm.models.options import ModelOptions
from medm.training.recipe import load_recipe
from tests import tiny
from tests.encoders.tiny import VIT

STACKS: list[list[str]] = []


class TracedEncoder(SiglipEncoder):
    """Notes which functions of medm are running when it is constructed."""

    def __init__(self, **keywords: Any) -> None:
        frame, names = sys._getframe(1), []
        while frame is not None:
            module = frame.f_globals["__name__"]
            if module.partition(".")[0] == "medm":
                names.append(f"{module}:{frame.f_code.co_qualname}")
            frame = frame.f_back
        STACKS.append(names)
        super().__init__(**keywords)


@pytest.fixture
def section(tmp_path: Path) -> dict[str, Any]:
    section = tiny.lvlm_section(tiny.save_llm("smollm2", tmp_path / "llm"), family="smollm2")
    section["branches"]["image"]["encoder"] = {
        "name": "traced",
        "architecture": VIT | {"image_size": 16, "patch_size": 8},
    }
    return section


def test_an_encoder_is_at_most_three_calls_from_a_recipe_and_from_a_saved_folder(
    section: dict[str, Any], tmp_path: Path
) -> None:
    STACKS.clear()
    with ENCODERS.temporary():
        ENCODERS.add("traced", TracedEncoder, "for the test", options=ViTOptions)
        model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
        assert STACKS[-1] == [
            "medm.models.lvlm.modeling:Branch.__init__",
            "medm.models.lvlm.build:LVLM.build",
            "medm.models:build",
        ]
        model.save_pretrained(tmp_path / "saved")
        processor.save_pretrained(tmp_path / "saved")
        AutoModel.from_pretrained(tmp_path / "saved")
        opened = [name for name in STACKS[-1] if "<" not in name]
        assert opened == [
            "medm.models.lvlm.modeling:Branch.__init__",
            "medm.models.lvlm.modeling:LVLMForConditionalGeneration.__init__",
        ]


def test_options_and_encoders_name_the_encoder_inside(section: dict[str, Any]) -> None:
    inner = {"name": "siglip", "architecture": VIT | {"image_size": 16, "patch_size": 8}}
    outer = ENCODERS.entry("slices").options.model_validate({"name": "slices", "encoder": inner})
    assert isinstance(outer, EncoderOptions)
    inside = outer.inner()
    assert inside is not None and inside.name == "siglip" and inside.inner() is None
    encoder = ENCODERS.constructor({"name": "slices", "architecture": {}, "encoder": inner})()
    assert isinstance(encoder.inner, SiglipEncoder)
    assert encoder.inner.inner is None


@pytest.mark.parametrize("name", MODELS.names())
def test_a_kind_and_its_options_agree_about_the_outputs(name: str) -> None:
    options = MODELS.entry(name).options
    assert issubclass(options, ModelOptions)
    assert options.outputs in (None, MODELS.get(name).outputs)


def test_the_outputs_of_an_lvlm_are_fields_of_its_output() -> None:
    assert LVLM.outputs <= {field.name for field in fields(LVLMOutput)}


class Towers(ModelKind):
    """A kind whose options class does not repeat the outputs."""

    config_class, model_class, processor_class = (
        LVLM.config_class,
        LVLM.model_class,
        LVLM.processor_class,
    )
    outputs: ClassVar[frozenset[str]] = frozenset({"image_embeds", "text_embeds", "logit_scale"})

    def build(self, options: Any) -> Any:
        raise AssertionError("a recipe is checked without a model")


class LossOnly(Towers):
    """A kind that says nothing about its outputs."""

    outputs: ClassVar[frozenset[str]] = ModelKind.outputs


class TowersOptions(ModelOptions):
    kind: Literal["towers", "loss-only"] = "towers"


@pytest.mark.parametrize(
    ("kind", "objective", "missing"),
    [
        ("towers", "contrastive", ""),
        (
            "towers",
            "language-modeling",
            "'language-modeling' reads loss.*kind 'towers' gives image_embeds",
        ),
        (
            "towers",
            {"name": "contrastive", "loss": "sigmoid"},
            "reads logit_bias.*kind 'towers' gives",
        ),
        ("loss-only", "language-modeling", ""),
        (
            "loss-only",
            "contrastive",
            "reads image_embeds, logit_scale, text_embeds.*kind 'loss-only' gives loss",
        ),
    ],
)
def test_an_objective_reads_what_the_kind_gives(
    kind: str, objective: Any, missing: str, tmp_path: Path
) -> None:
    recipe = {
        "model": {"kind": kind}, "data": {"train": [{"path": "a.json"}]}, "parts": {"tower": "full"},
        "output_dir": "out", "objective": objective,
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with MODELS.temporary():
        MODELS.add("towers", Towers, "for the test", options=TowersOptions)
        MODELS.add("loss-only", LossOnly, "for the test", options=TowersOptions)
        if not missing:
            assert load_recipe(file).objective.reads() <= outputs_of(load_recipe(file).model)
            return
        with pytest.raises(RecipeError, match=missing):
            load_recipe(file)


def test_a_recipe_is_checked_against_the_outputs_without_torch() -> None:
    script = (
        "import sys; from medm.models import outputs_of; from medm.models.lvlm.options import "
        "LVLMOptions;print(sorted(outputs_of(LVLMOptions.model_construct()))); print('torch' in "
        "sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["['loss', 'loss_sum', 'losses']", "False"]


def test_a_folder_of_one_kind_is_no_start_for_another(section: dict[str, Any]) -> None:
    section["branches"]["image"]["encoder"]["name"] = "siglip"
    model, _ = medm.models.build(validate(LVLMOptions, section, source="test"))
    with pytest.raises(
        RecipeError, match="init_from DIR: holds a model of kind 'lvlm', not 'towers'"
    ):
        model.check_same_parts(TowersOptions(), source="DIR")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("merged", "expected a vision-language model.*found CountModel"),
        ("llava", "expected a vision-language model.*found CountModel"),
        ("encoder", "the model has branches"),
    ],
)
def test_a_model_of_another_kind_is_not_exported(form: str, message: str, tmp_path: Path) -> None:
    from medm.models.auto import register
    from tests.models.count_kind import Count, CountConfig, CountModel, CountProcessor

    with MODELS.temporary():
        MODELS.add("count", Count, "for the test")
        register()
        CountModel(CountConfig(adapters={})).save_pretrained(tmp_path / "model")
        CountProcessor(tiny.make_tokenizer("smollm2")).save_pretrained(tmp_path / "model")
        with pytest.raises(ExportError, match=message):
            export(str(tmp_path / "model"), str(tmp_path / "out"), form=form)
    assert not (tmp_path / "out").exists()
    assert (
        json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "medm-count"
    )
