"""Preprocessing of volumes: orientation, spacing, windows, crop, size and scale, in this order."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medm.errors import MediaError
from medm.imaging.constant import Step, check_prepared
from medm.imaging.geometry import Geometry
from medm.imaging.notices import warn_of_file, warn_once
from medm.imaging.options import VolumePreprocess
from medm.imaging.placement import Placement, Prepared
from medm.imaging.volumes import Volume
from medm.limits import MAX_VOXELS, check_memory

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_OBLIQUE_DEGREES = 1.0
_GROWTH = 16
"""Most voxels after straightening, as a multiple of the file's: a rotated cube needs 5."""
_PATIENT_AXIS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
"""Axis of the patient (LPS) and sense of growth by letter."""
_TRAVELLING = tuple(map(np.dtype, ("i1", "u1", "=i2", "=i4", "=f4")))
"""Storage types of voxels that PyTorch knows too."""
_DEFAULT_WINDOWS = {
    "hu": [-1000.0, 1000.0],
    "0-255": [0.0, 255.0],
    "0-1": [0.0, 1.0],
    "minmax": [0.0, 1.0],
}


def prepare_volume(
    preprocess: VolumePreprocess, volume: Volume, *, device: str = "cpu"
) -> Prepared:
    """Return the volume as an encoder takes it, (C, *size) float32, and its placement.

    Args:
        preprocess: the preprocessing.
        volume: as it was read.
        device: where windows, stretching and normalization are computed; the result is in host
            memory.

    Raises:
        MediaError: values that the file proves not to be of the declared scale, an orientation or
            spacing that the file does not have, nothing in the foreground, a result that is too
            large, or one value for every voxel of a file that varies.
    """
    import torch

    shown, placement = _checked(preprocess, volume, device)
    mean = torch.tensor(preprocess.mean, device=device).view(-1, 1, 1, 1)
    std = torch.tensor(preprocess.std, device=device).view(-1, 1, 1, 1)
    return Prepared(((shown - mean) / std).contiguous().cpu().numpy(), placement)


def windowed_volume(preprocess: VolumePreprocess, volume: Volume) -> Prepared:
    """Return what `prepare_volume` does before `mean` and `std`, in 0..1, for display."""
    shown, placement = _checked(preprocess, volume, "cpu")
    return Prepared(shown.numpy(), placement)


def _checked(preprocess: VolumePreprocess, volume: Volume, device: str) -> tuple[Tensor, Placement]:
    """Return the channels before mean and std, after the check that they are not constant."""
    low, high = float(volume.voxels.min()), float(volume.voxels.max())
    _check_scale(preprocess, volume, low, high)
    shown, placement = _shown(preprocess, volume, device)
    check_prepared(
        shown.numpy() if shown.device.type == "cpu" else shown,
        volume.voxels,
        name=volume.name,
        windows=_stored_windows(preprocess, low, high),
        trace=lambda channel: _trace(preprocess, volume, device)[channel],
    )
    if preprocess.channels is not None and len(shown) == 1:
        shown = shown.expand(preprocess.channels, -1, -1, -1)
    return shown, placement


def _shown(
    preprocess: VolumePreprocess,
    volume: Volume,
    device: str,
    ranges: list[list[Step]] | None = None,
) -> tuple[Tensor, Placement]:
    """[windows, *size] in 0..1, before mean and std, and their geometry.

    `ranges` gets the ranges after each step, one list per window.
    """
    import torch

    voxels, placement = _on_grid(preprocess, volume)
    blend = _blend(preprocess, len(voxels))
    used = range(len(voxels)) if blend is None else blend.used
    _check_cost(preprocess, volume, len(used) * voxels[0].size)
    values = _on_device(voxels, used, device)  # [D, H, W]
    common = []
    if ranges is not None:
        common += [
            Step.of("the file", volume.voxels, tolerance=0.0),
            Step.of(
                f"resampling to orientation {preprocess.orientation}, spacing {preprocess.spacing}",
                voxels,
                tolerance=0.0,
            ),
            Step.of(f"size {preprocess.size} (its slices)", values, tolerance=0.0),
        ]
    if preprocess.scale == "minmax":
        values = _stretched(values)
    box = None
    channels = []
    windows = preprocess.windows or [default_window(preprocess.scale)]
    for number, (low, high) in enumerate(windows):
        steps = list(common)
        own = values if number == len(windows) - 1 else values.clone()
        channel = own.sub_(low).div_(high - low).clamp_(0, 1)
        if ranges is not None:
            ranges.append(steps)
            steps.append(Step.of(f"window {low:g}..{high:g}", channel))
        if preprocess.stretch:
            channel = _stretched(channel)
        if preprocess.crop_foreground is not None:
            box = box or _foreground(channel, preprocess.crop_foreground, volume, (low, high))
            channel = channel[box]
            if ranges is not None:
                steps.append(Step.of(f"crop_foreground {preprocess.crop_foreground:g}", channel))
        channel = _sized(preprocess, channel) if blend is None else blend.apply(channel)
        if ranges is not None:
            steps.append(Step.of(f"size {preprocess.size}", channel))
        channels.append(channel)
    if box is not None:
        starts, stops = [side.start for side in box], [side.stop for side in box]
        placement = placement.boxed(starts, np.subtract(stops, starts).tolist())
    return torch.stack(channels), _sized_placement(preprocess, placement)


def _trace(preprocess: VolumePreprocess, volume: Volume, device: str) -> list[list[Step]]:
    """Recompute the ranges after each step, by window, for a message."""
    ranges: list[list[Step]] = []
    _shown(preprocess, volume, device, ranges)
    return ranges


def _stored_windows(preprocess: VolumePreprocess, low: float, high: float) -> list[list[float]]:
    """Return the windows in stored values, for a volume of the range `low` to `high`."""
    windows = preprocess.windows or [default_window(preprocess.scale)]
    if preprocess.scale != "minmax":
        return windows
    return [[low + (high - low) * end for end in window] for window in windows]


def _on_device(voxels: np.ndarray, used: Sequence[int] | np.ndarray, device: str) -> Tensor:
    """Return some slices in float32; stored values go to a GPU unconverted: half the bytes."""
    import torch

    kept = voxels.dtype if device != "cpu" and voxels.dtype in _TRAVELLING else np.float32
    copied = np.empty((len(used), *voxels.shape[1:]), kept)
    for place, number in enumerate(
        used
    ):  # in one step from what is stored: a volume is large for a cache
        copied[place] = voxels[number]
    return torch.from_numpy(copied).to(device).float()


def default_window(scale: str) -> list[float]:
    """Return the values that become 0 and 1 without windows, in the unit of the scale."""
    return _DEFAULT_WINDOWS[scale]


def _on_grid(preprocess: VolumePreprocess, volume: Volume) -> tuple[np.ndarray, Placement]:
    """Voxels along the wanted axes at the wanted spacing, and their placement.

    Axes are exchanged and flipped where that is enough; otherwise the volume is resampled.
    """
    geometry = volume.geometry
    placement = Placement.of_source(volume.voxels.shape, geometry)
    if geometry is None:
        if preprocess.spacing is not None:
            raise MediaError(
                f"{volume.name}: `spacing` is asked for, but the file does not say where its "
                "voxels lie; set `spacing: null`"
            )
        if preprocess.orientation is not None:
            warn_once(
                logger,
                "no direction",
                f"{volume.name}: the file says nothing of its direction; its axes are taken to be "
                f"{preprocess.orientation} already. Set `orientation: null` to say that this is "
                "meant",
            )
        return volume.voxels, placement
    voxels, direction = volume.voxels, geometry.direction
    if preprocess.orientation is not None:
        voxels, geometry, placement = oriented(volume, preprocess.orientation)
        oblique = geometry.tilt > _OBLIQUE_DEGREES and preprocess.oblique == "resample"
        direction = _directions(preprocess.orientation) if oblique else geometry.direction
    if direction is geometry.direction and preprocess.spacing is None:
        return voxels, placement
    box = _Box.of(voxels, geometry)
    spacing = np.asarray(preprocess.spacing or geometry.spacing, dtype=np.float64)
    # A crop to the foreground comes between spacing and size; without it the final grid is known
    # already.
    fixed = preprocess.spacing is not None and preprocess.crop_foreground is None
    size = (preprocess.size if fixed else None) or box.size(direction, spacing)
    limit = MAX_VOXELS if preprocess.spacing is not None else min(MAX_VOXELS, _GROWTH * voxels.size)
    target = Geometry(
        spacing, direction, box.center - direction @ (spacing * (np.asarray(size) - 1) / 2)
    )
    placement = placement.sampled(*geometry.indices_of(target), size)
    if preprocess.interpolation == "area" and preprocess.spacing is not None:
        voxels, geometry = _averaged(voxels, geometry, preprocess.spacing)
    _check_result(size, volume.name, limit=limit)
    _check_cost(preprocess, volume, math.prod(size), copies=2)
    resampled = _resampled(
        voxels, geometry, target, size, nearest=preprocess.interpolation == "nearest"
    )
    return resampled, placement


def oriented(volume: Volume, orientation: str) -> tuple[np.ndarray, Geometry, Placement]:
    """Return a volume with its axes exchanged and flipped, never resampled, along an orientation.

    Args:
        volume: with a direction.
        orientation: as in `VolumePreprocess`; each axis follows the letter that is nearest to it.

    Returns:
        The voxels, their geometry, and their placement in the file.

    Raises:
        MediaError: the file has no direction.
    """
    if volume.geometry is None:
        raise MediaError(f"{volume.name}: the file does not say where its voxels lie")
    order, flips = _axis_changes(volume.geometry, orientation)
    placement = Placement.of_source(volume.voxels.shape, volume.geometry).permuted(order)
    for axis in np.flatnonzero(flips):
        placement = placement.flipped(int(axis))
    return *reoriented(volume.voxels, volume.geometry, orientation), placement


@dataclass(frozen=True, slots=True)
class _Box:
    """The space that a volume fills, to the outer faces of its outer voxels."""

    center: np.ndarray
    """(3,) in LPS."""
    edges: np.ndarray
    """(3, 3): column i is the edge along array axis i, in mm."""

    @classmethod
    def of(cls, voxels: np.ndarray, geometry: Geometry) -> _Box:
        """Return the box of voxels on a grid."""
        lengths = np.asarray(voxels.shape)
        center = geometry.origin + geometry.direction @ (geometry.spacing * (lengths - 1) / 2)
        return cls(center, geometry.direction * (lengths * geometry.spacing))

    def size(self, direction: np.ndarray, spacing: np.ndarray) -> list[int]:
        """Voxels of another grid that hold the whole box."""
        extent = np.abs(direction.T @ self.edges).sum(axis=1)
        return np.maximum(np.round(extent / spacing), 1).astype(int).tolist()


def _directions(orientation: str) -> np.ndarray:
    """(3, 3): column i is the unit vector of the patient (LPS) that letter i names."""
    direction = np.zeros((3, 3))
    for column, letter in enumerate(orientation):
        axis, sign = _PATIENT_AXIS[letter]
        direction[axis, column] = sign
    return direction


def _axis_changes(geometry: Geometry, orientation: str) -> tuple[list[int], list[bool]]:
    """Return the permutation of the axes for an orientation, and the axes reversed after it."""
    nearest = geometry.nearest_axes()
    order, flips = [], []
    for letter in orientation:
        axis, sign = _PATIENT_AXIS[letter]
        column = nearest.index(axis)
        order.append(column)
        flips.append(bool(geometry.direction[axis, column] * sign < 0))
    return order, flips


def reoriented(
    voxels: np.ndarray, geometry: Geometry, orientation: str
) -> tuple[np.ndarray, Geometry]:
    """Exchange and flip axes, without interpolation, so that each follows its letter."""
    order, flips = _axis_changes(geometry, orientation)
    spacing, direction = geometry.spacing[order], geometry.direction[:, order].copy()
    voxels = voxels.transpose(order)
    origin = geometry.origin.copy()
    for column, flip in enumerate(flips):
        if flip:
            origin += direction[:, column] * spacing[column] * (voxels.shape[column] - 1)
            direction[:, column] *= -1
            voxels = np.flip(voxels, column)
    return voxels, Geometry(spacing, direction, origin)


def _averaged(
    voxels: np.ndarray, geometry: Geometry, spacing: Sequence[float]
) -> tuple[np.ndarray, Geometry]:
    """Blocks of whole voxels averaged, as many as fit into the wanted spacing.

    Where the blocks do not divide the volume, its last voxels are repeated to fill the last block:
    none is dropped.
    """
    import torch
    import torch.nn.functional as F

    factors = [
        max(1, min(length, int(wanted / own + 1e-6)))
        for length, own, wanted in zip(voxels.shape, geometry.spacing, spacing, strict=True)
    ]
    values = torch.from_numpy(voxels.astype(np.float32, order="C"))[None, None]
    pads = [
        n
        for length, factor in zip(voxels.shape, factors, strict=True)
        for n in (-length % factor, 0)
    ]
    if any(pads):
        values = F.pad(values, pads[::-1], mode="replicate")
    means = F.avg_pool3d(values, factors)[0, 0].numpy()
    shift = geometry.direction @ (geometry.spacing * (np.asarray(factors) - 1) / 2)
    return means, Geometry(geometry.spacing * factors, geometry.direction, geometry.origin + shift)


def _resampled(
    voxels: np.ndarray,
    geometry: Geometry,
    target: Geometry,
    size: Sequence[int],
    *,
    nearest: bool,
) -> np.ndarray:
    """Resample to another grid; outside of the volume stands the smallest value (air).

    Args:
        voxels: along the axes of `geometry`.
        geometry: of the voxels.
        target: where the voxels of the result lie.
        size: voxels of the result.
        nearest: take the nearest voxel; otherwise linear.
    """
    import SimpleITK

    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing(geometry.spacing[::-1].tolist())
    image.SetDirection(geometry.direction[:, ::-1].ravel().tolist())
    image.SetOrigin(geometry.origin.tolist())
    result = SimpleITK.Resample(
        image,
        [int(length) for length in reversed(size)],
        SimpleITK.Transform(),
        SimpleITK.sitkNearestNeighbor if nearest else SimpleITK.sitkLinear,
        target.origin.tolist(),
        target.spacing[::-1].tolist(),
        target.direction[:, ::-1].ravel().tolist(),
        float(voxels.min()),
        SimpleITK.sitkFloat32,
    )
    return SimpleITK.GetArrayFromImage(result)


def _check_scale(preprocess: VolumePreprocess, volume: Volume, low: float, high: float) -> None:
    """Refuse a scale that the file disproves; warn of one that its values make unlikely."""
    if low == high:
        return  # one value fits any scale; `check_prepared` warns of it
    scale = preprocess.scale
    if scale == "hu" and volume.modality is not None and volume.unit != "HU":
        raise MediaError(
            f"{volume.name}: `scale: hu` is declared, but this DICOM of modality "
            f"{volume.modality} has no RescaleSlope and RescaleIntercept to Hounsfield units; its "
            f"values are {low:g}..{high:g}. Use `scale: minmax` for other modalities"
        )
    unlikely = {
        # A CT holds air or at least fat, something denser than lung, and spans more than a hundred
        # units.
        "hu": low > -100 or high < -900 or high - low < 100,
        "0-255": low < 0 or high > 255 or high <= 1,
        "0-1": low < -0.01 or high > 1.01,
        "minmax": False,
    }[scale]
    if unlikely:
        warn_of_file(
            logger,
            kind="scale",
            file=volume.name,
            message=f"{volume.name}: `scale: {scale}` is declared, but the values are "
            f"{low:g}..{high:g}; is the scale right?",
        )


@dataclass(frozen=True, slots=True)
class _Blend:
    """Stretch trilinearly in two steps: neighboring slices are mixed, then each slice is resized.

    The numbers are those of the stretch in one, but slices that no result needs are never touched.
    """

    used: np.ndarray
    """Slices of the volume that any result reads."""
    below: np.ndarray
    above: np.ndarray
    """By result slice, positions in `used`."""
    weight: np.ndarray
    """By result slice, the weight of `above`."""
    plane: tuple[int, int]
    """Rows and columns of the result."""

    def apply(self, channel: Tensor) -> Tensor:
        """[len(used), H, W] to [len(weight), *plane]."""
        import torch
        import torch.nn.functional as F

        mixed = channel.new_empty(len(self.weight), *channel.shape[1:])
        for place, (below, above, weight) in enumerate(
            zip(self.below, self.above, self.weight, strict=True)
        ):
            torch.lerp(channel[below], channel[above], float(weight), out=mixed[place])
        if tuple(mixed.shape[1:]) == self.plane:
            return mixed
        return F.interpolate(mixed[None], size=self.plane, mode="bilinear")[0]


def _blend(preprocess: VolumePreprocess, depth: int) -> _Blend | None:
    """Return the blend of a volume that shrinks in depth and is only windowed before; else None."""
    whole = (
        preprocess.stretch or preprocess.crop_foreground is not None or preprocess.scale == "minmax"
    )
    if (
        whole
        or preprocess.size is None
        or preprocess.spacing is not None
        or preprocess.interpolation != "trilinear"
    ):
        return None
    wanted, *plane = preprocess.size
    if wanted >= depth:
        return None
    place = ((np.arange(wanted) + 0.5) * (depth / wanted) - 0.5).clip(
        min=0
    )  # as torch: outer faces stay where they are
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, depth - 1)
    used, positions = np.unique(np.concatenate([below, above]), return_inverse=True)
    weight = (place - below).astype(np.float32)
    return _Blend(used, positions[:wanted], positions[wanted:], weight, (plane[0], plane[1]))


def _sized(preprocess: VolumePreprocess, channel: Tensor) -> Tensor:
    if preprocess.size is None:
        return channel
    if preprocess.spacing is None:
        return _resized(channel, preprocess.size, preprocess.interpolation)
    return _centered(channel, preprocess.size)


def _sized_placement(preprocess: VolumePreprocess, placement: Placement) -> Placement:
    """Return the placement after `_sized`."""
    if preprocess.size is None:
        return placement
    if preprocess.spacing is None:
        return placement.resized(preprocess.size)
    starts = [
        _start(length, wanted)
        for length, wanted in zip(placement.shape, preprocess.size, strict=True)
    ]
    return placement.boxed(starts, preprocess.size)


def _resized(values: Tensor, shape: Sequence[int], interpolation: str) -> Tensor:
    """[D, H, W] stretched; the outer faces of the outer voxels stay where they are."""
    import torch.nn.functional as F

    if list(values.shape) == list(shape):
        return values
    mode = {"nearest": "nearest-exact"}.get(interpolation, interpolation)
    return F.interpolate(values[None, None], size=list(shape), mode=mode)[0, 0]


def _centered(channel: Tensor, size: Sequence[int]) -> Tensor:
    """Cropped or padded with 0 (black) on both sides alike."""
    import torch.nn.functional as F

    pads: list[int] = []
    for axis, wanted in enumerate(size):
        start, missing = _start(channel.shape[axis], wanted), wanted - channel.shape[axis]
        if missing < 0:
            channel = channel.narrow(axis, start, wanted)
            pads = [0, 0, *pads]
        else:
            pads = [-start, missing + start, *pads]
    return F.pad(channel, pads)


def _start(length: int, wanted: int) -> int:
    """First index of the middle `wanted` of `length` voxels; negative where they are padded."""
    return (length - wanted) // 2 if length > wanted else -((wanted - length) // 2)


def _stretched(values: Tensor) -> Tensor:
    """Scale between the smallest and the largest value; 0 if equal (`check_prepared` warns).

    In place: a volume is large.
    """
    low, high = values.aminmax()
    values.sub_(low)
    return values if low == high else values.div_(high - low)


def _foreground(
    channel: Tensor, threshold: float, volume: Volume, window: tuple[float, float]
) -> tuple[slice, slice, slice]:
    mask = channel > threshold
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        inside = mask.any(dim=others[1]).any(dim=others[0]).nonzero().flatten()
        if not len(inside):
            raise MediaError(
                f"{volume.name}: no voxel is above `crop_foreground: {threshold:g}` in the first "
                f"window {window[0]:g}..{window[1]:g}; nothing is left of the values "
                f"{volume.voxels.min():g}..{volume.voxels.max():g}. Are the scale and the windows "
                "right?"
            )
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return box[0], box[1], box[2]


def _check_cost(
    preprocess: VolumePreprocess, volume: Volume, count: int, *, copies: int = 0
) -> None:
    """Refuse a small file whose preparation would take much memory.

    Args:
        preprocess: the preprocessing.
        volume: as it was read.
        count: voxels that are windowed, in float32 each; all windows but the last copy them.
        copies: further copies of them.

    Raises:
        MediaError: see `medm.limits.check_memory`.
    """
    if volume.held is None:
        return
    copies += 1 + (len(preprocess.windows or []) > 1) + (preprocess.scale == "minmax")
    needed = volume.voxels.nbytes + 4 * count * copies
    check_memory(needed, held=volume.held, name=volume.name, error=MediaError, what="preparing it")


def _check_result(shape: Sequence[int], name: str, *, limit: int) -> None:
    if math.prod(shape) > limit:
        text = " x ".join(str(length) for length in shape)
        raise MediaError(
            f"{name}: resampling would give {text} voxels, more than the {limit} that are allowed; "
            "is the spacing in the header right?"
        )
