"""I3D-ResNet: published names, a straight-line computation, and the published CT weights on real
chests."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from medm.encoders.i3d_resnet import I3DResNetEncoder
from medm.imaging.options import VolumePreprocess
from tests.encoders.published import load_published

ASSETS = Path(__file__).parents[2] / ".assets"
TINY = {"layers": [1, 2, 1, 1], "width": 4}


def published_state(encoder):
    """The encoder's tensors under the published names, with statistics that are not the initial
    ones."""
    state = {}
    for key, value in encoder.state_dict().items():
        name = key.replace("stages.", "layer")
        if key.endswith("running_var"):
            value = torch.rand_like(value) + 0.5
        elif key.endswith(("running_mean", "bias")):
            value = torch.randn_like(value) * 0.2
        state[name] = value
    return state


def straight_line(state, volume):
    def norm(x, name):
        shape = (1, -1, 1, 1, 1)
        mean, var = (
            state[f"{name}.running_mean"].view(shape),
            state[f"{name}.running_var"].view(shape),
        )
        return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"].view(shape) + state[
            f"{name}.bias"
        ].view(shape)

    x = torch.cat([volume] * 3, dim=1)
    x = norm(F.conv3d(x, state["conv1.weight"], stride=(1, 2, 2), padding=(1, 3, 3)), "bn1").clamp(
        min=0
    )
    x = F.max_pool3d(x, 3, 2, 1)
    for name, stride in (
        ("layer1.0", 1),
        ("layer2.0", 2),
        ("layer2.1", 1),
        ("layer3.0", 2),
        ("layer4.0", 2),
    ):
        y = norm(F.conv3d(x, state[f"{name}.conv1.weight"]), f"{name}.bn1").clamp(min=0)
        y = norm(
            F.conv3d(y, state[f"{name}.conv2.weight"], stride=stride, padding=1), f"{name}.bn2"
        ).clamp(min=0)
        y = norm(F.conv3d(y, state[f"{name}.conv3.weight"]), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in state:
            x = norm(
                F.conv3d(x, state[f"{name}.downsample.0.weight"], stride=stride),
                f"{name}.downsample.1",
            )
        x = (x + y).clamp(min=0)
    return x


@pytest.mark.parametrize(
    "prefix", ["", "encode_image.i3_resnet.", "visual_encoder.model.encode_image.i3_resnet."]
)  # Astra's shards, Merlin's file, Astra's file
def test_equals_a_straight_line_computation_on_published_names(prefix):
    torch.manual_seed(0)
    encoder = I3DResNetEncoder(architecture=TINY)
    state = published_state(encoder)
    load_published(encoder, {prefix + name: value for name, value in state.items()})
    volume = torch.rand(2, 1, 20, 40, 33)
    expected = straight_line(state, volume)
    features = encoder(volume)
    assert features.grid == tuple(expected.shape[2:]) == (2, 2, 2)
    torch.testing.assert_close(features.tokens, expected.flatten(2).mT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.pooled, expected.mean(dim=(2, 3, 4)), atol=1e-5, rtol=1e-5)


def test_names_shapes_and_size_of_the_published_tower():
    with torch.device("meta"):
        encoder = I3DResNetEncoder(architecture={})
    state = encoder.state_dict()
    assert len(state) == 930
    assert state["conv1.weight"].shape == (64, 3, 3, 7, 7)
    assert state["stages.3.35.conv2.weight"].shape == (256, 256, 3, 3, 3)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 117_366_208
    assert encoder.grid((160, 224, 224)) == (10, 7, 7)
    assert VolumePreprocess.model_validate(encoder.preprocess_from({}, {})).size == [160, 224, 224]


def test_statistics_are_kept_in_training():
    encoder = I3DResNetEncoder(architecture=TINY).train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder(torch.rand(2, 1, 16, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())


@pytest.mark.skipif(
    not (ASSETS / "astra/astra_encoder.pt").is_file()
    or not (ASSETS / "pyradiomics/lung1_image.nrrd").is_file(),
    reason="the published CT weights and the sample volumes have not been fetched",
)
def test_published_weights_see_that_two_chests_are_alike():
    from medm.imaging import load_pixels
    from medm.models.published.weights import PretrainedSource

    encoder = I3DResNetEncoder(architecture={}).eval()
    report = load_published(
        encoder, PretrainedSource(str(ASSETS / "astra/astra_encoder.pt")).tensors()
    )
    assert len(report.loaded) == 930
    assert report.ignored == []
    described = VolumePreprocess.model_validate(encoder.preprocess_from({}, {}, [80, 112, 112]))
    magnetic = VolumePreprocess(scale="minmax", orientation="SRA", size=described.size)
    pooled = {}
    for name in ("lung1", "lung2", "brain1"):
        pixels = load_pixels(
            ASSETS / f"pyradiomics/{name}_image.nrrd", magnetic if name == "brain1" else described
        )
        with torch.no_grad():
            pooled[name] = encoder(torch.from_numpy(pixels)[None]).pooled[0]

    def alike(first, second):
        return torch.cosine_similarity(pooled[first], pooled[second], dim=0).item()

    # Measured: 0.95 between the chests, 0.84 between chest and head.
    assert alike("lung1", "lung2") > 0.9
    assert alike("lung1", "lung2") > max(alike("lung1", "brain1"), alike("lung2", "brain1")) + 0.05
