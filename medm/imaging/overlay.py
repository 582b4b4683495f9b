"""Overlay sheets: an image or slices of a volume with masks in colors, as PNG.

For people who look at results; not for clinical use, and the sheet says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medm.errors import MediaError
from medm.files import atomic_file
from medm.imaging.geometry import Geometry
from medm.imaging.images import prepare_image, read_image
from medm.imaging.mask_colors import Color, mask_color
from medm.imaging.mask_output import NamedMasks, as_mask
from medm.imaging.options import ImagePreprocess
from medm.imaging.placement import Placement
from medm.imaging.sheet import Line, Marks, Tile, draw_sheet, marks_of
from medm.imaging.sources import Source, as_source
from medm.imaging.transforms import reoriented
from medm.imaging.volumes import Volume, read_volume

Style = Literal["both", "fill", "contour"]

_AXES = "SPL"
"""Orientation of the shown planes: the patient's right is on the left of axial and coronal ones."""
_PLANES = ("axial", "coronal", "sagittal")
_NOTICE = "Not for clinical use."
_FILL = 0.3
_NUMBER = 12
"""Height of a mask's number, in pixels."""
_THICK_SLICES = 1.5
"""Ratio of spacings from which slices are shown in the plane that they were acquired in."""
_PHRASE = 60
"""Most characters of a phrase in the legend."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the legend, and its masks in the order of the shown axes."""

    phrase: str
    color: Color
    predicted: np.ndarray | None
    reference: np.ndarray | None

    @property
    def shown(self) -> np.ndarray:
        """Voxels of either mask."""
        masks = [mask for mask in (self.predicted, self.reference) if mask is not None]
        return np.logical_or.reduce(masks)


@dataclass(frozen=True, slots=True)
class _Panel:
    """A plane to be drawn."""

    pixels: np.ndarray
    """(H, W) or (H, W, 3), 0..1."""
    masks: Sequence[tuple[np.ndarray | None, np.ndarray | None]]
    """For each entry the prediction and the reference, (H, W) bool."""
    caption: str
    extent: tuple[float, float]
    """Height and width, in `unit`."""
    unit: Literal["mm", "px"]
    marks: Marks | None = None


def overlay_sheet(
    source: Source,
    masks: NamedMasks,
    placement: Placement,
    *,
    reference: NamedMasks | None = None,
    window: tuple[float, float] | None = None,
    several: Literal["only", "largest"] = "only",
    style: Style = "both",
    tile: int | None = None,
    slices: int = 9,
) -> Image.Image:
    """Return an image with masks, or three planes and the largest slice of each mask of a volume.

    Masks have their color and number in the order of their phrases; those of the reference have
    the color of the same phrase. The sheet depends on nothing but the arguments.

    Args:
        source: the file, or what `medm.imaging.prepare` takes in its place.
        masks: predictions, `source_shape` of the placement; may be empty.
        placement: of the image or volume.
        reference: masks of a reference, drawn beside the predictions; None draws no second tile.
        window: values that become black and white. By default those of an image's file, and of a
            volume the percentiles 1 and 99.
        several: what was done with a DICOM folder of several series when none is named.
        style: outline, area, or both.
        tile: width and height of one tile, in pixels; None takes 512 for an image and 256 for
            a volume.
        slices: most slices of the masks of a volume, beside the three planes.

    Raises:
        MediaError: the source cannot be read or has another size than the placement, or values
            that are no masks.
    """
    source = as_source(source)
    entries = _entries(masks, reference, placement)
    tile = tile or (512 if len(placement.source_shape) == 2 else 256)
    if len(placement.source_shape) == 2:
        title, panels = _image_panels(source, entries, placement, window, tile)
        voxel = None
    else:
        title, panels, voxel = _volume_panels(
            source, entries, placement, window, several=several, slices=slices
        )
    tiles = []
    colors = [entry.color for entry in entries]
    for panel in panels:
        for column, name in enumerate(("predicted", "reference")[: 1 if reference is None else 2]):
            shown = [pair[column] for pair in panel.masks]
            caption = panel.caption if reference is None else f"{panel.caption} {name}".strip()
            pixels = _drawn(panel, shown, colors, tile, style)
            tiles.append(Tile(pixels, caption, panel.marks))
    legend: list[str | Line] = [
        Line(_legend(number, entry, reference is not None, voxel), entry.color)
        for number, entry in enumerate(entries, start=1)
    ]
    columns = None
    if reference is not None:  # pairs stay together
        columns = 2 * max(1, round(math.sqrt(len(tiles) * 1.5) / 2))
    lines = [*title, *(legend or ["no masks"]), _NOTICE]
    return draw_sheet(lines, tiles, tile, columns=columns)


def save_overlay_sheet(
    path: str | Path, source: Source, masks: NamedMasks, placement: Placement,
    *, reference: NamedMasks | None = None, window: tuple[float, float] | None = None,
    several: Literal["only", "largest"] = "only",
) -> None:  # fmt: skip
    """`overlay_sheet`, written as PNG without metadata, atomically.

    Raises:
        MediaError: as `overlay_sheet`.
        OSError: the file cannot be written.
    """
    sheet = overlay_sheet(
        source, masks, placement, reference=reference, window=window, several=several
    )
    with atomic_file(Path(path)) as temporary:
        sheet.save(temporary, "PNG")


def _entries(masks: NamedMasks, reference: NamedMasks | None, placement: Placement) -> list[_Entry]:
    """Return an entry for each phrase of both; the second "nodule" of one is that of the other."""
    pairs: dict[tuple[str, int], list[np.ndarray | None]] = {}
    for column, named in enumerate((masks, reference or [])):
        seen: Counter[str] = Counter()
        for phrase, mask in named:
            pair = pairs.setdefault((phrase, seen[phrase]), [None, None])
            pair[column] = as_mask(mask, placement, name=f"overlay: mask of {phrase!r}")
            seen[phrase] += 1
    return [
        _Entry(phrase, mask_color(index), predicted, wanted)
        for index, ((phrase, _), (predicted, wanted)) in enumerate(pairs.items())
    ]


def _legend(number: int, entry: _Entry, compared: bool, voxel: float | None) -> str:
    phrase = " ".join(entry.phrase.split())
    phrase = phrase if len(phrase) <= _PHRASE else phrase[: _PHRASE - 3] + "..."
    sizes = [_size(entry.predicted, voxel)]
    if compared:
        sizes = [f"predicted {sizes[0]}", f"reference {_size(entry.reference, voxel)}"]
    return f"{number}  {phrase}: {', '.join(sizes)}"


def _size(mask: np.ndarray | None, voxel: float | None) -> str:
    """Size of a mask; `voxel` is the volume of a voxel in mm^3."""
    if mask is None:
        return "no mask"
    count = int(mask.sum())
    if mask.ndim == 2:
        return f"{count} pixels"
    return f"{count} voxels" + ("" if voxel is None else f" ({count * voxel / 1000:.3g} ml)")


def _image_panels(
    source: Source,
    entries: Sequence[_Entry],
    placement: Placement,
    window: tuple[float, float] | None,
    tile: int,
) -> tuple[list[str], list[_Panel]]:
    image = read_image(source)
    height, width = image.pixels.shape[:2]
    _check_shape((height, width), placement, image.name)
    size = _fitted((height, width), tile)
    preprocess = ImagePreprocess(
        size=list(size), fit="squash", channels=3, mean=[0.0] * 3, std=[1.0] * 3,
        window=None if window is None else list(window),
    )  # fmt: skip
    pixels = np.moveaxis(prepare_image(preprocess, image).pixels, 0, -1)
    masks = [(entry.predicted, entry.reference) for entry in entries]
    title = [Path(image.name).name, f"{width} x {height} pixels"]
    return title, [_Panel(pixels, masks, "", (height, width), "px")]


def _volume_panels(
    source: Source,
    entries: Sequence[_Entry],
    placement: Placement,
    window: tuple[float, float] | None,
    *,
    several: Literal["only", "largest"],
    slices: int,
) -> tuple[list[str], list[_Panel], float | None]:
    """Return title, panels and volume of a voxel in mm^3."""
    if not isinstance(source, (str, Path, np.ndarray)):
        raise MediaError(
            f"volume: expected a path or an array (D, H, W), found {type(source).__name__}"
        )
    volume = read_volume(source, several=several)
    _check_shape(volume.voxels.shape, placement, volume.name)
    shown = _Shown.of(volume, entries)
    low, high = window or tuple(np.percentile(volume.voxels, (1, 99)))
    chosen = _chosen(shown, slices)
    panels = [shown.panel(axis, index, low, high) for axis, index in chosen]
    title = [
        Path(volume.name).name,
        f"{' x '.join(map(str, volume.voxels.shape))} voxels ({volume.unit}), window "
        f"{low:g}..{high:g}" + ("" if volume.geometry else ", direction unknown, sides not marked"),
    ]
    left_out = len(_chosen(shown, len(entries))) - len(chosen)
    if left_out:
        title.append(f"{left_out} further slices with the largest area of a mask are not shown")
    voxel = None if volume.geometry is None else float(np.prod(volume.geometry.spacing))
    return title, panels, voxel


@dataclass(frozen=True, slots=True)
class _Shown:
    """A volume and its masks along the axes of the sheet."""

    voxels: np.ndarray
    masks: list[tuple[np.ndarray | None, np.ndarray | None]]
    areas: list[np.ndarray]
    """Of each entry (D, H, W) bool: voxels of either mask."""
    geometry: Geometry | None
    file_geometry: Geometry | None
    """Of the shown grid and of the file's; None without a direction."""

    @classmethod
    def of(cls, volume: Volume, entries: Sequence[_Entry]) -> _Shown:
        """Turn a volume and its masks to the axes S, P, L; without a direction they stay."""
        own = volume.geometry
        if own is None:
            pairs = [(entry.predicted, entry.reference) for entry in entries]
            return cls(volume.voxels, pairs, [entry.shown for entry in entries], None, None)

        def turn(mask: np.ndarray | None) -> np.ndarray | None:
            return None if mask is None else reoriented(mask, own, _AXES)[0]

        voxels, geometry = reoriented(volume.voxels, own, _AXES)
        return cls(
            voxels,
            [(turn(entry.predicted), turn(entry.reference)) for entry in entries],
            [reoriented(entry.shown, own, _AXES)[0] for entry in entries],
            geometry,
            own,
        )

    @property
    def slice_axis(self) -> int:
        """Axis across the slices of the scan where they are thick; otherwise the first."""
        if self.geometry is None:
            return 0
        axis = int(self.geometry.spacing.argmax())
        thick = self.geometry.spacing[axis] > _THICK_SLICES * self.geometry.spacing.min()
        return axis if thick else 0

    def panel(self, axis: int, index: int, low: float, high: float) -> _Panel:
        """Return one plane; the head is at the top of coronal and sagittal ones."""
        down, across = [other for other in range(3) if other != axis]
        flip = self.geometry is not None and axis > 0

        def plane(array: np.ndarray) -> np.ndarray:
            taken = array.take(index, axis)
            return taken[::-1] if flip else taken

        values = np.clip((plane(self.voxels) - low) / max(high - low, 1e-6), 0, 1)
        extent: tuple[float, float] = values.shape
        marks: Marks | None = None
        unit: Literal["mm", "px"] = "px"
        name, number = f"axis {axis},", index
        if self.geometry is not None and self.file_geometry is not None:
            spacing = self.geometry.spacing
            extent = (values.shape[0] * spacing[down], values.shape[1] * spacing[across])
            marks, unit = marks_of(_AXES[across], "I" if flip else _AXES[down]), "mm"
            name, number = _PLANES[axis], self._file_index(axis, index)
        pairs = [
            (None if one is None else plane(one), None if other is None else plane(other))
            for one, other in self.masks
        ]
        caption = f"{name} slice {number + 1}/{self.voxels.shape[axis]}"
        return _Panel(values, pairs, caption, extent, unit, marks)

    def _file_index(self, axis: int, index: int) -> int:
        """Return the number of a shown slice along its axis in the file."""
        assert self.geometry is not None and self.file_geometry is not None
        matrix, offset = self.file_geometry.indices_of(self.geometry)
        own = int(np.abs(matrix[:, axis]).argmax())
        return round(matrix[own, axis] * index + offset[own])


def _chosen(shown: _Shown, slices: int) -> list[tuple[int, int]]:
    """Return (axis, index): three planes with the largest area of all masks, then one a mask."""
    union = np.logical_or.reduce(shown.areas) if shown.areas else np.zeros_like(shown.voxels, bool)
    planes = [(axis, _largest(union, axis)) for axis in range(3)]
    axis = shown.slice_axis
    extra: list[tuple[int, int]] = []
    for area in shown.areas:
        place = (axis, _largest(area, axis))
        if area.any() and place not in (*planes, *extra):
            extra.append(place)
    return [*planes, *extra[:slices]]


def _largest(mask: np.ndarray, axis: int) -> int:
    """Return the plane with the most voxels, the first of equal ones; the middle without any."""
    others = tuple(other for other in range(3) if other != axis)
    counts = mask.sum(axis=others)
    return int(counts.argmax()) if counts.any() else mask.shape[axis] // 2


def _check_shape(shape: tuple[int, ...], placement: Placement, name: str) -> None:
    if shape != placement.source_shape:
        found, expected = (" x ".join(map(str, sides)) for sides in (shape, placement.source_shape))
        raise MediaError(
            f"{name}: {found} for masks of {expected}; expected the image or volume that the masks "
            "were drawn on"
        )


def _fitted(extent: tuple[float, float], tile: int) -> tuple[int, int]:
    """Return rows and columns of a panel of some extent inside a tile."""
    scale = tile / max(extent)
    height, width = (max(1, round(length * scale)) for length in extent)
    return height, width


def _drawn(
    panel: _Panel,
    masks: Sequence[np.ndarray | None],
    colors: Sequence[Color],
    tile: int,
    style: Style,
) -> np.ndarray:
    """(tile, tile, 3), 0..1: a panel in the middle, with masks, their numbers and a scale."""
    height, width = _fitted(panel.extent, tile)
    unit = panel.extent[1] / width
    shades = Image.fromarray(np.round(panel.pixels * 255).astype(np.uint8)).convert("RGB")
    canvas = np.array(shades.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    numbers = []
    for index, (mask, color) in enumerate(zip(masks, colors, strict=True)):
        if mask is None or not mask.any():
            continue
        area = _scaled(mask, (height, width))
        if style != "contour":
            canvas[area] = (1 - _FILL) * canvas[area] + _FILL * np.asarray(color, np.float32)
        if style != "fill":
            canvas[area & ~_eroded(area, max(1, tile // 192))] = color
        numbers.append((index, *np.argwhere(area)[0]))
    whole = Image.new("RGB", (tile, tile))
    top, left = (tile - height) // 2, (tile - width) // 2
    whole.paste(Image.fromarray(np.round(canvas).astype(np.uint8)), (left, top))
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(size=_NUMBER)
    for index, row, column in numbers:
        draw.text(
            (left + int(column), max(top + int(row) - 2, _NUMBER)), str(index + 1),
            fill=(255, 255, 255), font=font, anchor="ls", stroke_width=2, stroke_fill=(0, 0, 0),
        )  # fmt: skip
    length = _round_length(width * unit / 3)
    bar, base = round(length / unit), tile - 6
    draw.line((6, base, 6 + bar, base), fill=(255, 255, 255), width=2)
    draw.text(
        (6, base - 3), f"{length:g} {panel.unit}", fill=(255, 255, 255), font=font, anchor="ls",
        stroke_width=2, stroke_fill=(0, 0, 0),
    )  # fmt: skip
    return np.asarray(whole, np.float32) / 255


def _scaled(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a mask on another grid; a pixel that shows any voxel of it belongs to it."""
    covered = Image.fromarray(mask.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX)
    found: np.ndarray = np.asarray(covered) > 1e-6
    return found


def _eroded(mask: np.ndarray, steps: int) -> np.ndarray:
    """Return pixels whose four neighbors belong to the mask too, `steps` times."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _round_length(most: float) -> float:
    """Return the largest of 1, 2, 5, 10, 20, ... that is at most `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return max(step * power for step in (1, 2, 5) if step * power <= most * (1 + 1e-9))
