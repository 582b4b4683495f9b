"""From the `data` section of a recipe to datasets, sampler and collators of a trainer.

The annotation files are checked as a whole before anything is built on them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from medm.data.base import AnyPipeline
from medm.data.build import build_batches
from medm.data.cached import loader
from medm.data.check import Report, check, merged
from medm.data.dataset import COUNTED, ExampleDataset
from medm.data.features import FeatureStore
from medm.data.limits import BadRecordsLimit, LengthLimit
from medm.data.options import DataOptions, SourceOptions
from medm.data.records import Records
from medm.distributed import all_gather_objects, rank, world_size
from medm.errors import DataError, RecipeError
from medm.training.options import TrainOptions
from medm.types import MediaExample

logger = logging.getLogger(__name__)


class TrainingData:
    """Datasets, sampler and collators of a run.

    Args:
        options: the `data` section.
        train: the `train` section, for batch sizes and the seed.
        pipeline: of the kind of model, with the model's processor.
        rank: this process.
        world: number of ranks.
        padding_free: with packing, put a whole batch into one row; see
            `MedmModel.enable_padding_free`.

    Raises:
        RecipeError: no training data, or a setting that the pipeline cannot follow.
        DataError: a bad record, where the policy is to stop; every one of them was logged.
    """

    def __init__(
        self,
        options: DataOptions,
        train: TrainOptions,
        pipeline: AnyPipeline,
        *,
        rank: int,
        world: int,
        padding_free: bool = False,
    ) -> None:
        if not options.train:
            raise RecipeError("data.train: no annotation file; name at least one")
        if train.eval_strategy != "no" and not options.eval:
            raise RecipeError(
                f"train.eval_strategy: {train.eval_strategy} needs held-out records; name files "
                "in data.eval"
            )
        pipeline.check_options(options)
        self.options, self.train_options, self.pipeline = options, train, pipeline
        self.limit = LengthLimit(options.max_length, options.too_long)
        self.files = [source.path for source in (*options.train, *options.eval)]
        found = self._check("training", options.train)
        self.concepts = found.concepts
        lengths = found.lengths
        self._left_out = sum(length == 0 for length in lengths)
        self.train = self._dataset(options.train, found, augmented=True)
        self.evaluation: ExampleDataset[MediaExample] | None = None
        if options.eval:
            self.evaluation = self._dataset(
                options.eval, self._check("held-out", options.eval), augmented=False
            )
        self.sampler = build_batches(
            options,
            self.train.records.sizes,
            batch_size=train.per_device_train_batch_size,
            rank=rank,
            world=world,
            accumulation=train.gradient_accumulation_steps,
            drop_last=train.dataloader_drop_last,
            lengths=lengths,
            seed=train.seed,
            groups=self.train.records.groups,
        )
        self.collate = pipeline.training_collator(options, padding_free=padding_free)
        self.eval_collate = pipeline.eval_collator()

    def use_features(self, stores: Mapping[str, FeatureStore]) -> None:
        """Use cached features in place of the pixels of their branches."""
        for dataset in (self.train, self.evaluation):
            if dataset is not None:
                dataset.features = dict(stores)

    @property
    def records(self) -> list[Records[Any, Any]]:
        """The records of the training and of the evaluation data."""
        return [dataset.records for dataset in (self.train, self.evaluation) if dataset is not None]

    @property
    def counts(self) -> dict[str, int]:
        """Number of records that the check left out, and of those left out or shortened since.

        All ranks call it.
        """
        noted = all_gather_objects({what: self.train.noted(what) for what in COUNTED})
        since = {what: len(set().union(*(one[what] for one in noted))) for what in COUNTED}
        return {"left_out_by_check": self._left_out, **since}

    def _check(self, what: str, sources: list[SourceOptions]) -> Report:
        """Check every record, each rank its shard; log and return the report."""
        shard = check(
            sources,
            self.pipeline,
            shard=(rank(), world_size()),
            # The preview shows the content of a record, so it is shown on request only.
            preview=logger.isEnabledFor(logging.DEBUG),
            length_limit=self.limit,
            progress=lambda done, total: logger.info(
                "checking %s records: %d of %d", what, done, total
            ),
        )
        report = merged(all_gather_objects(shard))
        if rank() == 0:
            logger.info("%s records\n%s", what, "\n".join(report.lines()))
        self._judge(what, report)
        return report

    def _judge(self, what: str, report: Report) -> None:
        if report.num_bad and self.options.bad_records == "stop":
            raise DataError(
                f"{report.num_bad} of {report.records} {what} records are bad; the first: "
                f"{report.bad[0]}. Fix them, or set data.bad_records: skip"
            )
        limit = BadRecordsLimit(self.options.bad_records_limit, report.records)
        if limit.exceeded(report.num_bad):
            raise limit.error(report.num_bad, str(report.bad[0]), what=what)
        if not any(report.lengths):
            raise DataError(f"none of {report.records} {what} records can be used")

    def _dataset(
        self, sources: list[SourceOptions], found: Report, *, augmented: bool
    ) -> ExampleDataset[MediaExample]:
        load = loader(self.options.cache)
        return ExampleDataset(
            Records(sources, self.pipeline),
            load=load,
            prepare=load.prepare,
            limit=self.limit,
            bad_records=self.options.bad_records,
            bad_records_limit=BadRecordsLimit(
                self.options.bad_records_limit, found.records, before=found.num_bad
            ),
            usable=[length > 0 for length in found.lengths],
            augmentation=self.options.augment if augmented else None,
            seed=self.train_options.seed,
        )
