"""Generation: prepared prompts in, replies out. Knows nothing of annotation files, output files or processes.

A prompt's pixels come by content: the same image asked about twice is encoded once. `Prepare` runs in the
workers of a DataLoader and makes the tensors of a batch; `Engine` holds the model and the device.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils import logging as transformers_logging

from medm.data.collator import padded
from medm.errors import DeviceError
from medm.inference.decoding import GreedyDecoder, Prompt
from medm.inference.options import GenerationOptions
from medm.types import Example, VisionFeatures


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to one prompt."""

    text: str
    tokens: int
    """Tokens generated, the end token included."""
    finished: bool
    """False where the reply was cut at `max_new_tokens`."""


@dataclass(slots=True)
class PromptBatch:
    """Left-padded prompts, and each different image or volume of them once."""

    input_ids: Tensor
    """(B, T)."""
    attention_mask: Tensor
    """(B, T)."""
    keys: dict[str, list[bytes]] = field(default_factory=dict)
    """Per branch the content key of each item of `pixels`."""
    pixels: dict[str, Tensor] = field(default_factory=dict)
    """Per branch (U, C, *spatial), every item different."""
    order: dict[str, list[int]] = field(default_factory=dict)
    """Per branch the position in `pixels` of each placeholder run of the batch, in order."""
    task_ids: dict[str, Tensor] = field(default_factory=dict)
    """Per branch (N,), the task of the prompt that each placeholder run belongs to."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, start: int, stop: int, placeholder_ids: dict[str, tuple[int, int]]) -> PromptBatch:
        """Some of the prompts, with the items that stand in them.

        Args:
            start: first row.
            stop: the row after the last.
            placeholder_ids: per branch the placeholder's id and the tokens of one item.
        """
        part = PromptBatch(self.input_ids[start:stop], self.attention_mask[start:stop])
        for name, order in self.order.items():
            token, per_item = placeholder_ids[name]
            ends = ((self.input_ids == token).sum(dim=1) // per_item).cumsum(dim=0).tolist()
            first, last = ([0, *ends][start], ends[stop - 1])
            if first == last:
                continue
            used = sorted(set(order[first:last]))
            part.order[name] = [used.index(position) for position in order[first:last]]
            part.pixels[name] = self.pixels[name][used]
            part.keys[name] = [self.keys[name][position] for position in used]
            part.task_ids[name] = self.task_ids[name][first:last]
        return part


def prepare(examples: Sequence[Example], *, pad_id: int) -> PromptBatch:
    """Prompts padded on the left, where the replies of all of them begin in the same column."""
    width = max(len(example.input_ids) for example in examples)
    batch = PromptBatch(
        padded([example.input_ids for example in examples], width, pad_id, side="left"),
        padded([[1] * len(example.input_ids) for example in examples], width, 0, side="left"),
    )
    for name in dict.fromkeys(name for example in examples for name, items in example.pixels.items() if items):
        unique: dict[bytes, np.ndarray] = {}
        keys, tasks = [], []
        for example in examples:
            for array in example.pixels.get(name, []):
                keys.append(content_key(array))
                tasks.append(example.task_id)
                unique.setdefault(keys[-1], array)
        batch.keys[name] = list(unique)
        batch.pixels[name] = torch.from_numpy(np.stack(list(unique.values())).astype(np.float32, copy=False))
        batch.order[name] = [batch.keys[name].index(key) for key in keys]
        batch.task_ids[name] = torch.tensor(tasks)
    return batch


def content_key(array: np.ndarray) -> bytes:
    """A short name of an array's content, type and shape."""
    digest = blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


class FeatureMemory:
    """Vision features by content, the least used forgotten first.

    Args:
        capacity: bytes that are kept on the model's device.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self._items: OrderedDict[tuple[str, bytes], VisionFeatures] = OrderedDict()

    def get(self, branch: str, key: bytes) -> VisionFeatures | None:
        """Features of one item, (1, N, D), or None."""
        found = self._items.get((branch, key))
        if found is not None:
            self._items.move_to_end((branch, key))
        return found

    def put(self, branch: str, key: bytes, features: VisionFeatures) -> None:
        """Keep features of one item; what is larger than the capacity is not kept."""
        if features.tokens.nbytes > self.capacity:
            return
        self._items[branch, key] = features
        self.size += features.tokens.nbytes
        while self.size > self.capacity:
            _, dropped = self._items.popitem(last=False)
            self.size -= dropped.tokens.nbytes


class Engine:
    """A model that answers.

    Args:
        model: an LVLM, on its device and in its precision, in eval mode.
        processor: the model's.
        options: how replies are chosen.
        store: bytes of vision features that are kept for later prompts on the same image.
        slots: prompts that are decoded at the same time; a batch may hold more.
    """

    def __init__(
        self, model: Any, processor: Any, options: GenerationOptions | None = None, *, store: int = 256 * 2**20,
        slots: int = 16,
    ) -> None:  # fmt: skip
        self.model, self.processor, self.options = model, processor, options or GenerationOptions()
        self.store = FeatureMemory(store)
        self.config = generation_config(model.generation_config, self.options)
        stops = self.config.eos_token_id
        self._stops = set(stops if isinstance(stops, list) else [stops])
        self._runs = {
            name: (int(processor.placeholder_ids[name]), int(entry["num_tokens"]))
            for name, entry in processor.branches.items()
        }
        self._slots = slots
        self.decoder = self._make_decoder()

    def _make_decoder(self) -> GreedyDecoder | None:
        greedy = not self.config.do_sample and self.config.num_beams == 1
        language_model = self.model.language_model
        if not greedy or not GreedyDecoder.supports(language_model):
            return None
        suppress, compiled = self.config.suppress_tokens or [], self.options.compile
        return GreedyDecoder(language_model, stops=self._stops, suppress=suppress, slots=self._slots, compiled=compiled)

    def with_options(self, options: GenerationOptions) -> Engine:
        """Return an engine of other options on the same model, with the vision features that this one has kept."""
        if options == self.options:
            return self
        other = copy.copy(self)
        other.options, other.config = options, generation_config(self.model.generation_config, options)
        if (
            self.decoder is None
            or other.config.do_sample
            or options.num_beams > 1
            or (options.compile != self.options.compile)
        ):
            other.decoder = other._make_decoder()
        return other

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def generate(self, batch: PromptBatch) -> list[Reply]:
        """One reply a prompt. A batch that does not fit the memory is halved until it does.

        Raises:
            DeviceError: not even one prompt fits.
        """
        try:
            ids = self._generate(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise DeviceError(
                    f"out of memory on {self.device} with one prompt of {batch.input_ids.shape[1]} tokens; use a "
                    "lower precision (bfloat16), fewer beams or a smaller model"
                ) from None
            if self.decoder is not None:
                self.decoder.forget()
            half = len(batch) // 2
            parts = [batch.rows(0, half, self._runs), batch.rows(half, len(batch), self._runs)]
            del batch
            torch.cuda.empty_cache()
            return [reply for part in parts for reply in self.generate(part)]
        return [self._reply(row) for row in ids]

    def stream(self, batch: PromptBatch) -> Iterator[str]:
        """The reply to a single prompt, in pieces as they come. Closing the iterator stops the generation."""
        if len(batch) != 1:
            raise ValueError(f"expected one prompt to stream, found {len(batch)}")
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failure = Event(), []

        def work() -> None:
            try:
                self._generate(batch, streamer=streamer, stopping_criteria=StoppingCriteriaList([_Stopped(stop)]))
            except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
                failure.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.set()
            thread.join()
        if failure:
            raise failure[0]

    @torch.inference_mode()
    def _generate(self, batch: PromptBatch, **kwargs: Any) -> list[list[int]]:
        """Generated ids of each row, up to and with the end token."""
        if self.config.do_sample:
            # Drawn from the prompts, so that a run that was stopped draws what it would have drawn.
            digest = blake2b(np.ascontiguousarray(batch.input_ids.numpy()).data, digest_size=7).digest()
            torch.manual_seed((int.from_bytes(digest, "big") + self.options.seed) % 2**63)
        features = {name: self._features(name, batch) for name in batch.pixels}
        if self.decoder is not None and not kwargs:
            return self.decoder.decode(self._prompts(batch, features))
        output = self.model.generate(
            input_ids=batch.input_ids.to(self.device),
            attention_mask=batch.attention_mask.to(self.device),
            features=features,
            task_ids={name: ids.to(self.device) for name, ids in batch.task_ids.items()},
            generation_config=self.config,
            **kwargs,
        )
        return [self._cut(row) for row in output[:, batch.input_ids.shape[1] :].tolist()]

    def _prompts(self, batch: PromptBatch, features: dict[str, VisionFeatures]) -> list[Prompt]:
        """Each prompt by itself, embedded; equal beginnings are marked equal, images by their content."""
        tasks = {name: ids.to(self.device) for name, ids in batch.task_ids.items()}
        embeds, _ = self.model.embed(batch.input_ids.to(self.device), features=features, task_ids=tasks)
        signature = batch.input_ids.numpy().copy()
        for name, order in batch.order.items():
            token, per_item = self._runs[name]
            rows, columns = np.nonzero(batch.input_ids.numpy() == token)
            for run, (position, task) in enumerate(zip(order, batch.task_ids[name].tolist(), strict=True)):
                content = blake2b(batch.keys[name][position] + bytes([task]), digest_size=5).digest()
                place = slice(run * per_item, (run + 1) * per_item)
                # Below zero, where no token id is.
                signature[rows[place], columns[place]] = (
                    -1 - (int.from_bytes(content, "big") << 20) - np.arange(per_item)
                )
        starts = (1 - batch.attention_mask).sum(dim=1).tolist()
        longest = self.options.max_new_tokens
        return [Prompt(embeds[row, start:], signature[row, start:], longest) for row, start in enumerate(starts)]

    def _features(self, name: str, batch: PromptBatch) -> VisionFeatures:
        """Features of every placeholder run of a branch; what was seen before is not encoded again."""
        keys = batch.keys[name]
        found = {key: self.store.get(name, key) for key in keys}
        new = [position for position, key in enumerate(keys) if found[key] is None]
        if new:
            encoded = self.model.branch(name).encode(batch.pixels[name][new].to(self.device))
            for row, position in enumerate(new):
                pooled = None if encoded.pooled is None else encoded.pooled[row : row + 1].clone()
                one = VisionFeatures(encoded.tokens[row : row + 1].clone(), encoded.grid, encoded.prefix, pooled)
                self.store.put(name, keys[position], one)
                found[keys[position]] = one
        items = [found[keys[position]] for position in batch.order[name]]
        first = items[0]
        assert first is not None
        pooled_items = [item.pooled for item in items if item is not None and item.pooled is not None]
        return VisionFeatures(
            tokens=torch.cat([item.tokens for item in items if item is not None]),
            grid=first.grid,
            prefix=first.prefix,
            pooled=torch.cat(pooled_items) if pooled_items else None,
        )

    def _cut(self, row: list[int]) -> list[int]:
        end = next((position for position, token in enumerate(row) if token in self._stops), None)
        return row if end is None else row[: end + 1]

    def _reply(self, ids: list[int]) -> Reply:
        finished = bool(ids) and ids[-1] in self._stops
        return Reply(self.processor.text(ids), len(ids), finished)


class _Stopped(StoppingCriteria):
    """Ends a generation whose reader has gone."""

    def __init__(self, stop: Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **_kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


def generation_config(published: GenerationConfig, options: GenerationOptions) -> GenerationConfig:
    """What stops and suppresses tokens is the model's; how tokens are chosen is the caller's alone.

    Published configs carry sampling settings of their own (temperature, top_k, repetition penalty), which would make
    "greedy" mean something else for each model.
    """
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "decoder_start_token_id")
    config = GenerationConfig(**{key: getattr(published, key, None) for key in kept})
    config.max_new_tokens, config.num_beams = options.max_new_tokens, options.num_beams
    config.do_sample = options.temperature > 0
    if options.compile and options.num_beams == 1:
        config.cache_implementation = "static"  # which transformers compiles for
    if config.do_sample:
        config.temperature, config.top_p, config.top_k = options.temperature, options.top_p, 0
    return config


def pick_device(name: str) -> torch.device:
    """A device by name, proven to be there; `auto` is the first GPU, or the CPU where there is none.

    Raises:
        DeviceError: it is not there, or the name is none.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not cuda:
            raise DeviceError(
                f"device {name!r} was asked for, but this PyTorch ({torch.__version__}) sees no GPU; check the driver "
                "and that PyTorch was installed with CUDA, or use device cpu"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPU(s)")
    return device


def load_engine(
    folder: str, options: GenerationOptions, *, device: torch.device, dtype: str = "saved", slots: int = 16
) -> tuple[Engine, Any]:
    """The model of a folder on a device, ready to answer, and its processor.

    Raises:
        CheckpointError: see `medm.models.load`.
    """
    from medm.models import load

    transformers_logging.disable_progress_bar()
    model, processor = load(folder)
    model.merge_adapters()
    nn.Module.to(model, device=device, dtype=None if dtype == "saved" else getattr(torch, dtype))
    model.requires_grad_(False)
    model.eval()
    return Engine(model, processor, options, slots=slots), processor
