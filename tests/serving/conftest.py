"""Servers of the tests: a grounded model, and a dual encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from medm.serving.options import Limits, ServeOptions
from tests.inference.grounded import save_grounded
from tests.models import plain_head
from tests.models.dual_encoder import tiny
from tests.serving.live import Live, running

LIMITS = Limits(
    max_new_tokens=300, max_body_mb=1, max_file_mb=1, max_images=3, max_pixels=250_000,
    max_voxels=100_000,
)  # fmt: skip


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A model that replies in text, with a mask head on images."""
    with ExitStack() as stack:
        with plain_head.registered():  # until the model is loaded
            folder, _ = save_grounded(tmp_path_factory.mktemp("served"))
            options = ServeOptions(
                model=str(folder), slots=4, queue=4, limits=LIMITS, storage_mb=2, body_seconds=1.5
            )
            server = stack.enter_context(running(options))
        yield server


@pytest.fixture(scope="package")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A dual encoder, served without a key."""
    root = tmp_path_factory.mktemp("dual")
    model, processor = tiny.make(tiny.section(tiny.save_tokenizer(root / "tokenizer")))
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    with running(ServeOptions(model=str(root / "model"), limits=LIMITS), key=None) as server:
        yield server
