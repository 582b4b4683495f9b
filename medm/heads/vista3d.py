"""VISTA3D of MONAI with a prompt in place of its class embedding (arXiv 2406.05285)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.networks.nets.segresnet_ds import SegResNetDS
from monai.networks.nets.vista3d import ClassMappingClassify
from pydantic import Field
from torch import Tensor, nn

from medm.config import Options, validate
from medm.errors import CheckpointError, RecipeError
from medm.heads.base import Maps, MaskHead, MaskLogits, Points
from medm.heads.similarity import ItemGroups, expected_iou
from medm.types import Config, Kind

_PATCH = [128, 128, 128]


class VISTA3DSizes(Options):
    """Sizes of the published model."""

    width: int = Field(default=48, ge=2)
    """Width of a prompt and of the features at full resolution."""
    in_channels: int = Field(default=1, ge=1)
    """Channels of the pixels."""
    blocks_down: list[int] = Field(default=[1, 2, 2, 4, 4], min_length=2)
    """Residual blocks of each level of the encoder; each but the last halves the volume."""


class VISTA3DHead(MaskHead):
    """Encoder and automatic branch of VISTA3D; a prompt replaces a row of its class table.

    The encoder is a SegResNet with features at full resolution. The decoder maps them by two
    residual blocks, the prompt by a small network, and a mask is their dot product. The point
    branch and the class table are not part of it.

    Outside of training a volume that is larger than `patch` is read in windows, as published: the
    maps hold the features of every window, and the logits of a mask are blended with Gaussian
    weights. A volume that is smaller along an axis has windows of its own size there.

    `presence` is the largest logit of a mask, since the published weights have no score of their
    own: a target is present where a voxel is. `quality` is computed
    (`medm.heads.similarity.expected_iou`).

    Args:
        architecture: see `VISTA3DSizes`.
        patch: see `VISTA3DOptions`.
        overlap: see `VISTA3DOptions`.

    Raises:
        RecipeError: unknown sizes, or a patch that the encoder cannot halve.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"volume"})
    decoder: PromptedClassHead
    key_map: ClassVar = (
        (r"^image_encoder\.up_layers_auto\.", "encoder.up_layers."),
        (r"^image_encoder\.encoder\.", "encoder.encoder."),
        (r"^class_head\.mlp\.", "decoder.mlp."),
        (r"^class_head\.image_post_mapping\.", "decoder.image_post_mapping."),
    )
    ignored_keys: ClassVar = (
        r"^point_head\.",
        r"^image_encoder\.up_layers\.",  # of the point branch
        r"^class_head\.class_embeddings\.",
    )

    def __init__(
        self,
        *,
        architecture: Mapping[str, object],
        patch: Sequence[int] | None = (128, 128, 128),
        overlap: float = 0.25,
    ) -> None:
        super().__init__()
        sizes = validate(VISTA3DSizes, architecture, source="vista3d architecture")
        self.dim, self.channels = sizes.width, (sizes.in_channels,)
        self._divisor = 2 ** (len(sizes.blocks_down) - 1)
        self.patch = tuple(patch) if patch is not None else None
        self.overlap = overlap
        if self.patch is not None:
            try:
                self.grid(self.patch)
            except ValueError as error:
                raise RecipeError(f"patch: {error}") from None
        self.encoder = SegResNetDS(
            in_channels=sizes.in_channels,
            init_filters=sizes.width,
            out_channels=sizes.width,
            blocks_down=tuple(sizes.blocks_down),
            norm="instance",
            dsdepth=1,
        )
        self.decoder = PromptedClassHead(sizes.width)

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Nothing: MONAI publishes `model.pt` alone, of the default sizes."""
        return {}

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | list[int] | None = None,
    ) -> Config:
        """Return those of MONAI's bundle: RAS, 1.5 mm, HU between two quantiles of its data."""
        size = [image_size] * 3 if isinstance(image_size, int) else image_size
        return {
            "size": size or _PATCH,
            "orientation": "RAS",
            "spacing": [1.5, 1.5, 1.5],
            "scale": "hu",
            "windows": [[-963.8247715525971, 1053.678477684517]],
        }

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """The grid of the input."""
        if len(spatial) != 3:
            raise ValueError(f"vista3d: expected a size of 3 axes, found {list(spatial)}")
        if any(size % self._divisor for size in spatial):
            raise ValueError(
                f"vista3d: expected multiples of {self._divisor} along each axis, found "
                f"{list(spatial)}"
            )
        if all(size == self._divisor for size in spatial):
            raise ValueError(
                f"vista3d: the encoder shrinks {list(spatial)} to a single voxel, which cannot be "
                "normalized; take a larger size"
            )
        return spatial

    def encode(self, pixels: Tensor) -> Maps:
        """Return the features of each window, (N, windows, width, *window), and the grid.

        The grid is the shape of a tensor without elements, (N, 0, *grid).
        """
        spatial = self.grid(tuple(pixels.shape[2:]))
        windows = [self.encoder(pixels[:, :, *window]) for window in self._windows(spatial)]
        return torch.stack(windows, dim=1), pixels.new_empty(len(pixels), 0, *spatial)

    def decode(
        self, maps: Maps, prompts: Tensor, items: Tensor, points: Points | None = None
    ) -> MaskLogits:
        if points is not None:
            raise ValueError("vista3d: takes no points beside the prompt, found some")
        features, spatial = maps[0], tuple(maps[1].shape[2:])
        kernels = self.decoder.kernels(prompts)
        groups = ItemGroups(items, len(features))
        parts = [
            groups.similarity(self.decoder.features(window), kernels)
            for window in features.unbind(dim=1)
        ]
        logits = parts[0] if len(parts) == 1 else self._blended(parts, spatial)
        return MaskLogits(logits, expected_iou(logits), logits.flatten(1).amax(dim=1))

    def _windows(self, spatial: tuple[int, ...]) -> list[tuple[slice, ...]]:
        """Return the windows in which a volume of this size is read."""
        if self.training or self.patch is None:
            return [tuple(slice(0, size) for size in spatial)]
        patch = [min(pair) for pair in zip(self.patch, spatial, strict=True)]
        steps = [
            side if side == size else max(1, int(side * (1 - self.overlap)))
            for side, size in zip(patch, spatial, strict=True)
        ]
        windows: list[tuple[slice, ...]] = dense_patch_slices(spatial, patch, steps)
        return windows

    def _blended(self, parts: Sequence[Tensor], spatial: tuple[int, ...]) -> Tensor:
        """Return the weighted mean of the logits of all windows, (M, *grid)."""
        first = parts[0]
        weight = compute_importance_map(
            tuple(first.shape[1:]), mode="gaussian", sigma_scale=0.125, device=first.device
        )
        total = torch.zeros(len(first), *spatial, device=first.device)
        weights = torch.zeros(spatial, device=first.device)
        for part, window in zip(parts, self._windows(spatial), strict=True):
            total[:, *window] += weight * part
            weights[window] += weight
        return (total / weights).to(first.dtype)

    def rename_published(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Refuse files of another model. Raises `CheckpointError`."""
        own = any(name.startswith("decoder.image_post_mapping.") for name in tensors)
        if not own and not any(name.startswith("class_head.") for name in tensors):
            raise CheckpointError(
                "vista3d: expected MONAI's VISTA3D (tensors image_encoder.*, class_head.*), found "
                f"{', '.join(sorted(tensors)[:3])}; name the model.pt of its bundle as path"
            )
        return tensors


class PromptedClassHead(nn.Module):
    """Class head of VISTA3D without its table.

    Args:
        width: of a prompt and of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        head = ClassMappingClassify(n_classes=1, feature_size=width, use_mlp=True)
        self.mlp, self.image_post_mapping = head.mlp, head.image_post_mapping

    def kernels(self, prompts: Tensor) -> Tensor:
        """(M, width) to (M, width)."""
        # The norm of the network is over the width of one prompt, which is its only channel.
        kernels: Tensor = self.mlp(prompts.unsqueeze(1))
        return kernels.squeeze(1)

    def features(self, maps: Tensor) -> Tensor:
        """(N, width, *grid) to the same shape."""
        features: Tensor = self.image_post_mapping(maps)
        return features
