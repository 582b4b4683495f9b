"""Processor of an LVLM: a conversation and its pixels to tensors.

It is saved with the model, and is the same in training and serving.

Never sees a model: it knows how many tokens an item of each branch takes, and what its pixels must
look like.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from medm.config import Options, validate
from medm.errors import DataError, RecipeError
from medm.imaging import ImagePreprocess, load_pixels, preprocess_from_dict
from medm.imaging.options import changed
from medm.llms.base import read_template
from medm.llms.chat import ChatFormat, Message, Part
from medm.llms.template_clock import fix_clock
from medm.models.lvlm.messages import ChatInput, flatten, parse_messages
from medm.models.lvlm.options import LVLMOptions
from medm.types import (
    IGNORE_INDEX,
    PHRASE_TOKENS,
    Config,
    ControlToken,
    Example,
    MaskTargets,
    Media,
    RegionMark,
    Sample,
    Turn,
    TurnPart,
    written,
)

logger = logging.getLogger(__name__)


class BranchSpec(Options):
    """Properties of a branch that the processor needs.

    A field that is added later needs a default, so that older folders open.
    """

    placeholder: str
    """Text that stands for one vision token."""
    num_tokens: int
    """Vision tokens of one item: an image, a volume, or a tile of an image that is cut."""
    preprocess: dict[str, Any]
    """What is done to the pixels, in the fields of `medm.imaging.options`."""
    known_tasks_only: bool = False
    """Its connector refuses tasks that are not among the model's."""
    before: str = ""
    after: str = ""
    """Texts around the vision tokens of an image or volume, all its tiles included."""


class MaskSpec(Options):
    """Properties of a mask head that the processor needs.

    A field that is added later needs a default, so that older folders open.
    """

    view: str
    """View that the head reads: `image@masks` or `volume@masks`."""
    preprocess: dict[str, Any]
    """What is done to its pixels, in the fields of `medm.imaging.options`."""
    logits: list[int]
    """Grid of the head's logits."""
    targets: Literal["head", "full"] = "head"
    """Grid on which masks are learned: that of the logits, or of the prepared pixels."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation, and how the prompt that is made of it ends."""

    chat: ChatInput
    generation: bool = True
    """Where the assistant's reply begins."""
    continue_final: bool = False
    """With the last message."""
    template: ChatFormat | None = None
    """Another chat template than the processor's."""


@dataclass(frozen=True, slots=True)
class LocatedToken:
    """A control token in a generated reply."""

    token: str
    index: int
    """Position among the generated ids: where a mask head reads the hidden state."""
    start: int
    """Position of its first letter in `Reply.text`."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A generated reply with its control tokens."""

    text: str
    """The words, with control tokens in letters; `tokens` says which letters are control tokens."""
    tokens: tuple[LocatedToken, ...]


class RenderedPrompt(str):
    """A prompt as text that knows the conversation which it was made of.

    The text alone could not tell a placeholder from the same letters typed by a user.
    """

    source: Prompt


class ModelInputs(BatchFeature):
    """Inputs of the model, whose `to` reaches the tensors of each branch too."""

    def to(self, *args: object, **kwargs: object) -> ModelInputs:
        super().to(*args, **kwargs)
        for name in ("pixels", "task_ids"):
            if name in self.data:
                self.data[name] = dict(BatchFeature(self.data[name]).to(*args, **kwargs))
        return self


class LVLMProcessor(ProcessorMixin):
    """Tokenizer, chat template and per-branch preprocessing.

    Args:
        tokenizer: knows each branch's placeholder as a special token.
        branches: per branch the fields of a `BranchSpec`.
        template_kwargs: fixed variables of the chat template.
        tasks: task names, in the order of their ids.
        chat_template: the template; the tokenizer's without it.
        control_tokens: tokens that parts of a reply stand for (`[SEG]`), added where the tokenizer
            has none.
        masks: fields of the `MaskSpec` of the model's mask head; none without one.
        regions: how regions of records are read: "draw", "text", or not.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        branches: Mapping[str, Any] | None = None,
        template_kwargs: Mapping[str, object] | None = None,
        tasks: Sequence[str] | None = None,
        chat_template: str | None = None,
        control_tokens: Sequence[str] | None = None,
        masks: Mapping[str, Any] | None = None,
        regions: Literal["draw", "text"] | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is None:
            raise RecipeError("a processor needs a tokenizer")
        template = chat_template or tokenizer.chat_template
        if not isinstance(template, str):
            raise RecipeError(
                "the tokenizer brings no chat template; set model.llm.chat_template to 'vicuna', "
                "'plain' or a file"
            )
        template = fix_clock(template)
        super().__init__(tokenizer, chat_template=template, **kwargs)
        for name, entry in (branches or {}).items():
            validate(BranchSpec, entry, source=f"processor_config.json, branches.{name}")
        self.branches = {name: dict(entry) for name, entry in (branches or {}).items()}
        self.template_kwargs = dict(template_kwargs or {})
        self.tasks = list(tasks or [])
        self.preprocess = {
            name: preprocess_from_dict(entry["preprocess"]) for name, entry in self.branches.items()
        }
        self.masks = dict(masks or {})
        self.mask_view: str | None = None
        """View of the mask head; None without one."""
        self.mask_grid: tuple[int, ...] | None = None
        """Grid on which masks are learned."""
        if self.masks:
            spec = validate(MaskSpec, self.masks, source="processor_config.json, masks")
            pixels = preprocess_from_dict(spec.preprocess)
            self.preprocess[spec.view] = pixels
            self.mask_view = spec.view
            self.mask_grid = tuple((spec.targets == "full" and pixels.size) or spec.logits)
        self.placeholder_ids = {
            name: tokenizer.added_tokens_encoder[entry["placeholder"]]
            for name, entry in self.branches.items()
        }
        self._wraps = {
            name: (self._wrap_ids(entry, "before"), self._wrap_ids(entry, "after"))
            for name, entry in self.branches.items()
        }
        self.control_tokens = list(control_tokens or [])
        self.regions = regions
        self.untrained_ids = add_tokens(tokenizer, self.control_tokens)
        """Control tokens that the tokenizer did not have, so that their rows hold no values yet."""
        self.control_token_ids = {
            token: tokenizer.added_tokens_encoder[token] for token in self.control_tokens
        }
        self.chat = self._chat_format(template, self.template_kwargs)
        own = {*self.control_tokens, *(entry["placeholder"] for entry in self.branches.values())}
        self._template_tokens = sorted(
            {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} - own
        )

    def _wrap_ids(self, entry: Mapping[str, Any], side: str) -> list[int]:
        text = str(entry.get(side, ""))
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _chat_format(self, template: str, variables: Mapping[str, Any]) -> ChatFormat:
        return ChatFormat(
            self.tokenizer,
            template=template,
            template_kwargs=variables,
            reply_tokens=self.control_tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        content = super().to_dict()
        for name in ("control_tokens", "masks", "regions"):
            if not content.get(name):  # an earlier medm opens the folders of models that have none
                content.pop(name, None)
        return content

    def adapt(
        self, options: LVLMOptions, *, masks: Mapping[str, Any] | None = None
    ) -> LVLMProcessor:
        """Return the processor with the chat template and preprocessing fields that a recipe sets.

        What the recipe does not set stays as it was saved. Control tokens are added to those that
        it has.

        Args:
            options: the recipe's section.
            masks: fields of the `MaskSpec` of a mask head that the model did not have.

        Raises:
            RecipeError: an input size other than the one that the model was built for, or a field
                that is unknown.
        """
        branches = {}
        for name, entry in self.branches.items():
            fields = options.branches[name].preprocess if name in options.branches else {}
            branches[name] = _adapted(entry, fields, place=f"model.branches.{name}")
            if name in options.branches and (wrap := options.branches[name].wrap) is not None:
                branches[name] |= wrap_fields(wrap)
        if self.masks and options.masks is not None:
            masks = {
                **_adapted(self.masks, options.masks.preprocess, place="model.masks"),
                "targets": options.masks.targets,
            }
        written = options.llm.chat_template
        return LVLMProcessor(
            self.tokenizer,
            branches=branches,
            template_kwargs=self.template_kwargs,
            tasks=self.tasks,
            chat_template=read_template(written) if written else str(self.chat_template),
            control_tokens=list(dict.fromkeys([*self.control_tokens, *options.reply_tokens])),
            masks=masks,
            regions=options.regions or self.regions,
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
    def num_tokens(self) -> dict[str, int]:
        """Per branch the vision tokens of one item: an image, a volume, or a tile."""
        return {name: int(entry["num_tokens"]) for name, entry in self.branches.items()}

    @property
    def pad_id(self) -> int:
        """Id that fills up short rows; masks, never this id, say what is padding."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else end if end is not None else 0)

    def encode(
        self,
        sample: Sample,
        pixels: Mapping[str, list[np.ndarray]],
        *,
        generation: bool = False,
        continue_final: bool = False,
        chat: ChatFormat | None = None,
        masks: MaskTargets | None = None,
    ) -> Example:
        """A checked sample and its preprocessed pixels as an example (`medm.types.Processor`).

        Args:
            sample: the conversation.
            pixels: per branch, in the order of the placeholders: (C, *spatial), or (T, C, *spatial)
                of an image that is cut into T tiles. Each tile is an item of the example. For the
                view of the mask head the images that `masks` belong to.
            generation: the prompt ends where the assistant's reply begins, and nothing is labelled.
            continue_final: the prompt ends with the last message.
            chat: another chat template than the processor's.
            masks: to learn, on `mask_grid`.

        Raises:
            DataError: an unknown branch, task or control token, pixels and placeholders that differ
                in number, or turns that the chat template refuses.
        """
        items = {
            name: self._items(name, arrays)
            for name, arrays in pixels.items()
            if arrays and name != self.mask_view
        }
        given = {name: len(found) for name, found in items.items()}
        wanted: dict[str, int] = {}
        for media in sample.media:
            wanted[media.branch] = wanted.get(media.branch, 0) + 1
        for name in wanted:
            if name not in self.branches:
                known = sorted(self.branches) or "no vision branch"
                raise DataError(
                    f"the model has {known}, and the record holds a '{name}'", field=name
                )
            if self.branches[name].get("known_tasks_only") and sample.task not in self.tasks:
                found = "no task" if sample.task is None else f"the task {sample.task!r}"
                raise DataError(
                    f"the record has {found}, and the experts of '{name}' are chosen by the task: "
                    f"expected one of {', '.join(self.tasks)}; for others the recipe has "
                    "unseen_task",
                    field="task",
                )
        if given != wanted:
            raise DataError(f"placeholders {wanted} and loaded files {given} differ in number")
        counts = {name: iter([len(own) for own in found]) for name, found in items.items()}
        messages = [
            Message(turn.role, [self._part(part, counts) for part in turn.content])
            for turn in sample.turns
        ]
        ids, learned = (chat or self.chat).encode(
            messages, generation=generation, continue_final=continue_final
        )
        labels = [
            token if is_target and not generation else IGNORE_INDEX
            for token, is_target in zip(ids, learned, strict=True)
        ]
        taken = {name: [item for own in found for item in own] for name, found in items.items()}
        if masks is not None and masks.arrays and self.mask_view is not None:
            taken[self.mask_view] = list(pixels[self.mask_view])
        else:
            masks = None
        return Example(ids, labels, taken, task_id=self.task_id(sample), masks=masks)

    def _items(self, branch: str, arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Return the items of each image or volume: its tiles, or itself."""
        preprocess = self.preprocess.get(branch)
        cut = isinstance(preprocess, ImagePreprocess) and preprocess.tiles is not None
        return [list(array) if cut else [array] for array in arrays]

    def task_id(self, sample: Sample) -> int:
        """Return the position of the sample's task in `tasks`.

        For a task that is not among them, the number of tasks.
        """
        if not self.tasks:
            return 0
        return self.tasks.index(sample.task) if sample.task in self.tasks else len(self.tasks)

    def __call__(
        self,
        text: str | Sequence[str],
        images: object = None,
        volumes: object = None,
        system: str | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Questions ready for `generate`: one user turn each, left-padded.

        Args:
            text: questions; `<image>` and `<volume>` stand where the pixels go. A prompt that
                `apply_chat_template` rendered is taken as the conversation that it was made of.
            images: for all questions in order, one or (nested) lists of them: a path, an image of
                Pillow, an array or tensor (H, W) or (H, W, 3), or an opened file. They are prepared
                as files are.
            volumes: likewise: a path, or an array or tensor (D, H, W).
            system: a system turn before each question.
            return_tensors: "pt", as servers built on transformers say; there are no others.
            kwargs: what transformers' own processors take, where it asks for what is done here.

        Raises:
            ValueError: another kind of tensors, padding or preprocessing is asked for.
            DataError: images or volumes and placeholders that differ in number, or an item that
                cannot be read.
        """
        _check_stock(return_tensors, kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        prompts = [
            one.source if isinstance(one, RenderedPrompt) else self._question(one, system)
            for one in texts
        ]
        return self._inputs(prompts, images, volumes)

    def apply_chat_template(  # type: ignore[override]  # its own arguments and no others
        self,
        conversation: Sequence[object],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "pt",
        return_dict: bool = False,
        processor_kwargs: Mapping[str, object] | None = None,
        images: object = None,
        volumes: object = None,
        **kwargs: object,
    ) -> RenderedPrompt | list[RenderedPrompt] | BatchFeature | torch.Tensor:
        """Conversations with content parts as a prompt, or as tensors ready for `generate`.

        Args:
            conversation: messages of `role` and `content`, which is text or a list of parts:
                `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` (or `path`,
                `url`, `base64`), `{"type": "volume", "volume": ...}`; or a list of such
                conversations. Items are what `__call__` takes. Text is text: placeholders come from
                parts alone.
            chat_template: another template than the model's.
            add_generation_prompt: end where the assistant's reply begins.
            continue_final_message: end with the last message, for the model to continue it.
            tokenize: return tensors; without it the prompt as text, which `__call__` takes with the
                images.
            return_tensors: "pt"; there are no others.
            return_dict: all inputs of `generate`; without it the token ids alone.
            processor_kwargs: as `kwargs`, for `__call__`.
            images: for parts that hold none, in order.
            volumes: likewise.
            kwargs: variables of the template, and what `__call__` takes.

        Raises:
            ValueError: as `__call__`.
            DataError: messages or parts that are not understood, with their place.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        stock = {name: kwargs.pop(name) for name in list(kwargs) if name in _STOCK}
        extra = dict(processor_kwargs or {})
        images, volumes = extra.pop("images", images), extra.pop("volumes", volumes)
        _check_stock(return_tensors, stock | extra)
        several = (
            not isinstance(conversation, (str, Mapping))
            and len(conversation) > 0
            and _is_chat(conversation[0])
        )
        chats = [
            getattr(chat, "messages", chat)
            for chat in (conversation if several else [conversation])
        ]
        template = None
        if chat_template is not None or kwargs:
            variables = self.template_kwargs | kwargs
            text = chat_template or str(self.chat_template)
            template = self._chat_format(text, variables)
        prompts = [
            Prompt(parse_messages(chat), add_generation_prompt, continue_final_message, template)
            for chat in chats
        ]
        if not tokenize:
            rendered = [self._rendered(prompt) for prompt in prompts]
            return rendered if several else rendered[0]
        inputs = self._inputs(prompts, images, volumes)
        return inputs if return_dict else inputs["input_ids"]

    def _question(self, text: object, system: str | None) -> Prompt:
        """One user turn, in whose text placeholders stand."""
        if not isinstance(text, str):
            raise DataError(
                f"text: expected a question or a list of them, found {type(text).__name__}"
            )
        control = [token for token in self._template_tokens if token in text]
        if control:
            logger.warning(
                "the question holds %s, which is read as plain text: the chat template is "
                "applied here. Give the messages to apply_chat_template, or the prompt that it "
                "returned",
                ", ".join(control),
            )
        content = split_placeholders(
            text, {name: entry["placeholder"] for name, entry in self.branches.items()}
        )
        turns = [Turn("system", (system,))] if system else []
        items = tuple(None for part in content if isinstance(part, Media))
        return Prompt(ChatInput((*turns, Turn("user", content)), items))

    def _rendered(self, prompt: Prompt) -> RenderedPrompt:
        placeholders = {name: str(entry["placeholder"]) for name, entry in self.branches.items()}

        def to_text(part: TurnPart) -> str:
            return (
                placeholders.get(part.branch, written(part))
                if isinstance(part, Media)
                else written(part)
            )

        messages = [
            Message(turn.role, [to_text(part) for part in turn.content])
            for turn in prompt.chat.turns
        ]
        chat = prompt.template or self.chat
        text = chat.to_text(
            messages, generation=prompt.generation, continue_final=prompt.continue_final
        )
        rendered = RenderedPrompt(text)
        rendered.source = prompt
        return rendered

    def _inputs(self, prompts: Sequence[Prompt], images: object, volumes: object) -> BatchFeature:
        given = {"image": flatten(images), "volume": flatten(volumes)}
        # As with transformers' own processors, what is handed over apart is for every place of its
        # kind.
        apart = {branch for branch, items in given.items() if items}
        examples = []
        for prompt in prompts:
            sample = Sample(prompt.chat.turns)
            pixels: dict[str, list[np.ndarray]] = {}
            for media, item in zip(sample.media, prompt.chat.items, strict=True):
                if media.branch not in self.branches:
                    known = sorted(self.branches) or "no vision branch"
                    raise DataError(f"the model has {known}, and the text holds a '{media.branch}'")
                if media.branch in apart or item is None:
                    if not given.get(media.branch):
                        raise DataError(
                            f"more {media.branch} placeholders in the text than {media.branch}s "
                            "given"
                        )
                    item = given[media.branch].pop(0)
                pixels.setdefault(media.branch, []).append(self._pixels(media.branch, item))
            examples.append(
                self.encode(
                    sample,
                    pixels,
                    generation=prompt.generation,
                    continue_final=prompt.continue_final,
                    chat=prompt.template,
                )
            )
        for branch, items in given.items():
            if items:
                place = self.branches[branch]["placeholder"] if branch in self.branches else None
                advice = (
                    f"; write {place} where each belongs" if place else "; the model reads none"
                )
                raise DataError(
                    f"{len(items)} {branch}(s) given beyond the placeholders in the text{advice}"
                )
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
                tasks[name] = torch.tensor(
                    [e.task_id for e in examples for _ in e.pixels.get(name, [])]
                )
        data: Config = {
            "input_ids": pad_sequence(rows, padding_value=self.pad_id, **on_the_left),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], **on_the_left),
        }
        return ModelInputs(data | ({"pixels": pixels, "task_ids": tasks} if pixels else {}))

    def text(self, ids: torch.Tensor | list[int]) -> str:
        """The words of generated ids, without control tokens and the text that ends a reply."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return text.removesuffix(self.chat.end_text).rstrip()

    def decode_with_control_tokens(self, ids: Sequence[int] | torch.Tensor) -> Reply:
        """Decode a generated reply and locate its control tokens.

        The n-th `[SEG]` is of the n-th mask.

        Args:
            ids: (T,), the reply. Other special tokens (end, padding, vision tokens) are left out.
        """
        tokens = {token_id: token for token, token_id in self.control_token_ids.items()}
        # The tokenizer's `all_special_ids` leave out those of the template (Phi-3's <|end|>).
        added = self.tokenizer.added_tokens_decoder
        dropped = {index for index, token in added.items() if token.special and index not in tokens}
        kept = [(index, int(token)) for index, token in enumerate(ids) if int(token) not in dropped]

        def decode(count: int) -> str:
            return str(
                self.tokenizer.decode(
                    [token for _, token in kept[:count]], skip_special_tokens=False
                )
            )

        text = decode(len(kept))
        leading = len(text) - len(text.lstrip())
        found: list[LocatedToken] = []
        for count, (index, token_id) in enumerate(kept):
            if token_id in tokens:
                token = tokens[token_id]
                # A decoder may write white space between the text before and the token.
                start = text.index(token, len(decode(count).rstrip()))
                found.append(LocatedToken(token, index=index, start=start - leading))
        return Reply(text.strip().removesuffix(self.chat.end_text).rstrip(), tuple(found))

    def _part(self, part: TurnPart, counts: Mapping[str, Iterator[int]]) -> Part:
        """Return a part of a turn in tokens. `counts`: items of the next image of each branch."""
        if isinstance(part, str):
            return part
        if isinstance(part, ControlToken):
            if part.token not in self.control_token_ids:
                if part.token in PHRASE_TOKENS:
                    return part.token
                known = ", ".join(self.control_tokens) or "no control tokens"
                raise DataError(
                    f"a reply holds {part.token} with a mask behind it, and the model has "
                    f"{known}; list it in model.control_tokens, or leave the masks out, and it is "
                    "text",
                    field="masks",
                )
            return [self.control_token_ids[part.token]]
        if isinstance(part, RegionMark):
            raise DataError(
                "a region that is neither drawn nor written as coordinates; records are encoded "
                "after `medm.data.regions.prepare_regions`",
                field="regions",
            )
        vision = self.num_tokens[part.branch] * next(counts[part.branch])
        before, after = self._wraps[part.branch]
        return [*before, *[self.placeholder_ids[part.branch]] * vision, *after]

    def _pixels(self, branch: str, item: object) -> np.ndarray:
        return load_pixels(item, self.preprocess[branch])

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixels", "task_ids"]


def _adapted(
    entry: Mapping[str, Any], fields: Mapping[str, object], *, place: str
) -> dict[str, Any]:
    """Return what a folder says of a view, with preprocessing fields that a recipe sets."""
    preprocess = changed(entry["preprocess"], fields)
    if list(preprocess["size"]) != list(entry["preprocess"]["size"]):
        raise RecipeError(
            f"{place}.preprocess.size: {preprocess['size']}, but the model of init_from takes "
            f"{entry['preprocess']['size']}; leave size out, or train from the published parts"
        )
    return {**entry, "preprocess": preprocess_from_dict(preprocess).model_dump()}


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add special tokens to a tokenizer, in place; return the ids of those that it did not have."""
    before = len(tokenizer)
    missing = [token for token in tokens if token not in tokenizer.added_tokens_encoder]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": missing}, replace_extra_special_tokens=False
    )
    added = [tokenizer.added_tokens_encoder[token] for token in missing]
    return [token_id for token_id in added if token_id >= before]


def wrap_fields(wrap: Sequence[str]) -> Config:
    """Return the fields of a `BranchSpec` that a recipe's `wrap` stands for."""
    before, after = wrap
    return {"before": before, "after": after}


def padded_size(tokens: int) -> int:
    """Return the rows of a vocabulary: a multiple of 64 is the shape that tensor cores like."""
    return -(-tokens // 64) * 64


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


_STOCK: dict[str, tuple[object, ...]] = {
    "padding": (None, True, False, "longest"),
    "padding_side": (None, "left"),
    "truncation": (None, False, "do_not_truncate"),
    "max_length": (None,),
    "add_special_tokens": (None, True, False),
    "return_attention_mask": (None, True),
    "return_token_type_ids": (None, False),
    "return_mm_token_type_ids": (None, False),
    "return_assistant_tokens_mask": (None, False),
    "sanitize_control_tokens": (None, True, False),
    "load_audio_from_video": (None, False),
    "tools": (None,),
    "documents": (None,),
    "videos": (None,),
    "audio": (None,),
}
"""Arguments of transformers' own processors, and the values that ask for what is done here in any
case."""


def _check_stock(return_tensors: str | None, given: Mapping[str, object]) -> None:
    """Raises `ValueError` for a value, `TypeError` for an argument, that would have no effect."""
    if return_tensors not in (None, "pt", "auto"):
        raise ValueError(f"return_tensors: expected 'pt', found {return_tensors!r}")
    for name, value in given.items():
        if name not in _STOCK:
            raise TypeError(
                f"unexpected keyword argument {name!r}: this processor takes images and volumes, "
                "and prepares them as was saved with the model"
            )
        if not any(value is accepted or value == accepted for accepted in _STOCK[name]):
            expected = " or ".join(repr(accepted) for accepted in _STOCK[name])
            raise ValueError(f"{name}: {value!r} is not supported; expected {expected}")


def _is_chat(value: object) -> bool:
    """Return whether a value is a conversation, and not a message."""
    return isinstance(value, (list, tuple)) or hasattr(value, "messages")
