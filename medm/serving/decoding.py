"""Uploads and images of requests, read in a process of its own with limits of memory and time.

Sizes are checked by the header, before anything is decoded. A file that crashes a decoder, or
hangs it, ends a program that holds nothing; the server goes on.

The program is this module: `python -P -m medm.serving.decoding`.
"""

from __future__ import annotations

import io
import json
import math
import os
import queue
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.lib import format as npy

from medm.errors import GeometryError, MediaError, MediaSizeError
from medm.imaging import ImagePreprocess, Preprocess, load_pixels, preprocess_from_dict
from medm.imaging.arrays import read_npy
from medm.imaging.geometry import Geometry
from medm.imaging.isolated import ChildDiedError, LimitedChild, limit_process, read_exactly
from medm.imaging.volumes import Volume, read_volume
from medm.serving.errors import media_error
from medm.serving.options import Limits
from medm.stopping import ignore_stops
from medm.types import JsonObject, Kind

Content: TypeAlias = bytes | Path
"""An image in memory, or a file or folder that was uploaded."""

_MEMORY = 2**30
"""Bytes of address space beyond those of the started program, and more for each pixel or voxel."""
_BYTES_PER_ITEM = {"image": 96, "volume": 48}
_CPU_SECONDS = 20
_ITEMS_PER_SECOND = 2_000_000
"""CPU time of a request: `_CPU_SECONDS`, and more for its pixels or voxels at this slow pace."""
_PATIENCE = 3
"""Factor on that time by the clock, for a busy machine."""
_COMMAND = (sys.executable, "-P", "-m", "medm.serving.decoding")
_LENGTHS = struct.Struct("<IQ")
"""Bytes of the description and of the content that follow a request."""
_LENGTH = struct.Struct("<I")
"""Bytes of the JSON that begins a reply."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """Form of an image or volume that was read in whole."""

    shape: tuple[int, ...]
    """(height, width) or (depth, height, width)."""
    spacing: tuple[float, ...] | None = None
    """Millimeters along each axis of `shape`, where the file says so."""
    axes: str | None = None
    """Direction of the patient along each axis, as "SPL"."""
    modality: str | None = None
    """Of DICOM."""
    unit: str | None = None
    """"HU" where the file proves it."""

    def as_json(self) -> JsonObject:
        """Return the geometry as clients are told."""
        return {
            "size": list(self.shape),
            "spacing_mm": None if self.spacing is None else list(self.spacing),
            "axes": self.axes,
            "modality": self.modality,
            "unit": self.unit,
        }


class Decoders:
    """Some programs that decode, each a file at a time.

    Args:
        count: programs, and so many files that are decoded at once.
        limits: largest image and volume.
    """

    def __init__(self, count: int, limits: Limits) -> None:
        self.limits = limits
        self._children = [LimitedChild(_COMMAND) for _ in range(count)]
        self._free: queue.LifoQueue[LimitedChild] = queue.LifoQueue()
        for child in self._children:
            self._free.put(child)

    def pixels(
        self, content: Content, preprocess: Preprocess, *, param: str | None = None
    ) -> np.ndarray:
        """Return the pixels of `medm.imaging.load_pixels`: (C, *spatial), or (T, C, *spatial).

        Raises:
            ServingError: too large, damaged, or of impossible geometry.
        """
        kind: Kind = "image" if isinstance(preprocess, ImagePreprocess) else "volume"
        request = {"kind": kind, "preprocess": preprocess.model_dump(mode="json")}
        _, pixels = self._ask(content, request, param)
        assert pixels is not None
        return pixels

    def inspect(self, content: Content, kind: Kind, *, param: str | None = None) -> Inspected:
        """Read all of an image or volume, and return its form. Raises as `pixels`."""
        found, _ = self._ask(content, {"kind": kind, "preprocess": None}, param)
        return Inspected(
            shape=tuple(found["shape"]),
            spacing=None if found["spacing"] is None else tuple(found["spacing"]),
            axes=found["axes"],
            modality=found["modality"],
            unit=found["unit"],
        )

    def volume(self, content: Path, *, param: str | None = None) -> Volume:
        """Return a volume as its file holds it. Raises as `pixels`."""
        request = {"kind": "volume", "preprocess": None, "voxels": True}
        found, voxels = self._ask(content, request, param)
        assert voxels is not None
        grid = found["grid"]
        geometry = None if grid is None else Geometry(*(np.array(part) for part in grid))
        return Volume(voxels, "volume", found["unit"], geometry, found["modality"])

    def start(self) -> None:
        """Start the programs, so that no request has to wait for one."""
        request = json.dumps({"kind": None}).encode()

        def start(child: LimitedChild) -> None:
            child.ask([_LENGTHS.pack(len(request), 0), request], _reply, seconds=120)

        with ThreadPoolExecutor(len(self._children)) as threads:
            list(threads.map(start, self._children))

    def close(self) -> None:
        """End all programs."""
        for child in self._children:
            child.stop()

    @contextmanager
    def _child(self) -> Iterator[LimitedChild]:
        child = self._free.get()
        try:
            yield child
        finally:
            self._free.put(child)

    def _ask(
        self, content: Content, request: JsonObject, param: str | None
    ) -> tuple[JsonObject, np.ndarray | None]:
        kind: Kind = request["kind"]
        most = self.limits.max_pixels if kind == "image" else self.limits.max_voxels
        seconds = _CPU_SECONDS + most // _ITEMS_PER_SECOND
        request |= {
            "path": str(content) if isinstance(content, Path) else None,
            "most": most,
            "seconds": seconds,
            "memory": _MEMORY + most * _BYTES_PER_ITEM[kind],
        }
        data = b"" if isinstance(content, Path) else content
        text = json.dumps(request).encode()
        hide = request["path"] or ""
        try:
            with self._child() as child:
                found, pixels = child.ask(
                    [_LENGTHS.pack(len(text), len(data)), text, data],
                    _reply,
                    seconds=seconds * _PATIENCE,
                )
        except ChildDiedError:
            raise media_error(
                MediaError(f"the {kind} is damaged: decoding it crashed or took too much time"),
                kind,
                param=param,
            ) from None
        if "error" in found:
            error = _KINDS_OF_ERROR[found["error"]](found["message"])
            raise media_error(error, kind, hide=hide, param=param)
        return found, pixels


_KINDS_OF_ERROR: dict[str, type[MediaError]] = {
    kind.__name__: kind for kind in (MediaError, MediaSizeError, GeometryError)
}


def _reply(stream: IO[bytes]) -> tuple[JsonObject, np.ndarray | None]:
    """Read a reply of the program."""
    (length,) = _LENGTH.unpack(read_exactly(stream, _LENGTH.size))
    found: JsonObject = json.loads(read_exactly(stream, length))
    if "items" not in found:
        return found, None
    return found, read_npy(stream, "pixels", max_items=found["items"], exact=False)


def main() -> None:
    """Answer requests until the other end is closed."""
    ignore_stops()
    # Codecs print on standard output; the pipe for replies is moved out of their way.
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while len(head := requests.read(_LENGTHS.size)) == _LENGTHS.size:
        length, size = _LENGTHS.unpack(head)
        request = json.loads(read_exactly(requests, length))
        data = read_exactly(requests, size)
        pixels = None
        try:
            found, pixels = _answer(request, data)
        except MediaError as error:
            kind = type(error).__name__
            found = {
                "error": kind if kind in _KINDS_OF_ERROR else "MediaError",
                "message": error.reason,
            }
        except MemoryError:
            found = {"error": "MediaSizeError", "message": "decoding takes too much memory"}
        if pixels is not None:
            found["items"] = pixels.size
        text = json.dumps(found).encode()
        replies.write(_LENGTH.pack(len(text)) + text)
        if pixels is not None:
            npy.write_array_header_1_0(replies, npy.header_data_from_array_1_0(pixels))
            replies.write(pixels.data)
        replies.flush()
        del data, pixels


def _answer(request: JsonObject, data: bytes) -> tuple[JsonObject, np.ndarray | None]:
    kind: Kind | None = request["kind"]
    if kind is None:
        return {}, None
    if kind == "volume":  # loaded before memory is limited
        import torch

        torch.set_num_threads(1)
    limit_process(request["seconds"], _address_space() + request["memory"])
    path = None if request["path"] is None else Path(request["path"])
    _check_size(path or io.BytesIO(data), kind, request["most"])
    source = path or io.BytesIO(data)
    if request["preprocess"] is not None:
        pixels = load_pixels(source, preprocess_from_dict(request["preprocess"]))
        return {}, np.ascontiguousarray(pixels)
    if kind == "image":
        from medm.imaging.images import read_image

        return {**_form(read_image(source).pixels.shape[:2], None)}, None
    assert path is not None
    volume = read_volume(path)
    form = _form(volume.voxels.shape, volume.geometry)
    found = {**form, "modality": volume.modality, "unit": volume.unit}
    if not request.get("voxels"):
        return found, None
    grid = volume.geometry
    parts = None if grid is None else [grid.spacing, grid.direction, grid.origin]
    found["grid"] = None if parts is None else [part.tolist() for part in parts]
    return found, volume.voxels


def _form(shape: tuple[int, ...], geometry: Geometry | None) -> dict[str, Any]:
    return {
        "shape": [int(length) for length in shape],
        "spacing": None if geometry is None else [float(step) for step in geometry.spacing],
        "axes": None if geometry is None else geometry.axes,
        "modality": None,
        "unit": None,
    }


def _check_size(source: Path | io.BytesIO, kind: Kind, most: int) -> None:
    """Refuse more pixels or voxels than `most` by the header alone. Raises `MediaSizeError`."""
    if kind == "image":
        from medm.imaging.images import check_image

        shape: tuple[int, ...] = check_image(source)
    else:
        assert isinstance(source, Path)
        shape = _volume_shape(source)
    if math.prod(shape) > most:
        text = " x ".join(str(length) for length in shape)
        items = "pixels" if kind == "image" else "voxels"
        raise MediaSizeError(f"{text} {items} are more than the {most} that this server takes")


def _volume_shape(path: Path) -> tuple[int, ...]:
    from medm.imaging.dicom_series import select_series
    from medm.imaging.volumes import check_volume

    shape = check_volume(path)
    if shape is None:
        headers, order, _ = select_series(path, str(path), series=None, several="only")
        shape = (len(order), headers[0].rows, headers[0].columns)
    return shape


def _address_space() -> int:
    """Return the bytes of address space of this process; where the system does not say, 4 GiB."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 2**32
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
