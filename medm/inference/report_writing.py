"""Replies as DICOM Structured Reports beside the output of inference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

from medm.errors import DataError, DeviceError
from medm.imaging.dicom_sr import ReportSource, write_dicom_sr
from medm.inference.mask_writing import file_stem
from medm.inference.options import InferOptions, ReportFormat
from medm.inference.segmenter import Shown
from medm.types import JsonObject


class Line(Protocol):
    """An answer that becomes a line of the output."""

    def line(self) -> JsonObject:
        """Return its fields of the output line."""
        ...


@dataclass(frozen=True, slots=True)
class ReportedReply:
    """A reply whose report was written."""

    reply: Line
    report: str
    """The file, relative to the folder of the output."""

    def line(self) -> JsonObject:
        """Return what an output file says of it."""
        return self.reply.line() | {"report_file": self.report}


class ReportWriter:
    """Writes replies as DICOM SR.

    Args:
        folder: of the files.
        beside: folder of the output, which its lines' paths are relative to.
        several: what a folder of several DICOM series stands for.

    Raises:
        DeviceError: highdicom is not installed.
    """

    def __init__(
        self, folder: Path, *, beside: Path, several: Literal["only", "largest"] = "only"
    ) -> None:
        require_report_format("dicom-sr")
        self.folder, self.beside, self.several = folder, beside, several

    @classmethod
    def of(
        cls, options: InferOptions, *, several: Literal["only", "largest"] = "only"
    ) -> ReportWriter:
        """Return the writer of a run of batch inference."""
        beside = Path(options.output).parent
        return cls(options.reports_folder, beside=beside, several=several)

    def write(self, name: str, reply: Line, media: Sequence[Shown]) -> Line:
        """Write one reply; a file of the same name is replaced. An empty one has no report.

        Args:
            name: of the record, by which the file is named.
            reply: its line holds `reply`.
            media: images and volumes of the prompt.

        Raises:
            DataError: the record is not about DICOM files.
            OSError: the file cannot be written.
        """
        text = str(reply.line()["reply"])
        if not text.strip():
            return reply
        sources = []
        for shown in media:
            if not isinstance(shown.source, (str, Path)):
                raise DataError("a DICOM SR refers to DICOM files; expected the path of one")
            sources.append(ReportSource(Path(shown.source), shown.kind))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{file_stem(name)}.dcm"
        write_dicom_sr(path, text, sources, several=self.several)
        return ReportedReply(reply, Path(os.path.relpath(path, self.beside)).as_posix())


def require_report_format(format: ReportFormat) -> None:
    """Refuse DICOM SR without its package. Raises `DeviceError`."""
    if format == "dicom-sr" and find_spec("highdicom") is None:
        raise DeviceError(
            "report_format dicom-sr needs highdicom; pip install 'medm[dicom]', or leave it out"
        )
