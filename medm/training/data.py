"""From the `data` section of a recipe to what a trainer takes: datasets, a sampler, collators.

The annotation files are checked as a whole before anything is built on them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from medm.data.batches import build_batches, build_collator
from medm.data.cached import loader
from medm.data.check import Report, check, merged
from medm.data.collator import Collator
from medm.data.dataset import ConversationDataset
from medm.data.features import FeatureStore
from medm.data.options import DataOptions, SourceOptions
from medm.data.records import Records
from medm.errors import DataError, RecipeError
from medm.training.options import TrainOptions
from medm.training.processes import gathered, rank, world_size
from medm.types import Batch

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
        self, options: DataOptions, train: TrainOptions, processor: Any, *, rank: int, world: int, flat: bool = False
    ) -> None:
        if not options.train:
            raise RecipeError("data.train: no annotation file; name at least one")
        if train.eval_strategy != "no" and not options.eval:
            raise RecipeError(
                f"train.eval_strategy: {train.eval_strategy} needs held-out records; name files in data.eval"
            )
        self.options, self.train_options, self.processor = options, train, processor
        self.files = [source.path for source in (*options.train, *options.eval)]
        lengths = self._check("training", options.train)
        self._left_out = sum(length == 0 for length in lengths)
        if options.eval:
            self._check("held-out", options.eval)
        self.train = self._dataset(options.train, augmented=True)
        self.evaluation: ConversationDataset | None = (
            self._dataset(options.eval, augmented=False) if options.eval else None
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
        """Records that the check left out, and those that this process left out or shortened since."""
        return {"left_out_by_check": self._left_out, **self.train.counts}

    def _check(self, what: str, sources: list[SourceOptions]) -> list[int]:
        """Look at every record, each process at its share; log what was found and return the tokens of each."""
        share = check(
            sources,
            share=(rank(), world_size()),
            preprocess=self.processor.preprocess,
            encode=self.processor.encode,
            to_text=self.processor.tokenizer.decode,
            max_length=self.options.max_length,
            too_long=self.options.too_long,
            placeholder_ids=self._placeholders,
            progress=lambda done, total: logger.info("checking %s records: %d of %d", what, done, total),
        )
        report = merged(gathered(share))
        if rank() == 0:
            logger.info("%s records\n%s", what, "\n".join(report.lines()))
        self._judge(what, report)
        return report.lengths

    def _judge(self, what: str, report: Report) -> None:
        limit = self.options.bad_records_limit
        if report.num_bad and self.options.bad_records == "stop":
            raise DataError(
                f"{report.num_bad} of {report.records} {what} records are bad; the first: {report.bad[0]}. Mend them, "
                "or set data.bad_records: skip"
            )
        if limit is not None and report.num_bad > limit:
            raise DataError(
                f"{report.num_bad} of {report.records} {what} records are bad, more than "
                f"data.bad_records_limit = {limit}; the first: {report.bad[0]}"
            )
        if not any(report.lengths):
            raise DataError(f"none of {report.records} {what} records can be used")

    @property
    def _placeholders(self) -> list[int]:
        return list(self.processor.placeholder_ids.values())

    def _dataset(self, sources: list[SourceOptions], *, augmented: bool) -> ConversationDataset:
        return ConversationDataset(
            Records(sources),
            self.processor.encode,
            self.processor.preprocess,
            load=loader(self.options.cache),
            max_length=self.options.max_length,
            too_long=self.options.too_long,
            placeholder_ids=self._placeholders,
            bad_records=self.options.bad_records,
            bad_records_limit=self.options.bad_records_limit,
            augmentation=self.options.augment if augmented else None,
            seed=self.train_options.seed,
        )
