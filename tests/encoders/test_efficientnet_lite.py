"""EfficientNet-Lite against a straight-line computation on published tensor names, and its
published sizes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medm.encoders import EfficientNetLiteOptions
from medm.encoders.efficientnet_lite import EfficientNetLiteEncoder, SameConv2d
from medm.imaging.options import ImagePreprocess

TINY = {"width": 0.1, "depth": 0.3, "stem": 8, "head": 16}

PUBLISHED_FILE = (
    Path(__file__).parents[2] / ".assets/efficientnet-lite0/efficientnet-lite0-57934424.pth"
)

# kernel, stride and expansion of each block of lite0, written out from the paper's table, not taken
# from the code
LITE0_BLOCKS = (
    [(3, 1, 1)]
    + [(3, 2, 6), (3, 1, 6)]
    + [(5, 2, 6), (5, 1, 6)]
    + [(3, 2, 6), (3, 1, 6), (3, 1, 6)]
    + [(5, 1, 6)] * 3
    + [(5, 2, 6)]
    + [(5, 1, 6)] * 3
    + [(3, 1, 6)]
)


def published(encoder):
    """The encoder's tensors under the names of efficientnet_pytorch, with statistics that are not
    the initial ones."""
    names = {
        "stem.conv": "_conv_stem", "stem.norm": "_bn0", "head.conv": "_conv_head", "head.norm": "_bn1",
        "expand.conv": "_expand_conv", "expand.norm": "_bn0", "depthwise.conv": "_depthwise_conv",
        "depthwise.norm": "_bn1", "project.conv": "_project_conv", "project.norm": "_bn2",
    }  # fmt: skip
    state = {}
    for key, value in encoder.state_dict().items():
        for own, theirs in names.items():
            if f".{own}." in f".{key}":
                state[("_" + key if key.startswith("blocks") else key).replace(own, theirs)] = value
                break
    assert len(state) == len(encoder.state_dict())
    return {
        key: torch.rand_like(value) + 0.5
        if key.endswith("running_var")
        else torch.randn_like(value) * 0.2
        if key.endswith(("running_mean", "bias"))
        else value
        for key, value in state.items()
    }


def renamed(state):
    own = {}
    for key, value in state.items():
        pattern, replacement = next(
            pair for pair in EfficientNetLiteEncoder.key_map if re.search(pair[0], key)
        )
        own[re.sub(pattern, replacement, key)] = value
    return own


def straight_line(state, pixels):
    """The maps at the ends of all 7 stages, and the head's, with torch functions alone."""

    def same(x, weight, stride=1, groups=1):
        pads = []
        for n in (x.shape[3], x.shape[2]):
            total = max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)

    def norm(x, name):
        shape = (1, -1, 1, 1)
        mean, var = (
            state[f"{name}.running_mean"].view(shape),
            state[f"{name}.running_var"].view(shape),
        )
        return (x - mean) / (var + 1e-3).sqrt() * state[f"{name}.weight"].view(shape) + state[
            f"{name}.bias"
        ].view(shape)

    def relu6(x):
        return x.clamp(0, 6)

    x = relu6(norm(same(pixels, state["_conv_stem.weight"], 2), "_bn0"))
    maps = []
    for i, (_kernel, stride, expansion) in enumerate(LITE0_BLOCKS):
        name, before = f"_blocks.{i}", x
        if expansion > 1:
            x = relu6(norm(same(x, state[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
        x = relu6(
            norm(
                same(x, state[f"{name}._depthwise_conv.weight"], stride, x.shape[1]), f"{name}._bn1"
            )
        )
        x = norm(same(x, state[f"{name}._project_conv.weight"]), f"{name}._bn2")
        x = x + before if stride == 1 and x.shape == before.shape else x
        maps.append(x)
    ends = [0, 2, 4, 7, 10, 14, 15]
    return [maps[i] for i in ends] + [relu6(norm(same(x, state["_conv_head.weight"]), "_bn1"))]


@pytest.mark.parametrize("size", [(64, 64), (65, 47)])
def test_equals_a_straight_line_computation_on_published_names(size):
    torch.manual_seed(0)
    encoder = EfficientNetLiteEncoder(
        architecture={"width": 0.1, "stem": 8, "head": 16}, stages=[4, 7, 8]
    ).eval()
    state = published(encoder)
    encoder.load_state_dict(renamed(state), strict=True)
    pixels = torch.randn(2, 3, *size)
    maps = straight_line(state, pixels)
    grid = tuple(maps[6].shape[2:])
    expected = (
        torch.cat([F.adaptive_avg_pool2d(maps[i], grid) for i in (3, 6, 7)], dim=1).flatten(2).mT
    )
    features = encoder(pixels)
    assert features.grid == grid == tuple(-(-n // 32) for n in size)
    torch.testing.assert_close(features.tokens, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.pooled, maps[7].mean(dim=(2, 3)), atol=1e-5, rtol=1e-5)


def test_same_padding_puts_the_odd_column_at_the_end():
    conv = SameConv2d(1, 1, 3, stride=2, bias=False)
    torch.nn.init.ones_(conv.weight)
    row = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 1, 4)
    # 4 columns, stride 2: one column of padding, on the right: 1+2+4, 4+8. Torch's padding=1 would
    # give 1+2, 2+4+8.
    assert conv(row).flatten().tolist() == [7.0, 12.0]


@pytest.mark.parametrize(
    ("variant", "millions"),
    [("lite0", 4.652), ("lite1", 5.417), ("lite2", 6.092), ("lite3", 8.197), ("lite4", 13.007)],
)
def test_sizes_of_the_published_variants(variant, millions):
    # The published figures count the classifier of 1000 classes, which is not built here: 1280 *
    # 1000 + 1000.
    with torch.device("meta"):
        encoder = EfficientNetLiteEncoder(architecture={}, variant=variant, stages=[8])
    count = sum(parameter.numel() for parameter in encoder.parameters()) + 1_281_000
    assert count / 1e6 == pytest.approx(millions, abs=0.001)


def test_two_maps_of_lite0_pooled_to_sixteen_tokens():
    with torch.device("meta"):
        encoder = EfficientNetLiteEncoder(architecture={}, stages=[5, 7], pool=4)
        features = encoder(torch.zeros(1, 3, 224, 224))
    assert features.tokens.shape == (1, 16, 112 + 320)
    assert features.grid == (4, 4)


def test_running_statistics_never_change_and_batch_statistics_do():
    pixels = torch.randn(4, 3, 32, 32)
    for statistics, changes in (("running", False), ("batch", True)):
        encoder = EfficientNetLiteEncoder(architecture=TINY, statistics=statistics).train()
        before = encoder.stem.norm.running_mean.clone()
        encoder(pixels)
        assert (not torch.equal(before, encoder.stem.norm.running_mean)) is changes


def test_training_and_evaluation_agree_on_running_statistics():
    encoder, pixels = EfficientNetLiteEncoder(architecture=TINY), torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder.train()(pixels).tokens, encoder.eval()(pixels).tokens)


def test_a_grid_finer_than_the_map_is_refused_with_numbers():
    encoder = EfficientNetLiteEncoder(architecture=TINY, stages=[7], pool=4)
    with pytest.raises(ValueError, match=r"pool 4 .* \(2, 2\) of stage 7 at input \(64, 64\)"):
        encoder.grid((64, 64))


def test_stages_after_the_last_chosen_one_are_not_built():
    encoder = EfficientNetLiteEncoder(architecture=TINY, stages=[2, 3])
    beyond = set(EfficientNetLiteEncoder(architecture=TINY, stages=[8]).state_dict()) - set(
        encoder.state_dict()
    )
    assert beyond
    assert all(any(re.search(pattern, key) for pattern in encoder.truncated_keys) for key in beyond)
    assert encoder(torch.randn(1, 3, 32, 32)).grid == (4, 4)


def test_the_input_is_that_of_the_variant_unless_told():
    def size(**block):
        return EfficientNetLiteOptions.model_validate(
            {"name": "efficientnet-lite", **block}
        ).image_size

    assert (size(), size(variant="lite4"), size(variant="lite4", image_size=128)) == (224, 300, 128)
    described = ImagePreprocess.model_validate(
        EfficientNetLiteEncoder.preprocess_from({}, {}, size(variant="lite3"))
    )
    assert described.size == [280, 280]
    # A value of 127 becomes 0, and 255 becomes 1.
    assert (127 / 255 - described.mean[0]) / described.std[0] == 0
    assert (255 / 255 - described.mean[0]) / described.std[0] == pytest.approx(1.0)


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="stages from 1 to 8, found"):
        EfficientNetLiteEncoder(architecture=TINY, stages=[9])


@pytest.mark.skipif(
    not PUBLISHED_FILE.is_file(), reason="the published ImageNet weights have not been fetched"
)
def test_published_weights_know_a_photograph():
    cbook = pytest.importorskip("matplotlib.cbook", reason="its sample photograph is the picture")
    image_module = pytest.importorskip("PIL.Image")
    state = torch.load(PUBLISHED_FILE, weights_only=True)
    encoder = EfficientNetLiteEncoder(architecture={}, stages=[8]).eval()
    classifier = {key: state.pop(key) for key in ("_fc.weight", "_fc.bias")}
    encoder.load_state_dict(renamed(state), strict=True)

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = (
            image_module.open(file).convert("RGB").crop((0, 0, 512, 512)).resize((224, 224), 3)
        )
    pixels = (torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None].float() - 127) / 128
    with torch.no_grad():
        logits = encoder(pixels).pooled @ classifier["_fc.weight"].T + classifier["_fc.bias"]
    military_uniform = 652
    assert logits.argmax().item() == military_uniform
