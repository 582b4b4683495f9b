"""Processor of the kind `blip`, saved with the model: images and texts of studies to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from medm.errors import RecipeError
from medm.imaging import Preprocess, load_pixels, preprocess_from_dict
from medm.imaging.options import changed
from medm.models.blip.answers import Answers
from medm.models.blip.options import BlipOptions
from medm.models.dual_encoder.processing import DualInputs
from medm.models.lvlm.messages import flatten
from medm.models.text_inputs import list_texts, pad_texts
from medm.types import ANSWER_BRANCHES, IGNORE_INDEX, EncodedText, Triplet

DECODER_TOKEN, ENCODER_TOKEN = "[DEC]", "[ENC]"
"""First token of a text in the decoder, and where it attends to an image (BLIP)."""


class MedmBlipProcessor(ProcessorMixin):
    """Tokenizer, preprocessing of images, names of findings.

    Args:
        tokenizer: of BERT, with the two tokens of BLIP.
        views: by branch the fields of its preprocessing (`medm.imaging.options`).
        max_length: tokens of a text; longer ones are cut.
        prompt: words before a report that are given.
        labels: names of the findings.
        images: images of a study that the model looks at, at most.
        reads_text: whether the model learns from texts.
        stores_triplets: whether the model has a memory of triplets.
        answers: by type of question (`ANSWER_BRANCHES`) the answers that the model chooses from.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_views: Mapping[str, Any] | None = None,
        max_length: int = 90,
        prompt: str = "",
        labels: Sequence[str] = (),
        views: int = 1,
        reads_text: bool = True,
        stores_triplets: bool = False,
        answers: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is None:
            raise RecipeError("a processor needs a tokenizer")
        super().__init__(tokenizer, **kwargs)
        self.image_views = {name: dict(fields) for name, fields in (image_views or {}).items()}
        self.max_length, self.prompt, self.labels = int(max_length), prompt, list(labels)
        self.views, self.reads_text = int(views), bool(reads_text)
        self.stores_triplets = bool(stores_triplets)
        self.answers = {name: list(listed) for name, listed in (answers or {}).items()}
        self.preprocess: dict[str, Preprocess] = {
            name: preprocess_from_dict(fields) for name, fields in self.image_views.items()
        }

    @property
    def pad_id(self) -> int:
        """Id that fills up short rows."""
        return int(self.tokenizer.pad_token_id)

    def encode_target(self, text: str, prompt: str | None = None) -> EncodedText:
        """Return a text that is learned; see `medm.data.studies`."""
        given = self._words(self.prompt if prompt is None else prompt)
        start, end = int(self.tokenizer.cls_token_id), int(self.tokenizer.sep_token_id)
        words = [*given, *self._words(text)][: self.max_length - 2]
        ids = [start, *words, end]
        learned = ids[1 + len(given) :]
        return EncodedText(ids, [IGNORE_INDEX] * (len(ids) - len(learned)) + learned)

    def encode_knowledge(self, triplets: Sequence[Triplet]) -> list[int]:
        """Return the tokens of triplets, cut to the length of a text; none without a memory."""
        if not self.stores_triplets or not triplets:
            return []
        text = "; ".join(" ".join(triplet) for triplet in triplets)
        return self.encode_target(text, "").input_ids

    def encode_text(self, texts: str | Sequence[str]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask`, (N, T) int64, padded on the right.

        Args:
            texts: one or more; what is beyond `max_length` tokens is cut.

        Raises:
            DataError: no texts, or something that is no text.
        """
        ids = [self.encode_target(row, "").input_ids for row in list_texts(texts)]
        return pad_texts(ids, self.pad_id)

    def encode_prompt(self, prompt: str | None = None) -> torch.Tensor:
        """Return the tokens (1, P) that a generated text begins with.

        Args:
            prompt: words; None for the model's own prompt.
        """
        words = self._words(self.prompt if prompt is None else prompt)
        return torch.tensor([[int(self.tokenizer.cls_token_id), *words]])

    def encode_prompts(self, prompts: Sequence[str | None]) -> dict[str, torch.Tensor]:
        """Return what generated texts begin with, such as questions: `input_ids` and
        `attention_mask`, (N, P) int64, padded on the right, without an end token.
        """
        rows = [self.encode_prompt(prompt)[0].tolist() for prompt in prompts]
        return pad_texts(rows, self.pad_id)

    def decode_answers(self, answers: Answers) -> list[str]:
        """Return the answers that `MedmBlip.answer` chose, as texts."""
        chosen = zip(answers.branches.tolist(), answers.classes.tolist(), strict=True)
        return [self.answers[ANSWER_BRANCHES[branch]][place] for branch, place in chosen]

    def decode(self, ids: Sequence[int] | torch.Tensor, **kwargs: Any) -> str:
        """Return the words of a generated text, without special tokens."""
        return str(self.tokenizer.decode(ids, **{"skip_special_tokens": True, **kwargs}))

    def load_pixels(self, item: object) -> np.ndarray:
        """Return the preprocessed pixels (C, height, width) of a path, an image or an array."""
        return load_pixels(item, self.preprocess["image"])

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: object = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Studies of one image each, and texts, as the model takes them.

        Args:
            text: one or more.
            images: one or (nested) lists of them: a path, an image of Pillow, an array or tensor
                (H, W) or (H, W, 3), or an opened file.
            return_tensors: "pt"; there are no others.

        Raises:
            ValueError: another kind of tensors is asked for.
            DataError: an item that cannot be read.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors: expected 'pt', found {return_tensors!r}")
        data: dict[str, Any] = {} if text is None else dict(self.encode_text(text))
        if items := flatten(images):
            arrays = [self.load_pixels(item) for item in items]
            data["pixels"] = {"image": torch.from_numpy(np.stack(arrays))}
            data["image_counts"] = torch.ones(len(items), dtype=torch.int64)
        return DualInputs(data)

    def adapt(self, options: BlipOptions) -> MedmBlipProcessor:
        """Return the processor with the preprocessing fields, length and prompt of a recipe.

        Raises:
            RecipeError: another input size than the model's, or an unknown field.
        """
        saved = self.image_views["image"]
        fields = changed(saved, options.image.preprocess)
        if list(fields["size"]) != list(saved["size"]):
            raise RecipeError(
                f"model.image.preprocess.size: {fields['size']}, but the model of init_from takes "
                f"{saved['size']}; leave size out, or train from the published weights"
            )
        return MedmBlipProcessor(
            self.tokenizer,
            image_views={"image": preprocess_from_dict(fields).model_dump()},
            max_length=options.text.max_length,
            prompt=options.text.prompt,
            labels=self.labels,
            views=self.views,
            reads_text=self.reads_text,
            stores_triplets=self.stores_triplets,
            answers=self.answers,
        )

    @property
    def model_input_names(self) -> list[str]:
        return ["pixels", "image_counts", "input_ids", "attention_mask"]

    def _words(self, text: str) -> list[int]:
        """Return the tokens of a text. Special tokens that it spells are text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(ids["input_ids"])
