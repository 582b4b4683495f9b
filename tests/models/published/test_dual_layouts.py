"""Dual encoders in the layouts they are published in open strictly and compute what they computed.

Layout-tested: the tensors have the published names and small sizes, not the published values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from medm.config import validate
from medm.encoders import TowerOptions, ViTOptions
from medm.errors import CheckpointError
from medm.models import build, load
from medm.models.dual_encoder.modeling import DualEncoder
from medm.models.published.importing import import_model
from medm.models.published.source_configs import Hints
from medm.models.vision import build_encoder
from tests.models.dual_encoder.tiny import IDS, MASK, WORDS, options, pairs, save_tokenizer, section

SIZES = {
    "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
VISION = SIZES | {"image_size": 16, "patch_size": 8}
TEXT = SIZES | {"vocab_size": len(WORDS), "max_position_embeddings": 12}
EMBED = 20
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def stock_clip(activation: str = "quick_gelu") -> CLIPModel:
    """transformers' CLIP with the end token that OpenAI's vocabulary has: its last one."""
    torch.manual_seed(0)
    act = {"hidden_act": activation}
    end = {"bos_token_id": len(WORDS) - 2, "eos_token_id": len(WORDS) - 1}
    config = CLIPConfig(
        vision_config=VISION | act, text_config=TEXT | act | end, projection_dim=EMBED
    )
    return CLIPModel(config).eval()


def open_clip_blocks(layers: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Blocks of CLIP under open_clip's names, with one matrix for query, key and value."""
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(layers.children()):
        place, own = f"{prefix}.{number}", dict(layer.state_dict())
        for kind in ("weight", "bias"):
            found[f"{place}.attn.in_proj_{kind}"] = torch.cat(
                [own[f"self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            for old, new in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                found[f"{place}.{new}.{kind}"] = own[f"{old}.{kind}"]
    return found


def open_clip_image(model: CLIPModel) -> dict[str, Tensor]:
    vision: Any = model.vision_model
    found = {
        "visual.class_embedding": vision.embeddings.class_embedding,
        "visual.positional_embedding": vision.embeddings.position_embedding.weight,
        "visual.conv1.weight": vision.embeddings.patch_embedding.weight,
        "visual.proj": model.visual_projection.weight.T,
    }
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = getattr(vision.pre_layrnorm, kind)
        found[f"visual.ln_post.{kind}"] = getattr(vision.post_layernorm, kind)
    return found | open_clip_blocks(vision.encoder.layers, "visual.transformer.resblocks")


def open_clip_text(model: CLIPModel) -> dict[str, Tensor]:
    text: Any = model.text_model
    return {
        "token_embedding.weight": text.embeddings.token_embedding.weight,
        "positional_embedding": text.embeddings.position_embedding.weight,
        "ln_final.weight": text.final_layer_norm.weight,
        "ln_final.bias": text.final_layer_norm.bias,
        "text_projection": model.text_projection.weight.T,
    } | open_clip_blocks(text.encoder.layers, "transformer.resblocks")


class BertTower(nn.Module):
    """BERT whose class token goes through two matrices with a GELU between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.bert = BertModel(BertConfig(**TEXT), add_pooling_layer=False)
        hidden = (128 + EMBED) // 2
        self.proj = nn.Sequential(
            nn.Linear(128, hidden, bias=False), nn.GELU(), nn.Linear(hidden, EMBED, bias=False)
        )
        self.eval()

    def forward(self) -> Tensor:
        return self.proj(self.bert(IDS, attention_mask=MASK).last_hidden_state[:, 0])


def clean(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def unimed(folder: Path, image: CLIPModel, text: BertTower, *, inner: str = "") -> Path:
    """A training checkpoint of UniMed-CLIP: `visual.*`, `text_encoder.*` and the scale."""
    state = open_clip_image(image)
    state |= {f"text_encoder.{inner}{k}": v for k, v in text.bert.state_dict().items()}
    state |= {f"text_encoder.proj.{k}": v for k, v in text.proj.state_dict().items()}
    state |= {"logit_scale": torch.tensor(2.5)}
    file = folder / "unimed.pt"
    named = {f"module.{name}": tensor for name, tensor in clean(state).items()}
    torch.save({"epoch": 10, "name": "x", "state_dict": named}, file)
    return file


def features(folder: Path) -> tuple[DualEncoder, Tensor, Tensor]:
    """Vectors of an imported folder."""
    model: Any = load(str(folder))[0]
    with torch.no_grad():
        output = model(**pairs())
    return model, output.image_embeds, output.text_embeds


def read_report(folder: Path) -> tuple[list[str], list[str]]:
    report = json.loads((folder / "import.json").read_text())
    parts = report["parts"].values()
    loaded = sorted({name for part in parts for name in part["loaded"]})
    return loaded, sorted({name for part in parts for name in part["ignored"]})


@torch.no_grad()
@pytest.mark.parametrize("inner", ["", "transformer."])
def test_unimed_clip(tmp_path: Path, tokenizer: str, inner: str) -> None:
    image, text = stock_clip(), BertTower()
    file = unimed(tmp_path, image, text, inner=inner)
    report = import_model(str(file), str(tmp_path / "out"), hints=Hints(tokenizer=tokenizer))
    model, found_image, found_text = features(tmp_path / "out")
    pixels = pairs()["pixels"]["image"]
    torch.testing.assert_close(
        found_image, image.visual_projection(image.vision_model(pixels).pooler_output), **CLOSE
    )
    torch.testing.assert_close(found_text, text(), **CLOSE)
    assert model.scale.logit_scale.item() == pytest.approx(2.5)
    names = {k.removeprefix("module.") for k in torch.load(file)["state_dict"]}
    loaded, ignored = read_report(tmp_path / "out")
    assert (set(loaded), ignored) == (names, [])  # every tensor of the file, under its name there
    assert any("heads are 64 wide" in note for note in report.notes)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "text."], ids=["openai", "custom-text"])
def test_openai_and_metaclip(tmp_path: Path, tokenizer: str, prefix: str) -> None:
    stock = stock_clip()
    state = open_clip_image(stock)
    state |= {prefix + name: tensor for name, tensor in open_clip_text(stock).items()}
    state |= {"logit_scale": torch.tensor(3.0)}
    if not prefix:  # what OpenAI's files hold beside
        state |= {
            "input_resolution": torch.tensor(16),
            "context_length": torch.tensor(12),
            "vocab_size": torch.tensor(len(WORDS)),
        }
    torch.save(clean(state), tmp_path / "clip.pt")
    hints = Hints(tokenizer=tokenizer)
    import_model(str(tmp_path / "clip.pt"), str(tmp_path / "out"), hints=hints)
    _, image, text = features(tmp_path / "out")
    pixels = pairs()["pixels"]["image"]
    expected = stock.visual_projection(stock.vision_model(pixels).pooler_output)
    torch.testing.assert_close(image, expected, **CLOSE)
    hidden = stock.text_model(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(text, stock.text_projection(hidden.pooler_output), **CLOSE)
    loaded, ignored = read_report(tmp_path / "out")
    assert set(loaded) | set(ignored) == set(state)
    assert ignored == sorted(set(state) & {"input_resolution", "context_length", "vocab_size"})


class PublishedTimm(nn.Module):
    """transformers' ViT under timm's names, with one matrix for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        config = ViTConfig(**VISION, layer_norm_eps=1e-6, hidden_act="gelu")
        self.vit = ViTModel(config, add_pooling_layer=False).eval()
        for weight in self.vit.parameters():  # biases begin as zero
            nn.init.normal_(weight, std=0.1)
        self.head = nn.Linear(128, EMBED, bias=False)

    def named(self) -> dict[str, Tensor]:
        own = self.vit.state_dict()

        def one(*endings: str) -> Tensor:
            return next(v for k, v in own.items() if any(k.endswith(end) for end in endings))

        state = {
            "cls_token": own["embeddings.cls_token"],
            "pos_embed": own["embeddings.position_embeddings"],
            "norm.weight": own["layernorm.weight"],
            "norm.bias": own["layernorm.bias"],
        }
        for kind in ("weight", "bias"):
            state[f"patch_embed.proj.{kind}"] = own[
                f"embeddings.patch_embeddings.projection.{kind}"
            ]
        for n in range(2):
            for kind in ("weight", "bias"):
                place = f"{n}.attention."
                state[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(
                    [
                        one(f"{place}attention.{long}.{kind}", f"{place}{short}_proj.{kind}")
                        for long, short in (("query", "q"), ("key", "k"), ("value", "v"))
                    ]
                )
                for new, old in (
                    ("attn.proj", (f"{place}output.dense", f"{place}o_proj")),
                    ("mlp.fc1", (f"{n}.intermediate.dense", f"{n}.mlp.fc1")),
                    ("mlp.fc2", (f"{n}.output.dense", f"{n}.mlp.fc2")),
                    ("norm1", (f"{n}.layernorm_before",)),
                    ("norm2", (f"{n}.layernorm_after",)),
                ):
                    state[f"blocks.{n}.{new}.{kind}"] = one(*(f"{end}.{kind}" for end in old))
        found = {f"visual.trunk.{name}": tensor for name, tensor in state.items()}
        return found | {"visual.head.proj.weight": self.head.weight}


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_biomedclip(tmp_path: Path, tokenizer: str, suffix: str) -> None:
    image, text = PublishedTimm(), BertTower()
    state = image.named() | {"logit_scale": torch.tensor(4.0)}
    state |= {f"text.transformer.{k}": v for k, v in text.bert.state_dict().items()}
    state |= {f"text.proj.{k}": v for k, v in text.proj.state_dict().items()}
    state |= {"text.transformer.embeddings.position_ids": torch.arange(12)[None]}
    folder = tmp_path / "biomedclip"
    save_tokenizer(folder)
    if suffix == "bin":
        torch.save(clean(state), folder / "open_clip_pytorch_model.bin")
    else:
        save_file(clean(state), folder / "open_clip_model.safetensors")
    described = {
        "model_cfg": {"embed_dim": EMBED, "vision_cfg": {"timm_model_name": "vit"}, "text_cfg": {}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    report = import_model(str(folder), str(tmp_path / "out"))
    model, found_image, found_text = features(tmp_path / "out")
    hidden = image.vit(pairs()["pixels"]["image"]).last_hidden_state[:, 0]
    torch.testing.assert_close(found_image, image.head(hidden), **CLOSE)
    torch.testing.assert_close(found_text, text(), **CLOSE)
    assert model.config.image["encoder"]["name"] == "vit"
    preprocess = load(str(tmp_path / "out"))[1].preprocess["image"]
    assert (preprocess.mean, preprocess.fit) == ([0.1, 0.2, 0.3], "crop")
    loaded, ignored = read_report(tmp_path / "out")
    assert ignored == ["text.transformer.embeddings.position_ids"]
    assert set(loaded) | set(ignored) == set(state)
    assert report.notes == []


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_stock_folders(tmp_path: Path, tokenizer: str, kind: str) -> None:
    torch.manual_seed(0)
    model: Any
    if kind == "clip":
        model = stock_clip("gelu")
    else:
        text = TEXT | {"max_position_embeddings": 5}
        model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)).eval()
    model.save_pretrained(tmp_path / "stock")
    import_model(
        str(tmp_path / "stock"),
        str(tmp_path / "out"),
        kind="dual-encoder",
        hints=Hints(tokenizer=tokenizer, preprocess={"image": {"fit": "pad"}}),
    )
    _, image, words = features(tmp_path / "out")
    mask = {"attention_mask": MASK} if kind == "clip" else {}
    expected = model(input_ids=IDS, pixel_values=pairs()["pixels"]["image"], **mask)
    torch.testing.assert_close(F.normalize(image, dim=-1), expected.image_embeds, **CLOSE)
    torch.testing.assert_close(F.normalize(words, dim=-1), expected.text_embeds, **CLOSE)
    assert load(str(tmp_path / "out"))[1].preprocess["image"].fit == "pad"


@torch.no_grad()
def test_a_recipe_begins_with_an_image_tower_of_metaclip_and_a_bert(
    tmp_path: Path, tokenizer: str
) -> None:
    """As UniMed-CLIP begins: towers of two sources, a scale of its own."""
    stock, bert = stock_clip(), BertTower()
    state = open_clip_image(stock) | open_clip_text(stock) | {"logit_scale": torch.tensor(3.0)}
    torch.save(clean(state), tmp_path / "metaclip.pt")
    bert.bert.save_pretrained(tmp_path / "bert")
    content = section(
        tokenizer,
        image={"encoder": {"name": "clip", "path": str(tmp_path / "metaclip.pt")}},
        text={"encoder": {"name": "bert", "path": str(tmp_path / "bert")}},
    )
    model: Any = build(options(content))[0]
    assert model.scale.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    pixels = pairs()["pixels"]["image"]
    hidden = stock.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.image.encode(pixels).tokens, hidden, **CLOSE)
    features = model.text.encoder(IDS, MASK)
    expected = bert.bert(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(features.tokens, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["metaclip.pt", "folder"])
@pytest.mark.parametrize("width", [EMBED, EMBED + 4])
def test_the_image_tower_of_a_dual_encoder_brings_its_norm_and_a_projection_that_fits(
    width: int, layout: str, tmp_path: Path, tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """UniMed-CLIP begins with every tensor of MetaCLIP's image tower."""
    caplog.set_level("INFO", logger="medm")
    stock = stock_clip()
    for module in (stock.vision_model.post_layernorm, stock.visual_projection):
        torch.nn.init.normal_(module.weight)
    state = open_clip_image(stock) | open_clip_text(stock) | {"logit_scale": torch.tensor(3.0)}
    torch.save(clean(state), tmp_path / "metaclip.pt")
    stock.save_pretrained(tmp_path / "folder")
    image = {"encoder": {"name": "clip", "path": str(tmp_path / layout)}}
    model: Any = build(options(section(tokenizer, image=image, embed_dim=width)))[0]
    pixels = pairs()["pixels"]["image"]
    tower = model.image
    pooled = stock.vision_model(pixels).pooler_output
    torch.testing.assert_close(tower.readout.pooling(tower.encode(pixels)), pooled, **CLOSE)
    said = [line for line in caplog.messages if "starts from new weights" in line]
    if width == EMBED:
        projected = stock.visual_projection(pooled)
        torch.testing.assert_close(model.get_image_features(pixels), projected, **CLOSE)
        assert not said
    else:
        assert len(said) == 1
        assert f"({EMBED}, {VISION['hidden_size']})" in said[0]
    assert model.scale.logit_scale.exp().item() == pytest.approx(1 / 0.07)


@torch.no_grad()
def test_the_image_tower_of_siglip_brings_its_pooling_head(tmp_path: Path, tokenizer: str) -> None:
    torch.manual_seed(2)
    stock = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)).eval()
    stock.save_pretrained(tmp_path / "siglip")
    image = {
        "encoder": {"name": "siglip", "path": str(tmp_path / "siglip")},
        "pool": "attention",
        "projection": "none",
    }
    model: Any = build(options(section(tokenizer, image=image, embed_dim=VISION["hidden_size"])))[0]
    pixels = pairs()["pixels"]["image"]
    expected = stock.vision_model(pixels).pooler_output
    torch.testing.assert_close(model.get_image_features(pixels), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", [32, 24, 8])
def test_a_tower_of_another_size_begins_with_resized_positions(
    tmp_path: Path, tokenizer: str, side: int
) -> None:
    """As MetaCLIP's loader makes a table of 24 x 24 from one of 14 x 14; of both layouts."""
    file = unimed(tmp_path, stock_clip(), BertTower())
    table = torch.load(file)["state_dict"]["module.visual.positional_embedding"]
    cells = side // 8
    grid = F.interpolate(
        table[1:].T.reshape(1, 128, 2, 2), size=(cells, cells), mode="bicubic", align_corners=True
    )
    expected = torch.cat([table[:1], grid.flatten(2)[0].T])
    stock_clip().save_pretrained(tmp_path / "stock")
    for path in (file, tmp_path / "stock"):
        architecture = {"image_size": side}
        block = {"name": "clip", "path": str(path), "architecture": architecture}
        encoder, preprocess = build_encoder(validate(TowerOptions, block, source="test"))
        tower: Any = encoder
        found = tower.tower.embeddings.position_embedding.weight
        torch.testing.assert_close(found, expected, **CLOSE)
        assert preprocess["size"] == [side, side]
        assert encoder(torch.randn(1, 3, side, side)).grid == (cells, cells)
    content = section(
        tokenizer,
        image={
            "encoder": {"name": "clip", "path": str(file), "architecture": {"image_size": side}}
        },
    )
    model, processor = build(options(content))
    assert processor.preprocess["image"].size == [side, side]
    torch.testing.assert_close(
        model.image.encoder.tower.embeddings.position_embedding.weight, expected, **CLOSE
    )


@torch.no_grad()
def test_positions_of_another_input_size_are_interpolated(tmp_path: Path, tokenizer: str) -> None:
    """Bicubic, the class token's position as it is; the table keeps its grid."""
    file = unimed(tmp_path, stock_clip(), BertTower())
    block = {"name": "clip", "path": str(file), "image_size": 32, "tokens": "cls_patch"}
    encoder, _ = build_encoder(validate(ViTOptions, block, source="test"))
    tower: Any = encoder
    pixels = torch.randn(1, 3, 32, 32)
    found = tower.tower.embeddings(pixels, interpolate_pos_encoding=True)
    patches = tower.tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    table = torch.load(file)["state_dict"]["module.visual.positional_embedding"]
    grid = table[1:].T.reshape(1, 128, 2, 2)
    grid = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    expected = patches + grid.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found[:, 1:], expected, **CLOSE)
    torch.testing.assert_close(found[0, 0], tower.tower.embeddings.class_embedding + table[0])
    model, processor = build(
        options(
            section(
                tokenizer,
                path=str(file),
                image={"encoder": {"name": "clip", "image_size": 32}},
                text={"encoder": {"name": "bert"}},
            )
        )
    )
    assert processor.preprocess["image"].size == [32, 32]
    assert model(**pairs((32, 32))).image_embeds.shape == (4, EMBED)


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path: Path, tokenizer: str) -> None:
    file = unimed(tmp_path, stock_clip(), BertTower())
    state = torch.load(file)["state_dict"]
    word = "module.text_encoder.proj.2.weight"
    cases = [
        (without(state, "module.visual.ln_post.bias"), "image.norm .*1 missing: bias"),
        (without(state, "module.visual.proj"), "model.image.projection: none"),
        (state | {"module.visual.more": state["module.visual.proj"]}, "belong to no known part"),
        (state | {word: state[word][:, :-1]}, "text.projection .*1 of another shape"),
        (without(state, "module.logit_scale"), "no dual encoder; expected .* a logit_scale"),
    ]
    for number, (tensors, message) in enumerate(cases):
        torch.save(clean(tensors), file)
        with pytest.raises(Exception, match=f"(?s){message}"):
            import_model(
                str(file), str(tmp_path / f"out{number}"), hints=Hints(tokenizer=tokenizer)
            )
        assert not (tmp_path / f"out{number}").exists()
    torch.save(clean(state), file)
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        import_model(str(file), str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="leave --tokenizer out"):
        import_model(
            str(file), str(tmp_path / "out"), kind="clip", hints=Hints(tokenizer=tokenizer)
        )
