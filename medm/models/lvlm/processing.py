"""How a conversation and its pixels become tensors. Saved with the model, the same in training and serving.

Never sees a model: it knows how many tokens an item of each branch takes, and what its pixels must look like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from medm.config import Options, validate
from medm.errors import DataError, RecipeError
from medm.imaging import load_pixels, preprocess_from_dict
from medm.imaging.options import changed
from medm.llms.base import read_template
from medm.llms.chat import ChatFormat, Message, Part
from medm.llms.template_clock import fix_clock
from medm.models.lvlm.options import LVLMOptions
from medm.types import IGNORE_INDEX, Example, Media, Sample, Turn


class SpokenBranch(Options):
    """What the processor knows of a branch. A field that is added later needs a default, so that older folders open."""

    placeholder: str
    """Text that stands for one vision token."""
    num_tokens: int
    """Vision tokens of one item."""
    preprocess: dict[str, Any]
    """What is done to the pixels, in the fields of `medm.imaging.options`."""
    known_tasks_only: bool = False
    """Its connector refuses tasks that are not among the model's."""


class LVLMProcessor(ProcessorMixin):
    """Tokenizer, chat template and per-branch preprocessing.

    Args:
        tokenizer: knows each branch's placeholder as a special token.
        branches: per branch the fields of a `SpokenBranch`.
        template_kwargs: fixed variables of the chat template.
        tasks: task names, in the order of their ids.
        chat_template: the template; the tokenizer's without it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        branches: Mapping[str, Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        tasks: Sequence[str] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is None:
            raise RecipeError("a processor needs a tokenizer")
        template = chat_template or tokenizer.chat_template
        if not isinstance(template, str):
            raise RecipeError(
                "the tokenizer brings no chat template; set model.llm.chat_template to 'vicuna', 'plain' or a file"
            )
        template = fix_clock(template)
        super().__init__(tokenizer, chat_template=template, **kwargs)
        for name, entry in (branches or {}).items():
            validate(SpokenBranch, entry, source=f"processor_config.json, branches.{name}")
        self.branches = {name: dict(entry) for name, entry in (branches or {}).items()}
        self.template_kwargs = dict(template_kwargs or {})
        self.tasks = list(tasks or [])
        self.preprocess = {name: preprocess_from_dict(entry["preprocess"]) for name, entry in self.branches.items()}
        self.placeholder_ids = {
            name: tokenizer.added_tokens_encoder[entry["placeholder"]] for name, entry in self.branches.items()
        }
        self.chat = ChatFormat(tokenizer, template=template, template_kwargs=self.template_kwargs)

    def following(self, options: LVLMOptions) -> LVLMProcessor:
        """The same processor with the chat template and the fields of preprocessing that a recipe writes.

        What it does not write stays: a stage may speak in another layout than the one before, or see other windows.

        Raises:
            RecipeError: an input size other than the one that the model was built for, or a field that is unknown.
        """
        branches = {}
        for name, entry in self.branches.items():
            fields = options.branches[name].preprocess if name in options.branches else {}
            preprocess = changed(entry["preprocess"], fields)
            if list(preprocess["size"]) != list(entry["preprocess"]["size"]):
                raise RecipeError(
                    f"model.branches.{name}.preprocess.size: {preprocess['size']}, but the model of init_from takes "
                    f"{entry['preprocess']['size']}; leave size out, or train from the published parts"
                )
            branches[name] = {**entry, "preprocess": preprocess_from_dict(preprocess).model_dump()}
        written = options.llm.chat_template
        return LVLMProcessor(
            self.tokenizer,
            branches=branches,
            template_kwargs=self.template_kwargs,
            tasks=self.tasks,
            chat_template=read_template(written) if written else str(self.chat_template),
        )

    # Names that servers built on transformers look for.
    @property
    def image_token(self) -> str | None:
        """The placeholder of the image branch."""
        return self.branches["image"]["placeholder"] if "image" in self.branches else None

    @property
    def image_token_id(self) -> int | None:
        """The placeholder's id."""
        return self.placeholder_ids.get("image")

    @property
    def pad_id(self) -> int:
        """Id that fills up short rows; masks, never this id, say what is padding."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else end if end is not None else 0)

    def encode(self, sample: Sample, pixels: Mapping[str, list[np.ndarray]], *, generation: bool = False) -> Example:
        """A checked sample and its preprocessed pixels as an example (the `medm.types.Encode` contract).

        Raises:
            DataError: an unknown branch or task, pixels and placeholders that differ in number, or turns
                that the chat template refuses.
        """
        given = {name: len(items) for name, items in pixels.items() if items}
        wanted: dict[str, int] = {}
        for media in sample.media:
            wanted[media.branch] = wanted.get(media.branch, 0) + 1
        for name in wanted:
            if name not in self.branches:
                known = sorted(self.branches) or "no vision branch"
                raise DataError(f"the model has {known}, and the record holds a '{name}'", field=name)
            if self.branches[name].get("known_tasks_only") and sample.task not in self.tasks:
                found = "no task" if sample.task is None else f"the task {sample.task!r}"
                raise DataError(
                    f"the record has {found}, and the experts of '{name}' are chosen by the task: expected one of "
                    f"{', '.join(self.tasks)}; for others the recipe has unseen_task",
                    field="task",
                )
        if given != wanted:
            raise DataError(f"placeholders {wanted} and loaded files {given} differ in number")
        messages = [Message(turn.role, [self._part(part) for part in turn.content]) for turn in sample.turns]
        ids, learned = self.chat.encode(messages, generation=generation)
        labels = [token if said and not generation else IGNORE_INDEX for token, said in zip(ids, learned, strict=True)]
        return Example(ids, labels, {name: list(pixels[name]) for name in given}, task_id=self.task_id(sample))

    def task_id(self, sample: Sample) -> int:
        """Position of the sample's task in `tasks`; the number of tasks where it is none of them."""
        if not self.tasks:
            return 0
        return self.tasks.index(sample.task) if sample.task in self.tasks else len(self.tasks)

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        volumes: Any = None,
        system: str | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Questions ready for `generate`: one user turn each, left-padded.

        Args:
            text: questions; `<image>` and `<volume>` stand where the pixels go.
            images: pictures for all questions in order: files, PIL images or arrays.
            volumes: volumes likewise.
            system: a system turn before each question.
            return_tensors: "pt", as servers built on transformers say; there are no others.

        Raises:
            ValueError: another kind of tensors is asked for.
            DataError: pictures or volumes and placeholders that differ in number.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors: expected 'pt', found {return_tensors!r}")
        texts = [text] if isinstance(text, str) else list(text)
        stock = {"image": _as_list(images), "volume": _as_list(volumes)}
        examples = []
        for question in texts:
            content = split_placeholders(question, {n: e["placeholder"] for n, e in self.branches.items()})
            turns = [Turn("system", (system,))] if system else []
            sample = Sample((*turns, Turn("user", content)))
            pixels: dict[str, list[np.ndarray]] = {}
            for media in sample.media:
                if not stock[media.branch]:
                    raise DataError(f"more {media.branch} placeholders in the text than {media.branch}s given")
                pixels.setdefault(media.branch, []).append(self._pixels(media.branch, stock[media.branch].pop(0)))
            examples.append(self.encode(sample, pixels, generation=True))
        left = {name: len(items) for name, items in stock.items() if items}
        if left:
            raise DataError(f"{left} given beyond the placeholders in the text")
        return self.pad(examples)

    def pad(self, examples: Sequence[Example]) -> BatchFeature:
        """Left-padded tensors for generation."""
        rows = [torch.tensor(example.input_ids) for example in examples]
        on_the_left: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
        pixels, tasks = {}, {}
        for name in self.branches:
            arrays = [array for example in examples for array in example.pixels.get(name, [])]
            if arrays:
                pixels[name] = torch.from_numpy(np.stack(arrays))
                tasks[name] = torch.tensor([e.task_id for e in examples for _ in e.pixels.get(name, [])])
        data: dict[str, Any] = {
            "input_ids": pad_sequence(rows, padding_value=self.pad_id, **on_the_left),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], **on_the_left),
        }
        return BatchFeature(data | ({"pixels": pixels, "task_ids": tasks} if pixels else {}))

    def text(self, ids: Any) -> str:
        """The words of generated ids, without control tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _part(self, part: str | Media) -> Part:
        if isinstance(part, str):
            return part
        return [self.placeholder_ids[part.branch]] * int(self.branches[part.branch]["num_tokens"])

    def _pixels(self, branch: str, item: Any) -> np.ndarray:
        return load_pixels(item, self.preprocess[branch])

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixels", "task_ids"]


def split_placeholders(text: str, placeholders: Mapping[str, str]) -> tuple[str | Media, ...]:
    """Text cut at its placeholders: `"<image>\\nWhat?"` to `(Media("image"), "\\nWhat?")`."""
    parts: list[str | Media] = [text]
    for branch, mark in placeholders.items():
        cut: list[str | Media] = []
        for part in parts:
            if isinstance(part, Media):
                cut.append(part)
                continue
            for i, piece in enumerate(part.split(mark)):
                cut += [Media(branch)] if i else []
                cut += [piece] if piece else []
        parts = cut
    return tuple(parts)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
