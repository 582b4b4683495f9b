"""Options of the playground. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medm.config import Options
from medm.serving.options import Limits, ServeOptions

MAX_MODELS = 2
"""Most models of a page: they stand side by side."""


class PlaygroundOptions(Options):
    """A web page for one model, or for two side by side."""

    models: list[str] = Field(min_length=1, max_length=MAX_MODELS)
    """Model folders that medm saved."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine's own need `auth_file`."""
    port: int = Field(default=7860, ge=0, le=65535)
    """Port to listen on; 0 for a free one."""
    auth_file: str | None = None
    """File that holds `user:password` in each line. The page then asks for them."""
    device: str = "auto"
    """`auto` (a GPU, or the CPU without one), `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["saved", "float32", "bfloat16", "float16"] = "saved"
    """Precision of the weights; `saved` keeps that of the folder."""
    slots: int = Field(default=4, ge=1)
    """Replies of a model that are generated at the same time."""
    limits: Limits = Limits()
    """Largest input and reply of a request."""
    keep_minutes: int = Field(default=60, ge=1)
    """Minutes without a request after which the files of a page are deleted."""
    storage_mb: int = Field(default=8192, ge=1)
    """Most MiB of uploaded files together."""

    def of_worker(self, model: str) -> ServeOptions:
        """Return the options of the worker of a model."""
        return ServeOptions(
            model=model,
            device=self.device,
            dtype=self.dtype,
            slots=self.slots,
            limits=self.limits,
        )
