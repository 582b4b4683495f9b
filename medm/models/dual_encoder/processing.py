"""Processor of a dual encoder: images, volumes and texts to tensors.

It is saved with the model, and the same in training and inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from medm.errors import DataError, RecipeError
from medm.imaging import Preprocess, load_pixels, preprocess_from_dict
from medm.imaging.options import changed
from medm.models.dual_encoder.options import DualEncoderOptions
from medm.models.lvlm.messages import flatten
from medm.models.text_inputs import list_texts, pad_texts


class DualInputs(BatchFeature):
    """Inputs of the model, whose `to` reaches the pixels of the branch too."""

    def to(self, *args: object, **kwargs: object) -> DualInputs:
        super().to(*args, **kwargs)
        if "pixels" in self.data:
            self.data["pixels"] = dict(BatchFeature(self.data["pixels"]).to(*args, **kwargs))
        return self


class DualEncoderProcessor(ProcessorMixin):
    """Tokenizer and preprocessing of the branch.

    Args:
        tokenizer: of the text encoder.
        views: by branch the fields of its preprocessing (`medm.imaging.options`).
        max_length: tokens of a text; longer ones are cut.
        pad_to_max_length: fill every text up to `max_length`, as SigLIP was trained.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        views: Mapping[str, Any] | None = None,
        max_length: int = 256,
        pad_to_max_length: bool = False,
        **kwargs: Any,
    ) -> None:
        if tokenizer is None:
            raise RecipeError("a processor needs a tokenizer")
        super().__init__(tokenizer, **kwargs)
        self.views = {name: dict(fields) for name, fields in (views or {}).items()}
        self.max_length, self.pad_to_max_length = int(max_length), bool(pad_to_max_length)
        self.preprocess: dict[str, Preprocess] = {
            name: preprocess_from_dict(fields) for name, fields in self.views.items()
        }

    @property
    def pad_id(self) -> int:
        """Id that fills up short rows; masks, never this id, say what is padding."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else end if end is not None else 0)

    def encode_text(self, texts: str | Sequence[str]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask`, (N, T) int64, padded on the right.

        Args:
            texts: one or more; what is beyond `max_length` tokens is cut.

        Raises:
            DataError: no texts, or something that is no text.
        """
        encoded: BatchEncoding = self.tokenizer(
            list_texts(texts), truncation=True, max_length=self.max_length
        )
        width = self.max_length if self.pad_to_max_length else 1
        return pad_texts(encoded["input_ids"], self.pad_id, width)

    def load_pixels(self, item: object) -> np.ndarray:
        """Return the preprocessed pixels (C, *spatial) of a path, an image or an array."""
        (preprocess,) = self.preprocess.values()
        return load_pixels(item, preprocess)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: object = None,
        volumes: object = None,
        return_tensors: str = "pt",
    ) -> DualInputs:
        """Images or volumes, and texts, as the model takes them.

        Args:
            text: one or more.
            images: one or (nested) lists of them: a path, an image of Pillow, an array or tensor
                (H, W) or (H, W, 3), or an opened file.
            volumes: likewise: a path, or an array or tensor (D, H, W).
            return_tensors: "pt"; there are no others.

        Raises:
            ValueError: another kind of tensors is asked for.
            DataError: an item that cannot be read, or of a kind that the model does not take.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors: expected 'pt', found {return_tensors!r}")
        data: dict[str, Any] = {} if text is None else dict(self.encode_text(text))
        for branch, items in (("image", flatten(images)), ("volume", flatten(volumes))):
            if items and branch not in self.preprocess:
                raise DataError(
                    f"{len(items)} {branch}(s) given; the model takes {', '.join(self.preprocess)}s"
                )
            if items:
                arrays = [self.load_pixels(item) for item in items]
                data["pixels"] = {branch: torch.from_numpy(np.stack(arrays))}
        return DualInputs(data)

    def adapt(self, options: DualEncoderOptions) -> DualEncoderProcessor:
        """Return the processor with the preprocessing fields and the length that a recipe sets.

        Raises:
            RecipeError: another input size than the model's, or an unknown field.
        """
        views = {}
        for name, saved in self.views.items():
            fields = changed(saved, options.image.preprocess)
            if list(fields["size"]) != list(saved["size"]):
                raise RecipeError(
                    f"model.image.preprocess.size: {fields['size']}, but the model of init_from "
                    f"takes {saved['size']}; leave size out, or train from the published weights"
                )
            views[name] = preprocess_from_dict(fields).model_dump()
        return DualEncoderProcessor(
            self.tokenizer,
            views=views,
            max_length=options.text.max_length or self.max_length,
            pad_to_max_length=self.pad_to_max_length,
        )

    @property
    def model_input_names(self) -> list[str]:
        return ["pixels", "input_ids", "attention_mask"]
