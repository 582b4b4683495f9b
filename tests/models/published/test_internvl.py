"""InternVL, Sa2VA and UniBiomed as published open without their code, and compute the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medm.config import validate
from medm.errors import CheckpointError, MedmError
from medm.heads import HEADS
from medm.heads.sam2 import HIERA, Sam2Head
from medm.models import load
from medm.models.lvlm.options import MaskOptions
from medm.models.published import internvl
from medm.models.published.importing import import_model
from medm.models.published.source_configs import Hints
from medm.types import ControlToken, Media, Sample, Turn
from tests.cli.runner import medm
from tests.heads.test_sam2 import make_video_model, meta_names
from tests.heads.tiny import TINY_MEMORY, TINY_SAM2
from tests.models.plain_head import PlainHead, registered
from tests.models.published.internvl import TOKENS, Published, write_published

PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 4 - 2
"""Two tiles and a thumbnail."""


def prompt(processor: Any, question: str = "Is there an effusion?") -> Any:
    sample = Sample((Turn("user", (Media("image"), question)),))
    return processor.encode(sample, {"image": [PIXELS.numpy()]}, generation=True)


def check_language(published: Published, model: Any, processor: Any) -> None:
    """Logits of a prompt with an image of three items, against the published modules by hand."""
    made = prompt(processor)
    ids = torch.tensor(made.input_ids)
    places = ids == processor.placeholder_ids["image"]
    assert int(places.sum()) == 3 * 4
    with torch.no_grad():
        embeds = published.llm.get_input_embeddings()(ids.where(~places, 0))
        embeds[places] = published.image_tokens(PIXELS).flatten(0, 1)
        expected = published.llm(inputs_embeds=embeds[None]).logits[0]
        found = model(
            input_ids=ids[None], pixels={"image": torch.from_numpy(np.stack(made.pixels["image"]))}
        ).logits[0]
    torch.testing.assert_close(found[:, : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)


def test_an_internvl_folder_computes_what_its_parts_do(tmp_path: Path) -> None:
    published = write_published(tmp_path / "InternVL2_5-1B")
    report = import_model(str(published.folder), str(tmp_path / "model"))
    model, processor = load(str(tmp_path / "model"))
    check_language(published, model, processor)
    assert report.kind.startswith("InternVL folders")
    assert {part.source: len(part.loaded) for part in report.parts} == {
        "llm": len(published.llm.state_dict()), "image.encoder": 46, "image.connector": 6,
    }  # fmt: skip
    named = json.loads((tmp_path / "model" / "import.json").read_text())["parts"]
    listed = [name for part in named.values() for name in part["loaded"] + part["ignored"]]
    assert sorted(listed) == sorted(published.tensors), "every tensor, once, by its own name"
    how = processor.preprocess["image"]
    assert (how.size, how.fit, how.interpolation) == ([16, 16], "squash", "bicubic")
    assert (how.tiles.max, how.tiles.min, how.tiles.thumbnail) == (6, 1, True)
    begin, end = (processor.tokenizer.convert_tokens_to_ids(token) for token in TOKENS[:2])
    ids = prompt(processor).input_ids
    image = processor.placeholder_ids["image"]
    first = ids.index(begin)
    assert ids[first : first + 14] == [begin, *[image] * 12, end]
    assert processor.tokenizer.decode(ids).startswith("<|im_start|>system\n你是书生")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "Hermes-2"}, "template 'Hermes-2' is not known; expected one of internlm2_"),
        ({"pad2square": True}, "pad2square is set"),
        ({"downsample_ratio": 0.3}, r"downsample_ratio: expected one of 1, 0\.5"),
        ({"llm_config": {"model_type": "internlm2"}}, "type 'internlm2' is not imported"),
        ({"vision_config": {"model_type": "siglip"}}, "found 'siglip'"),
    ],
)
def test_what_a_config_says_and_is_not_known_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_published(tmp_path / "source", **change)
    with pytest.raises(MedmError, match=message):
        import_model(str(tmp_path / "source"), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vision_model.encoder.layers.1.ls3", "1 unexpected: .*lambda_3"),
        ("vision_model.extra", "1 unexpected: .*extra"),
        ("mlp1.7.weight", "1 unexpected"),
        ("language_model.model.layers.0.extra", "1 unexpected"),
        ("grounding_encoder.sam2_model.x", "does not speak of mask_head"),
        ("other.weight", r"1 tensors belong to no known part: other\.weight"),
    ],
)
def test_an_unknown_tensor_is_refused(name: str, message: str, tmp_path: Path) -> None:
    write_published(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=message):
        import_model(str(tmp_path / "source"), str(tmp_path / "model"))


def test_a_missing_part_of_a_tensor_is_refused(tmp_path: Path) -> None:
    write_published(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    del tensors["vision_model.encoder.layers.0.attn.qkv.bias"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"3 missing: .*k_proj\.bias"):
        import_model(str(tmp_path / "source"), str(tmp_path / "model"))


def test_the_command_names_the_template_and_takes_another(tmp_path: Path) -> None:
    write_published(tmp_path / "source", template="Hermes-2")
    result = medm(
        "import", str(tmp_path / "source"), str(tmp_path / "model"), "--chat-template", "chatml",
        "--preprocess", "image.tiles=null",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "image.encoder: 46 tensors loaded" in result.out
    _, processor = load(str(tmp_path / "model"))
    assert processor.preprocess["image"].tiles is None
    hints = Hints(chat_template="chatml", preprocess={"image": {"tiles": {"max": 2}}})
    import_model(str(tmp_path / "source"), str(tmp_path / "other"), hints=hints)
    assert load(str(tmp_path / "other"))[1].preprocess["image"].max_items == 3


def segmented(published: Published, model: Any, processor: Any) -> tuple[torch.Tensor, Any]:
    """Prompt and mask of a `[SEG]`; the prompt is that of the published modules by hand."""
    reply = Turn("assistant", ("It is ", ControlToken("[SEG]"), "."))
    sample = Sample((Turn("user", (Media("image"), "Where is it?")), reply))
    made = processor.encode(sample, {"image": [PIXELS.numpy()]})
    ids = torch.tensor(made.input_ids)
    seg = processor.control_token_ids["[SEG]"]
    assert seg == processor.tokenizer.convert_tokens_to_ids("[SEG]") and seg < 256 + 3 + len(TOKENS)
    with torch.no_grad():
        places = ids == processor.placeholder_ids["image"]
        embeds = published.llm.get_input_embeddings()(ids.where(~places, 0))
        embeds[places] = published.image_tokens(PIXELS).flatten(0, 1)
        states = published.llm.base_model(inputs_embeds=embeds[None]).last_hidden_state[0]
        assert published.projection is not None
        expected = published.projection(states[ids == seg])
        prompts = model.mask_prompts(ids[None], pixels={"image": PIXELS})
        torch.testing.assert_close(prompts, expected, atol=1e-5, rtol=1e-4)
        return prompts, model.masks.head(images_for(model), prompts, torch.tensor([0]))


def images_for(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(1, model.masks.channels, *model.masks.spatial, generator=generator) * 4 - 2


def test_a_sa2va_folder_gives_the_masks_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    head = PlainHead(architecture={})
    with registered() as name:
        monkeypatch.setattr(internvl, "MASKS", internvl.MASKS | {"head": {"name": name}})
        published = write_published(
            tmp_path / "UniBiomed", head=dict(head.state_dict()), template="phi3_chat"
        )
        report = import_model(str(published.folder), str(tmp_path / "model"))
        assert report.kind.startswith("Sa2VA and UniBiomed folders")
        model, processor = load(str(tmp_path / "model"))
        check_language(published, model, processor)
        prompts, found = segmented(published, model, processor)
        with torch.no_grad():
            expected = head(images_for(model), prompts, torch.tensor([0]))
        torch.testing.assert_close(found.logits, expected.logits)
    named = json.loads((tmp_path / "model" / "import.json").read_text())["parts"]
    listed = [name for part in named.values() for name in part["loaded"] + part["ignored"]]
    assert sorted(listed) == sorted(published.tensors)
    assert list(processor.control_token_ids) == ["[SEG]", "<p>", "</p>"]
    assert processor.preprocess["image@masks"].interpolation == "bicubic"
    assert processor.preprocess["image"].max_items == 13, "Sa2VA's code, not its config"
    text = processor.tokenizer.decode(prompt(processor).input_ids)
    assert text.startswith("<|user|>\n<img>") and text.endswith("?<|end|>\n<|assistant|>\n")
    assert processor.chat.end_text == "<|end|>"
    assert any("Hiera-L of SAM 2.0" in note for note in report.notes)


def test_unibiomed_with_sam_2_under_metas_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAM 2.0 with its memory, `gamma` written as `g_weight`, as in `Luffy503/UniBiomed`."""
    era = {
        "enable_temporal_pos_encoding_for_object_pointers": False,
        "enable_occlusion_spatial_embedding": False,
    }
    video = make_video_model(era)
    meta = {
        re.sub(r"\.gamma$", ".g_weight", name): tensor for name, tensor in meta_names(video).items()
    }
    assert sum(name.endswith(".g_weight") for name in meta) == 2
    block = {
        "name": "sam2", "era": "2.0", "memory": True, "architecture": TINY_SAM2 | TINY_MEMORY,
    }  # fmt: skip
    monkeypatch.setattr(internvl, "MASKS", internvl.MASKS | {"head": block})
    published = write_published(
        tmp_path / "UniBiomed", head=meta, prompt_dim=128, template="phi3_chat"
    )
    import_model(str(published.folder), str(tmp_path / "model"))
    model, processor = load(str(tmp_path / "model"))
    check_language(published, model, processor)
    prompts, found = segmented(published, model, processor)

    images = images_for(model)
    with torch.no_grad():
        flat = video.get_image_features(images, return_dict=True).fpn_hidden_states
        levels = [
            level.permute(1, 2, 0).unflatten(2, (side, side))
            for level, side in zip(flat, (32, 16, 8), strict=True)
        ]
        coarse = levels[-1] + video.no_memory_embedding.view(1, -1, 1, 1)
        empty = video.prompt_encoder.not_a_point_embed.weight.expand(1, 1, 2, -1)
        dense = video.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        logits, quality, _, presence = video.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=video.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=torch.cat([empty, prompts[None, :, None]], dim=2),
            dense_prompt_embeddings=dense.expand(1, -1, *coarse.shape[-2:]),
            multimask_output=True,
            high_resolution_features=levels[:2],
        )
    best = quality[0, 0].argmax()
    torch.testing.assert_close(found.logits[0], logits[0, 0, best], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.quality[0], quality[0, 0, best], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.presence, presence.flatten(), atol=1e-4, rtol=1e-4)
    named = json.loads((tmp_path / "model" / "import.json").read_text())["parts"]
    listed = [name for part in named.values() for name in part["loaded"]]
    assert sorted(listed) == sorted(published.tensors), "memory included, nothing ignored"

    file = published.folder / "model.safetensors"
    tensors = load_file(file)
    extra = "grounding_encoder.sam2_model.no_obj_embed_spatial"
    save_file({**tensors, extra: torch.zeros(1, 128)}, file)
    with pytest.raises(CheckpointError, match=r"neither SAM 2\.0 nor SAM 2\.1"):
        import_model(str(published.folder), str(tmp_path / "mixed"))
    save_file({**tensors, extra.replace("no_obj_embed_spatial", "other"): torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="1 unexpected: other"):
        import_model(str(published.folder), str(tmp_path / "unknown"))
    assert not (tmp_path / "unknown").exists()


def test_the_mask_head_of_the_published_code_is_one_of_medm() -> None:
    options = validate(MaskOptions, internvl.MASKS, source="Sa2VA")
    sizes = HIERA["large"]["backbone_config"]
    assert isinstance(sizes, dict) and sizes["blocks_per_stage"] == [2, 6, 36, 4]
    with torch.device("meta"):
        head = HEADS.constructor({**options.head.model_dump(exclude={"path", "image_size"})})()
    assert isinstance(head, Sam2Head)
    assert (head.dim, head.era, head.grid((1024, 1024))) == (256, "2.0", (256, 256))
    assert head.decoder.memory is not None
    images = sum(p.numel() for p in [*head.encoder.parameters()])
    assert 210e6 < images < 215e6, "Hiera-L has 212 million weights"
