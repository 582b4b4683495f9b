from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from medm.config import Mark, Options, ResumeSafe, flatten
from medm.encoders import ENCODERS, EncoderOptions
from medm.errors import RecipeError
from medm.training.options import NewTokenOptions, PartOptions, TrainOptions
from medm.training.recipe import Recipe, differences, dump, load_recipe, resolved, resume_safe_keys

RECIPE: dict[str, Any] = {
    "model": {
        "llm": {"name": "qwen2.5", "path": "Qwen/Qwen2.5-3B-Instruct"},
        "branches": {"image": {"encoder": "siglip", "connector": {"name": "mlp", "depth": 2}}},
    },
    "data": {"train": [{"path": "a.json", "root": "images"}]},
    "parts": {
        "llm": {"tune": "lora", "r": 128, "alpha": 256, "lr": 2e-4},
        "image.connector": {"tune": "full"},
        "image.encoder": "frozen",
    },
    "train": {"deepspeed": "zero2", "bf16": True},
    "output_dir": "out",
}


VOLUME = "model.branches.volume={encoder: m3d-clip, connector: mlp}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_the_complete_recipe_is_read(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.parts["image.encoder"].tune == "frozen"
    assert recipe.parts["llm"].lora() == {
        "r": 128,
        "lora_alpha": 256,
        "lora_dropout": 0.05,
        "target_modules": None,
        "use_rslora": False,
        "use_dora": False,
    }
    assert recipe.model.kind == "lvlm"
    assert recipe.objective.name == "language-modeling"
    assert recipe.train.num_train_epochs == 1.0


def test_a_resolved_recipe_reads_back_as_itself(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    again = tmp_path / "again.yaml"
    again.write_text(dump(resolved(recipe)))
    assert load_recipe(again) == recipe
    assert differences(resolved(recipe), resolved(load_recipe(again))) == []


def test_overrides_reach_parts_with_dots_in_their_names(file: Path) -> None:
    recipe = load_recipe(
        file,
        [
            "parts.image.connector.lr=1e-3",
            "train.max_steps=3",
            VOLUME,
            "parts.volume.connector=full",
        ],
    )
    assert recipe.parts["image.connector"].lr == 1e-3
    assert recipe.parts["volume.connector"].tune == "full"
    assert recipe.train.max_steps == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rte=1", ["train", "learning_rte", "learning_rate"]),
        ("parts.image.connector.r=8", ["image.connector", "r", "tune: lora"]),
        ("parts.image.encoder={tune: frozen, lr: 1e-3}", ["lr", "frozen"]),
        ("parts.llm.tune=loar", ["parts.llm", "loar"]),
        ("parts={image.encoder: frozen}", ["nothing to train"]),
        (
            "parts={llm: {tune: frozen, new_tokens: train}}",
            ["parts.llm.new_tokens", "model.control_tokens"],
        ),
        (
            "parts={llm: {tune: lora, new_tokens: {lr: 0}}}",
            ["parts.llm.new_tokens.lr", "greater than 0"],
        ),
        ("parts={llm: {tune: lora, new_tokens: all}}", ["parts.llm.new_tokens"]),
        ("model.control_tokens=[SEG]", ["model.control_tokens", "[SEG]"]),
        ("train.fp16=true", ["bf16", "fp16"]),
        ("train.load_best_model_at_end=true", ["load_best_model_at_end", "eval_strategy"]),
        ("train.arguments={learning_rate: 1}", ["learning_rate", "key of its own"]),
        ("objective=contrastiv", ["contrastive"]),
        (
            "objective=contrastive",
            ["'contrastive' reads image_embeds, logit_scale, text_embeds", "'lvlm' gives loss"],
        ),
        ("model.kind=lvml", ["lvlm"]),
        ("train.save_steps=many", ["save_steps", "many"]),
    ],
)
def test_mistakes_are_named(file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(file, [override])
    for word in words:
        assert word in str(error.value)


MASKS = [
    "model.masks={head: {name: dot-product, image_size: 32}}",
    "parts={llm: {tune: lora}, masks.encoder: full, masks.decoder: full, masks.projection: full}",
]
SEGMENTATION = (
    "objective={terms: {language: {objective: language-modeling}, "
    "masks: {objective: segmentation}}}"
)


def test_masks_and_their_objective_go_together(file: Path) -> None:
    """A head that no objective teaches, and an objective without a head, before anything is read."""
    load_recipe(file, [*MASKS, SEGMENTATION])
    with pytest.raises(RecipeError, match=r"'masks\.encoder': the model section has no 'masks'"):
        load_recipe(file, [MASKS[1], SEGMENTATION])
    with pytest.raises(RecipeError, match=r"mask_logits.*model\.masks"):
        load_recipe(file, [SEGMENTATION])
    with pytest.raises(RecipeError, match=r"parts\.masks\.encoder: .*no objective reads masks"):
        load_recipe(file, MASKS)
    frozen = "parts={llm: {tune: lora}}"
    assert load_recipe(file, [MASKS[0], frozen]).model.part_names()


def test_what_matters_for_learning_is_told_from_what_does_not(file: Path) -> None:
    before = resolved(load_recipe(file))
    assert (
        differences(before, resolved(load_recipe(file, ["train.save_steps=7", "output_dir=other"])))
        == []
    )
    changed = differences(
        before, resolved(load_recipe(file, ["train.seed=7", "data.train.0.path=b.json"]))
    )
    assert changed == ["data.train.0.path: was 'a.json', is 'b.json'", "train.seed: was 42, is 7"]


def test_a_key_that_an_earlier_version_did_not_know_is_no_difference(file: Path) -> None:
    now = resolved(load_recipe(file))
    before = copy.deepcopy(now)
    del before["model"]["branches"]["image"]["encoder"]["layer"], before["data"]["packing"]
    assert differences(before, now) == []
    changed = resolved(load_recipe(file, ["data.packing=true"]))
    assert differences(before, changed) == ["data.packing: was False, is True"]


@pytest.mark.parametrize(("older", "mode"), [("published", "paper"), ("sound", "corrected")])
def test_the_older_name_of_a_value_is_no_difference(file: Path, older: str, mode: str) -> None:
    block = "model.branches.image.connector={name: moe, mode: %s}"
    before, now = (resolved(load_recipe(file, [block % value])) for value in (mode, mode))
    connector = before["model"]["branches"]["image"]["connector"]
    assert connector["mode"] == mode
    connector["mode"] = older  # as an earlier version wrote it
    assert differences(before, now) == []
    assert differences(before, resolved(load_recipe(file, [block % older]))) == []
    other = "paper" if mode == "corrected" else "corrected"
    assert differences(before, resolved(load_recipe(file, [block % other]))) == [
        f"model.branches.image.connector.mode: was {mode!r}, is {other!r}"
    ]


def test_a_key_in_a_short_form_makes_it_a_block(file: Path) -> None:
    overrides = [
        "parts.image.encoder.tune=lora",
        "parts.image.encoder.r=8",
        "model.branches.image.encoder.image_size=224",
        "objective.auxiliary={balance: 0.5}",
    ]
    recipe = load_recipe(file, overrides)
    assert (recipe.parts["image.encoder"].tune, recipe.parts["image.encoder"].r) == ("lora", 8)
    encoder = recipe.model.branches["image"].encoder
    assert (encoder.name, encoder.image_size) == ("siglip", 224)
    assert recipe.objective.auxiliary == {"balance": 0.5}
    with pytest.raises(RecipeError, match=r"'output_dir' holds 'out', not a block"):
        load_recipe(file, ["output_dir.x=1"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "parts.image.conector.lr=1",
            "parts: no part 'image.conector': did you mean 'image.connector'?",
        ),
        ("parts.lm=full", "parts: no part 'lm': did you mean 'llm'?"),
        ("parts.volume.connector=full", "parts: no part 'volume.connector'"),
        ("train.bf16=yes", "train.bf16: expected true or false, found 'yes'"),
        ("train.seed=x", "train.seed: expected a whole number, found 'x'"),
        ("train.learning_rate=fast", "train.learning_rate: expected a number, found 'fast'"),
        ("train.optim=[a]", "train.optim: expected text, found ['a']"),
        (
            "model.branches.image.connector={name: gated}",
            "a part of your own comes with 'medm --plugin FILE'",
        ),
        ("model.llm.name=mine", "a part of your own comes with 'medm --plugin FILE'"),
    ],
)
def test_messages_say_what_to_write(file: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, [override])
    assert words in str(caught.value)


def test_new_tokens_are_something_to_train(file: Path) -> None:
    tokens = "model.control_tokens=['[SEG]']"
    alone = load_recipe(file, [tokens, "parts={llm: {tune: frozen, new_tokens: train}}"])
    assert alone.parts["llm"].new_tokens == NewTokenOptions()
    nested = load_recipe(file, [tokens, "parts.llm={tune: lora}", "parts.llm.new_tokens.lr=1e-4"])
    assert nested.parts["llm"].new_tokens == NewTokenOptions(lr=1e-4)
    # A saved model may have them, which its folder says.
    continued = ["parts={llm: {tune: frozen, new_tokens: train}}", "init_from=somewhere"]
    assert load_recipe(file, continued).parts["llm"].new_tokens is not None


def test_recipes_are_checked_without_torch() -> None:
    code = (
        "import sys, medm.training.recipe; sys.exit('torch' in sys.modules or 'transformers' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("schema", [Recipe, PartOptions, TrainOptions])
def test_every_key_is_documented(schema: type[Options]) -> None:
    assert [name for name, field in schema.model_fields.items() if not field.description] == []


def test_names_of_the_train_section_are_those_of_transformers() -> None:
    from transformers import TrainingArguments

    own = {name for name, field in TrainOptions.model_fields.items() if Mark.OWN in field.metadata}
    assert own == {
        "gradient_checkpointing",
        "torch_compile",
        "liger",
        "save_in_background",
        "early_stopping_patience",
        "early_stopping_threshold",
        "require_gpu",
        "deepspeed",
        "arguments",
    }
    assert set(TrainOptions.model_fields) - own <= set(TrainingArguments.__dataclass_fields__)


RESUME_SAFE = {
    *(
        f"train.{name}"
        for name in (
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "save_in_background",
            "logging_steps",
            "logging_first_step",
            "report_to",
            "run_name",
            "dataloader_num_workers",
            "dataloader_prefetch_factor",
            "dataloader_pin_memory",
            "ddp_timeout",
            "require_gpu",
            "per_device_eval_batch_size",
        )
    ),
    "output_dir",
    "data.bad_records_limit",
    "data.cache",
    "diagnostics",
    "monitors",
}
"""Every key that may change between a run and its continuation. A new one is a decision, so it is
written here too."""

WHOLE = {
    "data.cache": "data.cache={dir: kept, max_gb: 3}",
    "diagnostics": "diagnostics={every: 4}",
}
"""Sections that a recipe leaves out unless asked."""


def test_the_marked_options_are_those_that_do_not_change_what_is_learned(file: Path) -> None:
    recipe = resolved(load_recipe(file, WHOLE.values()))
    assert set(resume_safe_keys(Recipe, recipe)) == RESUME_SAFE


def test_every_key_but_the_marked_ones_is_compared(file: Path) -> None:
    before = resolved(load_recipe(file, WHOLE.values()))
    for key in flatten(before):
        now = copy.deepcopy(before)
        _change(now, key)
        safe = key in RESUME_SAFE or key.startswith(("data.cache.", "diagnostics."))
        told = [line.partition(": was")[0] for line in differences(before, now)]
        assert told == ([] if safe else [key]), key


@pytest.mark.parametrize("section", WHOLE)
def test_a_marked_section_may_come_and_go(file: Path, section: str) -> None:
    without, whole = resolved(load_recipe(file)), resolved(load_recipe(file, [WHOLE[section]]))
    assert differences(without, whole) == differences(whole, without) == []


class ChunkedOptions(EncoderOptions):
    chunk: ResumeSafe[int] = 8
    """Slices at once: memory against time."""
    width: int = 4
    """Width."""


class InnerOptions(ChunkedOptions):
    chunk: int = 8
    """Here it changes what is computed."""


def test_options_of_a_plug_in_are_marked_like_those_of_medm(file: Path) -> None:
    with ENCODERS.temporary():
        ENCODERS.add("chunked", "medm.errors:MedmError", "marks an option", options=ChunkedOptions)
        ENCODERS.add("inner", "medm.errors:MedmError", "does not mark it", options=InnerOptions)

        def changed(name: str) -> list[str]:
            block = f"model.branches.image.encoder={{name: {name}, chunk: %d, width: %d}}"
            return differences(
                *(resolved(load_recipe(file, [block % values])) for values in ((8, 4), (2, 5)))
            )

        place = "model.branches.image.encoder"
        assert changed("chunked") == [f"{place}.width: was 4, is 5"]
        assert changed("inner") == [f"{place}.chunk: was 8, is 2", f"{place}.width: was 4, is 5"]
        wrapped = "model.branches.image.encoder={name: slices, encoder: {name: chunked, chunk: %d}}"
        recipes = [resolved(load_recipe(file, [wrapped % chunk])) for chunk in (8, 2)]
        assert differences(*recipes) == []


def _change(recipe: Any, key: str) -> None:
    """Put another value at a dotted key; part names hold dots themselves."""
    while not (isinstance(recipe, dict) and key in recipe):
        if isinstance(recipe, list):
            step, _, key = key.partition(".")
            recipe = recipe[int(step)]
        else:
            step = next(name for name in recipe if key.startswith(f"{name}."))
            recipe, key = recipe[step], key.removeprefix(f"{step}.")
    recipe[key] = "another"
