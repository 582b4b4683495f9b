"""A saved model in a few lines of Python. Not for clinical use.

    model = medm.load("work_dirs/finetune")
    reply = model.ask("What is seen?", image="a.png")

Preprocessing, prompts and decoding are those of `medm infer` and `medm chat`, whose code runs here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from medm.config import validate
from medm.data.base import missing_branch
from medm.data.regions import marked_image, prepare_regions
from medm.data.turns import parse_record
from medm.errors import DataError
from medm.imaging import load_pixels, resolve_inside
from medm.imaging.images import check_image
from medm.imaging.sources import rereadable
from medm.inference.chat import Conversation
from medm.inference.generator import Engine, Request, load_engine, pick_device, prepare
from medm.inference.grounded_text import Phrase
from medm.inference.options import GenerationOptions, SegmentationOptions
from medm.inference.segmenter import Answered, MaskPrediction, Segmenter, Shown
from medm.inference.volume_modes import SlicedVolumes
from medm.types import Example, Media, Sample, Turn

if TYPE_CHECKING:
    import numpy as np

    from medm.models.lvlm.modeling import LVLMForConditionalGeneration
    from medm.models.lvlm.processing import LVLMProcessor


@dataclass(frozen=True, slots=True)
class Prediction:
    """A reply with its masks."""

    text: str
    """The words, without marks."""
    raw: str
    """The reply with its marks (`[SEG]`, `<p>`) in letters."""
    spans: tuple[Phrase, ...] = ()
    """Of each mask the words that it belongs to: `start` and `end` in `text`."""
    masks: tuple[MaskPrediction, ...] = ()
    """One for each `[SEG]`, on the grid of the file. Empty for a model without a mask head, and
    for a prompt without an image that the head reads."""
    finished: bool = True
    """False where the reply was cut at `max_new_tokens`."""


@dataclass(frozen=True, slots=True)
class _Question:
    """The arguments of `Model.ask`, not checked yet."""

    question: object
    image: object = None
    volume: object = None
    system: object = None
    task: object = None

    @classmethod
    def of(cls, arguments: Mapping[str, object]) -> _Question:
        """Return the arguments that a mapping holds. Raises `DataError` for an unknown one."""
        known = {argument.name for argument in fields(cls)}
        if unknown := sorted(set(arguments) - known):
            raise DataError(
                f"unknown key; expected some of {', '.join(sorted(known))}", field=unknown[0]
            )
        return cls(**arguments)

    def sample(self) -> tuple[Sample, list[object]]:
        """Return the question as a sample, and the items of its images and volumes."""
        if not isinstance(self.question, str) or not self.question.strip():
            raise DataError("expected text that is not empty", field="question")
        content: list[str | Media] = []
        items: list[object] = []
        for branch, shown in (("image", self.image), ("volume", self.volume)):
            for item in _listed(shown):
                content += [Media(branch), "\n"]
                items.append(item)
        turns = [Turn("user", (*content, self.question))]
        if self.system:
            turns.insert(0, Turn("system", (str(self.system),)))
        task = None if self.task is None else str(self.task)
        return Sample(tuple(turns), task=task), items


def _listed(shown: object) -> list[object]:
    if shown is None:
        return []
    return list(shown) if isinstance(shown, (list, tuple)) else [shown]


def load(folder: str | Path, *, device: str = "auto", dtype: str = "saved") -> Model:
    """Open a model folder that medm saved.

    Args:
        folder: of a final model or a checkpoint.
        device: auto (a GPU, or the CPU without one), cpu, cuda or cuda:N.
        dtype: precision of the weights: saved, float32, bfloat16 or float16.

    Raises:
        CheckpointError: no such folder, not a medm model, damaged, or tensors that do not fit.
        DeviceError: the device is not available.
        ValueError: an unknown dtype.
    """
    if dtype not in ("saved", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: expected saved, float32, bfloat16 or float16, found {dtype!r}")
    engine, _ = load_engine(
        str(folder), GenerationOptions(), device=pick_device(device), dtype=dtype
    )
    return Model(engine)


class Model:
    """A model that answers questions about images and volumes.

    Images are given as a path, an image of Pillow, an array or tensor (H, W) or (H, W, 3), or an
    opened file; volumes as a path (a file, or the folder of a DICOM series), or an array or tensor
    (D, H, W). Several of them are a list.

    Options of every call are the fields of `medm.inference.options.GenerationOptions`:
    `max_new_tokens`, `temperature`, `top_k`, `top_p`, `seed`, `compile`. Replies are greedy without
    them. Beam search and other arguments of transformers are those of `model.generate`, see the
    page on Python.

    One thread at a time may use a model.

    Args:
        engine: holds the model, its processor and the device.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._segmenters: dict[str, Segmenter] = {}

    @property
    def model(self) -> LVLMForConditionalGeneration:
        """The transformers model. Its adapters are merged."""
        return self.engine.model

    @property
    def processor(self) -> LVLMProcessor:
        """The transformers processor."""
        return self.engine.processor

    def ask(
        self,
        question: str,
        *,
        image: object = None,
        volume: object = None,
        system: str | None = None,
        task: str | None = None,
        **options: object,
    ) -> str:
        """Return the reply to one question.

        Args:
            question: text; placeholders and control tokens in it are read as plain text.
            image: one or a list, shown before the question in this order.
            volume: likewise, after the images.
            system: a system turn before it.
            task: kind of task, for models whose experts are chosen by it.
            options: settings of the reply, see the class.

        Raises:
            DataError: an image or volume that cannot be read, or that the model has no branch for;
                a prompt that does not fit the model's context.
            RecipeError: an option that is unknown or out of range.
        """
        asked = _Question(question, image, volume, system, task)
        choice = _options(options)
        example = self._example(asked, Path(), choice)
        return self.engine.generate(prepare([example]), choice)[0].text

    def predict(
        self,
        question: str,
        *,
        image: object = None,
        volume: object = None,
        system: str | None = None,
        task: str | None = None,
        segmentation: Mapping[str, object] | None = None,
        soft: bool = False,
        **options: object,
    ) -> Prediction:
        """Return the reply to one question with its masks.

        Args:
            question: as in `ask`.
            image: as in `ask`.
            volume: as in `ask`. A model with a branch for images alone is shown slices of it.
            system: as in `ask`.
            task: as in `ask`.
            segmentation: fields of `medm.inference.options.SegmentationOptions`.
            soft: keep the probabilities of each mask.
            options: settings of the reply, see the class.

        Raises:
            DataError: as `ask`.
            RecipeError: an option that is unknown or out of range.
        """
        choice = _options(options)
        own = validate(SegmentationOptions, segmentation or {}, source="segmentation")
        # An opened file is read twice: for the language model, and for the mask head.
        image, volume = rereadable(image), rereadable(volume)
        asked = _Question(question, image, volume, system, task)
        batch = prepare([self._example(asked, Path(), choice, own)])
        reply = self.engine.generate(batch, choice)[0]
        if self.model.masks is None:
            return Prediction(reply.text, reply.text, finished=reply.finished)
        key = f"{own.model_dump_json()} {soft}"
        if key not in self._segmenters:
            self._segmenters[key] = Segmenter(self.engine, own, soft=soft)
        media = [Shown("image", item) for item in _listed(image)]
        media += [Shown("volume", item) for item in _listed(volume)]
        answered = Answered(batch.requests()[0], reply.ids, media)
        (grounded,) = self._segmenters[key].segment([answered])
        text, masks = grounded.text, grounded.masks
        spans = tuple(mask.phrase for mask in masks) if masks else text.phrases
        return Prediction(text.text, text.raw, spans, masks, reply.finished)

    def ask_many(
        self,
        questions: Sequence[str | Mapping[str, object]],
        *,
        batch_size: int = 8,
        root: str | Path = ".",
        **options: object,
    ) -> list[str]:
        """Return the reply to each of several questions, answered in batches.

        Args:
            questions: text; or mappings of the arguments of `ask`; or records as annotation files
                hold them (with `conversations` or `messages`), whose last reply is not shown to the
                model.
            batch_size: prompts that are prepared and answered at once.
            root: folder that the paths in records are relative to.
            options: see the class.

        Raises:
            DataError: as `ask`, with the position of the question.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, found {batch_size}")
        if isinstance(questions, (str, Mapping)):
            raise TypeError("expected a list of questions; ask takes a single one")
        choice = _options(options)
        replies: list[str] = []
        numbered = iter(enumerate(questions))
        while batch := list(islice(numbered, batch_size)):
            examples = []
            for index, question in batch:
                try:
                    examples.append(self._example(question, Path(root), choice))
                except DataError as error:
                    raise error.at(index=index if len(questions) > 1 else None) from None
            replies += [reply.text for reply in self.engine.generate(prepare(examples), choice)]
        return replies

    def stream(
        self,
        question: str,
        *,
        image: object = None,
        volume: object = None,
        system: str | None = None,
        task: str | None = None,
        **options: object,
    ) -> Iterator[str]:
        """Return the pieces of one reply as they come, see `ask`.

        Closing the iterator stops the generation.
        """
        choice = _options(options)
        asked = _Question(question, image, volume, system, task)
        return self.engine.stream(Request.of(self._example(asked, Path(), choice)), choice)

    def chat(
        self, *, system: str | None = None, task: str | None = None, **options: object
    ) -> Conversation:
        """Return a conversation of several turns.

        `show("image", item)` adds to the next question; `ask(question)` streams its reply.
        """
        segmenter = Segmenter(self.engine) if self.model.masks is not None else None
        return Conversation(
            self.engine,
            self.processor,
            system=system,
            task=task,
            options=_options(options),
            segmenter=segmenter,
        )

    def submit(
        self,
        question: str,
        *,
        image: object = None,
        volume: object = None,
        system: str | None = None,
        task: str | None = None,
        stream: bool = False,
        **options: object,
    ) -> int:
        """Queue one question in `engine` and return its number; `engine.step()` advances it.

        Its arguments are those of `ask`. With `stream`, the events of the request hold the reply in
        pieces, see `medm.inference.generator.Event`.
        """
        choice = _options(options)
        asked = _Question(question, image, volume, system, task)
        return self.engine.submit(
            Request.of(self._example(asked, Path(), choice)), choice, stream=stream
        )

    def _example(
        self,
        question: str | Mapping[str, object] | _Question,
        root: Path,
        options: GenerationOptions,
        segmentation: SegmentationOptions | None = None,
    ) -> Example:
        if isinstance(question, str):
            question = _Question(question)
        elif isinstance(question, Mapping) and "question" in question:
            question = _Question.of(question)
        if isinstance(question, _Question):
            sample, items = question.sample()
        elif isinstance(question, Mapping):
            sample = parse_record(dict(question), inference=True)
            files = [resolve_inside(root, str(media.path)) for media in sample.media]
            way = self.processor.regions
            sample = prepare_regions(sample, way, lambda number: check_image(files[number]), root)
            items = [
                marked_image(file, sample, number, root) if way == "draw" else file
                for number, file in enumerate(files)
            ]
        else:
            raise DataError(f"expected a question or a record, found {type(question).__name__}")
        sliced = SlicedVolumes(self.processor, segmentation or SegmentationOptions())
        if sliced.needed(sample):
            example = sliced.example(sample, items)
        else:
            example = self.processor.encode(sample, self._pixels(sample, items), generation=True)
        longest = self.engine.max_tokens
        if longest is not None and len(example.input_ids) + options.max_new_tokens > longest:
            raise DataError(
                f"the prompt has {len(example.input_ids)} tokens, vision tokens included; with a "
                f"reply of {options.max_new_tokens} tokens it exceeds the model's context of "
                f"{longest}; shorten the question, show fewer images or volumes, or lower "
                "max_new_tokens"
            )
        return example

    def _pixels(self, sample: Sample, items: Sequence[object]) -> dict[str, list[np.ndarray]]:
        pixels: dict[str, list[np.ndarray]] = {}
        for media, item in zip(sample.media, items, strict=True):
            if media.branch not in self.processor.branches:
                raise DataError(
                    missing_branch(media.branch, self.processor.branches), field=media.branch
                )
            array = load_pixels(item, self.processor.preprocess[media.branch])
            pixels.setdefault(media.branch, []).append(array)
        return pixels


def _options(options: Mapping[str, object]) -> GenerationOptions:
    return validate(GenerationOptions, options, source="options of the reply")
