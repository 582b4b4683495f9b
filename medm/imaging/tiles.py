"""Dynamic tiling of images, as InternVL 1.5 and later do it (arXiv 2404.16821, section 3.3).

An image of any shape becomes a grid of tiles, each of the size of the encoder's input, and a
thumbnail of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medm.imaging.decoded_image import DecodedImage
from medm.imaging.images import prepare_image
from medm.imaging.options import ImagePreprocess, Tiles
from medm.imaging.placement import Prepared


def tile_grid(size: Sequence[int], tiles: Tiles, tile: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of the tiles of an image.

    Of all grids of `tiles.min` to `tiles.max` tiles it is the one whose columns / rows is closest
    to width / height of the image. Of several the larger one is taken, unless it has twice the
    pixels of the image or more. The grids are compared in tiles: whether a tile is square changes
    nothing.

    Args:
        size: height and width of the image in pixels.
        tiles: limits.
        tile: height and width of a tile in pixels.
    """
    height, width = size
    wanted, area = width / height, width * height
    grids = [
        (rows, columns)
        for columns in range(1, tiles.max + 1)
        for rows in range(1, tiles.max // columns + 1)
        if rows * columns >= tiles.min
    ]
    best, distance = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        found = abs(wanted - columns / rows)
        large = area > 0.5 * tile[0] * tile[1] * rows * columns
        if found < distance or (found == distance and large):
            best, distance = (rows, columns), found
    return best


def num_items(preprocess: ImagePreprocess, size: Sequence[int]) -> int:
    """Return the items of an image: its tiles and the thumbnail; 1 without tiles.

    Args:
        preprocess: the preprocessing.
        size: height and width of the upright image, as `medm.imaging.images.check_image` gives it.
    """
    tiles = preprocess.tiles
    if tiles is None:
        return 1
    rows, columns = tile_grid(size, tiles, preprocess.size)
    return rows * columns + (tiles.thumbnail and rows * columns > 1)


def whole_image(preprocess: ImagePreprocess, size: Sequence[int]) -> ImagePreprocess:
    """Return the preprocessing of the image that is cut: itself without tiles.

    Args:
        preprocess: the preprocessing.
        size: height and width of the image in pixels.
    """
    if preprocess.tiles is None:
        return preprocess
    rows, columns = tile_grid(size, preprocess.tiles, preprocess.size)
    height, width = preprocess.size
    return preprocess.model_copy(update={"tiles": None, "size": [height * rows, width * columns]})


def prepare_tiles(preprocess: ImagePreprocess, image: DecodedImage) -> Prepared:
    """Return the tiles of an image, (T, C, height, width) float32, row by row; the thumbnail last.

    The placement is that of the resized whole. Raises as `medm.imaging.images.prepare_image`.
    """
    tiles = preprocess.tiles
    assert tiles is not None
    height, width = preprocess.size
    rows, columns = tile_grid(image.pixels.shape[:2], tiles, preprocess.size)
    whole = prepare_image(whole_image(preprocess, image.pixels.shape[:2]), image)
    cut = whole.pixels.reshape(-1, rows, height, columns, width)  # [C, rows, H, columns, W]
    items = cut.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1, height, width)
    if tiles.thumbnail and len(items) > 1:
        thumbnail = preprocess.model_copy(update={"tiles": None})
        items = np.concatenate([items, prepare_image(thumbnail, image).pixels[None]])
    return Prepared(np.ascontiguousarray(items), whole.placement)
