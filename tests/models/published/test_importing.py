"""Published layouts, written here from their facts, import and compute what hand-assembled modules
compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from medm.cli.models import import_
from medm.config import validate
from medm.encoders import M3DCLIPOptions
from medm.errors import CheckpointError
from medm.models import load
from medm.models.export.export import export
from medm.models.manifest import verify
from medm.models.published.importing import KINDS, import_model
from medm.models.published.source_configs import Hints
from medm.models.published.weights import read_tensors
from medm.models.vision import build_encoder
from medm.types import Media, Sample, Turn
from tests.cli.runner import medm
from tests.encoders.test_volume_vit import (
    DEPTH,
    HEADS,
    MLP,
    PublishedMedMCLIP,
    m3d_shapes,
    m3d_straight_line,
    random_state,
    whole_clip,
)
from tests.encoders.test_volume_vit import DIM as DIM_3D
from tests.encoders.test_volume_vit import SIZES as M3D_SIZES
from tests.inference.tiny import awaken
from tests.models.export.test_export import make, save
from tests.models.published.medm_vl import (
    config_2d,
    config_ct,
    m3d_tower,
    mlp,
    siglip,
    vision_names,
    volume_names,
    write,
)
from tests.tiny import VIT, save_llm


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llms")
    return {family: save_llm(family, folder / family) for family in ("qwen2.5", "llama-3.2", "phi")}


def logits_by_hand(llm: Any, ids: list[int], placeholder: int, vision: Tensor) -> Tensor:
    """Text embeddings with vision features (N, D) in the places of the placeholders, through the
    language model."""
    places = torch.tensor(ids) == placeholder
    embeds = llm.get_input_embeddings()(torch.tensor(ids).where(~places, 0))
    embeds[places] = vision
    return llm(inputs_embeds=embeds[None]).logits[0]


def encode(
    processor: Any, branch: str, pixels: Tensor, question: str = "Is there an effusion?"
) -> Any:
    turn = Turn("user", (Media(branch), f"\n{question}"))
    return processor.encode(Sample((turn,)), {branch: [pixels.numpy()]}, generation=True)


def own_logits(model: Any, example: Any) -> Tensor:
    ((branch, items),) = example.pixels.items()
    pixels = {branch: torch.from_numpy(items[0])[None]}
    return model(input_ids=torch.tensor([example.input_ids]), pixels=pixels).logits[0]


def check(
    model: Any, processor: Any, llm: Any, branch: str, pixels: Tensor, vision: Tensor
) -> None:
    example = encode(processor, branch, pixels)
    placeholder = processor.placeholder_ids[branch]
    assert example.input_ids.count(placeholder) == len(vision)
    expected = logits_by_hand(llm, example.input_ids, placeholder, vision)
    found = own_logits(model, example)[:, : expected.shape[-1]]
    assert expected.abs().max() > 0.3
    assert (found - expected).abs().max() < 2e-5  # measured 4e-6: the order of additions


def check_every_tensor_is_listed(source: Path, out: Path) -> None:
    """`import.json` names each tensor of the files once, as loaded or as ignored, and nothing
    else."""
    parts = json.loads((out / "import.json").read_text())["parts"]
    listed = [name for part in parts.values() for name in part["loaded"] + part["ignored"]]
    assert sorted(listed) == sorted(read_tensors(source / "model.safetensors"))


@torch.no_grad()
def test_generation_c_in_2d(llms: dict[str, Path], tmp_path: Path) -> None:
    tower = siglip()
    projector, names = mlp("connector_image.connector", 24)
    tower.save_pretrained(tmp_path / "siglip")
    config = config_2d(llm=str(llms["qwen2.5"]), encoder=str(tmp_path / "siglip"))
    llm = write(tmp_path / "src", llms["qwen2.5"], config, vision_names(tower) | names)
    report = import_model(str(tmp_path / "src"), str(tmp_path / "out"))
    assert report.kind == "MedM-VL model folder, generation C"
    model, processor = load(str(tmp_path / "out"))
    pixels = torch.rand(3, 16, 16)
    hidden = tower(pixels[None], output_hidden_states=True).hidden_states[-1]
    check(model, processor, llm, "image", pixels, projector(hidden)[0])

    check_every_tensor_is_listed(tmp_path / "src", tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "import.json").read_text())["parts"]
    assert all(
        "post_layernorm" in name or ".head." in name for name in listed["image.encoder"]["ignored"]
    )
    text = processor.tokenizer.decode(encode(processor, "image", pixels, "Q").input_ids)
    assert text.startswith("A chat between a curious user")
    assert text.endswith("\nQ ASSISTANT:")
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("generation", ["A", "B", "C"])
@torch.no_grad()
def test_a_3d_tower_with_spatial_pooling(
    llms: dict[str, Path], tmp_path: Path, generation: str
) -> None:
    """Nested configs (A), bare keys without a word about the connector (B) and prefixed keys (C);
    M3D-CLIP with its text side, tied embeddings stored once, a BOS in prompts."""
    tower = m3d_tower()
    projector, names = mlp("connector_image3d.connector", 24)
    config = config_ct(llms["llama-3.2"])
    if generation != "A":
        prefix = "lvlm_" if generation == "C" else ""
        (tmp_path / "m3d").mkdir()
        (tmp_path / "m3d" / "config.json").write_text(json.dumps(config["encoder_image3d_config"]))
        config = {
            f"{prefix}llm_type": "llama3",
            f"{prefix}llm_name_or_path": str(llms["llama-3.2"]),
            f"{prefix}encoder_image3d_type": "m3dclip",
            f"{prefix}encoder_image3d_select_layer": -1,
            f"{prefix}encoder_image3d_select_feature": "patch",
            f"{prefix}encoder_image3d_name_or_path": str(tmp_path / "m3d"),
        }
        if generation == "C":
            config["lvlm_connector_image3d_type"] = "spatial_pooling"
    llm = write(tmp_path / "src", llms["llama-3.2"], config, volume_names(tower) | names)
    report = import_model(str(tmp_path / "src"), str(tmp_path / "out"))
    check_every_tensor_is_listed(tmp_path / "src", tmp_path / "out")
    assert ("generation C" if generation == "C" else "generation A/B") in report.kind
    assert any("arrays of 0..1" in note for note in report.notes) == (generation != "C")
    assert any("taken to be spatial_pooling" in note for note in report.notes) == (
        generation == "B"
    )
    assert any("language_encoder" in line for line in report.lines())
    model, processor = load(str(tmp_path / "out"))
    volume = torch.rand(1, 8, 16, 16)
    patches = m3d_straight_line(tower, volume, 3, False)[1:]  # without the class token
    pooled = F.avg_pool3d(patches.T.reshape(1, 24, 2, 2, 2), 2, 2).reshape(24, -1).T
    check(model, processor, llm, "volume", volume, projector(pooled))
    assert processor.preprocess["volume"].scale == ("hu" if generation == "C" else "0-1")


@pytest.mark.parametrize(("generation", "prefix"), [("B", ""), ("C", "lvlm_")])
@torch.no_grad()
def test_medm_clip_with_spatial_pooling(
    llms: dict[str, Path], tmp_path: Path, generation: str, prefix: str
) -> None:
    torch.manual_seed(6)
    tower = PublishedMedMCLIP().eval()
    projector, names = mlp("connector_image3d.connector", DIM_3D)
    whole = {
        f"encoder_image3d.encoder.vision_encoder.{name}": value
        for name, value in tower.state_dict().items()
    }
    whole |= {
        "encoder_image3d.encoder.text_encoder.weight": torch.zeros(2),
        "encoder_image3d.encoder.logit_scale": torch.ones(()),
    }
    published = {
        "model_type": "medm-pretrain", "hidden_size": DIM_3D, "image_size": 16, "image_patch_size": 8, "frame_size": 8,
        "frame_patch_size": 4, "image_num_heads": HEADS, "image_mlp_dim": MLP, "image_num_layers": DEPTH,
    }  # fmt: skip
    (tmp_path / "medm").mkdir()
    (tmp_path / "medm" / "config.json").write_text(json.dumps(published))
    config = {
        f"{prefix}llm_type": "qwen2",
        f"{prefix}llm_name_or_path": str(llms["qwen2.5"]),
        f"{prefix}encoder_image3d_type": "medmclip",
        f"{prefix}encoder_image3d_name_or_path": str(tmp_path / "medm"),
        f"{prefix}encoder_image3d_select_feature": "patch",
    }
    llm = write(tmp_path / "src", llms["qwen2.5"], config, whole | names)
    report = import_model(str(tmp_path / "src"), str(tmp_path / "out"))
    check_every_tensor_is_listed(tmp_path / "src", tmp_path / "out")
    assert any("taken to be spatial_pooling" in note for note in report.notes)
    assert any("arrays of 0..255" in note for note in report.notes) == (generation == "B")
    model, processor = load(str(tmp_path / "out"))
    volume = torch.rand(1, 8, 16, 16)
    pooled = tower(volume[None], DEPTH)[:, 1:].mean(dim=1)  # the grid of 2 x 2 x 2 is one window
    check(model, processor, llm, "volume", volume, projector(pooled))


@pytest.mark.parametrize(("generation", "prefix"), [("B", ""), ("C", "lvlm_")])
@torch.no_grad()
def test_a_2d_tower_over_slices(
    llms: dict[str, Path], tmp_path: Path, generation: str, prefix: str
) -> None:
    """CT-Chest: a 2-D tower on every slice, learned queries over all of them; Phi-2's head has a
    bias and is untied."""
    tower = siglip()
    projector, names = mlp("connector_image.connector", 24)
    attention, query = nn.MultiheadAttention(24, 8, batch_first=True), torch.randn(16, 24)
    names |= {
        f"connector_image.attn.{name}": tensor for name, tensor in attention.state_dict().items()
    }
    names["connector_image.query"] = query
    config = {
        f"{prefix}llm_type": "phi",
        f"{prefix}llm_name_or_path": "/nowhere/phi-2",
        f"{prefix}encoder_image_type": "siglip",
        f"{prefix}encoder_image_select_feature": "cls_patch",
        f"{prefix}connector_image_type": "attn_pooling",
    }
    llm = write(tmp_path / "src", llms["phi"], config, vision_names(tower) | names)
    tower.save_pretrained(tmp_path / "siglip")
    with pytest.raises(CheckpointError, match=r"looked up as '/nowhere/phi-2'.*by --llm"):
        import_model(str(tmp_path / "src"), str(tmp_path / "out"))
    hints = Hints(
        llm=str(llms["phi"]),
        encoder=str(tmp_path / "siglip"),
        preprocess={"volume": {"size": [3, 16, 16]}},
    )
    report = import_model(str(tmp_path / "src"), str(tmp_path / "out"), hints=hints)
    check_every_tensor_is_listed(tmp_path / "src", tmp_path / "out")
    assert any("arrays of 0..255" in note for note in report.notes) == (generation == "B")
    model, processor = load(str(tmp_path / "out"))
    volume = torch.rand(3, 3, 16, 16)  # channels, slices, rows, columns
    hidden = tower(volume.transpose(0, 1), output_hidden_states=True).hidden_states[
        -1
    ]  # (3 slices, 16, 24)
    pooled, _ = attention(query[None], hidden.reshape(1, -1, 24), hidden.reshape(1, -1, 24))
    check(model, processor, llm, "volume", volume, projector(pooled)[0])


@torch.no_grad()
def test_generation_b_with_clip_and_a_head_of_its_own(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    """A config that says tied, and a stored head that differs: the head wins."""
    torch.manual_seed(3)
    tower = CLIPVisionModel(CLIPVisionConfig(**VIT)).eval()
    awaken(tower)
    tower.save_pretrained(tmp_path / "clip")
    projector, names = mlp("connector_image.connector", 24, depth=1)
    config = {
        "llm_type": "qwen2", "llm_name_or_path": str(llms["qwen2.5"]), "cache_dir_hf": None,
        "encoder_image_type": "clip", "encoder_image_name_or_path": str(tmp_path / "clip"),
        "encoder_image_select_layer": -2, "encoder_image_select_feature": "patch", "connector_image_type": "mlp",
    }  # fmt: skip
    head = torch.randn(320, 32)
    names["llm.lm_head.weight"] = head
    names["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    llm = write(tmp_path / "src", llms["qwen2.5"], config, vision_names(tower) | names)
    llm.config.tie_word_embeddings = False
    llm.lm_head.weight = nn.Parameter(head)
    report = import_model(str(tmp_path / "src"), str(tmp_path / "out"))
    assert any("no longer tied" in note for note in report.notes)
    check_every_tensor_is_listed(tmp_path / "src", tmp_path / "out")
    model, processor = load(str(tmp_path / "out"))
    pixels = torch.rand(3, 16, 16)
    hidden = tower(pixels[None], output_hidden_states=True).hidden_states[-2][:, 1:]
    check(model, processor, llm, "image", pixels, projector(hidden)[0])


def test_nothing_is_skipped_silently(llms: dict[str, Path], tmp_path: Path) -> None:
    tower = siglip()
    _, names = mlp("connector_image.connector", 24)
    tower.save_pretrained(tmp_path / "siglip")
    config = {
        "lvlm_llm_name_or_path": str(llms["qwen2.5"]),
        "lvlm_encoder_image_type": "siglip",
        "lvlm_encoder_image_name_or_path": str(tmp_path / "siglip"),
        "lvlm_connector_image_type": "mlp",
    }
    whole = vision_names(tower) | names
    cases: list[tuple[str, dict[str, Any], dict[str, Tensor], str]] = [
        (
            "strange",
            {},
            whole | {"adapter.weight": torch.zeros(1)},
            "1 tensors belong to no known part: adapter.weight",
        ),
        (
            "missing",
            {},
            {k: v for k, v in whole.items() if "connector.2.bias" not in k},
            "1 missing: layers.2.bias",
        ),
        (
            "shape",
            {},
            whole | {"connector_image.connector.2.bias": torch.zeros(7)},
            r"layers.2.bias \(7,\), expected",
        ),
        (
            "feature",
            {"lvlm_encoder_image_select_feature": "patch"},
            whole,
            "drops its first image patch",
        ),
        ("tower", {"lvlm_encoder_image_type": "ctclip"}, whole, "encoder 'ctclip' is not imported"),
        (
            "connector",
            {"lvlm_connector_image_type": "qformer"},
            whole,
            "connector 'qformer' is not imported",
        ),
    ]
    for name, changes, tensors, words in cases:
        write(tmp_path / name, llms["qwen2.5"], config | changes, tensors)
        with pytest.raises(CheckpointError, match=words):
            import_model(str(tmp_path / name), str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    save_file({"weight": torch.zeros(1)}, tmp_path / "empty" / "model.safetensors")
    with pytest.raises(CheckpointError, match="of unknown kind"):
        import_model(str(tmp_path / "empty"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_stock_llava_is_the_inverse_of_export(llms: dict[str, Path], tmp_path: Path) -> None:
    model, processor = make(llms["llama-3.2"], family="llama-3.2", encoder="clip", layer=-2)
    export(save((model, processor), tmp_path / "model"), str(tmp_path / "llava"), form="llava")
    import_model(str(tmp_path / "llava"), str(tmp_path / "again"))
    again, processor_again = load(str(tmp_path / "again"))
    pixels = torch.rand(3, 16, 16)
    example, other = encode(processor, "image", pixels), encode(processor_again, "image", pixels)
    assert other.input_ids == example.input_ids
    assert torch.equal(own_logits(again, other), own_logits(model, example))
    assert processor_again.preprocess["image"] == processor.preprocess["image"]


@pytest.mark.parametrize("layout", ["model.safetensors", "pretrained_ViT.bin"])
@torch.no_grad()
def test_m3d_clip_becomes_a_bundle(layout: str, tmp_path: Path) -> None:
    tower = random_state(m3d_shapes(), seed=4)
    source = tmp_path / "src"
    source.mkdir()
    if layout.endswith("bin"):
        torch.save(tower, source / layout)
        path = source / layout
    else:
        save_file(whole_clip(tower), source / layout)
        path = source
    published = {"model_type": "m3d_clip", "img_size": [8, 16, 16], "patch_size": [4, 8, 8], "in_channels": 1,
                 "hidden_size": 24, "mlp_dim": 40, "num_layers": 3, "num_heads": 3}  # fmt: skip
    (source / "config.json").write_text(json.dumps(published))
    report = import_model(str(path), str(tmp_path / "out"))
    assert (
        report.parts[0].ignored
        == ([] if layout.endswith("bin") else sorted(whole_clip({})))[: len(whole_clip({}))]
    )
    volume = torch.rand(1, 8, 16, 16)
    for norm, after in (("before", False), ("after", True)):
        block = {
            "name": "m3d-clip",
            "path": str(tmp_path / "out"),
            "norm": norm,
            "tokens": "cls_patch",
        }
        encoder, preprocess = build_encoder(validate(M3DCLIPOptions, block, source="test"))
        expected = m3d_straight_line(tower, volume, 3, after)
        assert (encoder(volume[None]).tokens[0] - expected).abs().max() < 2e-5
        assert preprocess["size"] == M3D_SIZES["image_size"]


@pytest.mark.parametrize(
    "prefix", ["mm_projector", "connector._connector", "connector_image.connector"]
)
def test_projectors_of_three_systems(prefix: str, tmp_path: Path) -> None:
    module, _ = mlp("x", 24)
    torch.save(
        {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()},
        tmp_path / "mm_projector.bin",
    )
    import_model(str(tmp_path / "mm_projector.bin"), str(tmp_path / "out"))
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (described["depth"], described["in_dim"], described["out_dim"]) == (2, 24, 32)
    written = read_tensors(tmp_path / "out" / "model.safetensors")
    assert {name.removeprefix("layers."): tensor.sum() for name, tensor in written.items()} == {
        name: tensor.sum() for name, tensor in module.state_dict().items()
    }


def test_the_command_says_what_became_of_every_tensor(tmp_path: Path) -> None:
    source = tmp_path / "siglip"
    siglip().save_pretrained(source)
    done = medm("import", str(source), str(tmp_path / "out"))
    assert done.code == 0, done.err
    assert "SigLIP vision towers" in done.out
    assert "tensors loaded" in done.out
    assert "ignored" in done.out
    assert "Not for clinical use" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out")["import"] == {
        "source": str(source),
        "kind": "SigLIP vision towers",
    }
    again = medm("import", str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert again.code == 1
    assert "exists already" in again.err, "said before the source is looked for"


def test_the_command_names_every_kind() -> None:
    assert set(get_args(get_type_hints(import_)["kind"])) == {"auto", *KINDS}
