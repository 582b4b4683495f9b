"""Objectives: the sum of a loss from a model's output and a batch.

The table has one line per objective. An objective knows nothing of optimizers or logging, and of
ranks only its own gathering. To add one, write a new file with an `Objective` and a line here;
options of its own stand above the table, torch-free. `medm.objectives.terms` adds several up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medm.config import Options
from medm.registry import NamedBlock, Registry

if TYPE_CHECKING:
    from medm.objectives.base import Objective

SameLabel: TypeAlias = Literal["negative", "ignore", "positive"]
AbsentTargets: TypeAlias = Literal["learn", "presence-only"]


class ObjectiveOptions(Options):
    """Options of every objective."""

    name: str
    """Registered name of the objective."""

    def reads(self) -> frozenset[str]:
        """Return the fields of the model's output that it needs."""
        return frozenset()

    def objectives(self) -> dict[str, ObjectiveOptions]:
        """Return the objectives of the section by the name that messages give them."""
        return {self.name: self}


class LanguageModelingOptions(ObjectiveOptions):
    """Next-token prediction."""

    auxiliary: dict[str, float] = {}
    """Weight of each auxiliary loss that the model reports by name (`image.connector` router
    balance ...). A loss that is not named here counts once (weight 1); weight 0 switches it off."""

    def reads(self) -> frozenset[str]:
        return frozenset({"loss_sum"})


class ContrastiveOptions(ObjectiveOptions):
    """Contrastive loss over the global batch.

    It pulls two views of the same item together and pushes all other pairs apart.
    """

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax`: symmetric InfoNCE (CLIP, arXiv 2103.00020); `sigmoid`: each pair separately (SigLIP,
    2303.15343)."""
    first: str = "image_embeds"
    """Field of the model's output that holds one view, (B, D)."""
    second: str = "text_embeds"
    """Field that holds the other view, (B, D)."""
    pairs: str = "input_ids"
    """Field of the batch with one row per pair, by which pairs are counted."""
    gather: bool = True
    """Compare with the pairs of all ranks; without it each rank sees its own batch alone."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the target that is spread over all pairs (`softmax` alone)."""
    same_label: SameLabel = "negative"
    """Other pairs with the same caption or label (batch field `pair_labels`): `negative` pushes
    them apart like all others, `ignore` leaves them out of the comparison, `positive` pulls them
    together (`softmax`: the target is spread over all of them)."""

    @model_serializer(mode="wrap")
    def _older_form(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out defaults of later fields, so that runs from before them continue."""
        values: dict[str, object] = dump(self)
        for name in ("pairs", "same_label"):
            if values[name] == type(self).model_fields[name].default:
                del values[name]
        return values

    def reads(self) -> frozenset[str]:
        bias = {"logit_bias"} if self.loss == "sigmoid" else set()
        return frozenset({self.first, self.second, "logit_scale", *bias})


class SegmentationOptions(ObjectiveOptions):
    """Masks of a grounded model: binary cross-entropy and soft Dice, summed over masks.

    The defaults are those of UniBiomed (arXiv 2504.21336).
    """

    bce: float = Field(default=2.0, ge=0)
    """Weight of the binary cross-entropy, a mean over the points or voxels of a mask."""
    dice: float = Field(default=0.5, ge=0)
    """Weight of the soft Dice loss of a mask, smoothed by 1."""
    presence: float = Field(default=0.0, ge=0)
    """Weight of the binary cross-entropy of the presence logit: is the target in the image at
    all."""
    quality: float = Field(default=0.0, ge=0)
    """Weight of the squared error of the predicted IoU against the IoU of the mask, as SAM is
    trained (arXiv 2304.02643). Published grounded models leave it at 0."""
    absent: AbsentTargets = "learn"
    """Targets that are not in the image: `learn` an empty mask, or teach their presence alone
    (`presence-only`). They count as masks either way."""
    points: int | None = Field(default=12544, ge=1)
    """Points of a mask at which it is compared (112 x 112 as published); null compares every voxel.
    """
    oversample: int = Field(default=3, ge=1)
    """Candidates for each point, from which the uncertain ones are chosen."""
    important: float = Field(default=0.75, ge=0, le=1)
    """Fraction of the points that are the most uncertain candidates; the others are uniform."""

    @model_validator(mode="after")
    def _something_is_learned(self) -> SegmentationOptions:
        if not (self.bce or self.dice or self.presence):
            raise ValueError("bce, dice and presence are all 0: expected one of them above 0")
        if self.absent == "presence-only" and not self.presence:
            raise ValueError(
                "absent is presence-only and presence is 0, so absent targets teach nothing; set "
                "presence above 0"
            )
        return self

    def reads(self) -> frozenset[str]:
        quality = {"mask_quality"} if self.quality else set()
        return frozenset({"mask_logits", "mask_presence", *quality})


class ItcOptions(ObjectiveOptions):
    """Image-text contrast against soft targets: cross-entropy of both directions, their mean.

    The model gives scores and targets (momentum similarities and queues: kind `blip`).
    """

    def reads(self) -> frozenset[str]:
        return frozenset(
            {
                "itc_logits_image",
                "itc_logits_text",
                "itc_targets_image",
                "itc_targets_text",
            }
        )


class ItmOptions(ObjectiveOptions):
    """Image-text matching: cross-entropy of true pairs and of hard negatives.

    The model draws the negatives, one image for each text and one text for each image.
    """

    def reads(self) -> frozenset[str]:
        return frozenset({"itm_logits", "itm_labels"})


class MultilabelOptions(ObjectiveOptions):
    """Several labels an item, each by itself: binary cross-entropy from logits.

    Labels that a record does not know (null) teach nothing and are not counted.
    """

    def reads(self) -> frozenset[str]:
        return frozenset({"label_logits"})


class AnswersOptions(ObjectiveOptions):
    """Answers as classes: binary cross-entropy of a branch's answers, and the type of the question.

    The binary cross-entropy of a question is its mean over the answers of its list, as published.
    """

    part: Literal["all", "closed", "open", "type"] = "all"
    """What is learned. `all` gives each question the same weight; MOTOR adds the mean over closed
    questions and that over open ones: two terms, `part: closed` and `part: open`."""
    type_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy of the type beside the answers (`all`)."""

    def reads(self) -> frozenset[str]:
        return frozenset({"answer_logits_closed", "answer_logits_open", "answer_logits_type"})


OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective", group="medm.objectives", options=ObjectiveOptions
)

OBJECTIVES.add(
    "language-modeling",
    "medm.objectives.language_modeling:LanguageModeling",
    "next-token loss over the labeled tokens, and the model's auxiliary losses",
    options=LanguageModelingOptions,
)
OBJECTIVES.add(
    "contrastive",
    "medm.objectives.contrastive:Contrastive",
    "image-text contrast over the global batch (CLIP or SigLIP loss)",
    options=ContrastiveOptions,
)
OBJECTIVES.add(
    "segmentation",
    "medm.objectives.segmentation:Segmentation",
    "masks of a grounded model: cross-entropy and Dice at uncertain points, or at every voxel",
    options=SegmentationOptions,
)
OBJECTIVES.add(
    "itc",
    "medm.objectives.image_text_contrast:ImageTextContrast",
    "image-text contrast against soft targets of a momentum model (ALBEF, BLIP)",
    options=ItcOptions,
)
OBJECTIVES.add(
    "itm",
    "medm.objectives.matching:ImageTextMatching",
    "image-text matching: true pairs against hard negatives that the model draws",
    options=ItmOptions,
)
OBJECTIVES.add(
    "multilabel",
    "medm.objectives.classification:Multilabel",
    "several labels an item, each by itself; unknown ones are left out",
    options=MultilabelOptions,
)
OBJECTIVES.add(
    "answers",
    "medm.objectives.answers:AnswerClasses",
    "answers as classes: the right ones of the list of a question's type, and that type",
    options=AnswersOptions,
)


class TermOptions(Options):
    """One term of a sum of objectives."""

    objective: Annotated[ObjectiveOptions, NamedBlock(OBJECTIVES)]
    """The objective, by name, and its options."""
    weight: float = Field(default=1.0, ge=0)
    """Factor of its loss, which is a mean over the items of the step. Auxiliary losses have weights
    of their own."""


class TermsOptions(Options):
    """Several objectives on one run of the model: `objective: {terms: {...}}`."""

    terms: dict[str, TermOptions] = Field(min_length=1)
    """The objectives by a name of your choice; each is logged as `loss/<name>`."""

    def objectives(self) -> dict[str, ObjectiveOptions]:
        """Return the objectives of the section by the name that messages give them."""
        return {f"terms.{name}": term.objective for name, term in self.terms.items()}
