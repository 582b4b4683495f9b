"""Preprocessing as data: the description of one branch, saved in every checkpoint.

The same object serves training, inference and serving. Torch-free; the work is done in
`medm.imaging`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from medm.config import Options
from medm.errors import RecipeError

logger = logging.getLogger(__name__)


# Published preprocessing, for folders without a preprocessor_config.json and for other encoders on
# the same pixels. Not compared with the folders: they are gated.
_IMAGE_CONVENTIONS: dict[str, dict[str, Any]] = {
    # google/medsiglip-448: its model card resizes without regard to the aspect, bilinear, to -1..1.
    "medsiglip-448": {
        "size": [448, 448],
        "fit": "squash",
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    # google/medgemma-4b-it and -27b-it, preprocessor_config.json (Gemma 3), without pan and scan.
    "medgemma-896": {
        "size": [896, 896],
        "fit": "squash",
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    # microsoft/rad-dino, preprocessor_config.json: mean and deviation of its chest radiographs.
    "raddino-518": {
        "size": [518, 518],
        "fit": "crop",
        "interpolation": "bicubic",
        "mean": [0.5307, 0.5307, 0.5307],
        "std": [0.2583, 0.2583, 0.2583],
    },
}


class Tiles(Options):
    """Tiles of an image of any shape, each of the size of the encoder's input (InternVL)."""

    max: int = Field(default=12, ge=1)
    """Most tiles of an image, the thumbnail not counted."""
    min: int = Field(default=1, ge=1)
    """Fewest tiles of an image."""
    thumbnail: bool = True
    """Append the whole image at the size of a tile where there is more than one tile."""

    @model_validator(mode="after")
    def _ordered(self) -> Tiles:
        if self.min > self.max:
            raise ValueError(f"min: expected at most max ({self.max}), found {self.min}")
        return self


class ImagePreprocess(Options):
    """Preprocessing of a 2-D image to a normalized float32 array (C, height, width)."""

    kind: Literal["image"] = "image"
    """2-D."""
    convention: Literal["medsiglip-448", "medgemma-896", "raddino-518"] | None = Field(
        default=None, exclude=True
    )
    """Published preprocessing by name: fills every field that is not written here. A saved model
    holds the fields alone."""
    size: list[int] = Field(default=[224, 224], min_length=2, max_length=2)
    """Height and width of the result, in pixels; of each tile where there are `tiles`."""
    fit: Literal["squash", "crop", "pad"] = "squash"
    """Fit of an image of another shape: `squash` resizes without regard to aspect (SigLIP), `crop`
    resizes by the shorter side and crops the center (CLIP), `pad` resizes by the longer side and
    pads with `mean` (LLaVA)."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Resampling filter, Pillow's by name."""
    channels: Literal[1, 3] = 3
    """1 keeps gray images gray; 3 repeats gray to red, green and blue."""
    mean: list[float] = [0.5, 0.5, 0.5]
    """Subtracted from values in 0..1, one per channel."""
    std: list[float] = [0.5, 0.5, 0.5]
    """Divides after the mean is subtracted."""
    window: list[float] | None = None
    """Lower and upper raw value that become 0 and 1 in images of more than 8 bits, gray or color
    (HU for CT). Without it such an image uses the VOI table or window of its DICOM file, else its
    full declared range."""
    tiles: Tiles | None = None
    """Cut the image into tiles of `size`, as many as its shape asks for: the grid of the closest
    aspect ratio, to which the image is resized. Requires `fit: squash`. Each tile takes the vision
    tokens of an image. None: one image of `size`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_convention(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        named = _IMAGE_CONVENTIONS.get(str(value.get("convention")))
        if named is None:
            return value
        return {**named, **{key: item for key, item in value.items() if key != "convention"}}

    @model_validator(mode="after")
    def _consistent(self) -> ImagePreprocess:
        _positive(self.size, "size")
        _per_channel(self.mean, self.std, self.channels)
        if self.window is not None:
            _rising(self.window, "window")
        if self.tiles is not None and self.fit != "squash":
            raise ValueError(
                f"tiles: the image is resized to the grid of tiles; expected fit 'squash', found "
                f"{self.fit!r}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unset_tiles(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Descriptions, and so the names of cache entries, stay those of an earlier medm, which
        # opens them.
        fields: dict[str, Any] = handler(self)
        if self.tiles is None:
            fields.pop("tiles", None)
        return fields

    @property
    def max_items(self) -> int:
        """Most items of an image: its tiles and the thumbnail; 1 without tiles."""
        if self.tiles is None:
            return 1
        return self.tiles.max + (self.tiles.thumbnail and self.tiles.max > 1)


# Each says all of scale, windows, stretch, crop and interpolation, so that it can take the place of
# another one.
_VOLUME_CONVENTIONS: dict[str, dict[str, Any]] = {
    # M3D-Cap as published: arrays already 0..1, stretched per volume, cropped to what is not
    # background.
    "m3d": {"scale": "0-1", "windows": None, "stretch": True, "crop_foreground": 0.0,
        "size": [32, 256, 256],
            "interpolation": "trilinear"},
    # MedM-VL since September 2025: HU -1000..1000 to 0..1, then as M3D.
    "medm-vl": {
        "scale": "hu", "windows": [[-1000.0, 1000.0]], "stretch": True, "crop_foreground": 0.0,
            "size": [32, 256, 256],
        "interpolation": "trilinear",
    },
    # MedM-CLIP's statistics are given on 0..255; here the same on 0..1.
    "medm-clip": {
        "scale": "hu", "windows": [[-1000.0, 1000.0]], "stretch": False, "crop_foreground": None,
        "size": [32, 256, 256], "interpolation": "trilinear", "mean": [55.698 / 255],
            "std": [66.194 / 255],
    },
    # Astra's for chest CT: HU -1000..200, the foreground box, averaged. Its own arrays are (X, Y,
    # Z) in RAS of 224 x 224 x 160, and its tower turns them to (Z, X, Y); here the slices stand in
    # front from the beginning.
    "astra": {
        "scale": "hu", "windows": [[-1000.0, 200.0]], "stretch": False, "crop_foreground": 0.0,
        "interpolation": "area", "orientation": "SRA", "size": [160, 224, 224],
    },
    # Merlin's for abdominal CT (StanfordMIMI/Merlin, merlin/data/monai_transforms.py): RAS, 1.5 x
    # 1.5 x 3 mm, HU -1000..1000, padded or cropped around the center to 224 x 224 x 160. As with
    # Astra the slices stand in front.
    "merlin": {
        "scale": "hu", "windows": [[-1000.0, 1000.0]], "stretch": False, "crop_foreground": None,
        "interpolation": "trilinear", "orientation": "SRA", "spacing": [3.0, 1.5, 1.5],
        "size": [160, 224, 224],
    },
}  # fmt: skip


class VolumePreprocess(Options):
    """Preprocessing of a 3-D volume to a normalized float32 array (C, *size).

    The order of the work: orientation, spacing, windows, foreground crop, size, mean and std.
    """

    kind: Literal["volume"] = "volume"
    """3-D."""
    convention: Literal["m3d", "medm-vl", "medm-clip", "astra", "merlin"] | None = None
    """Published preprocessing by name: fills every field that is not written here."""
    size: list[int] | None = Field(default=[32, 256, 256], min_length=3, max_length=3)
    """Voxels of the result along each axis. Without `spacing` the volume is stretched to it; with
    `spacing` it is cropped or padded around its center. None keeps the size that `spacing` gives.
    """
    spacing: list[float] | None = Field(default=None, min_length=3, max_length=3)
    """Millimeters between voxels of the result along each axis; None ignores spacing."""
    orientation: str | None = "SPL"
    """Direction in which the index grows along each axis of the result: one letter per axis, of
    R/L, A/P and S/I. "SPL" are axial slices from feet to head as radiologists look at them (front
    up, the patient's left on the right). "LPS" and "RAS" are arrays (x, y, z). None keeps the order
    of the file. Arrays and slice stacks carry no direction and stay as they are."""
    oblique: Literal["resample", "keep"] = "resample"
    """A grid that is turned against the patient by more than a degree: resampled to the axes of
    `orientation`, or kept with its axes only exchanged and flipped."""
    scale: Literal["hu", "0-255", "0-1", "minmax"] = "hu"
    """Meaning of the stored values: Hounsfield units, 0..255, 0..1, or anything, stretched per
    volume between its smallest and largest value. Never guessed; implausible values are reported
    with numbers."""
    windows: list[list[float]] | None = Field(default=None, min_length=1)
    """Lower and upper values that become 0 and 1, one pair per channel, in the unit of `scale`
    (0..1 for "minmax"). Without it: -1000..1000 HU, or the whole of the declared scale. `window:
    [lower, upper]` is a single pair."""
    stretch: bool = False
    """Stretch each windowed channel again to exactly 0..1 (M3D and MedM-VL do)."""
    crop_foreground: float | None = Field(default=None, ge=0, lt=1)
    """Keep the smallest box that holds all voxels whose first channel is above this value in 0..1;
    None keeps all."""
    interpolation: Literal["trilinear", "nearest", "area"] = "trilinear"
    """Resampling: "area" averages the voxels that fall together when a volume shrinks; "trilinear"
    is what the published models use. To a `spacing`, whole voxels are averaged first and the rest
    is linear."""
    channels: Literal[1, 3] | None = None
    """3 repeats a single window for encoders made for color; None has one channel per window."""
    mean: list[float] = [0.0]
    """Subtracted from values in 0..1: one, or one per channel."""
    std: list[float] = [1.0]
    """Divides after the mean is subtracted."""
    series: Literal["only", "largest"] = "only"
    """Selection in a DICOM folder of several series: "only" reports them and stops, "largest" takes
    the one with most slices. A record can name one as "folder#SeriesNumber"."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_convention(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {**_VOLUME_CONVENTIONS.get(str(value.get("convention")), {}), **_plural(value)}

    @field_validator("orientation")
    @classmethod
    def _three_axes(cls, value: str | None) -> str | None:
        pairs = ("RL", "AP", "SI")
        if value is not None and sorted(
            next((i for i, pair in enumerate(pairs) if letter in pair), -1) for letter in value
        ) != [0, 1, 2]:
            raise ValueError(
                "expected three letters, one each of R/L, A/P and S/I (such as SPL), found "
                f"{value!r}"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> VolumePreprocess:
        if self.size is not None:
            _positive(self.size, "size")
        if self.spacing is not None:
            _positive(self.spacing, "spacing")
        for window in self.windows or []:
            _rising(window, "windows")
        count = len(self.windows or [None])
        if self.channels is not None and count not in (1, self.channels):
            raise ValueError(
                f"channels is {self.channels}, but there are {count} windows; give one window or "
                "as many"
            )
        _per_channel(self.mean, self.std, self.num_channels)
        return self

    @property
    def num_channels(self) -> int:
        """Channels of the result."""
        return self.channels or len(self.windows or [None])

    @property
    def max_items(self) -> int:
        """Most items of a volume: always 1; images may be cut into tiles."""
        return 1


class Augment(Options):
    """Random changes of preprocessed pixels, 2-D and 3-D, drawn anew for each access.

    All are off by default.

    Rotation is in the plane of the last two axes. Left and right are kept unless `mirror` is asked
    for.
    """

    rotate: float = Field(default=0.0, ge=0, le=45)
    """Largest angle, in degrees, either way. Beyond 45 the patient's left would no longer be
    nearest to where reports expect it, and beyond 90 it would be on the other side."""
    scale: float = Field(default=0.0, ge=0, lt=1)
    """Largest relative change of size, either way: 0.1 draws from 0.9..1.1."""
    shift: float = Field(default=0.0, ge=0, le=1)
    """Largest shift along each axis as a fraction of its length."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Largest offset as a fraction of the range of the pixels."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Largest relative change of the distance to the mean."""
    gamma: float = Field(default=0.0, ge=0, lt=1)
    """Largest relative change of the exponent, on values scaled to 0..1."""
    mirror: bool = False
    """Flip the last axis half of the time. Reports say left and right: only for tasks without
    sides."""

    @property
    def motions(self) -> list[str]:
        """Names of the options that are set and move pixels."""
        return [name for name in ("rotate", "scale", "shift", "mirror") if getattr(self, name)]

    @model_validator(mode="after")
    def _warn_of_mirroring(self) -> Augment:
        if self.mirror:
            logger.warning(
                "augment.mirror is on: half of the images have left and right exchanged, but "
                "reports and answers that say 'left' and 'right' are not changed with them"
            )
        return self


def changed(described: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a description with some of them replaced.

    A convention among the changes replaces every field it covers but the size, which belongs to the
    encoder; other fields of the earlier convention stay.
    """
    known = _IMAGE_CONVENTIONS
    if described.get("kind") == "volume":
        changes, known = _plural(changes), _VOLUME_CONVENTIONS
    own, other = (known.get(str(given.get("convention")), {}) for given in (described, changes))
    return {
        **own,
        **described,
        **{key: value for key, value in other.items() if key != "size"},
        **changes,
    }


def _plural(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a volume with `window` as the only pair of `windows`, as images have it.

    Raises `RecipeError`.
    """
    fields = dict(fields)
    if "window" not in fields:
        return fields
    window = fields.pop("window")
    if "windows" in fields:
        raise RecipeError("preprocess: window and windows are both given; keep one")
    if isinstance(window, (list, tuple)) and any(
        isinstance(item, (list, tuple)) for item in window
    ):
        raise RecipeError(
            f"preprocess: window: expected [lower, upper], found {window}; several are `windows`"
        )
    return {**fields, "windows": None if window is None else [window]}


def _positive(values: list[int] | list[float], field: str) -> None:
    if not all(value > 0 for value in values):
        raise ValueError(f"{field}: expected numbers above 0, found {values}")


def _rising(window: list[float], field: str) -> None:
    if len(window) != 2 or not all(low < high for low, high in pairwise(window)):
        raise ValueError(f"{field}: expected [lower, upper] with lower < upper, found {window}")


def _per_channel(mean: list[float], std: list[float], channels: int) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(
                f"{name}: expected 1 or {channels} values (one per channel), found {len(values)}"
            )
    _positive(std, "std")
