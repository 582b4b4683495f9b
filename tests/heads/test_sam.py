"""SAM against transformers' own model, and its weights in both layouts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import SamConfig, SamModel

from medm.errors import CheckpointError
from medm.heads.base import Points
from medm.heads.sam import SamHead
from medm.models.published.weights import PretrainedSource, load_module
from tests.heads.tiny import TINY_SAM, build_head


@pytest.fixture(scope="module")
def model() -> SamModel:
    torch.manual_seed(0)
    model = SamModel(SamConfig(**TINY_SAM)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight + 0.05 * torch.randn(weight.shape, generator=generator))
    return model


def load(head: SamHead, tensors: dict[str, torch.Tensor]):
    return load_module(
        head,
        head.rename_published(tensors),
        source="test",
        key_map=SamHead.key_map,
        ignored=SamHead.ignored_keys,
    )


def like(model: SamModel, **options: object) -> SamHead:
    head = build_head("sam", **options).eval()
    assert isinstance(head, SamHead)
    load(head, dict(model.state_dict()))
    return head


def meta_names(model: SamModel) -> dict[str, torch.Tensor]:
    """The tensors as Meta's code names them."""
    named = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("shared_image_embedding"):
            continue
        new = name.replace("vision_encoder.layers", "image_encoder.blocks")
        for number, here in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2")):
            new = new.replace(f"vision_encoder.neck.{here}", f"image_encoder.neck.{number}")
        new = new.replace("vision_encoder.", "image_encoder.")
        new = new.replace("patch_embed.projection", "patch_embed.proj")
        if re.search("hypernetworks|iou_prediction", new):
            new = new.replace("layers.0", "layers.1").replace("proj_in", "layers.0")
            new = new.replace("proj_out", "layers.2")
        for number, here in (
            (0, "conv1"), (1, "layer_norm1"), (3, "conv2"), (4, "layer_norm2"), (6, "conv3"),
        ):  # fmt: skip
            new = new.replace(f"mask_embed.{here}", f"mask_downscaling.{number}")
        new = new.replace("upscale_conv1", "output_upscaling.0")
        new = new.replace("upscale_layer_norm", "output_upscaling.1")
        new = new.replace("upscale_conv2", "output_upscaling.3")
        new = new.replace("layer_norm", "norm")
        new = new.replace("encoder.point_embed.", "encoder.point_embeddings.")
        new = new.replace(
            "shared_embedding.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix"
        )
        named[new] = tensor
    return named


def decoder_call(model: SamModel, pixels: torch.Tensor, sparse: torch.Tensor, multimask: bool):
    """What `SamModel.forward` does behind the prompt encoder."""
    dense = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, 4, 4)
    return model.mask_decoder(
        image_embeddings=model.get_image_embeddings(pixels),
        image_positional_embeddings=model.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompted", ["points", "box", "language alone"])
def test_composition_equals_the_modules_of_transformers(model, multimask, prompted):
    head = like(model, multimask=multimask)
    pixels, prompt = torch.randn(1, 3, 64, 64), torch.randn(1, 32)
    tokens, points = [], None
    if prompted == "points":
        coords, labels = torch.tensor([[[[9.0, 50], [30, 7]]]]), torch.tensor([[[1, 0]]])
        tokens = [model.prompt_encoder(coords, labels, None, None)[0]]
        points = Points(coords[:, 0].flip(-1), labels[:, 0])
    elif prompted == "box":
        tokens = [model.prompt_encoder(None, None, torch.tensor([[[4.0, 8, 40, 60]]]), None)[0]]
        points = Points(torch.tensor([[[8.0, 4], [60, 40]]]), torch.tensor([[2, 3]]))
    sparse = torch.cat([*tokens, prompt[None, None]], dim=2)
    with torch.no_grad():
        logits, quality = decoder_call(model, pixels, sparse, multimask)
        ours = head(pixels, prompt, torch.tensor([0]), points)
    best = int(quality.argmax())
    torch.testing.assert_close(ours.logits, logits[:, 0, best], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.quality, quality[0, :, best])
    assert ours.presence.item() == ours.logits.max().item()


def test_every_name_of_meta_maps(model):
    own = dict(model.state_dict())
    del own["shared_image_embedding.positional_embedding"]
    meta = meta_names(model)
    assert "image_encoder.blocks.0.attn.rel_pos_h" in meta
    assert "mask_decoder.transformer.norm_final_attn.bias" in meta
    mapped = build_head("sam").rename_published(meta)
    assert mapped.keys() == own.keys()
    assert all(torch.equal(mapped[name], own[name]) for name in own)


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_published_files_load_with_a_report(model, tmp_path: Path, layout):
    if layout == "hf":
        model.save_pretrained(tmp_path)
        source = PretrainedSource(str(tmp_path))
        head = SamHead(architecture=SamHead.architecture_from(source.config()))
    else:
        torch.save(meta_names(model), tmp_path / "medsam.pth")
        source, head = PretrainedSource(str(tmp_path / "medsam.pth")), build_head("sam")
    load(head, source.tensors())
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        theirs = model.get_image_embeddings(pixels)
        torch.testing.assert_close(head.eval().encode(pixels)[0], theirs)
    matrix = head.decoder.prompt_encoder.shared_embedding.positional_embedding
    assert torch.equal(matrix, model.shared_image_embedding.positional_embedding)
    assert not any("positional_embedding" in name for name, _ in head.named_parameters())


def test_config_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match="found 'sam2'"):
        SamHead.architecture_from({"model_type": "sam2"})


def test_preprocessing_is_a_square_of_1024():
    fields = SamHead.preprocess_from({}, {})
    assert fields["size"] == [1024, 1024]
    assert (fields["fit"], fields["interpolation"]) == ("squash", "bilinear")
    assert SamHead.preprocess_from({"image_mean": [0, 0, 0]}, {})["mean"] == [0, 0, 0]
    with pytest.raises(ValueError, match="expected 64 x 64 pixels"):
        build_head("sam").grid((128, 128))
