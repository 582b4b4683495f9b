"""Bodies of requests, in OpenAI's form; the routes decide what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from medm.serving.errors import ServingError

HARMLESS = frozenset({
    "chat_template_kwargs", "metadata", "parallel_tool_calls", "prompt_cache_key",
    "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier", "store",
    "user", "verbosity",
})  # fmt: skip
"""Fields of OpenAI that change no reply: they are ignored, and a header says so."""
WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields that are not offered, and the values with which they ask for nothing. Null is one of
them."""
IGNORED_HEADER = "x-medm-ignored"
"""Header that names the fields that were ignored."""

_MAX_STOPS, _MAX_STOP = 4, 256
_LONG = 2**63


def _encodable(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected Unicode text, found half of a surrogate pair") from None
    return text


Text: TypeAlias = Annotated[str, AfterValidator(_encodable)]


class Body(BaseModel):
    """A body, or a part of one, with fields of the right types and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextPart(Body):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    """An image."""

    url: Text
    """A data URI."""
    detail: str | None = None
    """Ignored."""


class ImagePart(Body):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FileId(Body):
    """An uploaded file."""

    file_id: Text


class FilePart(Body):
    """An uploaded image or volume."""

    type: Literal["file"]
    file: FileId


Part: TypeAlias = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class Message(Body):
    """One message."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]


class StreamOptions(Body):
    """Options of a streamed reply."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    include_usage: bool | None = None


class Replying(BaseModel):
    """Settings of a reply."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    model: Text
    max_tokens: int | None = Field(default=None, ge=1, lt=_LONG)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    """0 or null for greedy decoding."""
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0, lt=_LONG)
    seed: int | None = Field(default=None, ge=-_LONG, lt=_LONG)
    stop: Text | Annotated[list[Text], Field(max_length=_MAX_STOPS)] | None = None


class ChatBody(Replying):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=512)]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=_LONG)
    n: int | None = Field(default=None, ge=1, lt=_LONG)
    """1."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    task: Text | None = None
    """Kind of task, for models whose experts are chosen by it."""


class JobBody(Replying):
    """`POST /v1/jobs`."""

    task: Literal["report", "segmentation"]
    files: Annotated[list[Text], Field(min_length=1)]
    """Ids of uploaded files."""
    prompt: Annotated[Text, Field(min_length=1)]


class EmbeddingsBody(BaseModel):
    """`POST /v1/embeddings`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    model: Text
    input: Text | Annotated[list[Text | Part], Field(min_length=1, max_length=2048)]
    """Texts, images and uploaded files."""
    encoding_format: Literal["float", "base64"] | None = None


class ZeroShotBody(Body):
    """`POST /v1/zero-shot`."""

    model: Text
    input: Annotated[list[Part], Field(min_length=1)]
    """Images and uploaded files."""
    labels: Annotated[
        list[Annotated[Text, Field(min_length=1)]], Field(min_length=2, max_length=512)
    ]
    templates: Annotated[list[Text], Field(min_length=1, max_length=64)] | None = None
    """Sentences with {} for the label; several are an ensemble."""


def ignored_fields(extra: Mapping[str, Any] | None) -> list[str]:
    """Return the fields of a body that are ignored.

    Raises:
        ServingError: a field that is not offered asks for something, or is unknown.
    """
    ignored = []
    for name, value in (extra or {}).items():
        if name in HARMLESS:
            ignored.append(name)
        elif name in WITHOUT_EFFECT:
            if value is not None and not any(
                value == none and isinstance(value, bool) == isinstance(none, bool)
                for none in WITHOUT_EFFECT[name]
            ):
                raise ServingError(
                    "unsupported", f"{name} is not offered by this server; leave it out", param=name
                )
        else:
            shown = ascii(name[:64])
            raise ServingError(
                "invalid_value", f"unknown field {shown}", param=ascii(name[:64])[1:-1]
            )
    return sorted(ignored)


def stops_of(stop: str | list[str] | None) -> list[str]:
    """Return the stop sequences of a body. Raises `ServingError` for empty or long ones."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if any(not 0 < len(text) <= _MAX_STOP for text in stops):
        raise ServingError(
            "invalid_value",
            f"expected stop sequences of 1 to {_MAX_STOP} characters",
            param="stop",
        )
    return stops
