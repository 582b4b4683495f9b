"""Contact sheet of an image or volume as the model sees it: windows, crop, and the patient's sides.

For people who check data; not for clinical use, and the sheet says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from medm.imaging import Preprocess
from medm.imaging.images import prepare_image, read_image
from medm.imaging.mask_colors import Color, mask_color
from medm.imaging.mask_files import read_mask
from medm.imaging.options import ImagePreprocess, VolumePreprocess
from medm.imaging.placement import Placement
from medm.imaging.sheet import Line, Tile, draw_sheet, marks_of
from medm.imaging.tiles import num_items, whole_image
from medm.imaging.transforms import default_window, windowed_volume
from medm.imaging.volumes import read_volume
from medm.types import MaskSource

_NOTICE = "As the model sees it. Not for clinical use."


@dataclass(frozen=True, slots=True)
class _Shown:
    """What the model sees of a file."""

    title: list[str]
    tiles: list[Tile]
    placement: Placement


def contact_sheet(
    path: Path,
    preprocess: Preprocess,
    *,
    slices: int = 12,
    tile: int = 192,
    masks: Sequence[Path] = (),
) -> Image.Image:
    """Return an image of what the model sees.

    Args:
        path: the image or volume.
        preprocess: the description that training uses.
        slices: most slices of a volume that are shown, evenly spread over its first axis.
        tile: width of one tile, in pixels.
        masks: mask files of the image or volume, whose outlines are drawn where the prepared grid
            shows them.

    Raises:
        MediaError: as `load_pixels`, and as `medm.imaging.mask_files.read_mask`.
    """
    shown = _tiles(path, preprocess, slices)
    title: list[str | Line] = [*shown.title]
    tiles = shown.tiles
    for number, file in enumerate(masks):
        source = MaskSource(token=0, media=0, field="mask", path=file.name)
        mask = read_mask(source, file.parent, shown.placement)
        title.append(Line(file.name, mask_color(number)))
        planes = shown.placement.to_prepared(mask)
        tiles = [_outlined(one, planes, mask_color(number)) for one in tiles]
    return draw_sheet([*title, _NOTICE], tiles, tile)


def similarity_sheet(
    path: Path,
    preprocess: Preprocess,
    similarity: np.ndarray,
    text: str,
    *,
    slices: int = 12,
    tile: int = 384,
) -> Image.Image:
    """Return an image of what the model sees, with a map of similarities over it.

    Args:
        path: the image or volume.
        preprocess: the description that training uses.
        similarity: a number for each cell of the token grid, (rows, columns) or (depth, rows,
            columns). Blue is the lowest of the map, red the highest.
        text: what the image is compared with.
        slices: most slices of a volume that are shown.
        tile: width of one tile, in pixels.

    Raises:
        MediaError: as `load_pixels`.
    """
    shown = _tiles(path, preprocess, slices)
    return _similarity_sheet(shown.title, shown.tiles, similarity, text, tile)


def similarity_sheet_of_pixels(
    pixels: np.ndarray,
    preprocess: Preprocess,
    similarity: np.ndarray,
    text: str,
    *,
    axes: str | None = None,
    slices: int = 12,
    tile: int = 384,
) -> Image.Image:
    """Return `similarity_sheet` of an image or volume that is prepared already.

    Args:
        pixels: (C, *spatial) of `medm.imaging.load_pixels`, of an image without tiles.
        preprocess: the description that `pixels` are made by.
        similarity: as for `similarity_sheet`.
        text: what the image is compared with.
        axes: direction of the patient along each axis of a volume's file, as "SPL"; None if
            unknown.
        slices: most slices of a volume that are shown.
        tile: width of one tile, in pixels.
    """
    across = (-1,) + (1,) * (pixels.ndim - 1)
    mean = np.asarray(preprocess.mean, dtype=np.float32).reshape(across)
    std = np.asarray(preprocess.std, dtype=np.float32).reshape(across)
    shown = pixels * std + mean
    if isinstance(preprocess, ImagePreprocess):
        tiles = [_image_tile(shown)]
    else:
        axes = None if axes is None else preprocess.orientation or axes
        tiles = _slices(shown, preprocess, axes, slices)
    return _similarity_sheet([], tiles, similarity, text, tile)


def _similarity_sheet(
    title: Sequence[str], tiles: Sequence[Tile], similarity: np.ndarray, text: str, tile: int
) -> Image.Image:
    low, high = float(similarity.min()), float(similarity.max())
    planes = (similarity - low) / max(high - low, 1e-12)
    planes = planes if planes.ndim == 3 else planes[None]
    covered = []
    for one in tiles:
        plane = planes[min(int(one.depth * len(planes)), len(planes) - 1)]
        covered.append(replace(one, pixels=_covered(one.pixels, plane)))
    scale = f"cosine of each patch alone, {low:.3f} (blue) to {high:.3f} (red)"
    return draw_sheet([*title, f"text: {text}", scale, _NOTICE], covered, tile)


def _covered(pixels: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """(H, W, 3) of pixels with colors for a plane of 0..1 over them."""
    height, width = pixels.shape[:2]
    cells = Image.fromarray(plane.astype(np.float32))
    heat = np.asarray(cells.resize((width, height), Image.Resampling.BILINEAR))[..., None]
    gray = pixels if pixels.ndim == 3 else pixels[..., None]
    gray = np.clip(gray, 0, 1).mean(axis=-1, keepdims=True)
    color = np.concatenate(
        [np.clip(2 * heat, 0, 1), 1 - np.abs(2 * heat - 1), np.clip(2 - 2 * heat, 0, 1)], axis=-1
    )
    return 0.6 * gray + 0.4 * color


def _tiles(path: Path, preprocess: Preprocess, slices: int) -> _Shown:
    if isinstance(preprocess, ImagePreprocess):
        return _image_tiles(path, preprocess)
    return _volume_tiles(path, preprocess, slices)


def _outlined(tile: Tile, mask: np.ndarray, color: Color) -> Tile:
    """Return a tile with the outline of a mask (H, W) or (D, H, W) of the prepared grid."""
    plane = mask if mask.ndim == 2 else mask[int(tile.depth * len(mask))]
    padded = np.pad(plane, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels = tile.pixels if tile.pixels.ndim == 3 else np.repeat(tile.pixels[..., None], 3, axis=2)
    edge = (plane & ~inner)[..., None]
    return replace(tile, pixels=np.where(edge, np.asarray(color, np.float32) / 255, pixels))


def save_contact_sheet(
    path: Path,
    preprocess: Preprocess,
    output: Path,
    *,
    slices: int = 12,
    tile: int = 192,
    masks: Sequence[Path] = (),
) -> None:
    """`contact_sheet`, written as PNG without metadata; its folder is made."""
    sheet = contact_sheet(path, preprocess, slices=slices, tile=tile, masks=masks)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output, "PNG")


def _image_tiles(path: Path, preprocess: ImagePreprocess) -> _Shown:
    image = read_image(path)
    shape = image.pixels.shape[:2]
    preprocess, items = whole_image(preprocess, shape), num_items(preprocess, shape)
    prepared = prepare_image(preprocess, image)
    mean = np.asarray(preprocess.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(preprocess.std, dtype=np.float32)[:, None, None]
    height, width = image.pixels.shape[:2]
    window = image.shown_range(preprocess.window)
    depth = f"window {window[0]:g}..{window[1]:g}" if image.is_deep and window else "8 bits"
    if image.voi is not None and preprocess.window is None:
        depth = str(image.voi)
    title = [
        path.name,
        f"{width} x {height}, {depth}, to {preprocess.size[1]} x {preprocess.size[0]} "
        f"({preprocess.fit})" + (f", cut into {items} items" if items > 1 else ""),
    ]
    return _Shown(title, [_image_tile(prepared.pixels * std + mean)], prepared.placement)


def _image_tile(shown: np.ndarray) -> Tile:
    """Return the tile of an image (C, H, W) in 0..1."""
    last = np.moveaxis(shown, 0, -1)
    return Tile(last[..., 0] if last.shape[-1] == 1 else last, "")


def _volume_tiles(path: Path, preprocess: VolumePreprocess, slices: int) -> _Shown:
    volume = read_volume(path, several=preprocess.series)
    prepared = windowed_volume(preprocess, volume)
    shown = prepared.pixels  # [C, D, H, W]
    axes = None
    if volume.geometry is not None:
        axes = preprocess.orientation or volume.geometry.axes
    tiles = _slices(shown, preprocess, axes, slices)
    direction = f"axes {axes}" if axes else "direction unknown, sides not marked"
    sizes = [
        " x ".join(str(length) for length in shape)
        for shape in (volume.voxels.shape, shown.shape[1:])
    ]
    title = [path.name, f"{sizes[0]} voxels ({volume.unit}) to {sizes[1]}, {direction}"]
    return _Shown(title, tiles, prepared.placement)


def _slices(
    shown: np.ndarray, preprocess: VolumePreprocess, axes: str | None, slices: int
) -> list[Tile]:
    """Return tiles of a volume (C, D, H, W) in 0..1, with the patient's sides where known."""
    marks = None if axes is None else marks_of(axes[2], axes[1])
    windows = preprocess.windows or [default_window(preprocess.scale)]
    depth = shown.shape[1]
    # Middles of as many equal parts, so that neither end is over-represented.
    picked = [int((i + 0.5) * depth / min(slices, depth)) for i in range(min(slices, depth))]
    return [
        Tile(shown[channel, z], f"{z + 1}/{depth}  {low:g}..{high:g}", marks, (z + 0.5) / depth)
        for channel, (low, high) in enumerate(windows)
        for z in picked
    ]
