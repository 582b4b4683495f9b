"""Sources of the images of a request: data URIs, uploaded files, URLs of listed hosts."""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple

from medm.serving.decoding import Content
from medm.serving.errors import ServingError
from medm.serving.fetching import Fetcher
from medm.serving.file_types import require_image
from medm.serving.files import StoredFile
from medm.types import Kind

_MEDIA_TYPES = frozenset(
    f"image/{name}" for name in ("png", "jpeg", "jpg", "tiff", "bmp", "x-ms-bmp", "dicom")
) | {"application/dicom", "application/octet-stream"}
FILE_ID = "file-"
"""Beginning of the id of an uploaded file."""


class Source(NamedTuple):
    """An image or volume of a request."""

    kind: Kind
    content: Content


def of_file(file: StoredFile) -> Source:
    """Return an uploaded file as the source of a request."""
    return Source(file.kind, file.path)


def of_url(url: str, fetcher: Fetcher, *, param: str) -> Source:
    """Return the image of an `image_url` that is a data URI, or a URL of a listed host.

    Raises:
        ServingError: a path or another URL, another type, or no base64.
    """
    if url[:5].lower() == "data:":
        content = _decoded(url, param)
    elif url[:7].lower() == "http://" or url[:8].lower() == "https://":
        content = fetcher.fetch(url, param=param)
    else:
        raise ServingError(
            "source_refused",
            "paths and other addresses are refused; expected a data URI "
            "(data:image/png;base64,...) or the id of an uploaded file",
            param=param,
        )
    require_image(content, param=param)
    return Source("image", content)


def _decoded(url: str, param: str) -> bytes:
    head, comma, text = url.partition(",")
    media_type, *settings = head[5:].lower().split(";")
    if not comma or "base64" not in (setting.strip() for setting in settings):
        raise ServingError(
            "invalid_image", "expected a data URI in base64: data:image/png;base64,...", param=param
        )
    if media_type.strip() not in _MEDIA_TYPES:
        raise ServingError(
            "unsupported_type",
            f"expected a data URI of one of {', '.join(sorted(_MEDIA_TYPES))}",
            param=param,
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ServingError(
            "invalid_image", "the data URI is not valid base64", param=param
        ) from None
