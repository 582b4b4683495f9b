"""Conversion of in-memory images and volumes of a Python program for the readers."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import numpy as np
from PIL import Image

from medm.errors import MediaError

Source: TypeAlias = str | Path | BinaryIO | Image.Image | np.ndarray
"""An image or volume: a file, or what a Python program has in memory."""

_NETWORK = ("http://", "https://", "ftp://", "s3://", "gs://")


def as_source(item: object) -> Source:
    """Return a path, stream, image or array from an item of a caller.

    Args:
        item: a path (also `file://`), an image of Pillow, a NumPy array, a torch tensor, an opened
            file, the bytes of one, or a `data:` address.

    Raises:
        MediaError: an address on the network, or an object of another kind.
    """
    if isinstance(item, str):
        if item.startswith("data:"):
            head, _, text = item.partition(",")
            if not head.endswith(";base64"):
                raise MediaError("expected a data: address in base64")
            return decode_base64(text)
        if item.startswith(_NETWORK):
            raise MediaError(
                f"{item[:80]}: nothing is fetched from a network; download the file and give its "
                "path"
            )
        return Path(item.removeprefix("file://")).expanduser()
    if isinstance(item, Path):
        return item.expanduser()
    if isinstance(item, bytes):
        return io.BytesIO(item)
    if isinstance(item, (Image.Image, np.ndarray)):
        return item
    if hasattr(item, "read"):
        return cast(BinaryIO, item)
    if hasattr(item, "detach") and hasattr(item, "dtype"):  # a tensor, without importing torch
        tensor = item.detach().cpu()
        return np.asarray(tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor)
    raise MediaError(
        "expected an image or volume: a path, an image of Pillow, a NumPy array, a torch tensor "
        f"or an opened file, found {'nothing' if item is None else type(item).__name__}"
    )


def rereadable(item: object) -> object:
    """Return an item that can be read more than once: the bytes of a stream in its place.

    Lists are taken item by item.
    """
    if isinstance(item, (list, tuple)):
        return [rereadable(one) for one in item]
    return item.read() if hasattr(item, "read") else item


def decode_base64(text: str | bytes) -> io.BytesIO:
    """Raises `MediaError`."""
    try:
        return io.BytesIO(base64.b64decode(text, validate=True))
    except (binascii.Error, TypeError, ValueError) as error:
        raise MediaError(f"not valid base64 ({error})") from None
