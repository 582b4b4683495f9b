"""Dual encoders compute what transformers' own do, in chunks too, and open as they were saved."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

from medm.errors import DataError, MedmError, RecipeError
from medm.models import MODELS, build, load, processor_of
from medm.models.dual_encoder.build import DualEncoderKind
from medm.models.dual_encoder.modeling import MAX_LOG_SCALE, DualEncoder
from medm.models.estimate import estimate
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts, parameter_groups
from medm.types import VisionFeatures
from tests.models.dual_encoder.tiny import (
    IDS,
    MASK,
    TEXT,
    VISION,
    loss,
    make,
    options,
    pairs,
    save_tokenizer,
    section,
)

VOLUME = {
    "branch": "volume",
    "image": {
        "encoder": {
            "name": "m3d-clip",
            "architecture": {
                "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": [4, 8, 8], "patch_size": [2, 4, 4],
            },
        },
        "preprocess": {"size": [4, 8, 8]},
    },
}  # fmt: skip
EFFICIENT = {
    "encoder": {
        "name": "efficientnet-lite",
        "stages": [3, 5],
        "architecture": {"width": 0.1, "depth": 0.3, "stem": 8, "head": 16},
        "image_size": 32,
    },
    "pool": "encoder",
}
SIGLIP = {"encoder": {"name": "siglip", "architecture": dict(VISION)}}
SIGLIP_TEXT = {"name": "siglip-text", "architecture": TEXT | {"projection_size": 20}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def clip_folder(folder: Path, tokenizer: str) -> tuple[CLIPModel, dict[str, Any]]:
    """A stock CLIPModel on disk, and the section that opens it."""
    torch.manual_seed(0)
    text = TEXT | {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=20)).eval()
    nn.init.constant_(model.logit_scale, 1.5)
    model.save_pretrained(folder)
    content = section(
        tokenizer,
        path=str(folder),
        image={"encoder": {"name": "clip"}},
        text={"encoder": {"name": "clip-text"}, "projection": "linear"},
    )
    return model, content


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_the_weights_of_a_clip_model_give_its_features_and_logits(
    tmp_path: Path, tokenizer: str, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VISION, "hidden_act", act)
    stock, content = clip_folder(tmp_path, tokenizer)
    model, _ = make(content)
    batch = pairs()
    with torch.no_grad():
        expected = stock(input_ids=IDS, attention_mask=MASK, pixel_values=batch["pixels"]["image"])
        output = model(**batch)
    image, text = (
        nn.functional.normalize(one, dim=-1) for one in (output.image_embeds, output.text_embeds)
    )
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(image, expected.image_embeds, **close)
    torch.testing.assert_close(text, expected.text_embeds, **close)
    logits = output.logit_scale * image @ text.T
    torch.testing.assert_close(logits, expected.logits_per_image, **close)
    assert output.logit_scale.item() == pytest.approx(math.exp(1.5))
    assert output.logit_bias is None


def test_the_weights_of_a_siglip_model_give_its_features_and_logits(
    tmp_path: Path, tokenizer: str
) -> None:
    torch.manual_seed(0)
    text = TEXT | {"hidden_size": 24, "projection_size": 24, "max_position_embeddings": 5}
    stock = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).eval()
    nn.init.constant_(stock.logit_scale, 2.0)
    nn.init.constant_(stock.logit_bias, -3.0)
    stock.save_pretrained(tmp_path)
    model, processor = make(
        section(
            tokenizer,
            path=str(tmp_path),
            image={"encoder": {"name": "siglip"}, "pool": "attention", "projection": "none"},
            text={"encoder": {"name": "siglip-text"}, "projection": "none"},
            embed_dim=24,
            logit_bias=-10.0,
        )
    )
    batch = pairs()
    with torch.no_grad():
        expected = stock(input_ids=IDS, pixel_values=batch["pixels"]["image"])
        output = model(**batch)
    image, words = (
        nn.functional.normalize(one, dim=-1) for one in (output.image_embeds, output.text_embeds)
    )
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(image, expected.image_embeds, **close)
    torch.testing.assert_close(words, expected.text_embeds, **close)
    logits = output.logit_scale * image @ words.T + output.logit_bias
    torch.testing.assert_close(logits, expected.logits_per_image, **close)
    # SigLIP knows texts of one length only.
    assert processor.encode_text("a mass")["input_ids"].shape == (1, 5)


@pytest.mark.parametrize(
    ("image", "spatial"),
    [
        ({}, (16, 16)),
        ({"pool": "mean"}, (16, 16)),
        (SIGLIP | {"pool": "attention"}, (16, 16)),
        (SIGLIP | {"pool": "mean", "norm": False}, (16, 16)),
        (EFFICIENT, (32, 32)),
        ({"encoder": {"name": "vit", "architecture": dict(VISION)}}, (16, 16)),
    ],
    ids=["cls", "mean", "attention", "mean-no-norm", "encoder", "vit"],
)
def test_every_pooling_trains_every_weight(
    tokenizer: str, image: dict[str, Any], spatial: tuple[int, int]
) -> None:
    model, processor = make(section(tokenizer, image=image))
    model.train()
    output = model(**pairs(spatial))
    assert output.image_embeds.shape == output.text_embeds.shape == (4, 20)
    assert list(processor.preprocess["image"].size or []) == list(spatial)
    loss(output).backward()
    idle = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert idle == []


def test_a_volume_tower_is_a_tower(tokenizer: str) -> None:
    model, processor = make(section(tokenizer, **copy.deepcopy(VOLUME)))
    assert list(processor.preprocess) == ["volume"]
    assert list(model.encoders()) == ["volume"]
    output = model(**pairs((4, 8, 8), channels=1))
    assert output.image_embeds.shape == (4, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": SIGLIP}, "model.image.pool: cls, but the encoder gives no class token"),
        ({"image": {"pool": "encoder"}}, "this encoder has no pooled vector"),
        ({"image": {"projection": "none"}}, "model.image.projection: none, but the encoder"),
        ({"text": {"projection": "none"}}, "model.text.projection: none, but the encoder"),
        ({"text": {"max_length": 13}}, "model.text.max_length: 13, but the text encoder has 12"),
        ({"text": {"tokenizer": None}}, "model.text.tokenizer: required"),
        (
            {"image": EFFICIENT | {"patch_dropout": 0.5}},
            "model.image.patch_dropout: 0.5, but EfficientNetLiteEncoder reads .*clip, .*vit",
        ),
        ({"branch": "volume"}, "model.branch: volume, but encoder 'clip' reads images"),
        ({"path": "a", "image": {"encoder": {"name": "clip", "path": "b"}}}, "image.encoder.path"),
        (
            {"text": {"encoder": {"name": "bert", "architecture": TEXT | {"vocab_size": 9}}}},
            "the tokenizer has 16 tokens, and the text encoder 9 rows",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_their_keys(
    tokenizer: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MedmError, match=message):
        make(section(tokenizer, **copy.deepcopy(changes)))


class Kept:
    """Bytes that autograd keeps for the backward pass, without the weights."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
        self.bytes = 0

    def __enter__(self) -> Kept:
        seen: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights | seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def gradients(model: DualEncoder, batch: dict[str, Any], **settings: Any) -> dict[str, Any]:
    model.zero_grad()
    loss(model(**batch, **settings)).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_give_the_gradients_of_the_whole_batch(tokenizer: str, chunk: int) -> None:
    model, _ = make(section(tokenizer))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.double()  # in float32 the order of the sums alone makes a difference of 1e-6
    batch = pairs()
    batch["pixels"]["image"] = batch["pixels"]["image"].double()
    whole = gradients(model, batch)
    torch.testing.assert_close(gradients(model, batch, chunk=chunk), whole, atol=1e-12, rtol=1e-9)


def test_with_dropout_the_backward_pass_sees_the_masks_of_the_forward_pass(tokenizer: str) -> None:
    model, _ = make(section(tokenizer, image={"patch_dropout": 0.5}))
    model.train()
    assert any(isinstance(m, nn.Dropout) and m.p for m in model.modules())
    batch = pairs()
    torch.manual_seed(3)
    once = gradients(model, batch, chunk=2)
    torch.manual_seed(3)
    output = model(**batch, chunk=2)
    torch.manual_seed(99)  # what recomputes must not draw anew
    model.zero_grad()
    loss(output).backward()
    again = {name: weight.grad for name, weight in model.named_parameters()}
    torch.testing.assert_close(again, once, atol=0, rtol=0)


def test_memory_of_chunks_does_not_grow_with_the_activations(tokenizer: str) -> None:
    model, _ = make(section(tokenizer))
    model.train()
    batch = pairs()
    with Kept(model) as whole:
        model(**batch)
    with Kept(model) as chunked:
        model(**batch, chunk=2)
    many = {
        "pixels": {"image": batch["pixels"]["image"].repeat(8, 1, 1, 1)},
        "input_ids": IDS.repeat(8, 1),
        "attention_mask": MASK.repeat(8, 1),
    }
    with Kept(model) as large:
        model(**many, chunk=2)
    assert chunked.bytes < whole.bytes / 5
    assert large.bytes < whole.bytes  # 8 times the pairs


def test_chunks_of_the_recipe_hold_in_training_alone(tokenizer: str, tmp_path: Path) -> None:
    model, processor = make(section(tokenizer, chunk=2))
    calls: list[int] = []
    model.text.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    with torch.no_grad():
        model(**pairs())
        model.train()
        model(**pairs(rows=3))
    assert calls == [4, 2, 1]
    model.save_pretrained(tmp_path)
    assert "chunk" not in (tmp_path / "config.json").read_text()
    processor.save_pretrained(tmp_path)
    again, _ = build(options(section(tokenizer, chunk=3)), init_from=str(tmp_path))
    assert again.config.chunk == 3


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_batch_without_pairs_goes_through_every_weight(tokenizer: str, chunk: int | None) -> None:
    model, _ = make(section(tokenizer))
    model.train()
    output = model(
        input_ids=torch.zeros(0, 1, dtype=torch.long),
        attention_mask=torch.zeros(0, 1, dtype=torch.long),
        chunk=chunk,
    )
    assert output.image_embeds.shape == output.text_embeds.shape == (0, 20)
    (output.image_embeds.sum() + output.text_embeds.sum() + 0 * output.logit_scale.sum()).backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(grad is not None and not grad.any() for grad in found.values())


def test_images_and_texts_of_other_numbers_are_refused(tokenizer: str) -> None:
    model, _ = make(section(tokenizer))
    with pytest.raises(ValueError, match="4 items of 'image' and 3 texts"):
        model(**pairs() | {"input_ids": IDS[:3], "attention_mask": MASK[:3]})
    with pytest.raises(ValueError, match="call get_image_features"):
        model(pixels=pairs()["pixels"])


@pytest.mark.parametrize(("held", "after"), [(9.0, MAX_LOG_SCALE), (-1.0, 0.0), (2.0, 2.0)])
def test_the_scale_is_held_within_1_and_100(tokenizer: str, held: float, after: float) -> None:
    model, _ = make(section(tokenizer))
    assert model.scale.logit_scale.shape == (1,)
    nn.init.constant_(model.scale.logit_scale, held)
    changed = model.after_step()
    assert model.scale.logit_scale.item() == pytest.approx(after)
    assert len(changed) == (held != after)
    nn.init.constant_(model.scale.logit_scale, held)
    model.scale.requires_grad_(False)
    assert not model.after_step()
    assert model.scale.logit_scale.item() == held  # a frozen scale is left alone


@pytest.mark.parametrize("part", ["image.encoder", "text.encoder"])
def test_gradient_checkpointing_takes_effect_in_each_tower(tokenizer: str, part: str) -> None:
    model, _ = make(section(tokenizer))
    model.train()
    tuned = {name: PartOptions(tune="full") for name in model.parts()}
    kept, found = [], []
    for recompute in (False, True):
        tuned[part] = PartOptions(tune="full", gradient_checkpointing=recompute)
        apply_parts(model, tuned, TrainOptions(gradient_checkpointing=False))
        torch.manual_seed(2)
        with Kept(model) as memory:
            model(**pairs())
        kept.append(memory.bytes)
        torch.manual_seed(2)
        found.append(gradients(model, pairs()))
    assert kept[1] < 0.75 * kept[0]
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-6)


def test_each_tower_has_a_learning_rate_of_its_own(tokenizer: str) -> None:
    model, _ = make(section(tokenizer))
    rates = {"image.encoder": 0.25, "text.encoder": 0.5, "text.projection": 1.0}
    tuned = {name: PartOptions(tune="full", lr=rate) for name, rate in rates.items()}
    train = TrainOptions(weight_decay=0.0)
    apply_parts(model, tuned, train)
    optimizer = torch.optim.SGD(parameter_groups(model, tuned, train), lr=8.0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    loss(model.train()(**pairs())).backward()
    optimizer.step()
    for name, weight in model.named_parameters():
        of = {part: rates[part] for part in rates if name.startswith(part)}
        rate = next(iter(of.values()), rates["image.encoder"] if "pooling" in name else 0.0)
        moved = before[name] if not rate else before[name] - rate * weight.grad
        torch.testing.assert_close(weight.detach(), moved, atol=0, rtol=0)
        assert weight.requires_grad == bool(rate), name  # projection and scale are locked


@pytest.mark.parametrize("image", [{}, SIGLIP | {"pool": "mean"}, SIGLIP | {"pool": "attention"}])
def test_patch_dropout_is_for_training_alone(tokenizer: str, image: dict[str, Any]) -> None:
    model, _ = make(section(tokenizer, image=image | {"patch_dropout": 0.5}))
    whole, _ = make(section(tokenizer, image=image))
    seen: list[VisionFeatures] = []
    model.image.encoder.register_forward_hook(lambda _module, _args, out: seen.append(out))
    pixels = pairs()["pixels"]
    with torch.no_grad():
        full = model.get_image_features(pixels)
        torch.testing.assert_close(full, whole.get_image_features(pixels), atol=0, rtol=0)
        model.train()
        torch.manual_seed(4)
        once, other = model.get_image_features(pixels), model.get_image_features(pixels)
        torch.manual_seed(4)
        again = model.get_image_features(pixels)
    front = model.image.encoder.prefix
    assert [features.tokens.shape[1] - front for features in seen] == [4, 2, 2, 2]
    assert [features.grid for features in seen] == [(2, 2), (2,), (2,), (2,)]
    assert torch.equal(once, again)  # of torch's generator, which a checkpoint holds
    assert not torch.equal(once, other)
    assert not torch.equal(once, full)


def test_a_frozen_encoder_sees_every_patch(tokenizer: str, tmp_path: Path) -> None:
    """The trainer holds frozen parts in eval mode; a saved model drops nothing out."""
    model, processor = make(section(tokenizer, image={"patch_dropout": 0.5}))
    model.train()
    torch.manual_seed(0)
    dropped = model.get_image_features(pairs()["pixels"])
    model.parts()["image.encoder"].eval()
    torch.manual_seed(0)
    assert not torch.equal(model.get_image_features(pairs()["pixels"]), dropped)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "patch_dropout" not in (tmp_path / "config.json").read_text()
    assert AutoModel.from_pretrained(tmp_path).image.encoder.patch_dropout == 0
    changed, _ = build(
        options(section(tokenizer, image={"patch_dropout": 0.25})), init_from=str(tmp_path)
    )
    assert changed.image.encoder.patch_dropout == 0.25


def test_a_locked_tower_keeps_its_norm_and_pooling(tokenizer: str) -> None:
    model, _ = make(section(tokenizer))
    content = options(section(tokenizer))
    assert set(model.parts()) == content.part_names()
    apply_parts(model, {"text.encoder": PartOptions(tune="full")}, TrainOptions())
    trained = {name.split(".")[0] for name, w in model.named_parameters() if w.requires_grad}
    assert trained == {"text"}
    model.zero_grad()
    loss(model(**pairs())).backward()
    assert model.image.readout.pooling.norm.weight.grad is None


def test_cached_features_give_the_vectors_of_the_pixels(tokenizer: str) -> None:
    model, _ = make(section(tokenizer))
    batch = pairs()
    with torch.no_grad():
        expected = model(**batch).image_embeds
        tokens = model.image.encode(batch["pixels"]["image"]).tokens
        del batch["pixels"]
        model.image.encoder_bypassed = True
        found = model(**batch, features={"image": tokens}).image_embeds
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("image", [{}, {"pool": "mean"}, SIGLIP | {"pool": "attention"}])
def test_vectors_of_cells_are_in_the_common_space(tokenizer: str, image: dict[str, Any]) -> None:
    model, _ = make(section(tokenizer, image=copy.deepcopy(image)))
    pixels = pairs()["pixels"]
    with torch.no_grad():
        cells, grid = model.get_patch_features(pixels)
        whole = model.get_image_features(pixels)
    assert (cells.shape, grid) == ((4, 4, 20), (2, 2))
    if image.get("pool") == "mean":
        torch.testing.assert_close(cells.mean(dim=1), whole)


def test_a_saved_model_opens_by_auto_classes_and_gives_the_same(
    tokenizer: str, tmp_path: Path
) -> None:
    model, processor = make(section(tokenizer, logit_bias=-4.0))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(opened, DualEncoder)
    torch.testing.assert_close(opened.state_dict(), model.state_dict(), atol=0, rtol=0)
    batch = pairs()
    with torch.no_grad():
        expected, found = model(**batch), opened.eval()(**batch)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds)
    torch.testing.assert_close(found.text_embeds, expected.text_embeds)
    assert again.preprocess == processor.preprocess
    texts = ["a normal chest radiograph", "mass"]
    torch.testing.assert_close(again.encode_text(texts), processor.encode_text(texts))
    assert load(str(tmp_path))[0].config.logit_bias == -4.0


def test_a_folder_that_names_another_model_is_refused(tokenizer: str, tmp_path: Path) -> None:
    model, processor = make(section(tokenizer))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for changes, message in (
        ({"image": {"pool": "mean"}}, "image.pool 'cls', not 'mean'"),
        ({"text": {"projection": "linear"}}, "text.projection 'mlp', not 'linear'"),
        ({"embed_dim": 16}, "embed_dim 20, not 16"),
        ({"logit_bias": -1.0}, "logit_bias None, not -1.0"),
    ):
        with pytest.raises(RecipeError, match=message):
            build(options(section(tokenizer, **changes)), init_from=str(tmp_path))
    adapted = processor_of(
        options(section(tokenizer, image={"preprocess": {"fit": "pad"}}, text={"max_length": 6})),
        init_from=str(tmp_path),
    )
    assert adapted.preprocess["image"].fit == "pad"
    assert adapted.max_length == 6  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"model\.image\.preprocess\.size"):
        processor_of(
            options(section(tokenizer, image={"preprocess": {"size": [32, 32]}})),
            init_from=str(tmp_path),
        )


def test_the_processor_pads_cuts_and_refuses(tokenizer: str) -> None:
    _, processor = make(section(tokenizer, text={"max_length": 4}))
    encoded = processor.encode_text(["a mass", "a normal chest radiograph of the knee"])
    assert encoded["input_ids"].tolist() == [[2, 4, 15, 3], [2, 4, 7, 3]]
    short = processor.encode_text(["mass", "a mass"])
    assert short["input_ids"].tolist() == [[2, 15, 3, 0], [2, 4, 15, 3]]
    assert short["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    for wrong, message in (([], "found none"), ([None], "found NoneType")):
        with pytest.raises(DataError, match=message):
            processor.encode_text(wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="given; the model takes images"):
        processor(volumes=torch.zeros(4, 8, 8).numpy())
    inputs = processor("a mass", images=torch.zeros(9, 9, dtype=torch.uint8).numpy())
    assert inputs["pixels"]["image"].shape == (1, 3, 16, 16)
    assert inputs.to(torch.float64)["pixels"]["image"].dtype == torch.float64


def test_a_recipe_is_estimated_without_weights(tokenizer: str) -> None:
    content = options(section(tokenizer))
    found = estimate(content, choose=lambda model: model.requires_grad_(True), length=16)
    model, _ = make(section(tokenizer))
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert {part.name for part in found.parts} == content.part_names()
    assert "a language model alone" in found.unknown


def test_the_kind_is_in_the_table() -> None:
    kind = MODELS.get("dual-encoder")()
    assert isinstance(kind, DualEncoderKind)
    assert (kind.pipeline, kind.needs_mask) == ("pairs", True)
    assert kind.gives(kind.config_class()) == {"embeddings", "scores"}
