"""From the `data` section of a recipe to what a trainer takes: datasets, a sampler, collators.

The annotation files are checked as a whole before anything is built on them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from medm.data.build import build_batches, build_collator
from medm.data.cached import loader
from medm.data.check import Report, check, merged
from medm.data.collator import Collator
from medm.data.dataset import COUNTED, ConversationDataset
from medm.data.features import FeatureStore
from medm.data.limits import BadRecordsLimit
from medm.data.options import DataOptions, SourceOptions
from medm.data.records import Records
from medm.distributed import all_gather_objects, rank, world_size
from medm.errors import DataError, RecipeError
from medm.training.options import TrainOptions
from medm.types import Batch, Processor

logger = logging.getLogger(__name__)


class TrainingData:
    """Everything about the data of a run.

    Args:
        options: the `data` section.
        train: the `train` section, for batch sizes and the seed.
        processor: of the model; encodes samples.
        rank: this process.
        world: number of processes.
        flat: pack a whole batch into one row that says where samples begin; see `MedmModel.separate_samples`.

    Raises:
        RecipeError: no training data.
        DataError: a bad record, where the policy is to stop; every one of them was logged.
    """

    def __init__(
        self,
        options: DataOptions,
        train: TrainOptions,
        processor: Processor,
        *,
        rank: int,
        world: int,
        flat: bool = False,
    ) -> None:
        if not options.train:
            raise RecipeError("data.train: no annotation file; name at least one")
        if train.eval_strategy != "no" and not options.eval:
            raise RecipeError(
                f"train.eval_strategy: {train.eval_strategy} needs held-out records; name files in data.eval"
            )
        self.options, self.train_options, self.processor = options, train, processor
        self.files = [source.path for source in (*options.train, *options.eval)]
        found = self._check("training", options.train)
        lengths = found.lengths
        self._left_out = sum(length == 0 for length in lengths)
        self.train = self._dataset(options.train, found, augmented=True)
        self.evaluation: ConversationDataset | None = None
        if options.eval:
            self.evaluation = self._dataset(options.eval, self._check("held-out", options.eval), augmented=False)
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
        )
        self.collate: Callable[[list[Any]], Batch] = build_collator(options, pad_id=processor.pad_id, flat=flat)
        self.eval_collate: Callable[[list[Any]], Batch] = Collator(processor.pad_id)

    def use_features(self, stores: Mapping[str, FeatureStore]) -> None:
        """Read these features in the place of their branches' pixels."""
        for dataset in (self.train, self.evaluation):
            if dataset is not None:
                dataset.features = dict(stores)

    @property
    def records(self) -> list[Records]:
        """What is trained and evaluated on."""
        return [dataset.records for dataset in (self.train, self.evaluation) if dataset is not None]

    @property
    def counts(self) -> dict[str, int]:
        """Records that the check left out, and those that were left out or shortened since. All processes call it."""
        noted = all_gather_objects({what: self.train.noted(what) for what in COUNTED})
        since = {what: len(set().union(*(one[what] for one in noted))) for what in COUNTED}
        return {"left_out_by_check": self._left_out, **since}

    def _to_text(self, ids: list[int]) -> str:
        return str(self.processor.tokenizer.decode(ids))

    def _check(self, what: str, sources: list[SourceOptions]) -> Report:
        """Look at every record, each process at its share; log and return what was found."""
        share = check(
            sources,
            share=(rank(), world_size()),
            preprocess=self.processor.preprocess,
            encode=self.processor.encode,
            # The preview shows what a record says, so it is for those who ask for it.
            to_text=self._to_text if logger.isEnabledFor(logging.DEBUG) else None,
            max_length=self.options.max_length,
            too_long=self.options.too_long,
            placeholder_ids=self._placeholders,
            progress=lambda done, total: logger.info("checking %s records: %d of %d", what, done, total),
        )
        report = merged(all_gather_objects(share))
        if rank() == 0:
            logger.info("%s records\n%s", what, "\n".join(report.lines()))
        self._judge(what, report)
        return report

    def _judge(self, what: str, report: Report) -> None:
        if report.num_bad and self.options.bad_records == "stop":
            raise DataError(
                f"{report.num_bad} of {report.records} {what} records are bad; the first: {report.bad[0]}. Fix them, "
                "or set data.bad_records: skip"
            )
        limit = BadRecordsLimit(self.options.bad_records_limit, report.records)
        if limit.exceeded(report.num_bad):
            raise limit.error(report.num_bad, str(report.bad[0]), what=what)
        if not any(report.lengths):
            raise DataError(f"none of {report.records} {what} records can be used")

    @property
    def _placeholders(self) -> list[int]:
        return list(self.processor.placeholder_ids.values())

    def _dataset(self, sources: list[SourceOptions], found: Report, *, augmented: bool) -> ConversationDataset:
        return ConversationDataset(
            Records(sources),
            self.processor.encode,
            self.processor.preprocess,
            load=loader(self.options.cache),
            max_length=self.options.max_length,
            too_long=self.options.too_long,
            placeholder_ids=self._placeholders,
            bad_records=self.options.bad_records,
            bad_records_limit=BadRecordsLimit(self.options.bad_records_limit, found.records, before=found.num_bad),
            usable=[length > 0 for length in found.lengths],
            augmentation=self.options.augment if augmented else None,
            seed=self.train_options.seed,
        )
