"""Masks of replies as files beside the output of inference, and what their lines say of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from medm.errors import DataError, DeviceError
from medm.files import atomic_file
from medm.imaging import Preprocess, VolumePreprocess, rle
from medm.imaging.dicom_seg import write_dicom_seg
from medm.imaging.mask_output import write_mask
from medm.imaging.overlay import save_overlay_sheet
from medm.imaging.sources import as_source
from medm.inference.generator import PromptBatch, Reply
from medm.inference.options import InferOptions, MaskFormat
from medm.inference.segmenter import Answered, Grounded, MaskPrediction, Segmenter, Shown
from medm.types import JsonObject, Kind

_NAME = 60
"""Most characters of a record's name in a file name."""


@dataclass(frozen=True, slots=True)
class MaskCounts:
    """Masks of the replies of a run."""

    masks: int = 0
    """`[SEG]` with a mask, empty ones included."""
    empty: int = 0
    """Masks without a voxel."""
    absent: int = 0
    """Of those: masks emptied because the predicted presence is below the threshold."""
    without_image: int = 0
    """`[SEG]` of replies to a prompt without an image that they could be of."""
    unmasked: int = 0
    """Marked phrases (`<p> ... </p>`) that no `[SEG]` follows."""
    without: int = 0
    """Replies without any `[SEG]`."""

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, object]]) -> MaskCounts:
        """Count the masks of output lines; lines without `spans` are not counted."""
        counts = dict.fromkeys(
            ("masks", "empty", "absent", "without_image", "unmasked", "without"), 0
        )
        for line in lines:
            spans = line.get("spans")
            if not isinstance(spans, list):
                continue
            counts["without"] += not spans
            unmasked = line.get("unmasked", 0)
            counts["unmasked"] += unmasked if isinstance(unmasked, int) else 0
            for span in spans:
                voxels = span.get("voxels")
                counts["without_image"] += voxels is None
                counts["masks"] += voxels is not None
                counts["empty"] += voxels == 0
                counts["absent"] += bool(span.get("absent"))
        return cls(**counts)

    @property
    def notes(self) -> list[str]:
        """What a summary says of them."""
        said = [
            (self.empty, f"{self.empty} of {self.masks} masks are empty, {self.absent} of them "
                "because the target is predicted to be absent"),
            (self.without, f"{self.without} replies have no mask"),
            (self.unmasked, f"{self.unmasked} marked phrases have no mask"),
            (self.without_image, f"{self.without_image} masks have no image to be of"),
        ]  # fmt: skip
        return [f"{self.masks} masks", *(text for count, text in said if count)]


@dataclass(frozen=True, slots=True)
class GroundedReply:
    """Reply of the model with its masks, as written."""

    reply: Reply
    grounded: Grounded
    spans: Sequence[JsonObject]
    further: JsonObject
    """Fields of the line about all masks together: their overlay sheet."""

    def line(self) -> JsonObject:
        """Return what an output file says of it.

        `reply` holds the words alone; `raw` also the marks, where there are some.
        """
        text = self.grounded.text
        line = {**self.reply.line(), "reply": text.text, "spans": list(self.spans)}
        if text.raw != text.text:
            line["raw"] = text.raw
        if text.unmasked:
            line["unmasked"] = text.unmasked
        return line | self.further


class MaskWriter:
    """Writes the masks of replies.

    Args:
        folder: of the mask files.
        beside: folder of the file that names them, which their paths are relative to.
        format: of the files: `auto` is PNG for images and NIfTI for volumes, `npy` holds
            probabilities, `rle` writes none.
        rle: also write run-length codes into the spans.
        overlays: also write an overlay sheet for each image of a reply.
        several: what a folder of several DICOM series stands for.

    Raises:
        DeviceError: DICOM SEG without highdicom.
    """

    def __init__(
        self,
        folder: Path,
        *,
        beside: Path,
        format: MaskFormat = "auto",
        rle: bool = False,
        overlays: bool = False,
        several: Literal["only", "largest"] = "only",
    ) -> None:
        require_format(format)
        self.folder, self.beside, self.format = folder, beside, format
        self.rle, self.overlays = rle or format == "rle", overlays
        self.several = several

    @classmethod
    def of(
        cls, options: InferOptions, *, several: Literal["only", "largest"] = "only"
    ) -> MaskWriter:
        """Return the writer of a run of batch inference."""
        return cls(
            options.masks_folder,
            beside=Path(options.output).parent,
            format=options.mask_format,
            rle=options.rle,
            overlays=options.overlays,
            several=several,
        )

    @property
    def soft(self) -> bool:
        """Probabilities are written."""
        return self.format == "npy"

    def write(
        self, name: str, reply: Reply, grounded: Grounded, media: Sequence[Shown]
    ) -> GroundedReply:
        """Write the masks of one reply, and return what its line says. See `spans_of`.

        Args:
            name: of the record, by which files are named.
            reply: as it was generated.
            grounded: its masks.
            media: images and volumes of the prompt.
        """
        further: JsonObject = {}
        return GroundedReply(
            reply, grounded, self.spans_of(name, grounded, media, further), further
        )

    def spans_of(
        self,
        name: str,
        grounded: Grounded,
        media: Sequence[Shown],
        further: JsonObject | None = None,
    ) -> list[JsonObject]:
        """Write the masks of one reply, and return its spans; files of the same name are replaced.

        Args:
            name: by which files are named.
            grounded: the masks.
            media: images and volumes of the prompt.
            further: gets the name of the overlay sheet.

        Raises:
            DataError: the format does not go with the image or volume.
            OSError: a file cannot be written.
        """
        stem = file_stem(name)
        pairs = [(mask, _span(mask.token, grounded, mask)) for mask in grounded.masks]
        files = sorted({(mask.kind, mask.media) for mask in grounded.masks})
        sheets: list[str] = []
        for kind, number in files:
            own = [pair for pair in pairs if (pair[0].kind, pair[0].media) == (kind, number)]
            source = [one for one in media if one.kind == kind][number].source
            part = f"{stem}_{number}" if len(files) > 1 else stem
            masks = [mask for mask, _ in own]
            self._write_files(part, kind, source, masks, [span for _, span in own])
            if self.overlays:
                sheet = self._path(f"{part}_overlay.png")
                named = [(mask.phrase.text, mask.mask) for mask in masks]
                save_overlay_sheet(
                    sheet, as_source(source), named, masks[0].placement, several=self.several
                )
                sheets.append(self._named(sheet))
        if sheets and further is not None:
            further["overlay"] = sheets[0] if len(sheets) == 1 else sheets
        if pairs:
            return [span for _, span in pairs]
        return [_span(token, grounded, None) for token in range(len(grounded.text.phrases))]

    def _write_files(
        self,
        stem: str,
        kind: Kind,
        source: object,
        masks: Sequence[MaskPrediction],
        spans: Sequence[JsonObject],
    ) -> None:
        """Write the masks of one image or volume, and name the files in the spans."""
        if self.rle:
            for mask, span in zip(masks, spans, strict=True):
                span["rle"] = rle.encode(mask.mask)
        if self.format == "rle":
            return
        if self.format == "dicom-seg":
            if not isinstance(source, (str, Path)):
                raise DataError("masks in DICOM SEG lie on a DICOM series; expected its path")
            path = self._path(f"{stem}.dcm")
            named = [(mask.phrase.text, mask.mask) for mask in masks]
            write_dicom_seg(path, named, source, masks[0].placement, several=self.several)
            for segment, span in enumerate(spans, start=1):
                span |= {"mask": self._named(path), "segment": segment}
            return
        if self.format != ("png" if kind == "image" else "nifti") and self.format not in (
            "auto",
            "npy",
        ):
            own = "png" if kind == "image" else "nifti"
            raise DataError(
                f"mask_format {self.format!r}: the masks of {kind}s are written as {own} or npy; "
                "set auto"
            )
        for mask, span in zip(masks, spans, strict=True):
            name = f"{stem}_{mask.token}"
            if self.format == "npy":
                assert mask.probabilities is not None
                path = self._path(f"{name}.npy")
                with atomic_file(path) as temporary, temporary.open("wb") as stream:
                    np.save(stream, mask.probabilities.astype(np.float32))
                span["mask"] = self._named(path)
                continue
            path = self._path(name + (".png" if kind == "image" else ".nii.gz"))
            write_mask(path, mask.mask, mask.placement)
            span["mask"] = self._named(path)

    def _path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def _named(self, path: Path) -> str:
        """Return a path as lines name it."""
        return Path(os.path.relpath(path, self.beside)).as_posix()


class ReplyMasks:
    """Masks of the replies to a batch of prompts, made and written.

    Args:
        segmenter: makes them.
        writer: writes them.
    """

    def __init__(self, segmenter: Segmenter, writer: MaskWriter) -> None:
        self.segmenter, self.writer = segmenter, writer

    def of(
        self,
        batch: PromptBatch,
        replies: Sequence[Reply],
        names: Sequence[str],
        media: Sequence[Sequence[Shown]],
    ) -> list[GroundedReply | DataError]:
        """Return each reply with its masks, or the reason why they cannot be made.

        Args:
            batch: the prompts.
            replies: to each of them.
            names: of the records, by which files are named.
            media: images and volumes of each prompt.

        Raises:
            DeviceError: not even one reply fits the memory.
            OSError: a file cannot be written.
        """
        answered = [
            Answered(request, reply.ids, shown)
            for request, reply, shown in zip(batch.requests(), replies, media, strict=True)
        ]
        made: list[GroundedReply | DataError] = []
        for one, prompts, reply, name in zip(
            answered, self.segmenter.prompts(answered), replies, names, strict=True
        ):
            try:
                grounded = self.segmenter.ground(one, prompts)
                made.append(self.writer.write(name, reply, grounded, one.media))
            except DataError as error:
                made.append(error)
        return made


def require_format(format: MaskFormat) -> None:
    """Refuse DICOM SEG without its package. Raises `DeviceError`."""
    if format == "dicom-seg" and find_spec("highdicom") is None:
        raise DeviceError(
            "mask_format dicom-seg needs highdicom; pip install 'medm[dicom]', or choose another "
            "format"
        )


def series_choice(preprocess: Preprocess | None) -> Literal["only", "largest"]:
    """Return what a folder of several DICOM series stands for where it is read in this way."""
    return preprocess.series if isinstance(preprocess, VolumePreprocess) else "only"


def file_stem(name: str) -> str:
    """Return a record's name as the beginning of a file name, on every system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_NAME].strip("-.") or "reply"


def _span(token: int, grounded: Grounded, mask: MaskPrediction | None) -> JsonObject:
    """Return what a line says of a `[SEG]` and one of its masks, without its file."""
    phrase = grounded.text.phrases[token]
    span: JsonObject = {
        "start": phrase.start,
        "end": phrase.end,
        "phrase": phrase.text,
        "token": token,
        "mask": None,
    }
    if mask is None:
        return span
    span |= {
        mask.kind: mask.media,
        "presence": round(mask.presence, 4),
        "quality": round(mask.quality, 4),
        "voxels": mask.voxels,
    }
    return span | ({"absent": True} if mask.absent else {})
