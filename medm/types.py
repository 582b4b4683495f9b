"""Data types that packages share: a record, an encoded example, a batch, vision features.

Torch is imported for type checkers only, so that reading and checking annotation files needs none
of it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    TypedDict,
    get_args,
    runtime_checkable,
)

from medm.errors import RecipeError, suggest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

Config: TypeAlias = dict[str, object]
"""A JSON object: options, sizes or settings by name. Parameters take `Mapping[str, object]`."""

MODEL_TYPE_PREFIX = "medm-"
"""Beginning of the `model_type` of every model folder that medm saves."""

IGNORE_INDEX = -100
"""Label of a position that is not learned; the value that torch's cross-entropy ignores by
default."""

ANSWER_BRANCHES = ("closed", "open")
"""Types of questions in the order of their numbers: those with a choice of answers, and others."""

Kind: TypeAlias = Literal["image", "volume"]
"""Kind of file: 2-D or 3-D."""

PLACEHOLDERS: Mapping[str, str] = {"image": "<image>", "volume": "<volume>"}
"""By kind the token that stands for a file in user and system turns."""

KIND_OF_PLACEHOLDER: Mapping[str, Kind] = {
    PLACEHOLDERS["image"]: "image",
    "<image3d>": "volume",
    PLACEHOLDERS["volume"]: "volume",
}
"""Placeholders that records may hold, and their kinds: the tokens, and a synonym of MedM-VL and
M3D."""

_VIEW = re.compile(r"(?P<kind>[a-z0-9]+)(@(?P<variant>[a-z0-9][a-z0-9_-]*))?")


class View(NamedTuple):
    """A kind of file with a preprocessing of its own, by name: "image", "volume", "image@sam2".

    The same file can reach two parts of a model differently: the pixels of an example and the
    preprocessing of a processor are keyed by view. The branches of a model are the views that its
    records' files are read for.
    """

    kind: Kind
    variant: str | None = None
    """The part after the @; None for the usual view of the kind."""

    def __str__(self) -> str:
        return self.kind if self.variant is None else f"{self.kind}@{self.variant}"

    @property
    def placeholder(self) -> str:
        """The text that stands for a file of the kind."""
        return PLACEHOLDERS[self.kind]


def parse_view(name: str) -> View:
    """Return the view of a name. Raises `RecipeError` for an unknown name."""
    found = _VIEW.fullmatch(name)
    kinds: tuple[Kind, ...] = get_args(Kind)
    kind = next((known for known in kinds if found is not None and found["kind"] == known), None)
    if found is None or kind is None:
        raise RecipeError(
            f"view {name!r}: expected a kind of file, {' or '.join(kinds)}, alone or followed by "
            "@ and a name of small letters, digits, '_' and '-' "
            f"(image@sam2){suggest(name, kinds)}"
        )
    return View(kind, found["variant"])


def views_of(kind: str, names: Iterable[str]) -> list[str]:
    """Return the names of all views of a kind of file, in their order."""
    return [name for name in names if name.partition("@")[0] == kind]


MASK_TOKEN = "[SEG]"
"""Control token that stands for one mask in a reply."""

PHRASE_TOKENS = ("<p>", "</p>")
"""Marks around the words of a reply that the next mask belongs to: control tokens of models that
list them in `control_tokens`, text for others."""

MASK_VIEW = "masks"
"""Variant of the view that a mask head reads: `image@masks`, `volume@masks`."""

Role: TypeAlias = Literal["system", "user", "assistant"]

JsonObject: TypeAlias = dict[str, Any]
"""An object of a JSON file: a record, a row of a benchmark, results."""

PredictionField: TypeAlias = Literal["text", "masks", "scores", "embeddings", "matches"]
"""Output of a model, or of a file of predictions, for an item of a benchmark; a benchmark needs
some."""


@dataclass(frozen=True, slots=True)
class Media:
    """A place in a turn where an image or a volume stands."""

    branch: str
    """Kind of file, "image" or "volume". Every view of the kind that a model has reads it."""
    path: str | None = None
    """File relative to the data root; None when the caller hands over the pixels."""


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A place in a reply where one special token stands that the model learns to write.

    The reader of records writes it. The same letters in a text part stay letters.
    """

    token: str
    """The token as annotation files write it: `[SEG]`."""
    mask: int | None = None
    """Of a `[SEG]`: its number among those of the record, from 0; see `MaskSource.token`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSource:
    """One mask of a record, as it is written: a file, a run-length code, polygons, or absent.

    Several masks may share a `[SEG]`: those of the same finding in the slices of a study.
    """

    token: int
    """The `[SEG]` in front of it, by its number among those of the record."""
    media: int
    """Image or volume that it belongs to, by its position in `Sample.media`."""
    field: str
    """Field of the record, for messages: `masks.0`."""
    path: str | None = None
    """File relative to the data root: PNG, .npy, NIfTI or another label map."""
    value: int | None = None
    """Label of the target in a label map; None takes every voxel that is not 0."""
    rle: JsonObject | None = None
    """COCO run-length code: `size` [rows, columns] and `counts`, a list or compressed text."""
    polygons: tuple[tuple[float, ...], ...] | None = None
    """Outlines x1, y1, x2, y2 ... in pixels of the file, whose union is the mask."""
    phrase: str | None = None
    """Words of the reply that the mask belongs to."""

    @property
    def absent(self) -> bool:
        """The target is not in the image: an empty mask, written as null."""
        return self.path is None and self.rle is None and self.polygons is None


REGION_MARK = "<region>"
"""Text that stands for a region of an image in user turns of records with `regions`."""


@dataclass(frozen=True, slots=True)
class RegionMark:
    """A place in a user turn where a region of an image is named.

    The model reads the text `<region>` beside a mark in the image, or the region's coordinates.
    """

    number: int
    """Position in `Sample.regions`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionSource:
    """A region of an image that a user turn asks about: exactly one of a box, point or mask."""

    media: int
    """Image that it lies in, by its position in `Sample.media`."""
    field: str
    """Field of the record, for messages: `regions.0`."""
    box: tuple[float, ...] | None = None
    """x1, y1, x2, y2 in pixels of the upright file; the upper corner is one past the last pixel."""
    point: tuple[float, ...] | None = None
    """x, y in pixels of the upright file."""
    contour: MaskSource | None = None
    """Mask whose outline is the region."""
    mask: MaskSource | None = None
    """Mask whose area is the region."""


TurnPart: TypeAlias = str | Media | ControlToken | RegionMark


@dataclass(frozen=True, slots=True)
class Turn:
    """One message.

    Text parts are text: nothing inside them is ever read as a control token or placeholder.
    """

    role: Role
    content: tuple[TurnPart, ...]

    @property
    def text(self) -> str:
        """The text parts joined."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def as_written(self) -> str:
        """The turn as annotation files write it: placeholders for media, control tokens as text."""
        return "".join(written(part) for part in self.content)


def written(part: TurnPart) -> str:
    """Return a part of a turn as annotation files write it."""
    if isinstance(part, Media):
        return f"<{part.branch}>"
    if isinstance(part, RegionMark):
        return REGION_MARK
    return part.token if isinstance(part, ControlToken) else part


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSample(ABC):
    """One record of an annotation file, read and checked.

    Each data pipeline has a subclass of its own.
    """

    id: str | None = None
    task: str | None = None
    file: str | None = None
    index: int | None = None
    """Annotation file and position in it, for messages."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the record, passed through untouched (question type, split ...)."""
    masks: tuple[MaskSource, ...] = ()
    """Masks in the order of their control tokens."""

    @property
    @abstractmethod
    def media(self) -> tuple[Media, ...]:
        """Every image and volume of the record, in order."""


@dataclass(frozen=True, slots=True)
class Sample(BaseSample):
    """A conversation, checked: placeholders and files agree, roles are in order."""

    turns: tuple[Turn, ...]
    answer: str | None = None
    """Reference answer of an inference record; never shown to the model."""
    regions: tuple[RegionSource, ...] = ()
    """Regions that user turns ask about, in the order of their `<region>`."""

    @property
    def media(self) -> tuple[Media, ...]:
        """Every image and volume, in the order of their placeholders."""
        return tuple(
            part for turn in self.turns for part in turn.content if isinstance(part, Media)
        )


class MediaExample(Protocol):
    """Pixels of an example of any pipeline: the input of dataset, feature caches and collators."""

    pixels: dict[str, list[np.ndarray]]
    """Per view the preprocessed arrays (C, *spatial)."""
    features: dict[str, list[np.ndarray]]
    """Per branch the encoder's output (prefix + prod(grid), D), in place of `pixels`, where it is
    cached."""
    task_id: int
    """Position of the sample's task in the model's task list; 0 where the model has none."""


@dataclass(slots=True)
class MaskTargets:
    """Masks of an example, on the grid that a mask head is trained on."""

    arrays: list[np.ndarray] = field(default_factory=list)
    """(*grid) uint8 of 0 and 1, one for each mask."""
    tokens: list[int] = field(default_factory=list)
    """Of each mask: its `[SEG]`, by the number among those of the example."""
    items: list[int] = field(default_factory=list)
    """Of each mask: position of its image in `pixels` of the mask view."""


class EncodedText(NamedTuple):
    """A text that is learned, as tokens."""

    input_ids: list[int]
    """With the tokens of the text encoder around it, cut to its length."""
    labels: list[int]
    """Same length; `IGNORE_INDEX` at the first token and at what is given before the text."""


Triplet: TypeAlias = tuple[str, str, str]
"""A statement of a report: subject, relation, object."""


@dataclass(slots=True)
class Example:
    """A conversation as the model takes it, before batching; a `MediaExample`."""

    input_ids: list[int]
    labels: list[int]
    """Same length as `input_ids`; `IGNORE_INDEX` wherever nothing is learned."""
    pixels: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Per view the preprocessed arrays (C, *spatial), in the order of their placeholders. An image
    that is cut into tiles has one for each tile."""
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    task_id: int = 0
    masks: MaskTargets | None = None
    """Masks to learn; the mask view in `pixels` then holds the images they belong to, and no
    others."""


Batch: TypeAlias = Mapping[str, Any]
"""Keyword arguments of a model's forward. Each data pipeline documents its own, as
`ConversationBatch` does."""


class ConversationBatch(TypedDict, total=False):
    """A batch of conversations. Keys without content are absent."""

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) int64, 0 at padding. Absent in packed rows, and in training where the kind of model
    needs none (`ModelKind.needs_mask`)."""
    labels: Tensor
    """(B, T) int64; `IGNORE_INDEX` at padding and wherever nothing is learned."""
    label_positions: Tensor
    """(L,) int64, in training: from which of the B * T positions a label is predicted, the one
    before it."""
    position_ids: Tensor
    """(B, T) int64, in packed rows alone: begins again at 0 with each sample."""
    pixels: dict[str, Tensor]
    """By branch (N, C, *spatial) float32, items of all samples in order; a branch without input is
    absent."""
    features: dict[str, Tensor]
    """By branch (N, prefix + prod(grid), D), in place of the branch's pixels: the cached output of
    the encoder."""
    task_ids: dict[str, Tensor]
    """By branch (N,) int64, the task of the sample that each item belongs to."""
    mask_targets: Tensor
    """(M, *grid) uint8, the masks of all samples in order."""
    mask_tokens: Tensor
    """(M,) int64: of each mask its `[SEG]`, by the number among those of the batch in the order of
    rows and positions."""
    mask_items: Tensor
    """(M,) int64: of each mask the position of its image in `pixels` of the mask view."""
    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    """(samples + 1,) int32, in padding-free rows alone: where each sample begins, under
    transformers' names."""
    max_length_q: int
    max_length_k: int
    """Tokens of the longest sample of a padding-free row."""


class VisionFeatures(NamedTuple):
    """Output of an encoder.

    It is a tuple, because ZeRO-3 finds the tensors of a module's output only in tuples and dicts.

    `tokens` is (B, P + prod(grid), D): first `prefix` tokens that stand for no place (CLS), then
    one token per cell of `grid`, the last axis fastest. Two grid axes for images (rows, columns),
    three for volumes (depth, rows, columns): the length of `grid` is the only difference between
    the two.
    """

    tokens: Tensor
    grid: tuple[int, ...]
    prefix: int = 0
    pooled: Tensor | None = None
    """(B, D_pooled), one vector per item, where the encoder has one."""


class Processor(Protocol):
    """Processor of a kind of model: the way from files and texts to its inputs.

    Training, inference and `medm data check` use the same one. A data pipeline may need more of it,
    as `ConversationProcessor` says for conversations.
    """

    @property
    def preprocess(self) -> Mapping[str, Any]:
        """Preprocessing of the pixels (`medm.imaging.Preprocess`) by view, e.g. "image@sam2"."""
        ...

    def save_pretrained(
        self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> object:
        """See `transformers.ProcessorMixin.save_pretrained`."""
        ...


@runtime_checkable
class ConversationProcessor(Processor, Protocol):
    """Processor of a kind of model whose records are conversations."""

    tokenizer: PreTrainedTokenizerBase
    placeholder_ids: dict[str, int]
    """Per branch the token that stands for one vision token."""
    control_token_ids: dict[str, int]
    """Ids of the control tokens in replies, by their text (`[SEG]`)."""
    mask_view: str | None
    """View of the mask head, which no placeholder stands for; None without one."""
    mask_grid: tuple[int, ...] | None
    """Grid on which masks are learned."""
    regions: Literal["draw", "text"] | None
    """How regions of records are read: marks on the pixels, or coordinates in the text."""

    @property
    def num_tokens(self) -> Mapping[str, int]:
        """Per branch the vision tokens of one item."""
        ...

    @property
    def pad_id(self) -> int:
        """Id that fills up short rows."""
        ...

    def encode(
        self,
        sample: Sample,
        pixels: Mapping[str, list[np.ndarray]],
        *,
        generation: bool = False,
        masks: MaskTargets | None = None,
    ) -> Example:
        """Make an example of a checked sample and its preprocessed pixels.

        Args:
            sample: the conversation.
            pixels: by view, in the order of the files; for `mask_view` the files that masks belong
                to.
            generation: the prompt ends where the assistant's reply begins, and nothing is labeled.
            masks: to learn, on `mask_grid`.
        """
        ...


class Embedder(Protocol):
    """Model that gives vectors of files and of texts in one space, ready for use."""

    def pixels(self, pixels: Tensor) -> Tensor:
        """Return vectors (N, D) of length 1 of preprocessed pixels (N, C, *spatial)."""
        ...

    def ensembles(self, classes: Sequence[Sequence[str]]) -> Tensor:
        """Return one vector (K, D) of length 1 for the texts of each class."""
        ...

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the scores (N, K) of vectors (N, D) and (K, D)."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerItem:
    """An item of a benchmark, with its files."""

    sample: Sample
    pixels: list[np.ndarray]
    """Its files in order, preprocessed, each (C, *spatial)."""
    question: str | None
    """What is asked; None where the answer is a report of the files."""


class Answerer(Protocol):
    """Model that answers items of a benchmark, ready for use."""

    @property
    def max_files(self) -> int | None:
        """Files of an item that are read, at most."""
        ...

    def answer(self, items: Sequence[AnswerItem]) -> list[JsonObject]:
        """Return the answer to each item, as fields of a line of predictions: `reply`, `scores`,
        `embedding`, `text_embeddings`.
        """
        ...


class VisionBranch(Protocol):
    """One way for vision to come into a model, as `MedmModel.encoders` gives it.

    What encodes files once (`medm.training.feature_caching`) and what counts memory
    (`medm.models.estimate`) need no more of a model than this.
    """

    encoder_bypassed: bool
    """Set by a run that hands over cached features on every rank: then no rank may touch the
    encoder."""

    @property
    def encoder(self) -> nn.Module:
        """Vision encoder (`medm.encoders.base.VisionEncoder`)."""
        ...

    @property
    def connector(self) -> nn.Module:
        """Module that leads to the language model: called with features and task ids (N,)."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the input."""
        ...

    @property
    def spatial(self) -> tuple[int, ...]:
        """Size of the input, (height, width) or (depth, height, width)."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of one item in the language model's sequence."""
        ...

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Return the vision features of (N, C, *spatial)."""
        ...

    def from_cached(self, features: VisionFeatures | Tensor) -> VisionFeatures:
        """Return features from cached output of `encode`.

        Tokens alone have the grid of the branch's input size.
        """
        ...
