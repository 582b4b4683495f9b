"""Options of the server. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from medm.config import Options


class Limits(Options):
    """Largest input and reply of a request. They are checked before anything is decoded."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest reply in tokens."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens, vision tokens included. Default: the model's context."""
    max_body_mb: int = Field(default=32, ge=1)
    """Largest body of a request in MiB, images as base64 included."""
    max_file_mb: int = Field(default=1024, ge=1)
    """Largest upload in MiB, and largest content of a zip."""
    max_images: int = Field(default=8, ge=1)
    """Most images and volumes of a request."""
    max_pixels: int = Field(default=2**25, ge=1)
    """Most pixels of an image."""
    max_voxels: int = Field(default=2**28, ge=1)
    """Most voxels of a volume."""

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mb` in bytes."""
        return self.max_body_mb * 2**20

    @property
    def max_file_bytes(self) -> int:
        """`max_file_mb` in bytes."""
        return self.max_file_mb * 2**20


class ServeOptions(Options):
    """A server of one model."""

    model: str
    """Model folder that medm saved."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine's own need an API key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 for a free one."""
    name: str | None = None
    """Name of the model in requests. Default: the name of its folder."""
    api_key_file: str | None = None
    """File that holds the API key in its first line. Without it the environment variable
    MEDM_API_KEY is used."""
    allow_hosts: str | None = None
    """Hosts that images may be fetched from, separated by commas. Default: none; images are data
    URIs and uploaded files."""
    device: str = "auto"
    """`auto` (a GPU, or the CPU without one), `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["saved", "float32", "bfloat16", "float16"] = "saved"
    """Precision of the weights; `saved` keeps that of the folder."""
    slots: int = Field(default=16, ge=1)
    """Replies that are generated at the same time."""
    queue: int = Field(default=64, ge=0)
    """Requests that wait beyond those; further ones are refused with status 429."""
    limits: Limits = Limits()
    """Largest input and reply of a request."""
    keep_minutes: int = Field(default=60, ge=1)
    """Minutes after which uploaded files and the results of jobs are deleted."""
    storage_mb: int = Field(default=8192, ge=1)
    """Most MiB of uploaded files together."""
    body_seconds: float = Field(default=30.0, gt=0)
    """Seconds that a client may take to send a body, and one more for each 64 KiB of it."""
    drain_seconds: float = Field(default=60.0, ge=0)
    """Seconds that running requests are given after SIGTERM or SIGINT."""

    @model_validator(mode="after")
    def _hosts(self) -> ServeOptions:
        for host in self.hosts:
            if any(character in host for character in "/:*@") or "." not in host:
                raise ValueError(
                    f"allow_hosts: expected exact host names such as images.example.org, "
                    f"found {host!r}"
                )
        return self

    @property
    def hosts(self) -> frozenset[str]:
        """The hosts of `allow_hosts`, in small letters."""
        names = (self.allow_hosts or "").split(",")
        return frozenset(name.strip().lower() for name in names if name.strip())
