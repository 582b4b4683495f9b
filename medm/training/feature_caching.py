"""Feature caching (`data.cache_features`): frozen encoders run over the data before training."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from medm.data.features import FeatureBatch, FeatureStore, missing, open_store
from medm.data.records import Records
from medm.distributed import all_gather_objects, failures, on_rank_zero, rank, world_size
from medm.errors import DataError, MediaError, MedmError, machine_fault
from medm.imaging import ImagePreprocess, Preprocess, fingerprint, prepare
from medm.imaging.placement import Prepared
from medm.imaging.probe import count_items
from medm.models.base import MedmModel
from medm.types import VisionBranch, parse_view

logger = logging.getLogger(__name__)

BATCH = 16
"""Items that an encoder sees at once."""


def cache_features(
    model: MedmModel,
    root: Path,
    preprocess: Mapping[str, Preprocess],
    data: Sequence[Records],
    *,
    device: torch.device,
    bad_records: Literal["stop", "skip"] = "stop",
) -> dict[str, FeatureStore]:
    """Return the feature caches of all branches with a frozen encoder, filled from the data.

    Args:
        model: `encoders()` gives each branch's module with `encoder` and `encode(pixels)`; its
            encoder is bypassed from now on.
        root: folder of the stores; any number of runs, models and data sets may use it.
        preprocess: by branch.
        data: whose files are needed.
        device: for the encoders; they return to their own device afterwards.
        bad_records: policy for unreadable files: stop, and keep the features made so far; or log
            the files. The dataset then leaves out and counts the records that need them.

    Raises:
        DataError: files cannot be read, and the policy is to stop.
        MedmError: the disk has no room.
    """
    stores = {}
    for name, branch in model.encoders().items():
        if any(parameter.requires_grad for parameter in branch.encoder.parameters()):
            continue
        store = open_store(
            root, f"{name}-{encoder_fingerprint(branch.encoder)}-{fingerprint(preprocess[name])}"
        )
        files = sorted({file for records in data for file in _files(records, name)})
        wanted, bad = on_rank_zero(lambda store=store, files=files: missing(store, files))  # type: ignore[misc]
        if wanted and rank() == 0:
            logger.info(
                "%s: encoding %d of %d files once, for %s",
                name,
                len(wanted),
                len(files),
                store.folder,
            )
        bad += _fill_on_all_ranks(store, branch, preprocess[name], wanted, device)
        if bad and bad_records == "stop":
            raise DataError(
                f"features of {name}: {len(bad)} of {len(files)} files cannot be read; the first: "
                f"{bad[0]}. Fix them, or set data.bad_records: skip"
            )
        if rank() == 0:
            for reason in bad:
                logger.warning("no features of %s: %s", name, reason)
        store.refresh()
        stores[name] = store
        branch.encoder_bypassed = True
    return stores


def encoder_fingerprint(encoder: nn.Module) -> str:
    """Return a hash of an encoder's code path, weights and precision."""
    digest = hashlib.blake2b(type(encoder).__qualname__.encode(), digest_size=8)
    settings = {
        key: value
        for key, value in sorted(vars(encoder).items())
        # transformers marks what it loaded, which changes nothing of what the encoder computes.
        if isinstance(value, (int, float, str, bool, tuple)) and key != "_is_hf_initialized"
    }
    digest.update(json.dumps(settings, default=str, sort_keys=True).encode())
    for key, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{key}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files(records: Records, view: str) -> Iterator[Path]:
    """Yield the files that one view reads. Bad records are skipped: the dataset reports them."""
    for index in range(len(records)):
        try:
            for media in records[index].media:
                if media.branch == parse_view(view).kind:
                    yield records.media_path(index, media)
        except DataError as error:
            logger.debug("no features for %s", error)


def _fill_on_all_ranks(
    store: FeatureStore,
    branch: VisionBranch,
    preprocess: Preprocess,
    wanted: list[tuple[str, Path]],
    device: torch.device,
) -> list[str]:
    """Fill a cache, each rank with its shard of the files.

    Return the reasons of unreadable files on all ranks.
    """
    bad: list[str] = []
    shard = wanted[rank() :: world_size()]
    if problems := failures(lambda: _fill(store, branch, preprocess, shard, device, bad)):
        raise MedmError(f"features could not be computed: {'; '.join(problems)}")
    return [reason for part in all_gather_objects(bad) for reason in part]


def _fill(
    store: FeatureStore,
    branch: VisionBranch,
    preprocess: Preprocess,
    wanted: list[tuple[str, Path]],
    device: torch.device,
    bad: list[str],
) -> None:
    """Encode and store the wanted files; the reasons of unreadable ones are added to `bad`."""
    before = next(branch.encoder.parameters()).device
    branch.encoder.to(device).eval()
    try:
        batches = _encode(branch, preprocess, wanted, device, bad)
        first = next(batches, None)
        if first is not None:
            tokens = first.features
            store.add(
                chain([first], batches),
                most=sum(_count_rows(file, preprocess) for _, file in wanted),
                shape=tokens.shape[1:],
                dtype=tokens.dtype,
            )
    finally:
        branch.encoder.to(before)


def _encode(
    branch: VisionBranch,
    preprocess: Preprocess,
    wanted: list[tuple[str, Path]],
    device: torch.device,
    bad: list[str],
) -> Iterator[FeatureBatch]:
    """Yield batches of features (n, prefix + prod(grid), D), one row for each item.

    They are in float16 where the encoder computes in it, else in float32: exact either way.
    """
    for start in range(0, len(wanted), BATCH):
        prepared: dict[str, Prepared] = {}
        for key, file in wanted[start : start + BATCH]:
            try:
                prepared[key] = prepare(file, preprocess)
            except MediaError as error:
                if (
                    machine_fault(error) is not None
                ):  # no fault of the file: its features are not missing for good
                    raise
                bad.append(str(error))
        if not prepared:
            continue
        arrays = [item.pixels for item in prepared.values()]
        cut = _is_cut(preprocess)
        pixels = torch.from_numpy(np.concatenate(arrays) if cut else np.stack(arrays))
        with torch.inference_mode():
            parts = [branch.encode(part.to(device)).tokens.cpu() for part in pixels.split(BATCH)]
        tokens = torch.cat(parts)
        tokens = tokens if tokens.dtype == torch.float16 else tokens.float()
        placements = [item.placement for item in prepared.values()]
        rows = [len(array) for array in arrays] if cut else None
        yield FeatureBatch(list(prepared), placements, tokens.numpy(), rows)


def _is_cut(preprocess: Preprocess) -> bool:
    """Return whether images are cut into tiles, each of which is an item of the encoder."""
    return isinstance(preprocess, ImagePreprocess) and preprocess.tiles is not None


def _count_rows(file: Path, preprocess: Preprocess) -> int:
    """Return the items of a file, or the most that it can have where its header is unreadable."""
    if not isinstance(preprocess, ImagePreprocess):
        return 1
    try:
        return count_items(file, preprocess)
    except MediaError:
        return preprocess.max_items
