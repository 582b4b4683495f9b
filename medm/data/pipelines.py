"""Table of data pipelines: one line per pipeline, whose class is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from medm.registry import Registry

if TYPE_CHECKING:
    from medm.data.base import AnyPipeline
    from medm.types import Processor

PIPELINES: Registry[type[AnyPipeline]] = Registry("data pipeline", group="medm.pipelines")

PIPELINES.add(
    "conversations",
    "medm.data.conversations:Conversations",
    "turns of user and assistant with images and volumes; replies are learned",
)
PIPELINES.add(
    "pairs",
    "medm.data.pairs:Pairs",
    "an image or volume and its captions, for contrastive training",
)
PIPELINES.add(
    "studies",
    "medm.data.studies:Studies",
    "images of a study with report, findings, triplets or a question",
)


class PipelineUser(Protocol):
    """The properties of a kind of model that choose its data pipeline."""

    @property
    def pipeline(self) -> str:
        """Name of the pipeline."""
        ...

    @property
    def needs_mask(self) -> bool:
        """True if training batches carry an `attention_mask`."""
        ...


def pipeline_for(
    kind: PipelineUser, processor: Processor | None = None, *, inference: bool = False
) -> AnyPipeline:
    """Return the pipeline of a kind of model.

    Args:
        kind: the kind of model.
        processor: of the model; without it records are read, but no examples are made.
        inference: examples are prompts.

    Raises:
        UnknownNameError: no pipeline has the name that the kind gives.
    """
    pipeline = PIPELINES.get(kind.pipeline)
    return pipeline(processor, inference=inference, needs_mask=kind.needs_mask)
