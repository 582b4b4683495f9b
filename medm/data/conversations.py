"""Data pipeline of conversations with images and volumes, padded or packed into rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from medm.data.base import Collate, MaskView, MediaSource, Pipeline, Segment, missing_branch
from medm.data.mask_targets import masked_media
from medm.data.regions import is_drawn_on, marked_image, prepare_regions
from medm.data.turns import media_field, parse_record
from medm.errors import DataError, RecipeError
from medm.imaging.marks import MarkedImage
from medm.types import IGNORE_INDEX, ConversationProcessor, Example, MaskTargets, Sample, views_of

if TYPE_CHECKING:
    import numpy as np

    from medm.data.options import DataOptions

MIN_REPEATS = 8
"""Number of equal tokens in a row from which a preview writes the token once, with a count."""


class Conversations(Pipeline[Sample, Example, ConversationProcessor]):
    """Conversations of a vision-language model; the replies are learned.

    The processor writes the tokens.
    """

    nouns: ClassVar[tuple[str, ...]] = ("turn",)
    unit: ClassVar[str] = "tokens, vision tokens included"

    def check_options(self, options: DataOptions) -> None:
        for section in ("train", "eval"):
            for number, source in enumerate(getattr(options, section)):
                for key in ("captions", "columns"):
                    if getattr(source, key) is not None:
                        raise RecipeError(
                            f"data.{section}.{number}.{key}: conversations have no {key}; leave it "
                            "out"
                        )
        if options.packing and self.needs_mask:
            raise RecipeError(
                "data.packing: packed rows have position_ids in place of an attention_mask, and "
                "this kind of model needs the mask; set data.packing: false"
            )

    def read(self, record: object, *, file: Path, index: int) -> Sample:
        return parse_record(record, inference=self.inference, file=file, index=index)

    def write_regions(
        self, sample: Sample, size_of: Callable[[int], tuple[int, int]], root: Path
    ) -> Sample:
        if not sample.regions or not self.makes_examples:
            return sample
        return prepare_regions(sample, self.processor.regions, size_of, root)

    def with_marks(
        self, source: MediaSource, sample: Sample, media: int, view: str, root: Path
    ) -> MediaSource:
        if not sample.regions or not is_drawn_on(view) or isinstance(source, MarkedImage):
            return source
        # Without a model the marks are for the check of their places.
        way = self.processor.regions if self.makes_examples else "draw"
        return marked_image(source, sample, media, root) if way == "draw" else source

    @property
    def mask_view(self) -> MaskView | None:
        # Masks of prompts are reference: nothing is learned from them.
        if self.inference or not self.makes_examples or self.processor.mask_view is None:
            return None
        if self.processor.mask_grid is None:
            raise ValueError(f"a processor with view {self.processor.mask_view} and no mask_grid")
        return MaskView(self.processor.mask_view, self.processor.mask_grid)

    def views(self, sample: Sample, number: int) -> list[str]:
        kind = sample.media[number].branch
        others = [name for name in self.preprocess if name != self.processor.mask_view]
        views = views_of(kind, others)
        if not views:
            raise DataError(missing_branch(kind, others))
        view = self.mask_view
        if view is not None and number in masked_media(sample, view):
            views.append(view.name)
        return views

    def media_field(self, record: object, number: int) -> str:
        return media_field(record, number)

    def counts(self, sample: Sample) -> Mapping[str, int]:
        return {"turn": len(sample.turns)}

    def make_example(self, sample: Sample, pixels: Mapping[str, list[np.ndarray]]) -> Example:
        return self.processor.encode(sample, pixels, generation=self.inference)

    def make_masked_example(
        self, sample: Sample, pixels: Mapping[str, list[np.ndarray]], masks: MaskTargets
    ) -> Example:
        return self.processor.encode(sample, pixels, masks=masks)

    def require_usable(self, example: Example) -> None:
        if not self.inference and not has_label(example.labels):
            raise DataError(
                "no token of this record is learned: the replies are empty once they are encoded"
            )

    def length(self, example: Example) -> int:
        return len(example.input_ids)

    def shorten(self, example: Example, max_length: int) -> Example:
        kept = (self.processor.placeholder_ids, self.processor.control_token_ids)
        return truncate_text(example, max_length, {token for ids in kept for token in ids.values()})

    def preview(self, example: Example) -> list[Segment]:
        return segments(example, lambda ids: str(self.processor.tokenizer.decode(ids)))

    def training_collator(
        self, options: DataOptions, *, padding_free: bool = False
    ) -> Collate[Example]:
        from medm.data.collator import Collator
        from medm.data.packing import PackingCollator

        pad_id = self.processor.pad_id
        if not options.packing:
            return Collator(
                pad_id,
                pad_to_multiple_of=options.pad_to_multiple_of,
                with_mask=self.needs_mask,
                with_label_positions=True,
            )
        if options.max_length is None:
            raise ValueError("packing needs data.max_length")
        return PackingCollator(
            pad_id,
            options.max_length,
            padding_free=padding_free,
            pad_to_multiple_of=None if padding_free else options.pad_to_multiple_of,
            with_label_positions=True,
        )

    def eval_collator(self) -> Collate[Example]:
        from medm.data.collator import Collator

        return Collator(self.processor.pad_id)


def has_label(labels: list[int]) -> bool:
    """Return whether any position is learned."""
    return any(label != IGNORE_INDEX for label in labels)


def truncate_text(example: Example, max_length: int, uncut_ids: Collection[int]) -> Example:
    """Return the first `max_length` tokens.

    Raises:
        DataError: that would cut a token of `uncut_ids` or leave no label.
    """
    length = len(example.input_ids)
    cut = sum(token in uncut_ids for token in example.input_ids[max_length:])
    if cut:
        raise DataError(
            f"{length} tokens cannot be cut to data.max_length = {max_length}: {cut} vision or "
            "control tokens stand beyond it, which are never cut; raise max_length, or shorten "
            "the text before them"
        )
    labels = example.labels[:max_length]
    if not has_label(labels) and has_label(example.labels):
        raise DataError(
            f"{length} tokens cut to data.max_length = {max_length} leave nothing of the reply to "
            "learn; raise it, or shorten the question"
        )
    return replace(example, input_ids=example.input_ids[:max_length], labels=labels)


def segments(example: Example, to_text: Callable[[list[int]], str]) -> list[Segment]:
    """Return an example as text, cut where learning begins and ends.

    A repeated token is written once with its number.
    """
    pieces: list[Segment] = []
    learned = (label != IGNORE_INDEX for label in example.labels)
    pairs = zip(example.input_ids, learned, strict=True)
    for is_learned, group in groupby(pairs, key=lambda pair: pair[1]):
        text = ""
        plain: list[int] = []
        for token, run in groupby(token for token, _ in group):
            count = len(list(run))
            if count < MIN_REPEATS:
                plain += [token] * count
                continue
            text += (to_text(plain) if plain else "") + f"{to_text([token])} x {count} "
            plain = []
        pieces.append(Segment(text + (to_text(plain) if plain else ""), is_learned))
    return pieces
