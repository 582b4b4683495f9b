"""BLIP and MOTOR in the layouts they are published in open strictly and compute what they computed.

Layout-tested: the tensors have the published names and small sizes, not the published values.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from medm.config import validate
from medm.errors import CheckpointError, RecipeError
from medm.models import build, load
from medm.models.blip.modeling import MedmBlip
from medm.models.blip.options import BlipOptions
from medm.models.published.importing import import_model
from medm.models.published.source_configs import Hints
from medm.models.vision import build_encoder, encoder_options
from tests.cli.runner import medm
from tests.models.dual_encoder.tiny import IDS, MASK, WORDS, save_tokenizer

SIZES = {
    "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
DEC, ENC = len(WORDS), len(WORDS) + 1
"""Tokens that medm and BLIP add to a vocabulary."""
CONFIG = BlipConfig(
    vision_config=SIZES | {"image_size": 16, "patch_size": 8},
    text_config=SIZES
    | {
        "vocab_size": len(WORDS) + 2, "max_position_embeddings": 12, "bos_token_id": DEC,
        "sep_token_id": 3, "encoder_hidden_size": 128, "initializer_range": 0.08,
    },
    image_text_hidden_size=20,
)  # fmt: skip
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SEEN = MASK.bool()
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def stock(kind: Any, *, eps: float = 1e-5) -> Any:
    """A model of transformers whose weights are not those of its initialization."""
    torch.manual_seed(0)
    config = BlipConfig.from_dict(CONFIG.to_dict())
    config.vision_config.layer_norm_eps = eps
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "embedding" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def folder(model: Any, place: Path) -> Path:
    model.save_pretrained(place)
    save_tokenizer(place)
    return place


def begun(first: int) -> Tensor:
    return torch.cat([torch.full_like(IDS[:, :1], first), IDS[:, 1:]], dim=1)


def opened(place: Path) -> MedmBlip:
    model: Any = load(str(place))[0]
    return model


def logits_of(model: MedmBlip, first: int = DEC) -> Tensor:
    """LM logits of every token."""
    assert model.decoder is not None
    images = model.encode_images(PIXELS)
    states = model.decoder(model.text, begun(first), MASK, images.tokens, images.mask)
    return model.decoder.logits(model.text, states)


def stock_logits(model: Any) -> Tensor:
    return model(pixel_values=PIXELS, input_ids=begun(DEC), attention_mask=MASK).logits


def compare_matching(model: MedmBlip, reference: Any) -> None:
    """Cosines and matching scores are those of transformers' class."""
    given = {"pixel_values": PIXELS, "attention_mask": MASK}
    with torch.no_grad():
        cosines = reference(**given, input_ids=IDS, use_itm_head=False).itm_score
        scores = reference(**given, input_ids=begun(ENC)).itm_score
        image = F.normalize(model.get_image_features(PIXELS), dim=-1)
        text = F.normalize(model.get_text_features(IDS, MASK), dim=-1)
        found = model.match(model.encode_images(PIXELS), IDS, MASK)
    torch.testing.assert_close(image @ text.T, cosines, **CLOSE)
    torch.testing.assert_close(found, scores, **CLOSE)


def names_in_report(place: Path) -> tuple[set[str], set[str]]:
    parts = json.loads((place / "import.json").read_text())["parts"].values()
    loaded = {name for part in parts for name in part["loaded"]}
    return loaded, {name for part in parts for name in part["ignored"]}


def original(model: nn.Module) -> dict[str, Tensor]:
    """Tensors under the names of BLIP's own code."""
    names = (
        (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
        (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
        (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."),
        (r"^vision_model\.encoder\.layers\.", "visual_encoder.blocks."),
        (r"(blocks\.\d+)\.self_attn\.projection\.", r"\1.attn.proj."),
        (r"(blocks\.\d+)\.self_attn\.", r"\1.attn."),
        (r"(blocks\.\d+)\.layer_norm", r"\1.norm"),
    )
    found = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor.clone()
    return found


def pretrained() -> tuple[dict[str, Tensor], Any, Any]:
    """A pretraining checkpoint, and transformers' models that hold its two halves.

    As BLIP's code ties them: the decoder has the encoder's weights but for self-attention, and the
    matrix of the LM head is one of its own.
    """
    matcher = stock(BlipForImageTextRetrieval, eps=1e-6)
    torch.manual_seed(5)
    writer = stock(BlipForConditionalGeneration, eps=1e-6)
    writer.vision_model.load_state_dict(matcher.vision_model.state_dict())
    shared = {
        name: tensor
        for name, tensor in matcher.text_encoder.state_dict().items()
        if ".attention." not in name
    }
    writer.text_decoder.bert.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for layer in writer.text_decoder.bert.encoder.layer:
            layer.attention.self.query.weight.add_(0.1)
        own = torch.randn(len(WORDS) + 2, 128) * 0.08
        writer.text_decoder.cls.predictions.decoder.weight = nn.Parameter(own)
    state = original(matcher) | {"temp": torch.tensor(0.043)}
    state |= {n: t for n, t in original(writer).items() if n.startswith("text_decoder.")}
    ids = torch.arange(12).unsqueeze(0)
    state |= {"text_encoder.embeddings.position_ids": ids}
    state |= {"text_decoder.bert.embeddings.position_ids": ids.clone()}
    for name in list(state):
        first, _, rest = name.partition(".")
        if first in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            state[f"{first}_m.{rest}"] = state[name].clone()
    state |= {"image_queue": torch.randn(20, 8), "text_queue": torch.randn(20, 8)}
    return state | {"queue_ptr": torch.zeros(1, dtype=torch.long)}, matcher, writer


def section(path: Path, tokenizer: str | None = None, **changes: Any) -> dict[str, Any]:
    text = {"tokenizer": tokenizer, "max_length": 12} | changes.pop("text", {})
    return {
        "kind": "blip", "path": str(path), "image": {"encoder": {"name": "vit"}}, "text": text,
        "embed_dim": 20, "heads": ["itc", "itm", "lm"], "queue": 8,
    } | changes  # fmt: skip


def made(content: dict[str, Any]) -> MedmBlip:
    model: Any = build(validate(BlipOptions, content, source="test"))[0]
    return model


# -- transformers' folders -------------------------------------------------------------------------


def test_a_captioning_folder_writes_what_transformers_writes(tmp_path: Path) -> None:
    reference = stock(BlipForConditionalGeneration)
    source = folder(reference, tmp_path / "captioning")
    report = import_model(str(source), str(tmp_path / "out"))
    assert any("the file has no text encoder" in note for note in report.notes)
    model = opened(tmp_path / "out")
    assert model.config.heads == ["lm"]
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model)[SEEN], stock_logits(reference)[SEEN], **CLOSE)
        written = model.generate(PIXELS, num_beams=1, max_length=8)
        expected = reference.generate(
            pixel_values=PIXELS, num_beams=1, do_sample=False, max_length=8, min_length=5
        )
    assert written[:, : expected.shape[1]].tolist() == expected.tolist()
    loaded, ignored = names_in_report(tmp_path / "out")
    # safetensors hold no second copy of tied tensors.
    second = {f"text_decoder.cls.predictions.decoder.{kind}" for kind in ("weight", "bias")}
    assert loaded == set(reference.state_dict()) - second
    assert not ignored


def test_a_retrieval_folder_matches_as_transformers_does(tmp_path: Path) -> None:
    reference = stock(BlipForImageTextRetrieval)
    source = folder(reference, tmp_path / "itm")
    import_model(str(source), str(tmp_path / "out"))
    model = opened(tmp_path / "out")
    assert model.config.heads == ["itc", "itm"]
    compare_matching(model, reference)
    loaded, ignored = names_in_report(tmp_path / "out")
    assert (loaded, ignored) == (set(reference.state_dict()), set())


def test_a_folder_that_answers_questions_is_refused_and_starts_a_recipe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = stock(BlipForQuestionAnswering)
    source = folder(reference, tmp_path / "vqa")
    with pytest.raises(CheckpointError, match="attends to the text encoder's states of the quest"):
        import_model(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="a BLIP that answers questions"):
        made(section(source))
    with caplog.at_level(logging.INFO):
        model = made(section(source, heads=["itc", "itm"]))
    assert "the decoder is left out: the model has no head lm" in caplog.text
    assert "the file has no itm, which starts from new weights" in caplog.text
    assert re.search(r"text.encoder from \S+: \d+ tensors loaded, 0 unused", caplog.text)
    with torch.no_grad():
        images = model.encode_images(PIXELS)
        found = model.text(IDS, MASK, images.tokens, images.mask)
        expected = reference.text_encoder(
            input_ids=IDS, attention_mask=MASK,
            encoder_hidden_states=reference.vision_model(PIXELS).last_hidden_state,
        ).last_hidden_state  # fmt: skip
    torch.testing.assert_close(found[SEEN], expected[SEEN], **CLOSE)


def test_a_recipe_may_add_a_decoder_and_labels_to_a_retrieval_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder(stock(BlipForImageTextRetrieval), tmp_path / "itm")
    heads = ["itc", "itm", "lm", "labels"]
    with caplog.at_level(logging.INFO):
        model = made(section(source, heads=heads, labels=["mass"], label_head="linear"))
    assert "the file has no decoder: its self-attention starts as the text encoder's" in caplog.text
    assert "labels starts from new weights" in caplog.text
    assert model.decoder is not None
    for layer, attention in zip(model.text.blocks(), model.decoder.attentions(), strict=True):
        torch.testing.assert_close(attention.self.query.weight, layer.attention.self.query.weight)
    for slow, fast in model._pairs():  # the copy starts from the loaded weights
        torch.testing.assert_close(slow, fast)


# -- files of BLIP's and MOTOR's own code ----------------------------------------------------------


@pytest.mark.parametrize("system", ["blip", "motor"])
def test_a_pretraining_file_has_every_head(system: str, tmp_path: Path, tokenizer: str) -> None:
    state, matcher, writer = pretrained()
    if system == "motor":
        knowledge = ("cross_attn.layers.0.norm.a_2", "cross_attn_m.layers.0.norm.a_2",
                     "tag_encoder.embed.weight", "create_knowledge.text_proj.weight")  # fmt: skip
        state |= {name: torch.randn(3) for name in knowledge}
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    file = tmp_path / "checkpoint_29.pth"
    torch.save({"model": state, "config": {"image_size": 16}, "epoch": 29}, file)
    out = tmp_path / "out"
    report = import_model(str(file), str(out), hints=Hints(tokenizer=tokenizer))
    model = opened(out)
    assert model.config.heads == ["itc", "itm", "lm"]
    assert model.temperature is not None
    assert model.temperature().item() == pytest.approx(0.043)
    compare_matching(model, matcher)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model)[SEEN], stock_logits(writer)[SEEN], **CLOSE)
    loaded, ignored = names_in_report(out)
    names = {name.removeprefix("module.") for name in state}
    assert loaded | ignored == names
    assert not loaded & ignored
    left = (r"_m\.", r"queue", r"position_ids$", r"^(cross_attn|tag_encoder|create_knowledge)\.")
    assert ignored == {name for name in names if any(re.search(one, name) for one in left)}
    assert ("knowledge modules" in " ".join(report.notes)) == (system == "motor")
    assert "momentum copies and queues are left out" in " ".join(report.notes)
    with pytest.raises(CheckpointError, match=r"set model\.text\.lm_head: own"):
        made(section(file, tokenizer))
    assert made(section(file, tokenizer, text={"lm_head": "own"})).decoder is not None
    # A recipe goes on from the imported folder, and says what it holds.
    given = section(file, tokenizer, queue=65536, temperature=0.043) | {"path": None}
    options = validate(BlipOptions, given, source="test")
    with pytest.raises(RecipeError, match=r"holds text\.lm_head 'own', not 'tied'"):
        build(options, init_from=str(out))
    given["text"] |= {"lm_head": "own"}
    build(validate(BlipOptions, given, source="test"), init_from=str(out))


def test_a_decoder_that_shares_nothing_is_refused_by_name(tmp_path: Path, tokenizer: str) -> None:
    state, _, _ = pretrained()
    name = "encoder.layer.1.crossattention.self.key.weight"
    state[f"text_decoder.bert.{name}"] += 0.01
    torch.save({"model": state}, tmp_path / "untied.pth")
    with pytest.raises(CheckpointError, match=f"1 tensors of the decoder differ.*{name}"):
        import_model(
            str(tmp_path / "untied.pth"), str(tmp_path / "out"), hints=Hints(tokenizer=tokenizer)
        )
    assert not (tmp_path / "out").exists()
    made(section(tmp_path / "untied.pth", tokenizer, heads=["itc", "itm"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_encoder.encoder.layer.0.output.dense.bias": None}, "1 missing: layers.0.output"),
        ({"itm_head.bias": None}, "1 missing: bias"),
        ({"prompt_encoder.weight": torch.zeros(2)}, "belong to no known part: prompt_encoder"),
        ({"text_decoder.bert.encoder.layer.0.adapter.weight": torch.zeros(2)}, "differ from those"),
        ({"visual_encoder.norm.weight": torch.zeros(2)}, r"weight \(2,\), expected \(128,\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, tokenizer: str
) -> None:
    state: dict[str, Any] = pretrained()[0] | change
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    torch.save({"model": state}, tmp_path / "blip.pth")
    with pytest.raises(CheckpointError, match=message):
        import_model(
            str(tmp_path / "blip.pth"), str(tmp_path / "out"), hints=Hints(tokenizer=tokenizer)
        )


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    reference = stock(BlipForConditionalGeneration)
    reference.config.text_config.bos_token_id = 4
    source = folder(reference, tmp_path / "captioning")
    with pytest.raises(CheckpointError, match=r"begins a text with token 4, and \[DEC\] is 16"):
        import_model(str(source), str(tmp_path / "out"))


def test_two_sources_of_weights_are_refused(tmp_path: Path, tokenizer: str) -> None:
    changes = {"image": {"encoder": {"name": "vit", "path": "elsewhere"}}}
    with pytest.raises(RecipeError, match=r"image\.encoder\.path names others"):
        made(section(tmp_path, tokenizer, **changes))


# -- the image tower alone -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_the_image_tower_serves_other_recipes(layout: str, tmp_path: Path) -> None:
    reference = stock(BlipForConditionalGeneration, eps=1e-6)
    source = tmp_path / "blip"
    if layout == "folder":
        folder(reference, source)
    else:
        source = tmp_path / "blip.pth"
        torch.save({"model": original(reference)}, source)
    block = {"name": "vit", "path": str(source), "tokens": "cls_patch"}
    encoder, preprocess = build_encoder(encoder_options(block, source="test"))
    assert preprocess["size"] == [16, 16]
    with torch.no_grad():
        found = reference.vision_model.post_layernorm(encoder(PIXELS).tokens)
        expected = reference.vision_model(PIXELS).last_hidden_state
    torch.testing.assert_close(found, expected, **CLOSE)


def test_the_command_names_parts_and_what_is_left(tmp_path: Path, tokenizer: str) -> None:
    torch.save({"model": pretrained()[0]}, tmp_path / "model_base.pth")
    done = medm(
        "import", str(tmp_path / "model_base.pth"), str(tmp_path / "out"), "--tokenizer", tokenizer
    )
    assert done.code == 0, done.err
    assert "BLIP and MOTOR: image tower" in done.out
    assert "training state: 0 tensors loaded" in done.out
    again = medm("import", str(tmp_path / "model_base.pth"), str(tmp_path / "other"))
    assert again.code == 1
    assert "--tokenizer" in again.err
