"""SAM 2 against transformers' own model, and its weights in every layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoMaskDecoderConfig

from medm.errors import CheckpointError, RecipeError
from medm.heads import Sam2Options
from medm.heads.base import Points
from medm.heads.sam2 import HIERA, Sam2Head
from medm.heads.sam2_keys import transformers_names
from medm.models.published.weights import LoadReport, PretrainedSource, load_module
from tests.heads.tiny import TINY_MEMORY, TINY_SAM2, build_head

ERA_21 = {
    "enable_temporal_pos_encoding_for_object_pointers": True,
    "enable_occlusion_spatial_embedding": True,
}
ERA_20 = dict.fromkeys(ERA_21, False)


def fill(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight away from its start, the matrix of positions the same under both names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(tensor + 0.05 * torch.randn(tensor.shape, generator=generator))
    prompts = model.prompt_encoder.shared_embedding.positional_embedding
    model.shared_image_embedding.positional_embedding.copy_(prompts)
    return model.eval()


@pytest.fixture(scope="module")
def image_model() -> Sam2Model:
    config = Sam2Config(**TINY_SAM2)
    config.mask_decoder_config.dynamic_multimask_via_stability = False
    return fill(Sam2Model(config))


@pytest.fixture(scope="module")
def video_model() -> Sam2VideoModel:
    return make_video_model(ERA_21)


def make_video_model(era: dict[str, bool]) -> Sam2VideoModel:
    torch.manual_seed(0)
    # transformers 5.17 makes a prompt encoder's config of a dict.
    decoder = Sam2VideoMaskDecoderConfig(**TINY_SAM2["mask_decoder_config"])
    sizes = TINY_SAM2 | {"mask_decoder_config": decoder}
    config = Sam2VideoConfig(**sizes, **TINY_MEMORY, **era, image_size=128,
                             memory_attention_rope_feat_sizes=[8, 8])  # fmt: skip
    return fill(Sam2VideoModel(config))


def load(head: Sam2Head, tensors: dict[str, torch.Tensor]) -> LoadReport:
    return load_module(
        head,
        head.rename_published(tensors),
        source="test",
        key_map=type(head).key_map,
        ignored=type(head).ignored_keys,
    )


def like(model: torch.nn.Module, **options: object) -> Sam2Head:
    head = build_head("sam2", **options).eval()
    assert isinstance(head, Sam2Head)
    load(head, dict(model.state_dict()))
    return head


def meta_names(model: Sam2VideoModel) -> dict[str, torch.Tensor]:
    """The tensors of a tiny model as Meta's code names them, module by module."""
    own = dict(model.state_dict())
    del own["shared_image_embedding.positional_embedding"]
    table = own.pop("prompt_encoder.point_embed.weight")
    named = {
        f"sam_prompt_encoder.point_embeddings.{row}.weight": table[row : row + 1]
        for row in range(4)
    }
    downsampler = len({k.split(".")[3] for k in own if ".mask_downsampler.layers." in k})
    for name, tensor in own.items():
        new = name
        new = new.replace("vision_encoder.backbone.", "image_encoder.trunk.")
        new = re.sub(r"vision_encoder\.neck\.convs\.(\d)", r"image_encoder.neck.convs.\1.conv", new)
        if found := re.match(r"(.*)\.mask_downsampler\.layers\.(\d)\.(conv|layer_norm)(.*)", new):
            number = 3 * int(found[2]) + (found[3] == "layer_norm")
            new = f"{found[1]}.mask_downsampler.encoder.{number}{found[4]}"
        new = new.replace("final_conv", f"encoder.{3 * downsampler}")
        if not new.startswith("memory_encoder.feature") and ".memory_fuser" not in new:
            three = re.search("iou_pred|obj_score_head|hypernetworks|pointer_proj", new)
            new = new.replace(".layers.0.", ".layers.1.") if three else new
            new = new.replace("proj_in", "layers.0")
            new = new.replace("proj_out", "layers.2" if three else "layers.1")
        for here, there in (
            ("mask_embed.conv1", "mask_downscaling.0"),
            ("mask_embed.layer_norm1", "mask_downscaling.1"),
            ("mask_embed.conv2", "mask_downscaling.3"),
            ("mask_embed.layer_norm2", "mask_downscaling.4"),
            ("mask_embed.conv3", "mask_downscaling.6"),
            ("upscale_conv1", "output_upscaling.0"),
            ("upscale_layer_norm", "output_upscaling.1"),
            ("upscale_conv2", "output_upscaling.3"),
            ("layer_norm", "norm"),
            ("shared_embedding.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix"),
            ("patch_embed.projection", "patch_embed.proj"),
            ("o_proj", "out_proj"),
            ("memory_encoder.projection", "memory_encoder.out_proj"),
            ("feature_projection", "pix_feat_proj"),
            ("memory_fuser", "fuser"),
            ("depthwise_conv", "dwconv"),
            ("pointwise_conv", "pwconv"),
            ("no_memory_embedding", "no_mem_embed"),
            ("no_memory_positional_encoding", "no_mem_pos_enc"),
            ("no_object_pointer", "no_obj_ptr"),
            ("occlusion_spatial_embedding_parameter", "no_obj_embed_spatial"),
            ("object_pointer_proj", "obj_ptr_proj"),
            ("memory_temporal_positional_encoding", "maskmem_tpos_enc"),
            ("temporal_positional_encoding_projection_layer", "obj_ptr_tpos_proj"),
        ):  # fmt: skip
            new = new.replace(here, there)
        new = re.sub(r"(fuser.*)\.scale$", r"\1.gamma", new)
        new = re.sub(r"^(prompt_encoder|mask_decoder)", r"sam_\1", new)
        named[new] = tensor
    return named


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("multimask", [True, False])
def test_composition_equals_the_forward_of_transformers(image_model, multimask):
    """Points alone: the head's prompt token is left out."""
    head = like(image_model, multimask=multimask)
    pixels = torch.randn(2, 3, 128, 128)
    coords = torch.tensor([[[[20.0, 40], [90, 10]]], [[[3, 5], [64, 100]]]])  # (N, 1, P, xy)
    labels = torch.tensor([[[1, 0]], [[1, -1]]])
    with torch.no_grad():
        theirs = image_model(
            pixels, input_points=coords, input_labels=labels, multimask_output=multimask
        )
        maps = head.encode(pixels)
        alone = maps[-1] + head.decoder.no_memory_embedding.view(1, -1, 1, 1)
        points = Points(coords[:, 0].flip(-1), labels[:, 0])
        ours = head.decode_levels(head.fine_levels(maps), alone, None, points).masks
    best = theirs.iou_scores[:, 0].argmax(dim=1)
    rows = torch.arange(2)
    torch.testing.assert_close(ours.logits, theirs.pred_masks[rows, 0, best], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.quality, theirs.iou_scores[rows, 0, best])
    torch.testing.assert_close(ours.presence, theirs.object_score_logits[:, 0, 0])


def test_box_equals_the_forward_of_transformers(image_model):
    head = like(image_model)
    pixels = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        theirs = image_model(pixels, input_boxes=torch.tensor([[[10.0, 20, 70, 90]]]))
        maps = head.encode(pixels)
        corners = Points(torch.tensor([[[20.0, 10], [90, 70]]]), torch.tensor([[2, 3]]))
        alone = maps[-1] + head.decoder.no_memory_embedding.view(1, -1, 1, 1)
        ours = head.decode_levels(head.fine_levels(maps), alone, None, corners).masks
    best = int(theirs.iou_scores.argmax())
    torch.testing.assert_close(ours.logits, theirs.pred_masks[0, :, best], atol=1e-5, rtol=1e-5)


def test_language_prompt_stands_behind_padding_and_points(image_model, monkeypatch):
    head = like(image_model)
    seen: list[torch.Tensor] = []
    decoder = head.decoder.mask_decoder
    run = decoder.forward

    def spy(**inputs: torch.Tensor):
        seen.append(inputs["sparse_prompt_embeddings"])
        return run(**inputs)

    monkeypatch.setattr(decoder, "forward", spy)
    pixels, item = torch.randn(1, 3, 128, 128), torch.tensor([0])
    prompt = torch.randn(1, 128)
    padding = image_model.prompt_encoder.not_a_point_embed.weight[0]
    plain = head(pixels, prompt, item).logits
    points = Points(torch.tensor([[[5.0, 9]]]), torch.tensor([[1]]))
    pointed = head(pixels, prompt, item, points).logits
    without, beside = (tokens[0, 0] for tokens in seen)
    assert torch.equal(without, torch.stack([padding, padding, prompt[0]]))
    coords, labels = torch.tensor([[[[9.0, 5]]]]), torch.tensor([[[1]]])
    theirs, _ = image_model.prompt_encoder(coords, labels, None, None)
    torch.testing.assert_close(beside[:2], theirs[0, 0])
    assert torch.equal(beside[2], prompt[0])
    assert not torch.allclose(plain, pointed)
    seen.clear()
    build_head("sam2", padding_points=0)
    head.padding_points = 0
    head(pixels, prompt, item)
    assert seen[0].shape[2] == 1


def test_points_that_are_none_are_refused(image_model):
    head = like(image_model)
    pixels, item, prompt = torch.randn(1, 3, 128, 128), torch.tensor([0]), torch.randn(1, 128)
    with pytest.raises(ValueError, match="labels -1 to 3, found"):
        head(pixels, prompt, item, Points(torch.ones(1, 1, 2), torch.tensor([[4]])))
    with pytest.raises(ValueError, match="in rows and columns"):
        head(pixels, prompt, item, Points(torch.ones(1, 1, 3), torch.tensor([[1]])))


def test_convolutions_of_the_decoder_train_with_a_frozen_encoder():
    head = build_head("sam2").train()
    head.encoder.requires_grad_(False)
    head(
        torch.randn(1, 3, 128, 128), torch.randn(1, 128), torch.tensor([0])
    ).logits.sum().backward()
    decoder = head.decoder.mask_decoder
    assert all(conv.weight.grad.any() for conv in (decoder.conv_s0, decoder.conv_s1))
    assert head.decoder.no_memory_embedding.grad.any()
    assert all(weight.grad is None for weight in head.encoder.parameters())


def test_training_and_inference_give_the_same_masks(image_model):
    head = like(image_model, multimask=False)
    inputs = torch.randn(1, 3, 128, 128), torch.randn(1, 128), torch.tensor([0])
    torch.testing.assert_close(head.train()(*inputs).logits, head.eval()(*inputs).logits)


@pytest.mark.parametrize(("side", "levels"), [(512, (128, 64, 32)), (256, (64, 32, 16))])
def test_levels_of_another_image_size(image_model, side, levels):
    head = like(image_model)
    maps = head.encode(torch.randn(1, 3, side, side))
    assert tuple(level.shape[-1] for level in maps) == levels
    masks = head.decode(maps, torch.randn(1, 128), torch.tensor([0]))
    assert masks.logits.shape == (1, side // 4, side // 4) == (1, *head.grid((side, side)))


def test_positions_of_another_image_size_equal_those_of_transformers(image_model):
    sized = json.loads(json.dumps(TINY_SAM2))
    sized["prompt_encoder_config"]["image_size"] = 256
    sized["vision_config"]["backbone_feature_sizes"] = [[64, 64], [32, 32], [16, 16]]
    other = Sam2Model(Sam2Config(**sized)).eval()
    other.load_state_dict(image_model.state_dict())
    head = like(image_model)
    pixels = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        theirs = other(pixels, input_points=torch.tensor([[[[200.0, 40]]]]))
        maps = head.encode(pixels)
        alone = maps[-1] + head.decoder.no_memory_embedding.view(1, -1, 1, 1)
        point = Points(torch.tensor([[[40.0, 200]]]), torch.tensor([[1]]))
        ours = head.decode_levels(head.fine_levels(maps), alone, None, point).masks
    best = int(theirs.iou_scores.argmax())
    torch.testing.assert_close(ours.logits, theirs.pred_masks[0, :, best], atol=1e-5, rtol=1e-5)


# --- sizes and preprocessing ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 27), ("small", 34), ("base_plus", 69), ("large", 212)]
)
def test_sizes_are_the_published_ones(size, millions):
    """Parameters of the encoders, as transformers counts the published models."""
    with torch.device("meta"):
        head = Sam2Head(architecture={}, size=size)
    found = sum(weight.numel() for weight in head.encoder.parameters()) / 1e6
    assert found == pytest.approx(millions, abs=1)


def test_medsam2_is_tiny_at_512():
    options = Sam2Options(name="sam2", size="medsam2")
    assert options.image_size == 512
    assert HIERA["medsam2"] == HIERA["tiny"]
    fields = Sam2Head.preprocess_from({}, {}, options.image_size)
    assert fields["size"] == [512, 512]
    assert Sam2Options(name="sam2", size="medsam2", image_size=256).image_size == 256
    assert Sam2Options(name="sam2", size="large").image_size is None


def test_preprocessing_is_a_square_of_1024_with_imagenet_statistics():
    fields = Sam2Head.preprocess_from({}, {})
    assert fields == {
        "size": [1024, 1024],
        "fit": "squash",
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert Sam2Head.preprocess_from({"resample": 3}, {})["interpolation"] == "bicubic"
    assert Sam2Head.preprocess_from({}, TINY_SAM2)["size"] == [128, 128]


def test_a_size_beside_another_architecture_is_refused():
    with pytest.raises(RecipeError, match=r"size 'large' has \[2, 6, 36, 4\] blocks"):
        build_head("sam2", size="large")


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("video", [False, True])
def test_hugging_face_folders(image_model, video_model, tmp_path: Path, video):
    model = video_model if video else image_model
    model.save_pretrained(tmp_path)
    source = PretrainedSource(str(tmp_path))
    sizes = Sam2Head.architecture_from(source.config())
    assert ("num_maskmem" in sizes) is video
    head = Sam2Head(architecture=sizes)
    report = load(head, source.tensors())
    assert bool(report.ignored) is video
    pixels = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(
            head.eval().encode(pixels)[-1].flatten(2).permute(2, 0, 1),
            model.get_image_features(pixels).fpn_hidden_states[-1],
        )


def test_config_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match="found 'edgetam'"):
        Sam2Head.architecture_from({"model_type": "edgetam"})


@pytest.mark.parametrize("era", [ERA_20, ERA_21])
def test_every_name_of_meta_maps(era):
    model = make_video_model(era)
    meta = meta_names(model)
    assert "sam_mask_decoder.iou_prediction_head.layers.2.weight" in meta
    assert "memory_encoder.fuser.layers.0.gamma" in meta
    assert "memory_attention.layers.1.cross_attn_image.out_proj.bias" in meta
    assert "sam_mask_decoder.transformer.norm_final_attn.weight" in meta
    own = model.state_dict()
    mapped = transformers_names(meta)
    assert mapped.keys() == own.keys()
    assert all(torch.equal(mapped[name], own[name]) for name in own)


def test_names_of_sa2va_and_unibiomed_map(video_model):
    meta = meta_names(video_model)
    renamed = {name.replace(".gamma", ".g_weight"): tensor for name, tensor in meta.items()}
    assert renamed.keys() != meta.keys()
    assert transformers_names(renamed).keys() == video_model.state_dict().keys()


def test_file_of_meta_loads_with_a_report(video_model, tmp_path: Path):
    meta = meta_names(video_model)
    torch.save({"model": meta}, tmp_path / "sam2.pt")
    head = build_head("sam2")
    report = load(head, PretrainedSource(str(tmp_path / "sam2.pt")).tensors())
    assert report.missing == report.unexpected == []
    assert "memory_attention.layer_norm.weight" in report.ignored
    assert not any(name.startswith("mask_decoder") for name in report.ignored)
    theirs = video_model.state_dict()["mask_decoder.iou_token.weight"]
    assert torch.equal(head.decoder.mask_decoder.iou_token.weight, theirs)


def test_a_missing_point_embedding_is_named(video_model):
    meta = meta_names(video_model)
    del meta["sam_prompt_encoder.point_embeddings.1.weight"]
    with pytest.raises(CheckpointError, match=r"embeddings 0 to 3, found \[0, 2, 3\]"):
        transformers_names(meta)


def test_an_encoder_of_another_size_is_named(video_model):
    head = Sam2Head(architecture={**TINY_SAM2, "vision_config": HIERA["small"] | {}})
    with pytest.raises(CheckpointError, match="encoder of 6 blocks, the head was built with 16"):
        head.rename_published(dict(video_model.state_dict()))


def test_an_encoder_of_a_published_size_is_told(image_model):
    names = {
        f"vision_encoder.backbone.blocks.{i}.layer_norm1.weight": torch.ones(1) for i in range(48)
    }
    with pytest.raises(CheckpointError, match="set size: large"):
        build_head("sam2").rename_published(names)


# --- generations ---------------------------------------------------------------------------------


def test_weights_of_the_other_generation_are_refused(video_model):
    new, old = dict(video_model.state_dict()), dict(make_video_model(ERA_20).state_dict())
    for era, tensors, found in (("2.0", new, "2.1"), ("2.1", old, "2.0")):
        with pytest.raises(CheckpointError, match=f"set era: '{found}'"):
            build_head("sam2", era=era).rename_published(tensors)
    with pytest.raises(CheckpointError, match=r"built for SAM 2\.1"):
        build_head("sam2", memory=True).rename_published(old)
    load(build_head("sam2", memory=True, era="2.0"), old)
    load(build_head("sam2"), old)


def test_a_mixed_file_and_a_mixed_config_are_refused(video_model):
    tensors = dict(video_model.state_dict())
    del tensors["occlusion_spatial_embedding_parameter"]
    with pytest.raises(CheckpointError, match=r"neither SAM 2.0 nor SAM 2.1"):
        build_head("sam2").rename_published(tensors)
    mixed = {**TINY_SAM2, **ERA_21, "enable_occlusion_spatial_embedding": False}
    with pytest.raises(RecipeError, match=r"the config mixes SAM 2.0 and 2.1"):
        build_head("sam2", architecture=mixed)
    with pytest.raises(RecipeError, match=r"era '2.1', but the published config is of SAM 2.0"):
        build_head("sam2", architecture={**TINY_SAM2, **ERA_20}, era="2.1")


def test_memory_without_its_weights_is_refused(image_model):
    with pytest.raises(CheckpointError, match="the file holds no memory"):
        build_head("sam2", memory=True).rename_published(dict(image_model.state_dict()))
