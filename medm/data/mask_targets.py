"""Masks of a record on the grid that a mask head is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from medm.data.base import MaskView
from medm.errors import DataError
from medm.imaging.mask_files import read_mask
from medm.imaging.placement import Placement
from medm.types import BaseSample, MaskSource, MaskTargets, parse_view


def masked_media(sample: BaseSample, view: MaskView) -> list[int]:
    """Return the files that the view of a mask head reads, by position in `sample.media`.

    They are those of the head's kind that masks belong to.
    """
    kind = parse_view(view.name).kind
    media = {mask.media for mask in sample.masks}
    return [number for number in sorted(media) if sample.media[number].branch == kind]


def read_targets(
    sample: BaseSample, root: Path, placements: Mapping[int, Placement], view: MaskView
) -> MaskTargets:
    """Return the masks of a record on the target grid.

    Args:
        sample: the record.
        root: folder that the paths of masks are relative to.
        placements: of the prepared pixels of the view, by position in `sample.media`.
        view: of the mask head.

    Raises:
        DataError: with the field of the mask: a mask of another kind of file than the head reads,
            or one that cannot be read.
    """

    def read(mask: MaskSource) -> np.ndarray:
        placement = placements[mask.media]
        return _on_grid(read_mask(mask, root, placement), placement, view.grid)

    return _targets(sample, view, read)


def blank_targets(sample: BaseSample, view: MaskView) -> MaskTargets:
    """Return empty masks in place of the record's, for a check. Raises `DataError` likewise."""
    blank = np.broadcast_to(np.uint8(0), view.grid)
    return _targets(sample, view, lambda mask: blank)


def _targets(
    sample: BaseSample, view: MaskView, read: Callable[[MaskSource], np.ndarray]
) -> MaskTargets:
    items = {number: item for item, number in enumerate(masked_media(sample, view))}
    targets = MaskTargets()
    for mask in sample.masks:
        if mask.media not in items:
            kind = sample.media[mask.media].branch
            raise DataError(
                f"a mask of a {kind}, and the model's mask head reads {parse_view(view.name).kind}s"
                "; leave the record out, or set model.masks.view",
                field=mask.field,
            )
        targets.arrays.append(read(mask))
        targets.tokens.append(mask.token)
        targets.items.append(items[mask.media])
    return targets


def _on_grid(mask: np.ndarray, placement: Placement, grid: tuple[int, ...]) -> np.ndarray:
    """Return a mask of the file's grid on the target grid, uint8 of 0 and 1.

    Each cell takes the nearest voxel. A structure so small that no cell does keeps the cells that
    its voxels lie in: an empty mask would teach that it is not there.
    """
    placed = placement.resized(grid)
    target = placed.to_prepared(mask)
    if not target.any() and mask.any():
        cells = np.floor(placed.points_to_prepared(np.argwhere(mask)) + 0.5).astype(np.int64)
        cells = cells[((cells >= 0) & (cells < grid)).all(axis=1)]
        target[tuple(cells.T)] = True
    return target.astype(np.uint8)
