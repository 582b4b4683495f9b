"""Errors of the server: one table of codes, statuses and types, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping

from medm.errors import DataError, DeviceError, GeometryError, MediaError, MediaSizeError, MedmError
from medm.types import JsonObject

INVALID, AUTH, LIMIT, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)

ERRORS: Mapping[str, tuple[int, str]] = {
    "invalid_json": (400, INVALID),
    "invalid_value": (400, INVALID),
    "unsupported": (400, INVALID),
    "too_many_images": (400, INVALID),
    "invalid_image": (400, INVALID),
    "invalid_file": (400, INVALID),
    "source_refused": (400, INVALID),
    "invalid_api_key": (401, AUTH),
    "host_refused": (403, INVALID),
    "not_found": (404, INVALID),
    "model_not_found": (404, INVALID),
    "file_not_found": (404, INVALID),
    "job_not_found": (404, INVALID),
    "method_not_allowed": (405, INVALID),
    "body_timeout": (408, INVALID),
    "job_not_done": (409, INVALID),
    "body_too_large": (413, INVALID),
    "too_many_pixels": (413, INVALID),
    "too_many_voxels": (413, INVALID),
    "context_length_exceeded": (413, INVALID),
    "unsupported_type": (415, INVALID),
    "geometry": (422, INVALID),
    "queue_full": (429, LIMIT),
    "storage_full": (429, LIMIT),
    "client_left": (499, INVALID),
    "internal_error": (500, SERVER),
    "loading": (503, SERVER),
    "draining": (503, SERVER),
    "failed": (503, SERVER),
}
"""Status and type of each code. `client_left` is in logs and metrics alone."""

_RETRY_SECONDS = {"queue_full": 1, "storage_full": 60, "loading": 5, "draining": 5}


class ServingError(MedmError):
    """A request that is refused or fails.

    Args:
        code: one of `ERRORS`.
        message: what was expected, what was found, and what to do. It never repeats texts or
            images.
        param: field of the request at fault.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        self.code, self.message, self.param = code, message, param
        self.status, self.type = ERRORS[code]
        super().__init__(message)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        headers = {"x-medm-error": self.code}
        if self.code in _RETRY_SECONDS:
            headers["retry-after"] = str(_RETRY_SECONDS[self.code])
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def body(self) -> JsonObject:
        """Return the body of the response, in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def media_error(
    error: MediaError, kind: str, *, hide: str = "", param: str | None = None
) -> ServingError:
    """Return the error of an image or volume that cannot be used.

    Args:
        error: of the reader.
        kind: "image" or "volume".
        hide: path that messages must not show.
        param: field of the request at fault.
    """
    message = str(error)
    if hide:
        message = message.replace(hide, f"the {kind}")
    if isinstance(error, MediaSizeError):
        code = "too_many_pixels" if kind == "image" else "too_many_voxels"
    elif isinstance(error, GeometryError):
        code = "geometry"
    else:
        code = "invalid_image" if kind == "image" else "invalid_file"
    return ServingError(code, message, param=param)


def as_serving_error(error: BaseException) -> ServingError:
    """Return the error that a client is told. Defects give no detail; the log has their type."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, DataError):
        return ServingError("invalid_value", error.reason, param=error.field)
    if isinstance(error, DeviceError):
        return ServingError("internal_error", str(error))
    if isinstance(error, MedmError):
        return ServingError("invalid_value", str(error))
    return ServingError(
        "internal_error", "the request failed by a defect of the server; its log names the error"
    )
