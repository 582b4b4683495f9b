"""A saved model of studies, and batches of studies from records.

Knows nothing of annotation files, output files or processes; `medm.inference.batch` runs it over
many records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from medm.errors import RecipeError
from medm.inference.loading import load_model
from medm.inference.options import EmbedOptions, InferOptions, changed_fields
from medm.types import BaseSample, PredictionField

if TYPE_CHECKING:
    from medm.data.studies import StudyExample
    from medm.models.blip.answering import StudyAnswerer, StudyFiles

CANDIDATES = "candidates"
"""Field of a record that lists the ids of records whose reports are matched with its images."""


def make_studies(examples: Sequence[Any], samples: Sequence[BaseSample]) -> StudyFiles:
    """Return the studies of examples as one batch."""
    from medm.models.blip.answering import StudyFiles

    items = [cast("StudyExample", example).pixels["image"] for example in examples]
    stacked = np.stack([image for images in items for image in images])
    return StudyFiles(
        pixels={"image": torch.from_numpy(stacked.astype(np.float32, copy=False))},
        counts=[len(images) for images in items],
        questions=[getattr(sample, "question", None) for sample in samples],
        answer_types=[getattr(sample, "answer_type", None) for sample in samples],
        reports=[getattr(sample, "report", None) for sample in samples],
        candidates=[
            tuple(map(str, getattr(sample, "extra", {}).get(CANDIDATES, ()))) for sample in samples
        ],
    )


def study_outputs(
    options: InferOptions | EmbedOptions, gives: frozenset[PredictionField]
) -> frozenset[PredictionField]:
    """Return what a run writes of each study.

    Args:
        options: of the run.
        gives: what the model gives.

    Raises:
        RecipeError: the model does not give what is asked for, or options of another kind of model
            are set.
    """
    if isinstance(options, EmbedOptions):
        return frozenset({"embeddings"})
    if named := changed_fields(options.generation):
        raise RecipeError(
            f"generation: {', '.join(named)}: for language models; model {options.model} writes by "
            "beam search. Set beams, max_length and min_length of studies"
        )
    answers = options.studies.answers
    both: frozenset[PredictionField] = frozenset({"text", "scores"})
    wanted = both & gives if answers == "all" else frozenset({answers})
    if not wanted or not wanted <= gives:
        asked = "text or scores" if answers == "all" else answers
        raise RecipeError(
            f"medm infer writes {asked} of studies; model {options.model} gives "
            f"{' and '.join(sorted(gives)) or 'nothing'}"
            + ("; medm embed writes its vectors" if "embeddings" in gives else "")
        )
    return wanted


def load_studies(
    options: InferOptions | EmbedOptions,
    wanted: frozenset[PredictionField],
    reports: Mapping[str, str],
    *,
    device: torch.device,
) -> StudyAnswerer:
    """Return the model of a folder on a device, ready for studies.

    Args:
        options: of the run.
        wanted: what is written of each study.
        reports: by id the reports that candidates name.
        device: of the weights.

    Raises:
        CheckpointError: see `medm.models.load`.
        RecipeError: knowledge is switched off in a model without any.
    """
    from medm.models.blip.answering import StudyAnswerer
    from medm.models.blip.modeling import MedmBlip
    from medm.models.blip.processing import MedmBlipProcessor

    model, processor = load_model(
        options.model,
        MedmBlip,
        refusal="reads no studies; expected a model of kind blip",
        device=device,
        dtype=options.dtype,
    )
    assert isinstance(processor, MedmBlipProcessor)
    if options.studies.knowledge == "off":
        if model.knowledge is None:
            raise RecipeError(
                f"knowledge off: model {options.model} has no model.knowledge; leave it out"
            )
        model.knowledge = None
    asked = options.studies
    return StudyAnswerer(
        model,
        processor,
        wanted,
        batch_size=options.batch_size,
        beams=asked.beams,
        max_length=asked.max_length,
        min_length=asked.min_length,
        with_reports=isinstance(options, EmbedOptions) and options.captions,
        reports=reports,
    )
