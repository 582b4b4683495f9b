"""Files of one sample to arrays: augmented pixels, or cached features of a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from medm.data.base import MediaSource
from medm.data.features import FeatureStore
from medm.errors import DataError, InputLostError
from medm.imaging import Augment, Preprocess
from medm.imaging.augment import augment, augment_prepared, follow
from medm.imaging.marks import MarkedImage
from medm.imaging.placement import Placement, Prepared
from medm.types import parse_view


class FileReader:
    """Reads the files of one sample, each for its views in order.

    The pixels of a mask head keep their placement, which carries masks to them. They move with the
    usual view of the same file, which is read before: the model sees one scene in both.

    Args:
        load: from file and preprocessing to an array.
        prepare: the same with the placement.
        preprocess: by view.
        augmentation: by view, random changes of the pixels.
        features: by view, cached features of a frozen encoder, in place of the pixels of files.
        mask_view: view of the mask head; None without one.
        rng: draws the changes.
    """

    def __init__(
        self,
        load: Callable[[MediaSource, Preprocess], np.ndarray],
        prepare: Callable[[MediaSource, Preprocess], Prepared],
        preprocess: Mapping[str, Preprocess],
        *,
        augmentation: Mapping[str, Augment],
        features: Mapping[str, FeatureStore],
        mask_view: str | None,
        rng: np.random.Generator,
    ) -> None:
        self._load, self._prepare, self._preprocess = load, prepare, preprocess
        self._augmentation, self._features, self._rng = augmentation, features, rng
        self._mask_view = mask_view
        self._leading = None if mask_view is None else str(parse_view(mask_view).kind)
        self._motion: tuple[Placement, Placement] | None = None
        """Placements of the file's usual view before and after its motion."""
        self.placements: list[Placement] = []
        """Of the pixels of the mask view, in order."""

    def load(self, file: MediaSource, view: str) -> np.ndarray:
        """Return the array of a file for one of its views.

        Raises:
            DataError: the file cannot be read, or its features would lack the marks drawn on it.
            InputLostError: the file changed after its features were computed.
        """
        if view == self._mask_view:
            return self._masked(file, view)
        store = self._features.get(view)
        if store is not None and isinstance(file, MarkedImage):
            raise DataError(
                "the record has regions, which model.regions: draw marks on the pixels, and cached "
                "features have no pixels; set data.cache_features: null, or model.regions: text"
            )
        if store is None or not isinstance(file, Path):
            return self._pixels(file, view)
        found = store.get(file)
        if found is None:
            self._load(file, self._preprocess[view])  # a file that cannot be read says why
            raise InputLostError(
                f"{file.name} changed after its features were computed; start the run again"
            )
        return found

    def _pixels(self, file: MediaSource, view: str) -> np.ndarray:
        options, preprocess = self._augmentation.get(view), self._preprocess[view]
        if view == self._leading and options is not None and options.motions:
            prepared = self._prepare(file, preprocess)
            moved = augment_prepared(options, prepared, self._rng)
            self._motion = prepared.placement, moved.placement
            return moved.pixels
        array = self._load(file, preprocess)
        return array if options is None else augment(options, array, self._rng)

    def _masked(self, file: MediaSource, view: str) -> np.ndarray:
        prepared = self._prepare(file, self._preprocess[view])
        if self._motion is not None:
            prepared = follow(prepared, *self._motion)
            self._motion = None
        self.placements.append(prepared.placement)
        options = self._augmentation.get(view)
        return prepared.pixels if options is None else augment(options, prepared.pixels, self._rng)
