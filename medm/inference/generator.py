"""Generation: prepared prompts in, replies out.

Knows nothing of annotation files, output files or processes.

A prompt's pixels come by content: the same image asked about twice is encoded once. `prepare` runs
in the workers of a DataLoader and makes the tensors of a batch; `Engine` holds the model and the
device.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from medm.errors import DataError, DeviceError
from medm.inference.decoding import Decoder, Finish, Prompt, TokenEvent
from medm.inference.loading import load_model
from medm.inference.options import GenerationOptions
from medm.inference.sampling import Sampling
from medm.inference.streaming import ReplyText
from medm.types import Example, JsonObject, VisionFeatures

if TYPE_CHECKING:
    from medm.models.lvlm.modeling import LVLMForConditionalGeneration
    from medm.models.lvlm.processing import LVLMProcessor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply:
    """Reply of the model to one prompt."""

    text: str
    tokens: int
    """Tokens generated, the end token included."""
    finished: bool
    """False where the reply was cut at `max_new_tokens`."""
    ids: tuple[int, ...] = ()
    """The generated tokens, control tokens and the end token included."""

    def line(self) -> JsonObject:
        """Return what an output file says of it."""
        return {"reply": self.text, "tokens": self.tokens, "finished": self.finished}


@dataclass(frozen=True, slots=True)
class Event:
    """Outcome of a step of the engine for one request."""

    request: int
    token: int | None = None
    """One more token of the reply."""
    text: str = ""
    """The next piece of the reply, for requests that are streamed. The pieces together are
    `Reply.text`."""
    finish: Finish | None = None
    """Set in the last event of a request: "stop", "length", "cancelled" or "error"."""
    reply: Reply | None = None
    """The whole reply, with `finish` "stop" or "length"."""
    error: Exception | None = None
    """The cause of `finish` "error"."""


@dataclass(frozen=True, slots=True)
class Item:
    """An image or volume of a prompt, or a tile of an image."""

    key: bytes
    """Hash of its content, see `content_key`."""
    pixels: Tensor
    """(C, *spatial)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt."""

    input_ids: np.ndarray
    """(T,) int64, with one placeholder for each vision token."""
    items: dict[str, list[Item]] = field(default_factory=dict)
    """Per branch the item of each placeholder run, in order."""
    task_id: int = 0
    """Position of the task in the model's task list, as in `Example`."""

    @classmethod
    def of(cls, example: Example) -> Request:
        """Return the request of one example."""
        return prepare([example]).requests()[0]


@dataclass(slots=True)
class PromptBatch:
    """Several prompts, and each different image or volume of them once."""

    input_ids: list[np.ndarray]
    """Token ids (T,) of each prompt."""
    task_ids: list[int]
    """Task of each prompt, as in `Example`."""
    keys: dict[str, list[bytes]] = field(default_factory=dict)
    """Per branch the content key of each item of `pixels`."""
    pixels: dict[str, Tensor] = field(default_factory=dict)
    """Per branch (U, C, *spatial), every item different."""
    order: dict[str, list[list[int]]] = field(default_factory=dict)
    """Per branch and prompt the position in `pixels` of each placeholder run, in order."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def requests(self) -> list[Request]:
        """Return each prompt by itself, with the items that stand in it."""
        items = {
            name: [
                Item(key, pixels)
                for key, pixels in zip(self.keys[name], self.pixels[name], strict=True)
            ]
            for name in self.pixels
        }
        return [
            Request(
                ids,
                {
                    name: [items[name][p] for p in order[row]]
                    for name, order in self.order.items()
                    if order[row]
                },
                self.task_ids[row],
            )
            for row, ids in enumerate(self.input_ids)
        ]


def prepare(examples: Sequence[Example]) -> PromptBatch:
    """Return the prompts of examples as one batch, without labels."""
    batch = PromptBatch(
        [np.array(example.input_ids, np.int64) for example in examples],
        [example.task_id for example in examples],
    )
    for name in dict.fromkeys(
        name for example in examples for name, items in example.pixels.items() if items
    ):
        unique: dict[bytes, np.ndarray] = {}
        keys: list[list[bytes]] = []
        for example in examples:
            arrays = example.pixels.get(name, [])
            keys.append([content_key(array) for array in arrays])
            for key, array in zip(keys[-1], arrays, strict=True):
                unique.setdefault(key, array)
        positions = {key: position for position, key in enumerate(unique)}
        batch.keys[name] = list(unique)
        batch.pixels[name] = torch.from_numpy(
            np.stack(list(unique.values())).astype(np.float32, copy=False)
        )
        batch.order[name] = [[positions[key] for key in own] for own in keys]
    return batch


def content_key(array: np.ndarray) -> bytes:
    """Return a hash of an array's content, type and shape."""
    digest = blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


class FeatureMemory(Generic[T]):
    """Cache of what an encoder gave, by content; the least recently used are dropped first.

    Args:
        capacity: bytes that are kept on the model's device.
        nbytes: gives the bytes of the features of one item.
    """

    def __init__(self, capacity: int, nbytes: Callable[[T], int]) -> None:
        self.capacity, self.size, self.nbytes = capacity, 0, nbytes
        self._items: OrderedDict[tuple[str, bytes], T] = OrderedDict()

    def get(self, view: str, key: bytes) -> T | None:
        """Return the features of one item, or None."""
        found = self._items.get((view, key))
        if found is not None:
            self._items.move_to_end((view, key))
        return found

    def put(self, view: str, key: bytes, features: T) -> None:
        """Keep the features of one item, unless they alone exceed the capacity."""
        size = self.nbytes(features)
        if size > self.capacity or (view, key) in self._items:
            return
        self._items[view, key] = features
        self.size += size
        while self.size > self.capacity:
            _, dropped = self._items.popitem(last=False)
            self.size -= self.nbytes(dropped)


@dataclass(slots=True)
class _RequestPrompt(Prompt):
    """A prompt whose embeddings are made from its request."""

    request: Request = field(default_factory=lambda: Request(np.zeros(0, np.int64)))


@dataclass(slots=True)
class _Pending:
    """A request that is not finished."""

    decoder: Decoder
    inbox: deque[Event] | None
    """Takes its events; without it `step` returns them."""
    text: ReplyText | None
    """The text of a reply that is streamed."""
    tokens: list[int] = field(default_factory=list)


class Engine:
    """A model that generates replies.

    All requests go through one continuous batch: `submit` some, `step` until they are finished,
    `submit` more at any time between. `generate` and `stream` do so for a batch and for a single
    request; requests of others advance meanwhile, and their events are kept.

    One thread at a time may use an engine, and the model with it: a server hands requests to the
    thread that owns it.

    Args:
        model: an LVLM, on its device and in its precision, in eval mode.
        processor: the model's.
        options: settings of replies for requests without their own.
        store: bytes of vision features that are kept for later prompts on the same image.
        slots: requests that are decoded at the same time; more may wait.
        max_tokens: most tokens of a prompt and its reply together; the model's context without it.
            A reply ends there; a longer prompt is refused.
    """

    def __init__(
        self,
        model: LVLMForConditionalGeneration,
        processor: LVLMProcessor,
        options: GenerationOptions | None = None,
        *,
        store: int = 256 * 2**20,
        slots: int = 16,
        max_tokens: int | None = None,
    ) -> None:
        self.model, self.processor, self.options = model, processor, options or GenerationOptions()
        self.store = FeatureMemory[VisionFeatures](store, lambda features: features.tokens.nbytes)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_tokens = context if max_tokens is None else max_tokens
        self._runs = {
            name: (int(processor.placeholder_ids[name]), int(entry["num_tokens"]))
            for name, entry in processor.branches.items()
        }
        self._slots = slots
        self._ids = itertools.count()
        self._decoders: dict[bool, Decoder] = {}
        """By `compile`."""
        self._pending: dict[int, _Pending] = {}
        self._events: list[Event] = []

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return torch.device(self.model.device)

    @property
    def pending(self) -> int:
        """Requests that are not finished, and events that `step` has not returned yet."""
        return len(self._pending) + len(self._events)

    def decoder(self, *, compiled: bool) -> Decoder:
        """Return the continuous batch of requests with or without `compile`.

        The model gives the ids that end a reply and those that are never generated; the request
        alone gives the settings of sampling. Configs of published models have sampling settings too
        (temperature, top_k, repetition penalty), which would make "greedy" mean something else for
        each model.
        """
        if compiled not in self._decoders:
            config = self.model.generation_config
            stops, vocabulary = config.eos_token_id, self.model.get_input_embeddings()
            self._decoders[compiled] = Decoder(
                self.model.language_model,
                stops=[
                    stop
                    for stop in (stops if isinstance(stops, list) else [stops])
                    if stop is not None
                ],
                end_sequence=self.processor.chat.end_sequence,
                suppress=[
                    token
                    for token in config.suppress_tokens or []
                    if token < vocabulary.num_embeddings
                ],
                slots=self._slots,
                compiled=compiled,
                max_tokens=self.max_tokens,
                embed=self._embed,
                ids=self._ids,
            )
        return self._decoders[compiled]

    def submit(
        self, request: Request, options: GenerationOptions | None = None, *, stream: bool = False
    ) -> int:
        """Queue a request and return its number.

        Args:
            request: the prompt. One that cannot be answered (items that do not match its
                placeholders, longer than the context) ends with an error in a later step.
            options: settings of its reply; the engine's without them.
            stream: fill `Event.text`.
        """
        return self._submit(request, options, text=self._reply_text() if stream else None)

    def cancel(self, request: int) -> None:
        """End a request at the next step, which frees its KV cache.

        Does nothing for a request that is finished.
        """
        if request in self._pending:
            self._pending[request].decoder.cancel(request)

    def step(self) -> list[Event]:
        """Run one step of the continuous batch: evict, prefill, admit, decode.

        Each admitted request gets one token.

        Returns:
            The events of all requests that were submitted by `submit`.

        Raises:
            Exception: the model fails for a whole batch. The requests stay; they can be tried again
                or cancelled.
        """
        self._advance()
        events, self._events = self._events, []
        return events

    def generate(self, batch: PromptBatch, options: GenerationOptions | None = None) -> list[Reply]:
        """Return one reply per prompt.

        Raises:
            DataError: a prompt cannot be answered.
            DeviceError: not even one prompt fits the memory.
        """
        requests, inbox = batch.requests(), deque[Event]()
        replies: dict[int, Reply] = {}
        rows: dict[int, int] = {}
        try:
            # The longest first: whether they fit the memory shows at the start.
            for row in sorted(
                range(len(requests)), key=lambda row: (-len(requests[row].input_ids), row)
            ):
                rows[self._submit(requests[row], options, inbox=inbox)] = row
            compiled = (options or self.options).compile
            with self.decoder(compiled=compiled).prepacked_head:
                while len(replies) < len(requests):
                    self._advance()
                    while inbox:
                        event = inbox.popleft()
                        if event.error is not None:
                            raise event.error
                        if event.reply is not None:
                            replies[rows[event.request]] = event.reply
        finally:
            self._abandon(rows)
        return [replies[row] for row in range(len(requests))]

    def stream(
        self, request: Request, options: GenerationOptions | None = None
    ) -> Generator[str, None, Reply | None]:
        """Yield the reply to one prompt in pieces as they come, and return it as a whole.

        None is returned for a request that was cancelled. Closing the iterator cancels it.

        Raises:
            DataError: the prompt cannot be answered.
            DeviceError: it does not fit the memory.
        """
        inbox = deque[Event]()
        number = self._submit(request, options, inbox=inbox, text=self._reply_text())
        try:
            reply, finished = None, False
            while not finished:
                self._advance()
                while inbox:
                    event = inbox.popleft()
                    if event.error is not None:
                        raise event.error
                    finished, reply = event.finish is not None, event.reply
                    if event.text:
                        yield event.text
            return reply
        finally:
            self._abandon([number])

    def _submit(
        self,
        request: Request,
        options: GenerationOptions | None,
        *,
        inbox: deque[Event] | None = None,
        text: ReplyText | None = None,
    ) -> int:
        options = options or self.options
        problem = self._problem(request)
        if problem is not None:
            number = next(self._ids)
            event = Event(number, finish="error", error=DataError(problem))
            (self._events if inbox is None else inbox).append(event)
            return number
        decoder, signature = self.decoder(compiled=options.compile), self._signature(request)
        sampling = None
        if options.temperature > 0:
            # From the prompt as well: a run that was stopped draws what it would have drawn.
            digest = int.from_bytes(blake2b(signature.tobytes(), digest_size=7).digest(), "big")
            sampling = Sampling(
                options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seed=(digest + options.seed) % 2**63,
            )
        number = decoder.submit(
            _RequestPrompt(
                None, signature, options.max_new_tokens, sampling=sampling, request=request
            )
        )
        self._pending[number] = _Pending(decoder, inbox, text)
        return number

    def _reply_text(self) -> ReplyText:
        return ReplyText(self.processor.text, end=self.processor.chat.end_text)

    def _problem(self, request: Request) -> str | None:
        """Return the reason why a request cannot be answered, or None.

        On a GPU such a request would end the process of the model.
        """
        ids, vocabulary = request.input_ids, self.model.get_input_embeddings().num_embeddings
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            return (
                f"token ids from {ids.min()} to {ids.max()}; expected ids from 0 to "
                f"{vocabulary - 1}"
            )
        if unknown := sorted(set(request.items) - set(self._runs)):
            return (
                f"items for {', '.join(unknown)}; the model has branches for "
                f"{', '.join(self._runs)}"
            )
        for name, (token, per_item) in self._runs.items():
            items, places = request.items.get(name, []), int((ids == token).sum())
            if places != len(items) * per_item:
                return (
                    f"branch {name!r}: {places} placeholder tokens and {len(items)} items of "
                    f"{per_item} tokens; expected one placeholder for each vision token"
                )
            expected = (self.model.branch(name).channels, *self.model.branch(name).spatial)
            for item in items:
                if tuple(item.pixels.shape) != expected:
                    return (
                        f"branch {name!r}: pixels of shape {tuple(item.pixels.shape)}; expected "
                        f"{expected}"
                    )
        return None

    def _advance(self) -> None:
        """Run a step of every continuous batch that has requests, and hand out the events."""
        for decoder in self._decoders.values():
            if decoder.pending:
                for event in decoder.step():
                    self._take(event)

    def _take(self, event: TokenEvent) -> None:
        pending = self._pending.get(event.request)
        if pending is None:
            return  # abandoned by `stream` or `generate`
        piece, reply = "", None
        if event.token is not None:
            pending.tokens.append(event.token)
            piece = "" if pending.text is None else pending.text.add(event.token)
        if event.finish is not None:
            del self._pending[event.request]
            piece += "" if pending.text is None else pending.text.end()
        if event.finish in ("stop", "length"):
            ids = tuple(pending.tokens)
            text = self.processor.text(pending.tokens)
            reply = Reply(text, len(ids), event.finish == "stop", ids)
        own = Event(event.request, event.token, piece, event.finish, reply, event.error)
        (self._events if pending.inbox is None else pending.inbox).append(own)

    def _abandon(self, requests: Iterable[int]) -> None:
        """Cancel requests and drop their events; the next step frees their KV cache."""
        for request in requests:
            self.cancel(request)
            self._pending.pop(request, None)

    def _signature(self, request: Request) -> np.ndarray:
        """Return the token ids, (T,), with a hash of content and task for each vision token."""
        signature = request.input_ids.copy()
        for name, items in request.items.items():
            token, per_item = self._runs[name]
            places = np.flatnonzero(request.input_ids == token).reshape(len(items), per_item)
            for run, item in zip(places, items, strict=True):
                content = blake2b(item.key + bytes([request.task_id]), digest_size=5).digest()
                # Below zero, where no token id is.
                signature[run] = -1 - (int.from_bytes(content, "big") << 20) - np.arange(per_item)
        return signature

    def _embed(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Return the embeddings (T, D) of each prompt."""
        requests = [prompt.request for prompt in prompts if isinstance(prompt, _RequestPrompt)]
        row = torch.from_numpy(np.concatenate([request.input_ids for request in requests]))[
            None
        ].to(self.device)
        features, task_ids = self.vision(requests)
        embeds, _ = self.model.embed(row, features=features, task_ids=task_ids)  # (1, all T, D)
        return list(embeds[0].split([len(request.input_ids) for request in requests]))

    def vision(
        self, requests: Sequence[Request]
    ) -> tuple[dict[str, VisionFeatures], dict[str, Tensor]]:
        """Return the features and task ids of the items of some prompts, per branch.

        Features that are cached are not computed again.
        """
        features, task_ids = {}, {}
        for name in self._runs:
            items = [
                (item, request.task_id)
                for request in requests
                for item in request.items.get(name, [])
            ]
            if items:
                features[name] = self._features(name, [item for item, _ in items])
                task_ids[name] = torch.tensor([task for _, task in items], device=self.device)
        return features, task_ids

    def _features(self, name: str, items: Sequence[Item]) -> VisionFeatures:
        """Return the features of every item in order; cached ones are not encoded again."""
        found = {item.key: self.store.get(name, item.key) for item in items}
        new = {item.key: item.pixels for item in items if found[item.key] is None}
        if new:
            encoded = self.model.branch(name).encode(
                torch.stack(list(new.values())).to(self.device)
            )
            for row, key in enumerate(new):
                pooled = None if encoded.pooled is None else encoded.pooled[row : row + 1].clone()
                one = VisionFeatures(
                    encoded.tokens[row : row + 1].clone(), encoded.grid, encoded.prefix, pooled
                )
                self.store.put(name, key, one)
                found[key] = one
        features = [known for item in items if (known := found[item.key]) is not None]
        pooled_items = [one.pooled for one in features if one.pooled is not None]
        return VisionFeatures(
            tokens=torch.cat([one.tokens for one in features]),
            grid=features[0].grid,
            prefix=features[0].prefix,
            pooled=torch.cat(pooled_items) if pooled_items else None,
        )


def pick_device(name: str) -> torch.device:
    """Return an available device by name; `auto` is the first GPU, or the CPU without one.

    Raises:
        DeviceError: the device is not available, or the name is invalid.
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
                f"device {name!r} was asked for, but this PyTorch ({torch.__version__}) sees no "
                "GPU; check the driver and that PyTorch was installed with CUDA, or use device "
                "cpu"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(
                f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPU(s)"
            )
    return device


def load_engine(
    folder: str,
    options: GenerationOptions,
    *,
    device: torch.device,
    dtype: str = "saved",
    slots: int = 16,
) -> tuple[Engine, LVLMProcessor]:
    """Load the model of a folder onto a device and return its engine and its processor.

    Raises:
        CheckpointError: see `medm.models.load`; or the model generates no text, which is known
            before weights are read.
    """
    from medm.models.lvlm.modeling import LVLMForConditionalGeneration
    from medm.models.lvlm.processing import LVLMProcessor

    model, processor = load_model(
        folder,
        LVLMForConditionalGeneration,
        refusal="generates no text; expected a model with a language model",
        device=device,
        dtype=dtype,
    )
    assert isinstance(processor, LVLMProcessor)
    return Engine(model, processor, options, slots=slots), processor
