"""Volumes of a text header and voxels behind it or in a file beside it: NRRD and MetaImage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np

from medm.imaging.geometry import Geometry
from medm.imaging.payload import Packing, check_cost, check_length, open_binary, read_voxels

Fields: TypeAlias = dict[str, str]


class Layout(NamedTuple):
    """Storage of the voxels."""

    shape: tuple[int, ...]
    """(z, y, x)."""
    dtype: np.dtype
    packing: Packing


@dataclass(frozen=True, slots=True)
class TextHeaderFormat:
    """A format by the functions that read its header; each raises `MediaError`."""

    fields: Callable[[BinaryIO, str], Fields]
    """The fields of the header, from the opened file, which is left at the first byte behind it."""
    layout: Callable[[Fields, str], Layout]
    geometry: Callable[[Fields, str], Geometry | None]
    detached: Callable[[Fields, Path, str], Path | None]
    """The file that holds the voxels, where it is another one."""

    def read(self, path: Path, name: str) -> tuple[np.ndarray, Geometry | None]:
        """Return voxels (z, y, x) and their geometry; None where the header gives no direction.

        Raises:
            MediaError: truncated, damaged, of a kind that is not read, or with impossible numbers
                in its header.
        """
        with self._at_voxels(path, name) as (stream, fields):
            layout = self.layout(fields, name)
            held = os.fstat(stream.fileno()).st_size
            check_cost(layout.shape, layout.dtype, held=held, name=name)
            return read_voxels(stream, *layout, name), self.geometry(fields, name)

    def check(self, path: Path, name: str) -> tuple[int, ...]:
        """Check the header and the length of uncompressed voxels. Return the size (D, H, W).

        Raises `MediaError`.
        """
        with self._at_voxels(path, name) as (stream, fields):
            shape, dtype, packing = self.layout(fields, name)
            check_length(stream, shape, dtype, packing, name)
            check_cost(shape, dtype, held=os.fstat(stream.fileno()).st_size, name=name)
        return shape

    def data_file(self, path: Path, name: str) -> Path | None:
        """Return where the voxels lie, if not in the file itself. Raises `MediaError` as `read`."""
        with open_binary(path, name) as stream:
            return self.detached(self.fields(stream, name), path, name)

    @contextmanager
    def _at_voxels(self, path: Path, name: str) -> Iterator[tuple[BinaryIO, Fields]]:
        """Return the voxels' file, the offset of the first voxel, and the checked fields."""
        with open_binary(path, name) as stream:
            fields = self.fields(stream, name)
            self.layout(fields, name)
            self.geometry(fields, name)
            beside = self.detached(fields, path, name)
            if beside is None:
                yield stream, fields
                return
        with open_binary(beside, name) as stream:
            yield stream, fields
