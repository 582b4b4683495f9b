"""Every shipped recipe says what it means: it passes the schema, without torch and without asking a
hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medm.cli.recipes import find, shipped, summary
from medm.errors import RecipeError
from medm.llms.base import read_template
from medm.models import preprocess_of
from medm.training.recipe import differences, dump, load_recipe, resolved
from tests import shrink
from tests.models.dual_encoder.tiny import save_tokenizer

ROOT = Path(__file__).parents[1]
NAMES = sorted(shipped())


def test_the_published_systems_are_there() -> None:
    assert {
        "medm-vl-2d/pretrain",
        "medm-vl-2d/finetune",
        "medm-vl-2d/finetune_lora",
        "medm-vl-ct/pretrain",
        "medm-vl-ct/finetune",
        "medm-vl-ct/finetune_lora",
        "medm-vl-ct-chest/pretrain",
        "medm-vl-ct-chest/finetune",
        "medm-vl-ct-chest/finetune_lora",
        "tinyllava-phi2-siglip/pretrain",
        "tinyllava-phi2-siglip/finetune",
        "uni-med/published",
        "uni-med/small",
        "uni-med/small_dense",
        "unimed-clip/vit-b16",
        "unimed-clip/vit-b32",
        "unimed-clip/vit-l14-336",
        "unimed-clip/vit-l14-336-large-text",
        "unimed-clip/small",
        "m3d-clip/pretrain",
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_resolves_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(shipped()[name])
    written = tmp_path / "resolved.yaml"
    written.write_text(dump(resolved(recipe)), encoding="utf-8")
    assert load_recipe(written) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_preprocessing_is_known_without_the_language_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "medm.models.lvlm.build._text_config", lambda *_: pytest.fail("asked for the LLM")
    )
    recipe = load_recipe(shipped()[name])
    if recipe.model.kind != "lvlm":
        pytest.skip("other kinds know their preprocessing from their processor")
    known = preprocess_of(recipe.model)
    fields = {name: branch.preprocess for name, branch in recipe.model.branches.items()}
    if (masks := recipe.model.masks) is not None:
        fields[f"{masks.view}@masks"] = masks.preprocess
    assert list(known) == list(fields)
    for view, written in fields.items():
        said = known[view].model_dump()
        assert said["size"] and written.items() <= said.items()


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_what_it_is(name: str) -> None:
    assert len(summary(shipped()[name])) > 20


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_those_of_the_model(name: str) -> None:
    """A part that the model lacks would be noticed only after the weights are loaded."""
    recipe = load_recipe(shipped()[name])
    if recipe.model.kind != "lvlm":
        pytest.skip("the parts of other kinds are known to the built model alone")
    branches = recipe.model.branches
    known = {"llm"} | {
        f"{branch}.{part}" for branch in branches for part in ("encoder", "connector")
    }
    if recipe.model.masks is not None:
        known |= {"masks.encoder", "masks.decoder", "masks.projection"}
    assert set(recipe.parts) <= known


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [  # the published numbers, as a reader of the paper would look them up
        ("medm-vl-2d/pretrain", "parts.image.connector.lr", 1e-3),
        ("medm-vl-2d/pretrain", "train.per_device_train_batch_size", 64),
        ("medm-vl-2d/pretrain", "train.gradient_accumulation_steps", 2),
        ("medm-vl-2d/finetune", "parts.image.encoder.tune", "full"),
        ("medm-vl-2d/finetune", "parts.llm.lr", 2e-5),
        ("medm-vl-2d/finetune", "train.num_train_epochs", 3),
        ("medm-vl-2d/finetune_lora", "parts.llm.r", 128),
        ("medm-vl-2d/finetune_lora", "parts.llm.alpha", 256),
        ("medm-vl-2d/finetune_lora", "parts.image.encoder.tune", "frozen"),
        ("medm-vl-ct/pretrain", "data.max_length", 512),
        ("medm-vl-ct/pretrain", "parts.volume.connector.lr", 1e-4),
        ("medm-vl-ct/pretrain", "train.num_train_epochs", 3),
        ("medm-vl-ct/pretrain", "train.per_device_train_batch_size", 32),
        ("medm-vl-ct/finetune", "parts.llm.lr", 5e-5),
        ("medm-vl-ct/finetune", "parts.volume.encoder.tune", "frozen"),
        ("medm-vl-ct/finetune", "train.num_train_epochs", 4),
        ("medm-vl-ct/finetune", "train.per_device_train_batch_size", 16),
        ("medm-vl-ct/finetune_lora", "parts.llm.r", 128),
        ("medm-vl-ct-chest/pretrain", "parts.volume.connector.lr", 1e-3),
        ("medm-vl-ct-chest/pretrain", "train.per_device_train_batch_size", 16),
        ("medm-vl-ct-chest/finetune", "parts.volume.encoder.lr", 2e-5),
        ("medm-vl-ct-chest/finetune", "train.per_device_train_batch_size", 8),
        ("medm-vl-ct-chest/finetune_lora", "parts.volume.connector.lr", 2e-4),
        ("tinyllava-phi2-siglip/pretrain", "data.max_length", 3072),
        ("tinyllava-phi2-siglip/pretrain", "parts.image.connector.lr", 1e-3),
        ("tinyllava-phi2-siglip/finetune", "parts.llm.tune", "full"),
        ("tinyllava-phi2-siglip/finetune", "parts.image.encoder.tune", "frozen"),
        ("tinyllava-phi2-siglip/finetune", "train.gradient_accumulation_steps", 4),
        ("uni-med/published", "parts.llm.r", 8),
        ("uni-med/published", "parts.llm.alpha", 16),
        ("uni-med/published", "train.learning_rate", 1e-5),
        ("uni-med/published", "train.weight_decay", 0.05),
        ("uni-med/published", "train.warmup_steps", 5000),
        ("uni-med/published", "train.max_steps", 50000),
        ("uni-med/published", "train.per_device_train_batch_size", 4),
        ("uni-med/published", "data.max_length", 3800),
        ("unimed-clip/vit-b16", "model.image.encoder.image_size", 224),
        ("unimed-clip/vit-b16", "model.embed_dim", 512),
        ("unimed-clip/vit-b16", "model.text.max_length", 256),
        ("unimed-clip/vit-b16", "train.learning_rate", 5e-4),
        ("unimed-clip/vit-b16", "train.per_device_train_batch_size", 128),
        ("unimed-clip/vit-b16", "train.warmup_steps", 2000),
        ("unimed-clip/vit-b16", "train.num_train_epochs", 10),
        ("unimed-clip/vit-b16", "train.weight_decay", 0.2),
        ("unimed-clip/vit-b16", "train.adam_beta2", 0.98),
        ("unimed-clip/vit-b16", "train.adam_epsilon", 1e-6),
        ("unimed-clip/vit-b16", "train.max_grad_norm", 0),
        ("unimed-clip/vit-b32", "train.learning_rate", 5e-4),
        ("unimed-clip/vit-l14-336", "model.image.encoder.architecture", {"image_size": 336}),
        ("unimed-clip/vit-l14-336", "model.embed_dim", 768),
        ("unimed-clip/vit-l14-336", "train.learning_rate", 4e-4),
        ("unimed-clip/vit-l14-336-large-text", "train.learning_rate", 4e-4),
        ("m3d-clip/pretrain", "model.text.max_length", 128),
        ("m3d-clip/pretrain", "train.learning_rate", 1e-4),
        ("m3d-clip/pretrain", "train.weight_decay", 0.1),
        ("m3d-clip/pretrain", "train.num_train_epochs", 100),
        ("m3d-clip/pretrain", "train.per_device_train_batch_size", 32),
    ],
)
def test_published_values(name: str, key: str, value: object) -> None:
    section, rest = key.split(".", 1)
    block = resolved(load_recipe(shipped()[name]))[section]
    part, _, last = rest.rpartition(".")
    if section == "model":  # names of parts have dots, keys of nested blocks have none
        for key in part.split(".") if part else ():
            block = block[key]
        part = ""
    assert (block[part] if part else block)[last] == value


UNI_MED = {
    "medqa": 2, "pubmedqa": 2, "slake-vqa": 5, "path-vqa": 5, "slake-rec": 4, "sa-med2d-rec": 4, "slake-reg": 4,
    "sa-med2d-reg": 4, "medpix": 8, "mimic-caption": 8, "medmnist-derma": 4 * 7007 / 20939,
    "medmnist-organs": 4 * 13932 / 20939,
}  # fmt: skip
"""Task that makes the source -> published ratio; both MedMNIST sets are one source of 4 in
proportion to their size."""


@pytest.mark.parametrize("name", ["uni-med/published", "uni-med/small", "uni-med/small_dense"])
def test_uni_med_draws_its_sources_in_the_published_ratios(name: str) -> None:
    from medm.tasks import TASKS

    weights = {
        Path(source.path).stem: source.weight for source in load_recipe(find(name)).data.train
    }
    assert weights == pytest.approx(UNI_MED, abs=1e-3)
    assert all(task in TASKS for task in weights)
    convert = (ROOT / "scripts/train/Uni-Med/convert.sh").read_text("utf-8")
    assert all(f" {task}=" in convert for task in weights)


UNIMED_CLIP = [name for name in NAMES if name.startswith("unimed-clip/")]


@pytest.mark.parametrize("name", UNIMED_CLIP)
def test_unimed_clip_trains_on_its_13_sources_and_never_mirrors(name: str) -> None:
    from medm.tasks.pair_sources import PAIR_SOURCES

    recipe = load_recipe(find(name))
    stems = [Path(source.path).stem for source in recipe.data.train]
    assert len(stems) == len(set(stems)) == 13
    assert all(f"unimed/{stem}" in PAIR_SOURCES for stem in stems)
    rules = {stem: source.captions for stem, source in zip(stems, recipe.data.train, strict=True)}
    assert {stem for stem, rule in rules.items() if rule is not None} == {"openi"}
    assert rules["openi"] == "first"
    assert recipe.data.augment is not None
    assert not recipe.data.augment["image"].mirror
    convert = (ROOT / "scripts/train/UniMed-CLIP/convert.sh").read_text("utf-8")
    for source in recipe.data.train:
        assert f" {Path(source.path).stem}=" in convert
        assert f":-{source.root}}}" in convert


BERT_BASE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512,
}  # fmt: skip
BERT_LARGE = BERT_BASE | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16,
}  # fmt: skip
VIT_B = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 16,
}  # fmt: skip
VIT_L = VIT_B | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "patch_size": 14, "image_size": 336,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "vision", "text", "widths", "grid"),
    [
        ("vit-b16", VIT_B, BERT_BASE, [768, 640, 512], (14, 14)),
        ("vit-b32", VIT_B | {"patch_size": 32}, BERT_BASE, [768, 640, 512], (7, 7)),
        ("vit-l14-336", VIT_L, BERT_BASE, [768, 768, 768], (24, 24)),
        ("vit-l14-336-large-text", VIT_L, BERT_LARGE, [1024, 896, 768], (24, 24)),
    ],
)
def test_the_towers_of_unimed_clip_have_the_published_widths(
    name: str,
    vision: dict[str, int],
    text: dict[str, int],
    widths: list[int],
    grid: tuple[int, int],
    tiny_parts: Path,
) -> None:
    """With the sizes of the files that the recipe names; nothing is allocated."""
    from medm.models import kind_of

    tokenizer = tiny_parts / "words"
    save_tokenizer(tokenizer)
    towers = {"image": vision, "text": text}
    overrides = [f"model.text.tokenizer={tokenizer}"]
    for tower, sizes in towers.items():
        encoder = f"model.{tower}.encoder"
        overrides += [f"{encoder}.path=null", f"{encoder}.architecture={json.dumps(sizes)}"]
    options = load_recipe(find(f"unimed-clip/{name}"), overrides).model
    model = kind_of(options).skeleton(options)
    matrices = [part.weight for part in model.text.projection if hasattr(part, "weight")]
    assert [matrices[0].shape[1], *(matrix.shape[0] for matrix in matrices)] == widths
    assert not any(getattr(part, "bias", None) is not None for part in model.text.projection)
    projection = model.image.readout.projection.weight
    assert tuple(projection.shape) == (widths[-1], vision["hidden_size"])
    assert model.image.encoder.grid(model.image.spatial) == grid
    assert model.image.encoder.prefix == 1


def test_the_published_text_towers_of_unimed_clip_differ_in_size_alone() -> None:
    base, large = (
        resolved(load_recipe(find(f"unimed-clip/vit-l14-336{text}")))
        for text in ("", "-large-text")
    )
    changed = [line.partition(":")[0] for line in differences(base, large)]
    assert changed == ["model.text.encoder.path"]


def test_the_published_connector_of_uni_med() -> None:
    model = load_recipe(find("uni-med/published")).model
    connector = model.branches["image"].connector.model_dump()
    assert model.tasks == ["vqa", "refer", "identify", "caption", "cls"]
    said = {
        key: connector[key]
        for key in ("mode", "num_experts", "gate", "route_by", "resample", "window", "depth")
    }
    assert said == {
        "mode": "paper",
        "num_experts": 5,
        "gate": "soft",
        "route_by": "task+token",
        "resample": "projection",
        "window": [1, 4],
        "depth": 2,
    }


def test_the_dense_baseline_of_uni_med_differs_in_one_line() -> None:
    experts, dense = (
        resolved(load_recipe(find(f"uni-med/{name}"))) for name in ("small", "small_dense")
    )
    changed = [line.partition(":")[0] for line in differences(experts, dense)]
    assert changed == ["model.branches.image.connector.gate"]


def test_recipes_are_found_by_name_from_anywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "medm",
            "recipes",
            "show",
            "medm-vl-2d/pretrain",
            "train.num_train_epochs=7",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "num_train_epochs: 7" in done.stdout
    assert find("medm-vl-2d/pretrain.yaml") == find("medm-vl-2d/pretrain")
    assert find("recipes/medm-vl-2d/pretrain.yaml").samefile(find("medm-vl-2d/pretrain"))
    with pytest.raises(RecipeError, match="did you mean 'medm-vl-2d/pretrain'"):
        find("medm-vl-2d/pretrian")


def test_recipe_check_needs_no_torch() -> None:
    script = (
        "import sys; from medm.cli import main\n"
        "try: main(['recipes', 'show', 'medm-vl-2d/finetune'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle.llm=x", ["modle", "did you mean 'model'"]),
        ("model.llm.name=qwen", ["qwen", "qwen2.5"]),
        (
            "model.branches.image.connector.dept=3",
            ["model.branches.image.connector", "dept", "did you mean 'depth'"],
        ),
        ("train.learning_rte=1e-4", ["learning_rte", "did you mean 'learning_rate'"]),
        ("train.bf16=maybe", ["train.bf16", "'maybe'"]),
        ("parts.llm.tune=lor", ["parts.llm", "'lor'"]),
        ("data.train.0.path=7", ["data.train.0.path", "7"]),
    ],
)
def test_mistakes_are_named_with_their_key(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(find("medm-vl-2d/finetune_lora"), [override])
    for word in words:
        assert word in str(caught.value)


@pytest.fixture(scope="module")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains(name: str, tiny_parts: Path, tmp_path: Path) -> None:
    """Two steps with tiny parts: what the recipe says is trained moves, and nothing else does."""
    from transformers import set_seed

    from medm.models import build, load
    from medm.training.run import train

    sources = f'[{{"path": "{shrink.records(name)}"}}]'
    recipe = load_recipe(
        find(name),
        [
            *shrink.overrides(name, tiny_parts),
            f"data.train={sources}",
            "data.eval=[]",
            "train.eval_strategy=no",
            "train.save_strategy=no",
            "init_from=null",
            f"output_dir={tmp_path / 'out'}",
        ],
    )
    set_seed(recipe.train.seed)
    before = {part: module.state_dict() for part, module in build(recipe.model)[0].parts().items()}
    outcome = train(recipe)
    assert outcome.finished
    assert outcome.steps == 2
    model, processor = load(str(tmp_path / "out"))
    for part, module in model.parts().items():
        if part == "momentum":  # not in the folder: it starts again as what it follows
            continue
        after, tune = (
            module.state_dict(),
            recipe.parts[part].tune if part in recipe.parts else "frozen",
        )
        if tune == "lora":
            assert any(bool(tensor.any()) for key, tensor in after.items() if "lora_B" in key), part
        else:
            moved = any(not torch.equal(tensor, before[part][key]) for key, tensor in after.items())
            assert moved == (tune == "full"), part
    if recipe.model.kind != "lvlm":
        return
    template = recipe.model.llm.chat_template
    if template is not None:
        assert processor.chat_template == read_template(template)


def test_reference_page_is_current() -> None:
    from medm.cli.reference import page

    written = (ROOT / "docs" / "recipe-reference.md").read_text(encoding="utf-8")
    assert written == page(), "run: make docs"
