"""Exports compute what the model computes, with nothing of medm at hand; what cannot be exported is
refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import medm.models.export.export as export_module
from medm.config import validate
from medm.encoders import ENCODERS, ViTOptions
from medm.errors import CheckpointError, ExportError
from medm.models import build, load
from medm.models.export.export import Proof, Question, _ask, draw_test_image, export
from medm.models.export.llava import literal, save_llava, stock_template
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import LVLMOptions
from medm.models.manifest import verify
from medm.models.vision import build_encoder
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from tests.cli.runner import medm
from tests.encoders.tiny import TINY_ENCODERS
from tests.inference.grounded import build_grounded
from tests.inference.tiny import awaken
from tests.models import plain_head
from tests.models.dual_encoder.tiny import make as make_dual
from tests.models.dual_encoder.tiny import save_tokenizer
from tests.models.dual_encoder.tiny import section as dual_section
from tests.tiny import lvlm_section, save_llm


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llms")
    return {
        family: save_llm(family, folder / family)
        for family in ("qwen2.5", "llama-3.2", "phi3", "phi", "qwen3")
    }


def make(
    llm: Path,
    *,
    family: str = "qwen2.5",
    encoder: str = "siglip",
    changes: Any = None,
    **options: Any,
) -> Any:
    section = lvlm_section(llm, family=family, encoder=encoder, **options)
    section["branches"]["image"] |= changes or {}
    torch.manual_seed(1)
    model, processor = build(validate(LVLMOptions, section, source="test"))
    awaken(model)
    return model, processor


def save(pair: Any, folder: Path) -> str:
    for part in pair:
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
@pytest.mark.parametrize("family", ["qwen2.5", "llama-3.2", "phi3"])
def test_logits_and_ids_equal_the_stock_class(
    family: str, encoder: str, llms: dict[str, Path], tmp_path: Path
) -> None:
    """The measured worst case is 0 on equal pixels: both run the same kernels on the same tensors.

    The two image processors round differently in the last bit; random weights as large as these
    make 4e-5 of it.
    """
    layer = -2 if encoder == "clip" else -1
    model, processor = make(llms[family], family=family, encoder=encoder, layer=layer)
    save_llava(model, processor, tmp_path)
    stock, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(stock).__name__ == "LlavaForConditionalGeneration"
    own = _ask(model, processor, Question(draw_test_image(tmp_path / "p.png"), "What is it?", 12))
    inputs = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": str(tmp_path / "p.png")},
                    {"type": "text", "text": "What is it?"},
                ],
            }
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["input_ids"].tolist() == own.input_ids.tolist()
    assert (inputs["pixel_values"] - own.pixels).abs().max() < 1e-6
    with torch.no_grad():
        logits = stock(**{**inputs, "pixel_values": own.pixels}).logits
        ids = stock.generate(**inputs, max_new_tokens=12, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
    assert own.logits.abs().max() > 0.5
    assert (logits - own.logits).abs().max() < 1e-5
    assert ids.tolist() == own.reply
    assert len(set(own.reply)) > 1


def test_the_proof_runs_where_medm_cannot_be_imported(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    pair = make(llms["qwen2.5"], encoder="clip", layer=-2, image_size=24, tokens="cls_patch")
    folder = save(pair, tmp_path / "model")
    proof = export(folder, str(tmp_path / "out"), form="llava")
    assert proof.difference < 1e-5
    assert "same reply" in str(proof)
    assert "Not for clinical use" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "origin").exists(), "the model has no records"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 3
    assert config["vision_config"]["image_size"] == 24
    assert config["vision_feature_select_strategy"] == "full"
    hiding = (
        Path(export_module.__file__)
        .with_name("stock_check.py")
        .read_text()
        .partition("if __name__")[0]
    )
    script = f"{hiding}\nsys.meta_path.insert(0, NoMedm())\nimport medm"
    hidden = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False
    )
    assert "medm is hidden from this process" in hidden.stderr


def test_what_the_stock_class_cannot_compute_is_refused(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    cases: list[tuple[Any, str]] = [
        (
            make(llms["qwen2.5"], changes={"connector": {"name": "mlp", "depth": 3}}),
            "mlp of depth 3",
        ),
        (make(llms["qwen2.5"], changes={"connector": {"name": "linear"}}), "this model has linear"),
        (make(llms["qwen2.5"], encoder="clip", tokens="cls"), "class token alone"),
        (make(llms["qwen2.5"], changes={"preprocess": {"fit": "pad"}}), "pads before it resizes"),
        (make(llms["qwen2.5"], changes={"preprocess": {"size": [16, 24]}}), "takes 16 x 24"),
    ]
    for pair, words in cases:
        with pytest.raises(ExportError, match=words):
            save_llava(*pair, tmp_path)
    assert not list(tmp_path.iterdir())


def test_phi_2_is_refused_with_the_size_of_its_bias(llms: dict[str, Path], tmp_path: Path) -> None:
    model, processor = make(llms["phi"], family="phi")
    with torch.no_grad():
        model.language_model.lm_head.bias[7] = -0.75
    folder = save((model, processor), tmp_path / "model")
    with pytest.raises(
        ExportError,
        match=r"without the bias of this phi model the logits would change by up to 0\.75",
    ):
        export(folder, str(tmp_path / "out"), form="llava")
    assert not (tmp_path / "out").exists()


def test_a_failed_proof_leaves_nothing(
    llms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(make(llms["qwen2.5"]), tmp_path / "model")
    original = export_module.save_llava

    def broken(model: Any, processor: Any, target: Path) -> None:
        original(model, processor, target)
        config = json.loads((target / "config.json").read_text())
        config["vision_feature_layer"] = -3
        (target / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(export_module, "save_llava", broken)
    with pytest.raises(ExportError, match="other logits: they differ by up to"):
        export(folder, str(tmp_path / "out"), form="llava")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_merged_folds_the_adapter_and_computes_the_same(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    model, processor = make(llms["llama-3.2"], family="llama-3.2")
    model.add_adapter_to_part(
        "llm", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    folder = save((model, processor), tmp_path / "model")
    (tmp_path / "model" / "recipe.yaml").write_text("output_dir: x\n")
    (tmp_path / "model" / "run.json").write_text("{}\n")
    proof = export(folder, str(tmp_path / "out"), form="merged")
    assert proof.difference < 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not for clinical use" in card
    assert str(proof) in card
    assert (tmp_path / "out" / "origin" / "recipe.yaml").read_text() == "output_dir: x\n"
    facts = verify(tmp_path / "out")["export"]
    assert (facts["form"], facts["source"]) == ("merged", "model")
    merged, _ = load(str(tmp_path / "out"))
    assert merged.config.adapters == {}
    assert not any("lora" in name for name in merged.state_dict())


@pytest.mark.parametrize(
    ("form", "part", "layer"),
    [("merged", "llm", "q_proj"), ("llava", "llm", "q_proj"), ("llava", "image.connector", "0"),
     ("encoder", "image.encoder", "fc1")],
)  # fmt: skip
def test_a_wrong_merge_is_found_since_the_trained_model_is_what_exports_are_compared_with(
    form: str,
    part: str,
    layer: str,
    llms: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = make(llms["qwen2.5"])
    model.add_adapter_to_part(part, {"r": 4, "lora_alpha": 8, "target_modules": [layer]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    folder = save((model, processor), tmp_path / "model")
    proof = export(folder, str(tmp_path / "right"), form=form)
    assert 0 < proof.difference < 1e-4 * max(1.0, proof.largest)
    monkeypatch.setattr(
        peft.tuners.lora.Linear, "merge", lambda self, safe_merge=False: None
    )  # the adapter is lost
    with pytest.raises(ExportError, match="they differ by up to"):
        export(folder, str(tmp_path / "out"), form=form)
    assert not (tmp_path / "out").exists()


def test_what_can_be_known_is_said_before_weights_are_read(
    llms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(make(llms["qwen2.5"]), tmp_path / "model")
    monkeypatch.setattr(export_module, "load", lambda _folder: pytest.fail("weights were read"))
    file = tmp_path / "model" / "config.json"
    cases: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
        (ExportError, "exists already", folder, {}),
        (ExportError, "exists already", str(file), {}),
        (NotADirectoryError, "config.json", str(file / "out"), {}),
        (OSError, "too long", str(tmp_path / ("n" * 300)), {}),
        (
            ExportError,
            "no such file; expected an image",
            str(tmp_path / "out"),
            {"image": str(tmp_path / "none.png")},
        ),
        (
            ExportError,
            "say whose encoder",
            str(tmp_path / "out"),
            {"form": "encoder", "branch": "volume"},
        ),
    ]
    for kind, words, out, changes in cases:
        with pytest.raises(kind, match=words):
            export(folder, out, **({"form": "merged"} | changes))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_names_the_folder_and_leaves_nothing(
    llms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(make(llms["qwen2.5"]), tmp_path / "model")

    def full(*_arguments: Any, **_keywords: Any) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    done = medm("export", str(tmp_path / "out"), "--model", folder, "--format", "merged")
    assert done.code == 1
    assert f"error: {tmp_path / 'out'}: No space left on device; make room" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_encoder_goes_into_another_recipe(llms: dict[str, Path], tmp_path: Path) -> None:
    model, processor = make(llms["qwen2.5"], encoder="clip", layer=-2, image_size=24)
    folder = save((model, processor), tmp_path / "model")
    assert (
        str(export(folder, str(tmp_path / "tower"), form="encoder"))
        == "the same features, bit for bit"
    )
    options = validate(
        ViTOptions, {"name": "clip", "path": str(tmp_path / "tower"), "layer": -2}, source="test"
    )
    encoder, preprocess = build_encoder(options)
    pixels = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(encoder(pixels).tokens, model.branch("image").encoder(pixels).tokens)
    assert preprocess == processor.preprocess["image"].model_dump()
    section = lvlm_section(
        llms["qwen2.5"], encoder="siglip", path=str(tmp_path / "tower"), layer=-2
    )
    with pytest.raises(Exception, match="holds an encoder 'clip', not 'siglip'"):
        build(validate(LVLMOptions, section, source="test"))
    with pytest.raises(
        CheckpointError, match="missing"
    ):  # the last block was never used, so it is not there
        build_encoder(options.model_copy(update={"layer": -1}))
    with pytest.raises(ExportError, match=r"branches \['image'\]"):
        export(folder, str(tmp_path / "none"), form="encoder", branch="volume")


def test_nothing_is_overwritten(llms: dict[str, Path], tmp_path: Path) -> None:
    folder = save(make(llms["qwen2.5"]), tmp_path / "model")
    with pytest.raises(ExportError, match="exists already"):
        export(folder, folder, form="merged")
    with pytest.raises(ExportError, match="unknown form 'gguf'"):
        export(folder, str(tmp_path / "out"), form="gguf")


def test_templates_carry_their_variables() -> None:
    from jinja2 import Template

    template = stock_template(
        "{{ date }}|{{ on }}|{{ messages[0].content }}",
        {"date": "it's", "on": False},
        image_token="<image>",
    )
    parts = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    assert (
        Template(template).render(messages=[{"role": "user", "content": parts}])
        == "it's|False|<image>\nWhy?"
    )
    assert (
        Template(template).render(messages=[{"role": "user", "content": "Why?"}])
        == "it's|False|Why?"
    )
    with pytest.raises(ExportError):
        literal([1])


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a 2-D and a 3-D dual encoder, and of one with an adapter in its image tower."""
    folder = tmp_path_factory.mktemp("dual")
    tokenizer = save_tokenizer(folder / "tokenizer")
    volume = {"name": "m3d-clip", "architecture": TINY_ENCODERS["m3d-clip"].block["architecture"]}
    sections = {
        "image": dual_section(tokenizer),
        "volume": dual_section(
            tokenizer,
            branch="volume",
            image={"encoder": volume, "preprocess": {"size": [8, 16, 16]}},
        ),
        "cnn": dual_section(
            tokenizer,
            image={
                "encoder": TINY_ENCODERS["efficientnet-lite"].block,
                "pool": "encoder",
                "norm": False,
            },
        ),
    }
    return {name: save(make_dual(content), folder / name) for name, content in sections.items()}


@pytest.mark.parametrize("name", ["image", "volume", "cnn"])
def test_the_tower_of_a_dual_encoder_goes_into_an_lvlm_recipe(
    name: str, dual: dict[str, str], llms: dict[str, Path], tmp_path: Path
) -> None:
    tower = str(tmp_path / "tower")
    proof = export(dual[name], tower, form="encoder")
    assert "same features" in str(proof) or "largest feature difference" in str(proof)
    assert not proof.difference or name == "cnn"
    trained, processor = load(dual[name])
    (branch,) = trained.encoders()
    block = {"name": trained.config.image["encoder"]["name"], "path": tower}
    block |= {"stages": [3, 5]} if name == "cnn" else {}  # the recipe chooses feature maps
    connector = {"name": "mlp", "depth": 2}
    content = {
        "llm": {"name": "qwen2.5", "path": str(llms["qwen2.5"])},
        "branches": {branch: {"encoder": block, "connector": connector}},
    }
    model, lvlm_processor = build(validate(LVLMOptions, content, source="test"))
    own, other = trained.encoders()[branch], model.encoders()[branch]
    assert lvlm_processor.preprocess[branch] == processor.preprocess[branch]
    pixels = torch.rand(2, own.channels, *processor.preprocess[branch].size)
    with torch.no_grad():
        before, after = own.encoder(pixels), other.encoder(pixels)
    assert torch.equal(before.tokens[:, before.prefix :], after.tokens[:, after.prefix :])


@pytest.mark.parametrize(("name", "target"), [("image", "fc1"), ("volume", "up")])
def test_an_adapted_tower_of_a_dual_encoder_is_merged(
    name: str, target: str, dual: dict[str, str], tmp_path: Path
) -> None:
    model, processor = load(dual[name])
    model.add_adapter_to_part(
        "image.encoder", PartOptions(tune="lora", r=2, targets=[target]).lora()
    )
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = save((model, processor), tmp_path / "adapted")
    export(folder, str(tmp_path / "tower"), form="encoder")
    (vision,) = model.eval().encoders().values()
    block = {"name": model.config.image["encoder"]["name"], "path": str(tmp_path / "tower")}
    tower = validate(ENCODERS.entry(block["name"]).options, block, source="test")
    plain, _ = build_encoder(tower)
    pixels = torch.rand(1, vision.channels, *vision.spatial)
    with torch.no_grad():
        adapted = vision.encoder(pixels).tokens[:, 1:]
        torch.testing.assert_close(plain(pixels).tokens, adapted, atol=1e-5, rtol=1e-4)
        before = load(dual[name])[0].image.encoder(pixels).tokens[:, 1:]
    assert (adapted - before).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["merged", "llava"])
def test_other_forms_of_a_dual_encoder_are_refused(
    form: str, dual: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="--format encoder alone can be written"):
        export(dual["image"], str(tmp_path / "out"), form=form)
    with pytest.raises(ExportError, match=r"branches \['image'\]"):
        export(dual["image"], str(tmp_path / "out"), form="encoder", branch="volume")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def grounded(tmp_path: Path) -> Iterator[str]:
    """A model with a mask head, LoRA, trained rows of its tokens and LoRA on its projection."""
    with plain_head.registered():
        model, processor = build_grounded(tmp_path)
        parts = {
            "llm": {"tune": "lora", "r": 4, "new_tokens": {}},
            "masks.projection": {"tune": "lora", "r": 2},
        }
        apply_parts(
            model,
            {name: PartOptions.model_validate(part) for name, part in parts.items()},
            TrainOptions(),
        )
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "new_rows" in name:
                    parameter.normal_(std=0.2, generator=generator)
        yield save((model.eval(), processor), tmp_path / "model")


def test_a_reply_without_a_word_is_compared_as_a_reply() -> None:
    said = str(Proof(0.5, 2.0, "", "masks as well"))
    assert said == "largest logit difference 0.5 (of 2), same reply: ''; masks as well"
    assert "feature difference" in str(Proof(0.5, 2.0, None))


def masks_of(folder: str) -> Tensor:
    """Logits of the masks of a fixed reply."""
    model, processor = load(folder)
    reply = "<p>mass</p>[SEG] and [SEG]"
    ids = torch.tensor([processor.tokenizer(reply, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        prompts = model.mask_prompts(ids)
        noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return model.masks.head(noise, prompts, torch.zeros(2, dtype=torch.int64)).logits


def test_masks_and_trained_rows_survive_merging(grounded: str, tmp_path: Path) -> None:
    proof = export(grounded, str(tmp_path / "merged"), form="merged", max_new_tokens=2)
    assert "largest difference of a mask logit" in str(proof)
    assert load(str(tmp_path / "merged"))[0].config.adapters == {}
    own = masks_of(grounded)
    assert own.abs().max() > 0.01
    assert (own[0] - own[1]).abs().max() > 1e-3
    torch.testing.assert_close(masks_of(str(tmp_path / "merged")), own, atol=1e-5, rtol=1e-4)
    proof = export(grounded, str(tmp_path / "tower"), form="encoder")
    assert "feature" in str(proof)


def test_a_wrong_merge_of_the_mask_head_is_found(
    grounded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = LVLMForConditionalGeneration.merge_adapters

    def wrong(self: Any) -> None:
        merge(self)
        with torch.no_grad():
            self.masks.head.decoder.weight.mul_(1.5)

    monkeypatch.setattr(LVLMForConditionalGeneration, "merge_adapters", wrong)
    with pytest.raises(ExportError, match="the merged model draws other masks"):
        export(grounded, str(tmp_path / "out"), form="merged", max_new_tokens=2)
    assert not (tmp_path / "out").exists()


def test_masks_are_lost_in_the_stock_class_only_where_that_is_asked_for(
    grounded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    with monkeypatch.context() as before_weights:
        before_weights.setattr(export_module, "load", lambda _folder: pytest.fail("weights read"))
        done = medm("export", out, "--model", grounded, "--format", "llava")
    assert done.code != 0
    said = " ".join(done.err.split())
    assert "the model has a mask head" in said
    assert "--without-masks" in said
    assert not Path(out).exists()
    done = medm(
        "export", out, "--model", grounded, "--format", "llava", "--without-masks",
        "--max-new-tokens", "2",
    )  # fmt: skip
    assert done.code == 0, done.err
    with pytest.raises(ExportError, match="for the form llava alone"):
        export(grounded, str(tmp_path / "x"), form="merged", without_masks=True)
    lost = "the masks of its replies are lost"
    assert lost in " ".join(done.out.split())
    assert lost in (tmp_path / "out" / "README.md").read_text("utf-8")
