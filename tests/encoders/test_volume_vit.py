"""M3D-CLIP and MedM-CLIP: published names and shapes load strict, and equal straight-line
computations."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medm.encoders.volume_vit import M3DCLIPEncoder, MedMCLIPEncoder
from medm.errors import CheckpointError, RecipeError
from medm.imaging.options import VolumePreprocess
from tests.encoders.published import load_published

DIM, MLP, HEADS, DEPTH = 24, 40, 3, 3
SIZES = {
    "image_size": [8, 16, 16], "patch_size": [4, 8, 8], "num_channels": 1, "hidden_size": DIM,
    "intermediate_size": MLP, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
}  # fmt: skip
GRID, VOXELS = (2, 2, 2), 4 * 8 * 8


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def m3d_shapes(dim=DIM, mlp=MLP, depth=DEPTH, cells=8, voxels=VOXELS):
    shapes = {
        "cls_token": (1, 1, dim),
        "patch_embedding.position_embeddings": (1, cells, dim),
        "patch_embedding.patch_embeddings.1.weight": (dim, voxels),
        "patch_embedding.patch_embeddings.1.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.mlp.linear1.weight": (mlp, dim), f"blocks.{i}.mlp.linear1.bias": (mlp,),
            f"blocks.{i}.mlp.linear2.weight": (dim, mlp), f"blocks.{i}.mlp.linear2.bias": (dim,),
            f"blocks.{i}.norm1.weight": (dim,), f"blocks.{i}.norm1.bias": (dim,),
            f"blocks.{i}.norm2.weight": (dim,), f"blocks.{i}.norm2.bias": (dim,),
            f"blocks.{i}.attn.out_proj.weight": (dim, dim), f"blocks.{i}.attn.out_proj.bias": (dim,),
            f"blocks.{i}.attn.qkv.weight": (3 * dim, dim),
        }  # fmt: skip
    return shapes


def whole_clip(tower):
    """The layout of the full M3D-CLIP file: the tower under its prefix, the text side beside it."""
    return {f"vision_encoder.{name}": value for name, value in tower.items()} | {
        "language_encoder.embeddings.word_embeddings.weight": torch.zeros(30, 8),
        "mm_vision_proj.weight": torch.zeros(DIM, DIM),
        "mm_vision_proj.bias": torch.zeros(DIM),
        "mm_language_proj.weight": torch.zeros(DIM, DIM),
        "mm_language_proj.bias": torch.zeros(DIM),
        "logit_scale": torch.tensor(2.6592),
    }


def m3d_straight_line(state, volume, blocks, after_norm):
    """One volume (1, D, H, W), patch by patch and head by head, with nothing but matrix
    products."""

    def layer_norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]

    rows = []
    for d in range(GRID[0]):
        for h in range(GRID[1]):
            for w in range(GRID[2]):
                patch = volume[:, d * 4 : d * 4 + 4, h * 8 : h * 8 + 8, w * 8 : w * 8 + 8]
                vector = patch.permute(1, 2, 3, 0).reshape(-1)  # p1 p2 p3 c
                weight = state["patch_embedding.patch_embeddings.1.weight"]
                rows.append(weight @ vector + state["patch_embedding.patch_embeddings.1.bias"])
    x = torch.stack(rows) + state["patch_embedding.position_embeddings"][0]
    x = torch.cat([state["cls_token"][0], x])
    size = DIM // HEADS
    for i in range(blocks):
        qkv = layer_norm(x, f"blocks.{i}.norm1") @ state[f"blocks.{i}.attn.qkv.weight"].T
        heads = []
        for head in range(HEADS):
            q, k, v = (
                qkv[:, part * DIM + head * size : part * DIM + (head + 1) * size]
                for part in range(3)
            )
            heads.append((q @ k.T / size**0.5).softmax(-1) @ v)
        out = torch.cat(heads, -1) @ state[f"blocks.{i}.attn.out_proj.weight"].T
        x = x + out + state[f"blocks.{i}.attn.out_proj.bias"]
        y = layer_norm(x, f"blocks.{i}.norm2") @ state[f"blocks.{i}.mlp.linear1.weight"].T
        y = y + state[f"blocks.{i}.mlp.linear1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        x = (
            x
            + y @ state[f"blocks.{i}.mlp.linear2.weight"].T
            + state[f"blocks.{i}.mlp.linear2.bias"]
        )
    return layer_norm(x, "norm") if after_norm else x


@pytest.mark.parametrize("layout", ["pretrained_ViT.bin", "model.safetensors"])
@pytest.mark.parametrize(
    ("options", "blocks", "after_norm"),
    [
        ({"layer": -1}, 3, False),
        ({"layer": -1, "norm": "after"}, 3, True),
        ({"layer": -2}, 2, False),
        ({"layer": 1}, 1, False),
    ],
)
def test_m3d_clip_equals_a_straight_line_computation(layout, options, blocks, after_norm):
    tower = random_state(m3d_shapes())
    encoder = M3DCLIPEncoder(architecture=SIZES, tokens="cls_patch", **options)
    load_published(encoder, whole_clip(tower) if layout == "model.safetensors" else tower)
    volumes = torch.rand(2, 1, 8, 16, 16)
    features = encoder(volumes)
    expected = torch.stack(
        [m3d_straight_line(tower, volume, blocks, after_norm) for volume in volumes]
    )
    assert features.grid == GRID
    # Measured worst case 2.6e-6 on values up to 8.5; GELU's tanh form would be 1e-3 away, swapped
    # query and key 0.3.
    torch.testing.assert_close(features.tokens, expected, atol=1e-5, rtol=1e-5)


def test_m3d_clip_published_shapes_load_strict():
    with torch.device("meta"):
        encoder = M3DCLIPEncoder(architecture={}, norm="after")
        tower = {
            name: torch.empty(shape)
            for name, shape in m3d_shapes(
                dim=768, mlp=3072, depth=12, cells=2048, voxels=1024
            ).items()
        }
    report = load_published(encoder, tower)
    assert len(report.loaded) == len(tower) == len(encoder.state_dict())
    assert encoder.grid((32, 256, 256)) == (8, 16, 16)


def test_patch_tokens_are_those_without_the_class_token():
    tower, volume = random_state(m3d_shapes()), torch.rand(1, 1, 8, 16, 16)
    outputs = {}
    for tokens in ("patch", "cls_patch", "cls"):
        encoder = M3DCLIPEncoder(architecture=SIZES, tokens=tokens)
        load_published(encoder, tower)
        outputs[tokens] = encoder(volume)
    assert torch.equal(outputs["patch"].tokens, outputs["cls_patch"].tokens[:, 1:])
    assert torch.equal(outputs["cls"].tokens, outputs["cls_patch"].tokens[:, :1])
    assert (outputs["cls"].grid, outputs["cls"].prefix) == ((0,), 1)


def test_a_missing_tensor_of_the_tower_is_an_error():
    tower = random_state(m3d_shapes())
    del tower["blocks.1.attn.qkv.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.1\.attention\.qkv\.weight"):
        load_published(M3DCLIPEncoder(architecture=SIZES), tower)


def test_another_size_interpolates_positions_and_says_so_once(caplog):
    encoder = M3DCLIPEncoder(architecture=SIZES)
    with torch.no_grad():
        # A plane over the grid: positions that trilinear interpolation must keep linear in the
        # middle.
        slices = torch.arange(2.0).view(2, 1, 1).expand(GRID).reshape(1, 8, 1)
        encoder.positions.copy_(slices.expand(-1, -1, DIM))
    with caplog.at_level(logging.WARNING, logger="medm.encoders.plain_vit"):
        for _ in range(2):
            features = encoder(torch.rand(1, 1, 16, 16, 24))
    assert features.grid == (4, 2, 3)
    assert [r.message for r in caplog.records] == [
        "position embeddings of grid (2, 2, 2) are interpolated to (4, 2, 3)"
    ]
    # 2 slices become 4, centres at -0.25, 0.25, 0.75, 1.25 of the old index: 0, 0.25, 0.75, 1.
    positions = encoder._positions_for((4, 2, 3)).view(4, 6, DIM)
    torch.testing.assert_close(positions[:, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))
    assert torch.equal(positions[:, 0], positions[:, 5])


def test_an_input_that_is_no_multiple_of_the_patch_is_refused():
    encoder = M3DCLIPEncoder(architecture=SIZES)
    with pytest.raises(ValueError, match=r"multiples of \(4, 8, 8\), found \(8, 16, 20\)"):
        encoder(torch.rand(1, 1, 8, 16, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": -4}, "layer -4 does not exist in a tower of 3 blocks"),
        ({"layer": 0}, "layer 0 does not exist"),
        (
            {"layer": -2, "norm": "after"},
            "norm 'after' belongs to the last of the 3 blocks, found layer -2",
        ),
    ],
)
def test_layers_that_mean_nothing_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        M3DCLIPEncoder(architecture=SIZES, **options)


def test_sizes_come_from_the_published_config():
    published = {
        "model_type": "m3d_clip", "img_size": [32, 256, 256], "patch_size": [4, 16, 16], "in_channels": 1,
        "hidden_size": 768, "mlp_dim": 3072, "num_layers": 12, "num_heads": 12, "pos_embed": "perceptron",
        "max_text_len": 128, "vocab_size": 30522,
    }  # fmt: skip
    assert M3DCLIPEncoder.architecture_from(published) == M3DCLIPEncoder.published_sizes
    assert M3DCLIPEncoder.architecture_from({}) == {}
    medm = {
        "hidden_size": 768, "image_size": 256, "image_patch_size": 16, "frame_size": 32, "frame_patch_size": 4,
        "image_num_heads": 12, "image_mlp_dim": 3072, "image_num_layers": 12,
    }  # fmt: skip
    sizes = MedMCLIPEncoder.architecture_from(medm)
    assert {**MedMCLIPEncoder.published_sizes, **sizes} == MedMCLIPEncoder.published_sizes


@pytest.mark.parametrize("encoder", [M3DCLIPEncoder, MedMCLIPEncoder])
def test_preprocessing_fits_the_input(encoder):
    for wanted, size in (
        (None, [32, 256, 256]),
        ([16, 128, 128], [16, 128, 128]),
        (64, [32, 64, 64]),
    ):
        assert VolumePreprocess.model_validate(encoder.preprocess_from({}, {}, wanted)).size == size
    assert encoder.preprocess_from({}, SIZES)["size"] == [8, 16, 16]


class PublishedMedMCLIP(nn.Module):
    """MedM-CLIP's vision tower from torch's own transformer layers, under the published names."""

    def __init__(self):
        super().__init__()
        self.to_patch_embedding = nn.Sequential(
            nn.Identity(), nn.LayerNorm(VOXELS), nn.Linear(VOXELS, DIM), nn.LayerNorm(DIM)
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, 9, DIM))
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.transformer_layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                DIM, HEADS, dim_feedforward=MLP, dropout=0.0, batch_first=True
            )
            for _ in range(DEPTH)
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM))

    def forward(self, volume, blocks):
        cells = volume.unfold(2, 4, 4).unfold(3, 8, 8).unfold(4, 8, 8)  # (B, 1, d, h, w, 4, 8, 8)
        patches = cells.permute(0, 2, 3, 4, 6, 7, 5, 1).reshape(len(volume), 8, VOXELS)
        x = self.to_patch_embedding(patches)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        for layer in self.transformer_layers[:blocks]:
            x = layer(x)
        return x


@pytest.mark.parametrize(("layer", "blocks"), [(-1, 3), (-2, 2)])
def test_medm_clip_equals_torch_transformer_layers(layer, blocks):
    torch.manual_seed(0)
    published = PublishedMedMCLIP()
    for parameter in published.parameters():
        nn.init.normal_(parameter, std=0.3)
    tensors = {f"vision_encoder.{name}": value for name, value in published.state_dict().items()}
    tensors |= {
        "text_encoder.embeddings.word_embeddings.weight": torch.zeros(3, 2),
        "logit_scale": torch.zeros(()),
    }
    encoder = MedMCLIPEncoder(architecture=SIZES, layer=layer, tokens="cls_patch")
    report = load_published(encoder, tensors)
    assert not any("transformer_layers.0" in name for name in report.ignored)
    volumes = torch.rand(2, 1, 8, 16, 16)
    torch.testing.assert_close(
        encoder(volumes).tokens, published(volumes, blocks), atol=1e-5, rtol=1e-5
    )


def test_medm_clip_gives_a_gradient_to_every_weight():
    # The published code detached the states, so that a tower set to be trained learned nothing.
    encoder = MedMCLIPEncoder(architecture=SIZES)
    tokens = encoder(torch.rand(1, 1, 8, 16, 16)).tokens
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters()
    )


def test_positions_of_the_class_token_are_not_interpolated():
    encoder = MedMCLIPEncoder(architecture=SIZES)
    placed = encoder._positions_for((4, 4, 4))
    assert placed.shape == (1, 65, DIM)
    assert torch.equal(placed[:, 0], encoder.positions[:, 0])
    table = encoder.positions[:, 1:].transpose(1, 2).unflatten(2, GRID)
    expected = F.interpolate(table, size=(4, 4, 4), mode="trilinear").flatten(2).transpose(1, 2)
    assert torch.equal(placed[:, 1:], expected)
