"""Head of features: a mask is where the features of a voxel agree with the prompt.

Features are those of a network of MONAI, or those of a vision encoder, made finer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import ClassVar, Final, Literal, NamedTuple, Protocol, cast

import torch
from monai.networks.layers.factories import Conv
from monai.networks.nets import SegResNet, SwinUNETR, UNet
from pydantic import Field
from torch import Tensor, nn

from medm.config import Options, validate
from medm.errors import RecipeError
from medm.heads import FeatureNetwork
from medm.heads.base import Maps, MaskHead, MaskLogits, Points
from medm.heads.similarity import ItemGroups, expected_iou
from medm.types import Config, Kind, VisionFeatures

_AXES: Final[dict[Kind, int]] = {"image": 2, "volume": 3}


class HeadSizes(Options):
    """Sizes of the head, whatever its features come from."""

    axes: Literal[2, 3] = 2
    """2 for images, 3 for volumes; set by the kind of file."""
    dim: int = Field(default=64, ge=1)
    """Width of a prompt."""
    features: int = Field(default=32, ge=1)
    """Width of the features."""


class EncoderSizes(HeadSizes):
    """Sizes of the head of a vision encoder."""

    upsample: int | list[int] = 4
    """Cells of the mask per patch along an axis: one power of 2, or one for each axis."""


class Sizes(HeadSizes):
    """Sizes of the head, whatever its network."""

    in_channels: int = Field(default=1, ge=1)
    """Channels of the pixels."""
    stride: int | list[int] = 1
    """Voxels of the input per voxel of the mask: one number, or one for each axis."""

    def network(self) -> Config:
        """Return the sizes of the network alone, by MONAI's names."""
        return {k: v for k, v in self.model_dump().items() if k not in Sizes.model_fields}

    @property
    def divisor(self) -> int:
        """Factor by which the network shrinks its input on the way down."""
        raise NotImplementedError(f"{type(self).__name__} belongs to no network")


class UNetSizes(Sizes):
    """MONAI's UNet with residual units."""

    channels: list[int] = Field(default=[16, 32, 64, 128], min_length=2)
    """Width of each level."""
    strides: list[int] = [2, 2, 2]
    """Stride between two levels."""
    num_res_units: int = Field(default=1, ge=0)
    """Convolutions of a residual unit."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after each convolution."""

    @property
    def divisor(self) -> int:
        return prod(self.strides)


class SegResNetSizes(Sizes):
    """MONAI's SegResNet."""

    init_filters: int = Field(default=16, ge=8, multiple_of=8)
    """Width of the first level; group norm has 8 groups."""
    blocks_down: list[int] = Field(default=[1, 2, 2, 4], min_length=2)
    """Residual blocks of each level on the way down."""
    blocks_up: list[int] = [1, 1, 1]
    """Residual blocks of each level on the way up."""

    @property
    def divisor(self) -> int:
        return 2 ** int(len(self.blocks_down) - 1)


class SwinUNETRSizes(Sizes):
    """MONAI's SwinUNETR."""

    feature_size: int = Field(default=24, ge=12, multiple_of=12)
    """Width of the first level."""
    depths: list[int] = Field(default=[2, 2, 2, 2], min_length=4, max_length=4)
    """Transformer blocks of each level."""
    num_heads: list[int] = Field(default=[3, 6, 12, 24], min_length=4, max_length=4)
    """Attention heads of each level."""
    window_size: int = Field(default=7, ge=2)
    """Side of an attention window."""

    @property
    def divisor(self) -> int:
        return 32


class _Network(NamedTuple):
    """A network that gives features at the resolution of its input."""

    network: Callable[..., nn.Module]
    sizes: type[Sizes]
    fixed: Config
    """Arguments that no recipe changes: normalization within an item, so that a batch does not
    change a mask."""


_NETWORKS: Final[dict[FeatureNetwork, _Network]] = {
    "unet": _Network(UNet, UNetSizes, {"norm": ("instance", {"affine": True})}),
    "segresnet": _Network(SegResNet, SegResNetSizes, {"norm": ("group", {"num_groups": 8})}),
    "swin-unetr": _Network(
        SwinUNETR, SwinUNETRSizes, {"norm_name": ("instance", {"affine": True})}
    ),
}


class PatchEncoder(Protocol):
    """A vision encoder, as this head needs it (`medm.encoders.base.VisionEncoder`)."""

    axes: ClassVar[int]
    dim: int
    channels: tuple[int, ...]
    patch_dropout: float

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Return the token grid of an input of this size."""
        ...


class DotProductHead(MaskHead):
    """Features, and their dot product with the prompt; 2-D and 3-D.

    The logit of a voxel is <W prompt + w, features> / sqrt(width of the features) plus a bias that
    is linear in the prompt. Every voxel of the input has features, or with `stride` every block of
    voxels, so that small lesions are not lost to a coarse mask. There are no published weights: the
    head learns from scratch.

    With `encoder` the features are the patches of a vision encoder, whose tokens without a position
    (class token, registers) are left out. The decoder doubles their grid by transposed convolutions
    that do not overlap (as those of SAM's mask decoder, arXiv 2304.02643), until a patch has
    `upsample` cells of the mask along an axis.

    `presence` is learned: a small network reads the prompt and the features of the mask's most
    likely voxels (`presence` of the objective is the weight of its loss). `quality` is computed,
    not learned: the IoU to expect if the sigmoids are right (`medm.heads.similarity.expected_iou`).

    Args:
        architecture: see `Sizes` and those of the network (`UNetSizes`, `SegResNetSizes`,
            `SwinUNETRSizes`); with `encoder` see `EncoderSizes`.
        network: see `DotProductOptions`.
        encoder: see `DotProductOptions`; constructed by the composition.

    Raises:
        RecipeError: unknown sizes, or sizes that disagree.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"image", "volume"})

    def __init__(
        self,
        *,
        architecture: Mapping[str, object],
        network: FeatureNetwork = "unet",
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if encoder is not None:
            self._use_encoder(encoder, architecture)
        else:
            self._use_network(network, architecture)

    def _use_encoder(self, encoder: nn.Module, architecture: Mapping[str, object]) -> None:
        sizes = validate(EncoderSizes, architecture, source="dot-product (encoder) architecture")
        patches = cast(PatchEncoder, encoder)
        name = type(encoder).__name__
        if patches.axes != sizes.axes:
            raise RecipeError(
                f"dot-product: encoder: {name} reads inputs of {patches.axes} axes, and the view "
                f"has {sizes.axes}; choose another encoder or view"
            )
        if patches.patch_dropout:
            raise RecipeError(
                f"dot-product: encoder: patch_dropout {patches.patch_dropout} leaves out patches, "
                "and masks need all of them; set patch_dropout: 0"
            )
        self.axes, self.dim, self.channels = sizes.axes, sizes.dim, patches.channels
        factors = _per_axis(sizes.upsample, sizes.axes, name="upsample")
        if any(factor & (factor - 1) for factor in factors):
            raise RecipeError(
                f"dot-product: architecture.upsample: expected powers of 2, found "
                f"{sizes.upsample!r}"
            )
        self.upsample: tuple[int, ...] | None = factors
        self.encoder = encoder
        self.decoder: DotProductDecoder = UpsamplingDecoder(
            sizes.dim, patches.dim, sizes.features, factors
        )

    def _use_network(self, network: FeatureNetwork, architecture: Mapping[str, object]) -> None:
        chosen = _NETWORKS[network]
        sizes = validate(chosen.sizes, architecture, source=f"dot-product ({network}) architecture")
        self.upsample = None
        self.axes, self.dim = sizes.axes, sizes.dim
        self.channels = (sizes.in_channels,)
        self.stride = _per_axis(sizes.stride, sizes.axes, name="stride")
        self._divisor = sizes.divisor
        channels = sizes.in_channels
        layers: list[nn.Module] = []
        if max(self.stride) > 1:
            convolution = Conv[Conv.CONV, self.axes]
            layers.append(convolution(channels, sizes.features, self.stride, stride=self.stride))
            channels = sizes.features
        layers.append(
            _built(
                chosen.network,
                spatial_dims=self.axes,
                in_channels=channels,
                out_channels=sizes.features,
                **sizes.network(),
                **chosen.fixed,
            )
        )
        self.encoder = nn.Sequential(*layers)
        self.decoder = DotProductDecoder(sizes.dim, sizes.features)

    @classmethod
    def architecture_for(cls, kind: Kind, architecture: Mapping[str, object]) -> Config:
        """Set the axes by the kind of file. Raises `RecipeError` where they disagree."""
        axes = architecture.get("axes", _AXES[kind])
        if axes != _AXES[kind]:
            raise RecipeError(
                f"dot-product: architecture.axes: a file of kind {kind} has {_AXES[kind]} axes, "
                f"found {axes!r}; leave it out"
            )
        return {**architecture, "axes": axes}

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | list[int] | None = None,
    ) -> Config:
        """Images of 256 x 256; volumes of 32 x 128 x 128, of -1000 to 1000 HU as 0 to 1."""
        axes = architecture.get("axes", 2)
        channels = architecture.get("in_channels", 1)
        if isinstance(image_size, int):
            image_size = [image_size] * (3 if axes == 3 else 2)
        if axes == 3:
            # Other numbers of channels are those of several windows, which the recipe gives.
            color: Config = {"channels": 3} if channels == 3 else {}
            return {"size": image_size or [32, 128, 128], **color}
        return {
            "size": image_size or [256, 256],
            "interpolation": "bilinear",
            "channels": channels,
            "mean": [0.5],
            "std": [0.5],
        }

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """One voxel for each block of `stride` voxels, or `upsample` of them for each patch."""
        if len(spatial) != self.axes:
            raise ValueError(
                f"dot-product: expected a size of {self.axes} axes, found {list(spatial)}"
            )
        if self.upsample is not None:
            return self._grid_of_patches(spatial, self.upsample)
        divisors = [step * self._divisor for step in self.stride]
        if any(size % divisor for size, divisor in zip(spatial, divisors, strict=True)):
            raise ValueError(
                f"dot-product: expected multiples of {divisors}, found {list(spatial)}; change the "
                "size, or the levels of the network in architecture"
            )
        if list(spatial) == divisors:
            raise ValueError(
                f"dot-product: the network shrinks {list(spatial)} to a single voxel, which cannot "
                "be normalized; take a larger size, or fewer levels in architecture"
            )
        return tuple(size // step for size, step in zip(spatial, self.stride, strict=True))

    def _grid_of_patches(
        self, spatial: tuple[int, ...], factors: tuple[int, ...]
    ) -> tuple[int, ...]:
        patches = cast(PatchEncoder, self.encoder).grid(spatial)
        if not prod(patches):
            raise ValueError(
                "dot-product: the encoder gives no patches, of which masks are made; set its "
                "tokens: patch"
            )
        if any(size % count for size, count in zip(spatial, patches, strict=True)):
            raise ValueError(
                f"dot-product: expected a size that the encoder's patches cover exactly, found "
                f"{list(spatial)} and {list(patches)} patches"
            )
        return tuple(count * factor for count, factor in zip(patches, factors, strict=True))

    def encode(self, pixels: Tensor) -> Maps:
        """Return the features, (N, features, *grid), or those of the patches."""
        self.grid(tuple(pixels.shape[2:]))
        if self.upsample is None:
            return (self.encoder(pixels),)
        seen: VisionFeatures = self.encoder(pixels)
        patches = seen.tokens[:, seen.prefix :].transpose(1, 2)  # (N, width, patches)
        return (patches.unflatten(2, seen.grid),)

    def decode(
        self, maps: Maps, prompts: Tensor, items: Tensor, points: Points | None = None
    ) -> MaskLogits:
        if points is not None:
            raise ValueError("dot-product: takes no points beside the prompt, found some")
        decoded: MaskLogits = self.decoder(maps[0], prompts, items)
        return decoded


class DotProductDecoder(nn.Module):
    """Prompts and features to masks.

    Args:
        dim: width of a prompt.
        width: width of the features.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(dim, width)
        self.bias = nn.Linear(dim, 1)
        self.presence = nn.Sequential(nn.Linear(dim + width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor, prompts: Tensor, items: Tensor) -> MaskLogits:
        """(N, width, *grid) and (M, dim) to M masks; see `MaskHead.decode`."""
        kernels = self.kernel(prompts) * features.shape[1] ** -0.5  # (M, width)
        bias = self.bias(prompts).reshape(-1, *[1] * (features.dim() - 2))
        groups = ItemGroups(items, len(features))
        logits = groups.similarity(features, kernels) + bias  # (M, *grid)
        seen = groups.attended(features, logits)  # (M, width)
        presence = self.presence(torch.cat([prompts, seen], dim=1)).squeeze(1)
        return MaskLogits(logits, expected_iou(logits), presence)


class UpsamplingDecoder(DotProductDecoder):
    """Prompts and the patches of an encoder to masks.

    Args:
        dim: width of a prompt.
        patch_dim: width of a patch.
        width: width of the features.
        factors: cells of the mask per patch, for each axis; powers of 2.
    """

    def __init__(self, dim: int, patch_dim: int, width: int, factors: tuple[int, ...]) -> None:
        super().__init__(dim, width)
        convolution = Conv[Conv.CONV, len(factors)]
        transposed = Conv[Conv.CONVTRANS, len(factors)]
        layers: list[nn.Module] = [convolution(patch_dim, width, 1)]
        while max(factors) > 1:
            steps = tuple(min(factor, 2) for factor in factors)
            factors = tuple(factor // step for factor, step in zip(factors, steps, strict=True))
            layers += [
                transposed(width, width, steps, stride=steps),
                nn.GroupNorm(1, width),  # within an item, so that a batch does not change a mask
                nn.GELU(),
                convolution(width, width, 3, padding=1),
            ]
        self.upsampler = nn.Sequential(*layers)

    def forward(self, features: Tensor, prompts: Tensor, items: Tensor) -> MaskLogits:
        """(N, patch_dim, *patches) and (M, dim) to M masks; see `MaskHead.decode`."""
        return super().forward(self.upsampler(features), prompts, items)


def _per_axis(stride: int | list[int], axes: int, *, name: str) -> tuple[int, ...]:
    """Return the value of each axis. Raises `RecipeError`."""
    steps = [stride] * axes if isinstance(stride, int) else stride
    if len(steps) != axes or min(steps) < 1:
        raise RecipeError(
            f"dot-product: architecture.{name}: expected a number of at least 1, or {axes} of "
            f"them, found {stride!r}"
        )
    return tuple(steps)


def _built(network: Callable[..., nn.Module], **arguments: object) -> nn.Module:
    """Construct a network of MONAI. Raises `RecipeError` for sizes that disagree."""
    try:
        return network(**arguments)
    except (ValueError, TypeError, IndexError) as error:
        name = getattr(network, "__name__", str(network))
        raise RecipeError(
            f"dot-product: architecture: MONAI's {name} refuses the sizes {arguments}: {error}"
        ) from None
