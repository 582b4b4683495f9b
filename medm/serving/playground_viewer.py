"""What the viewer of a page shows: an image or volume, and the masks of a reply over it.

The page gets a description as JSON and files by random names; static/viewer.js draws them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medm.imaging.label_maps import write_label_map
from medm.imaging.mask_colors import mask_color
from medm.imaging.nifti import write_nifti
from medm.imaging.options import ImagePreprocess
from medm.imaging.placement import Placement
from medm.inference.segmenter import Grounded, MaskPrediction
from medm.serving.decoding import Decoders
from medm.serving.files import StoredFile
from medm.serving.playground_session import Session, ViewerFiles
from medm.types import JsonObject

FILES = "medm/files"
"""Path of the files that a page shows, below the page."""
_WINDOW_SAMPLE = 2**20
"""Most voxels of the percentiles that the first window is taken from."""


def viewer(view: JsonObject | None, name: str) -> str:
    """Return the element of a viewer.

    Args:
        view: what it shows; None for nothing.
        name: of the viewer on the page.
    """
    text = html.escape(json.dumps(view), quote=True)
    return f'<div class="medm-viewer" data-name="{html.escape(name)}" data-view="{text}"></div>'


class Views:
    """Descriptions of what viewers show.

    Args:
        decoders: read uploads.
        files: where files for pages are written.
    """

    def __init__(self, decoders: Decoders, files: ViewerFiles) -> None:
        self.decoders, self.files = decoders, files

    def of_file(self, session: Session, file: StoredFile) -> JsonObject:
        """Return the description of an image or volume without masks.

        Raises:
            ServingError: the file cannot be read.
        """
        return self._image(session, file) if file.kind == "image" else self._volume(session, file)

    def of_masks(
        self, session: Session, files: Sequence[StoredFile], grounded: Grounded
    ) -> JsonObject | None:
        """Return the description of the file that masks are of, with them; None without masks.

        Args:
            session: of the page.
            files: uploads of the conversation.
            grounded: the reply.

        Raises:
            ServingError: the file cannot be read.
        """
        if not grounded.masks:
            return None
        last = grounded.masks[-1]
        masks = [one for one in grounded.masks if (one.kind, one.media) == (last.kind, last.media)]
        file = [one for one in files if one.kind == last.kind][last.media]
        view = self.of_file(session, file)
        view["findings"] = [_finding(mask, number) for number, mask in enumerate(masks)]
        if file.kind == "image":
            for mask, finding in zip(masks, view["findings"], strict=True):
                with session.writing(self.files.new(".png")) as path:
                    _colored(mask.mask, finding["color"]).save(path, "PNG")
                finding["url"] = _url(path)
        else:
            labels = np.zeros(last.placement.source_shape, np.uint16)
            for label, mask in enumerate(masks, start=1):
                labels[mask.mask] = label
            with session.writing(self.files.new(".nii.gz")) as path:
                write_label_map(path, labels, last.placement)
            view["labels"] = _url(path)
        return view

    def _image(self, session: Session, file: StoredFile) -> JsonObject:
        height, width = file.form.shape
        if file.id not in session.viewed:
            as_is = ImagePreprocess(size=[height, width], mean=[0.0] * 3, std=[1.0] * 3)
            pixels = self.decoders.pixels(file.path, as_is)
            path = self.files.new(".png")
            shades = np.round(np.moveaxis(pixels, 0, -1).clip(0, 1) * 255).astype(np.uint8)
            Image.fromarray(shades).save(path, "PNG")
            session.viewed[file.id] = path
        url = _url(session.viewed[file.id])
        return {"kind": "image", "url": url, "width": width, "height": height, "findings": []}

    def _volume(self, session: Session, file: StoredFile) -> JsonObject:
        if file.id not in session.viewed:
            volume = self.decoders.volume(file.path)
            path = self.files.new(".nii.gz")
            write_nifti(path, volume.voxels, volume.geometry)
            session.viewed[file.id] = path
            step = -(-volume.voxels.size // _WINDOW_SAMPLE)
            sample = volume.voxels.reshape(-1)[::step]
            low, high = (float(value) for value in np.percentile(sample, (1, 99)))
            session.windows[file.id] = (low, max(high, low + 1e-3))
        return {
            "kind": "volume",
            "url": _url(session.viewed[file.id]),
            "window": list(session.windows[file.id]),
            "unit": file.form.unit,
            "oriented": file.form.axes is not None,
            "findings": [],
        }


def describe(files: Sequence[StoredFile]) -> str:
    """Return a line about uploads: "image 1 (20 x 24)"."""
    numbers: dict[str, int] = {}
    parts = []
    for file in files:
        numbers[file.kind] = numbers.get(file.kind, 0) + 1
        size = " x ".join(str(side) for side in file.form.shape)
        parts.append(f"{file.kind} {numbers[file.kind]} ({size})")
    return ", ".join(parts)


def _url(path: Path) -> str:
    return f"{FILES}/{path.name}"


def _finding(mask: MaskPrediction, number: int) -> JsonObject:
    return {
        "phrase": mask.phrase.text or "(no words)",
        "color": list(mask_color(number)),
        "size": _size(mask),
        "center": _center(mask.mask, mask.placement),
    }


def _size(mask: MaskPrediction) -> str:
    """Return the size of a mask, for people."""
    if mask.absent:
        return f"not in the image (presence {mask.presence:.2f})"
    if not mask.voxels:
        return "empty mask"
    if mask.mask.ndim == 2:
        return f"{mask.voxels} pixels"
    grid = mask.placement.geometry
    if grid is None:
        return f"{mask.voxels} voxels"
    volume = mask.voxels * float(np.prod(grid.spacing)) / 1000
    digits = ".0f" if volume >= 100 else ".3g"
    return f"{mask.voxels} voxels, {volume:{digits}} ml"


def _center(mask: np.ndarray, placement: Placement) -> list[float] | None:
    """Return a voxel of a mask, nearest to its center, in mm (RAS); None for images."""
    if mask.ndim != 3 or not mask.any():
        return None
    inside = np.argwhere(mask)
    nearest = inside[np.square(inside - inside.mean(axis=0)).sum(axis=1).argmin()]
    grid = placement.geometry
    if grid is None:  # as viewers place a file without orientation
        return [float(value) for value in nearest[::-1]]
    left, back, head = grid.steps @ nearest + grid.origin
    return [-float(left), -float(back), float(head)]


def _colored(mask: np.ndarray, color: Sequence[int]) -> Image.Image:
    """Return a mask (H, W) as an image of one color, transparent outside."""
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[mask] = (*color, 255)
    return Image.fromarray(pixels)
