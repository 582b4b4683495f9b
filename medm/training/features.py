"""Frozen encoders run once over the data before training, and their output is kept (`data.cache_features`)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medm.data.features import FeatureStore, missing, open_store
from medm.data.records import Records
from medm.errors import DataError
from medm.imaging import Preprocess, fingerprint, load_pixels
from medm.training.processes import failures, on_first, rank, world_size

logger = logging.getLogger(__name__)

BATCH = 16
"""Items that an encoder sees at once."""


def keep_features(
    model: Any, root: Path, preprocess: Mapping[str, Preprocess], data: Sequence[Records], *, device: torch.device
) -> dict[str, FeatureStore]:
    """The stores of every branch whose encoder is frozen, with everything in them that the data needs.

    Args:
        model: `encoders()` gives each branch's module with `encoder` and `encode(pixels)`; it is told that the
            encoder stays idle from now on.
        root: folder of the stores; may serve any number of runs, models and data sets.
        preprocess: by branch.
        data: whose files are needed.
        device: where the encoders run; they are back where they were afterwards.

    Raises:
        DataError: a file cannot be read.
        MedmError: the disk has no room.
    """
    stores = {}
    for name, branch in model.encoders().items():
        if any(parameter.requires_grad for parameter in branch.encoder.parameters()):
            continue
        store = open_store(root, f"{name}-{encoder_fingerprint(branch.encoder)}-{fingerprint(preprocess[name])}")
        files = sorted({file for records in data for file in _files(records, name)})
        wanted = on_first(lambda store=store, files=files: list(missing(store, files)))  # type: ignore[misc]
        share = wanted[rank() :: world_size()]
        if wanted and rank() == 0:
            logger.info("%s: encoding %d of %d files once, for %s", name, len(wanted), len(files), store.folder)
        problems = failures(lambda store=store, share=share, branch=branch, name=name: _fill(  # type: ignore[misc]
            store, branch, preprocess[name], share, device
        ))  # fmt: skip
        if problems:
            raise DataError(f"features of {name} could not be made: {'; '.join(problems)}")
        store.refresh()
        stores[name] = store
        branch.features_only = True
    return stores


def encoder_fingerprint(encoder: nn.Module) -> str:
    """A short name of an encoder's code path, weights and precision."""
    digest = hashlib.blake2b(type(encoder).__qualname__.encode(), digest_size=8)
    settings = {
        key: value for key, value in sorted(vars(encoder).items()) if isinstance(value, (int, float, str, bool, tuple))
    }
    digest.update(json.dumps(settings, default=str, sort_keys=True).encode())
    for key, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{key}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files(records: Records, branch: str) -> Iterator[Path]:
    """Files of one branch; records that are bad are the data's business, and are passed over here."""
    for index in range(len(records)):
        try:
            for media in records[index].media:
                if media.branch == branch:
                    yield records.media_path(index, media)
        except DataError as error:
            logger.debug("no features for %s", error)


def _fill(
    store: FeatureStore, branch: Any, preprocess: Preprocess, wanted: list[tuple[str, Path]], device: torch.device
) -> None:
    if not wanted:
        return
    before = branch.encoder.device_and_dtype["device"]
    branch.encoder.to(device).eval()
    try:
        batches = _encoded(branch, preprocess, [file for _, file in wanted], device)
        first = next(batches)

        def everything() -> Iterator[np.ndarray]:
            yield first
            yield from batches

        store.add([key for key, _ in wanted], everything(), shape=first.shape[1:], dtype=first.dtype)
    finally:
        branch.encoder.to(before)


def _encoded(branch: Any, preprocess: Preprocess, files: list[Path], device: torch.device) -> Iterator[np.ndarray]:
    """(n, prefix + prod(grid), D), in float16 where the encoder computes in it, else in float32: exact either way."""
    for start in range(0, len(files), BATCH):
        pixels = np.stack([load_pixels(file, preprocess) for file in files[start : start + BATCH]])
        with torch.inference_mode():
            tokens = branch.encode(torch.from_numpy(pixels).to(device)).tokens
        yield (tokens if tokens.dtype == torch.float16 else tokens.float()).cpu().numpy()
