"""The owner of the model: one thread that generates replies, masks and vectors for all requests.

    worker = Worker(ServeOptions(model="work_dirs/finetune"))
    worker.start()
    worker.wait_ready()
    stream = worker.submit([Turn("user", (Media("image"), "\n", "What is seen?"))], [Path("a.png")])
    for piece in stream:
        print(piece, end="")

Requests of any thread enter one continuous batch. Knows nothing of HTTP.
"""

from __future__ import annotations

import copy
import logging
import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np

from medm.data.base import missing_branch
from medm.errors import CheckpointError, DataError, MediaError, MedmError
from medm.inference.decoding import Finish
from medm.inference.embedder import load_embedder
from medm.inference.generator import Engine, Event, Request, load_engine, pick_device
from medm.inference.options import GenerationOptions, SegmentationOptions
from medm.inference.segmenter import Answered, Grounded, Segmenter, Shown
from medm.inference.volume_modes import SlicedVolumes, needs_slices
from medm.models import kind_of_config, load_config
from medm.serving.decoding import Content, Decoders
from medm.serving.errors import ServingError, as_serving_error, media_error
from medm.serving.options import ServeOptions
from medm.serving.stops import StopText
from medm.types import Example, Kind, Media, Sample, Turn

if TYPE_CHECKING:
    from medm.models.dual_encoder.embedder import Embedder
    from medm.models.lvlm.processing import LVLMProcessor

logger = logging.getLogger(__name__)
T = TypeVar("T")

State: TypeAlias = Literal["loading", "ready", "draining", "failed"]

_DECODERS = 2
"""Programs that decode images."""
_BYTES_PER_TOKEN = 256
"""No token is longer; a longer text is refused before it is split into tokens."""
_FAILURES = 3
"""Steps that fail one after another, after which the model is given up."""


@dataclass(frozen=True, slots=True)
class ReplyEnd:
    """End of a reply."""

    finish: Finish
    """"stop" (an end token or a stop sequence), "length", "cancelled" or "error"."""
    text: str = ""
    """The whole reply, without the stop sequence."""
    ids: tuple[int, ...] = ()
    """Tokens that were generated."""
    error: ServingError | None = None
    """The cause of "error"."""


@dataclass(frozen=True, slots=True)
class ReplyEvent:
    """A piece of a reply, or its end, or both."""

    text: str = ""
    end: ReplyEnd | None = None
    tokens: int = 0
    """Tokens generated so far."""


class ReplyStream:
    """The reply to one request, while it is generated.

    Args:
        request: the prompt.
        media: its images and volumes, in order.
        stop: texts that end the reply.
        cancel: frees the slot of a stream.
        listener: takes the events, in the thread of the worker; without it they are kept for
            `__iter__` and `result`.
    """

    def __init__(
        self,
        request: Request,
        media: Sequence[Shown],
        *,
        stop: Sequence[str],
        cancel: Callable[[ReplyStream], None],
        listener: Callable[[ReplyEvent], None] | None,
    ) -> None:
        self.request, self.media = request, tuple(media)
        self.prompt_tokens = len(request.input_ids)
        self.number: int | None = None
        """Of the request in the engine; set by the worker."""
        self.end: ReplyEnd | None = None
        """Set once the reply is complete."""
        self._cancel = cancel
        self._events: queue.SimpleQueue[ReplyEvent] = queue.SimpleQueue()
        self._listener = listener or self._events.put
        self._stops = StopText(stop)
        self._pieces: list[str] = []
        self._ids: list[int] = []

    def __iter__(self) -> Iterator[str]:
        """Yield the reply in pieces. Leaving the loop early cancels it.

        Raises:
            ServingError: the request fails.
        """
        try:
            while self.end is None or not self._events.empty():
                event = self._events.get()
                if event.text:
                    yield event.text
                if event.end is not None:
                    if event.end.error is not None:
                        raise event.end.error
                    return
        finally:
            if self.end is None:
                self.cancel()

    def result(self) -> ReplyEnd:
        """Wait for the end and return it. Raises as `__iter__`."""
        for _ in self:
            pass
        assert self.end is not None
        return self.end

    def cancel(self) -> None:
        """End the reply, which frees its slot. Does nothing once it is complete."""
        if self.end is None:
            self._cancel(self)

    def take(self, event: Event) -> bool:
        """Take an event of the engine. Called by the worker.

        Returns:
            True if the reply is complete.
        """
        if event.token is not None:
            self._ids.append(event.token)
        text = self._stops.add(event.text)
        finish = event.finish
        if self._stops.found:
            finish = "stop"
        elif finish is not None:
            text += self._stops.end()
        self._pieces.append(text)
        if finish is None:
            if text:
                self._listener(ReplyEvent(text, tokens=len(self._ids)))
            return False
        error = None if event.error is None else as_serving_error(event.error)
        self.close(ReplyEnd(finish, "".join(self._pieces), tuple(self._ids), error), text)
        return True

    def close(self, end: ReplyEnd, text: str = "") -> None:
        """Tell the listener of the end. Called by the worker, once."""
        self.end = end
        self._listener(ReplyEvent(text, end, len(self._ids)))


class Worker:
    """One model and the thread that owns it.

    Args:
        options: the model, its device and the limits.

    Raises:
        CheckpointError: no folder that medm saved, or a kind of model that is not served.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.options, self.limits = options, options.limits
        self.kind: Literal["lvlm", "dual-encoder"] = _kind(options.model)
        self.decoders = Decoders(_DECODERS, options.limits)
        self.failure: BaseException | None = None
        """Why the model could not be loaded, or was given up."""
        self.on_failure: Callable[[], None] | None = None
        """Called in the worker's thread when `failure` is set."""
        self.engine: Engine | None = None
        self.embedder: Embedder | None = None
        self._state: State = "loading"
        self._loaded = threading.Event()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """Requests and cancellations; None ends the thread."""
        self._calls: deque[Callable[[], None]] = deque()
        self._closed = False
        self._ended = threading.Event()
        """Set when the thread takes no more requests."""
        self._streams: dict[int, ReplyStream] = {}
        self._failures = 0
        self._segmenters: dict[str, Segmenter] = {}
        self._lock = threading.Lock()
        self._open = 0
        self._encoding = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="medm-worker", daemon=True)

    @property
    def state(self) -> State:
        """Readiness for requests."""
        return self._state

    @property
    def open(self) -> int:
        """Requests that are not finished."""
        return self._open

    @property
    def capacity(self) -> int:
        """Most requests that may be open."""
        return self.options.slots + self.options.queue

    @property
    def processor(self) -> LVLMProcessor:
        """Processor for the threads of requests. One at a time may use its tokenizer (`encode`)."""
        if self.engine is None:
            self.require_ready("lvlm")
        return self._processor

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of a prompt and its reply."""
        return None if self.engine is None else self.engine.max_tokens

    @property
    def has_masks(self) -> bool:
        """The model has a mask head."""
        return self.engine is not None and self.engine.model.masks is not None

    def branches(self) -> list[str]:
        """Return the kinds of file that requests may show."""
        if self.embedder is not None:
            return [self.embedder.branch]
        if self.engine is None:
            return []
        found = list(self._processor.branches)
        return [*found, "volume"] if needs_slices(self._processor, "volume") else found

    def start(self) -> None:
        """Start the thread, which loads the model first."""
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the model is loaded. Raises the error of loading, or `TimeoutError`."""
        if not self._loaded.wait(timeout):
            raise TimeoutError(f"the model is not loaded after {timeout} s")
        if self.failure is not None:
            raise self.failure

    def drain(self) -> None:
        """Refuse new requests from now on; those that are open go on."""
        if self._state in ("loading", "ready"):
            self._state = "draining"

    def close(self) -> None:
        """End the thread after its present step; open requests are cancelled."""
        self.drain()
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self.decoders.close()

    def require_ready(self, kind: str | None = None) -> None:
        """Refuse a request that cannot be served now, or by no model of this kind.

        Raises:
            ServingError: "loading", "draining", "failed" or "unsupported".
        """
        if self._state == "loading":
            raise ServingError("loading", "the model is loading; try again in some seconds")
        if self._state == "draining":
            raise ServingError("draining", "the server is ending; send new requests to another one")
        if self._state == "failed":
            raise ServingError("failed", "the model failed and the server must be started again")
        if kind is not None and kind != self.kind:
            gives = "generates text" if self.kind == "lvlm" else "gives vectors"
            raise ServingError(
                "unsupported", f"the model of this server {gives}; expected a model of kind {kind}"
            )

    def submit(
        self,
        turns: Sequence[Turn],
        sources: Sequence[Content] = (),
        *,
        generation: GenerationOptions | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        task: str | None = None,
        listener: Callable[[ReplyEvent], None] | None = None,
    ) -> ReplyStream:
        """Queue a conversation and return its reply while it is generated.

        Images are decoded and the prompt is made in the thread of the caller.

        Args:
            turns: the conversation, which ends with a user's turn.
            sources: content of each `Media` of the turns, in order: bytes of an image, or a path.
            generation: temperature, top-k, top-p and seed; greedy without them. Its
                `max_new_tokens` is not used.
            max_new_tokens: longest reply. Default: the server's limit, or what the context leaves.
            stop: texts that end the reply.
            task: kind of task, for models whose experts are chosen by it.
            listener: see `ReplyStream`.

        Raises:
            ServingError: the queue is full, the model is not ready, the prompt and its reply are
                too long, or an image cannot be read.
        """
        self.require_ready("lvlm")
        self._enter()
        try:
            self._check_lengths(turns, max_new_tokens)
            example = self.encode(turns, sources, task=task)
            longest = self._reply_length(len(example.input_ids), max_new_tokens)
            options = (generation or GenerationOptions()).model_copy(
                update={"max_new_tokens": longest}
            )
            stream = ReplyStream(
                Request.of(example),
                _shown(turns, sources),
                stop=stop,
                cancel=self._cancel_later,
                listener=listener,
            )
        except BaseException:
            self._leave()
            raise
        self._put(lambda: self._admit(stream, options))
        return stream

    def encode(
        self, turns: Sequence[Turn], sources: Sequence[Content] = (), *, task: str | None = None
    ) -> Example:
        """Return the prompt of a conversation.

        Raises:
            ServingError: an image or volume cannot be read, or the model has no branch for it.
        """
        processor = self.processor
        sample = Sample(tuple(turns), task=task)
        kinds = [media.branch for media in sample.media]
        if len(kinds) != len(sources):
            raise ServingError(
                "invalid_value", f"{len(kinds)} places of images, and {len(sources)} images"
            )
        sliced = SlicedVolumes(processor, SegmentationOptions())
        try:
            if sliced.needed(sample):
                # Uploaded volumes were read in whole by a decoder before.
                with self._encoding:
                    return sliced.example(sample, list(sources))
            pixels: dict[str, list[np.ndarray]] = {}
            for kind, source in zip(kinds, sources, strict=True):
                pixels.setdefault(kind, []).append(self.pixels(kind, source))
            with self._encoding:
                return processor.encode(sample, pixels, generation=True)
        except MediaError as error:
            hide = next((str(source) for source in sources if not isinstance(source, bytes)), "")
            raise media_error(error, "volume", hide=hide, param="messages") from None
        except DataError as error:
            raise ServingError("invalid_value", error.reason, param="messages") from None

    def pixels(self, kind: str, source: Content) -> np.ndarray:
        """Return an image or volume as the model takes it. Raises `ServingError`."""
        preprocess: Mapping[str, Any]
        if self.embedder is not None:
            preprocess = self.embedder.processor.preprocess
        else:
            branches = self.processor.branches
            preprocess = {name: self.processor.preprocess[name] for name in branches}
        if kind not in preprocess:
            raise ServingError("unsupported", missing_branch(kind, preprocess), param="messages")
        return self.decoders.pixels(source, preprocess[kind], param="messages")

    def segment(
        self,
        stream: ReplyStream,
        *,
        on_slice: Callable[[int, int], None] | None = None,
        options: SegmentationOptions | None = None,
    ) -> Future[Grounded]:
        """Return the masks of a complete reply, from a model with a mask head.

        Replies of others are generated between the slices of a volume.

        Args:
            stream: its `end` is set.
            on_slice: told the slices that are done and all of them. What it raises ends the work.
            options: how masks are made.

        Raises:
            ServingError: the model has no mask head.
        """
        if not self.has_masks:
            raise ServingError(
                "unsupported", "the model has no mask head; its replies have no masks"
            )
        assert stream.end is not None
        answered = Answered(stream.request, stream.end.ids, stream.media)
        chosen = options or SegmentationOptions()

        def run() -> Grounded:
            segmenter = self._segmenter(chosen)

            def between(done: int, total: int) -> None:
                if on_slice is not None:
                    on_slice(done, total)
                self._receive(wait=False)
                self._step()

            segmenter.on_slice = between
            try:
                return segmenter.segment([answered])[0]
            finally:
                segmenter.on_slice = None

        return self.call(run, continues=True)

    def call(self, function: Callable[[], T], *, continues: bool = False) -> Future[T]:
        """Run a function in the thread that owns the model, between two steps of generation.

        Args:
            function: uses the model.
            continues: it belongs to a request that was taken before, so that neither a full queue
                nor the end of the server refuses it.

        Raises:
            ServingError: the queue is full, or the model is not ready.
        """
        if not continues:
            self.require_ready()
        self._enter(always=continues)
        future: Future[T] = Future()

        def run() -> None:
            try:
                if future.set_running_or_notify_cancel():
                    try:
                        if self._ended.is_set():
                            raise _ended()
                        result = function()
                    except BaseException as error:  # noqa: BLE001 (raised again by `result`)
                        future.set_exception(error)
                    else:
                        future.set_result(result)
            finally:
                self._leave()

        self._put(lambda: self._calls.append(run))
        return future

    def _put(self, item: Callable[[], None]) -> None:
        self._inbox.put(item)
        if self._ended.is_set():
            self._flush()

    def _check_lengths(self, turns: Sequence[Turn], max_new_tokens: int | None) -> None:
        """Refuse what is too long, before a text is split into tokens or an image is decoded."""
        if max_new_tokens is not None and max_new_tokens > self.limits.max_new_tokens:
            raise ServingError(
                "context_length_exceeded",
                f"a reply of {max_new_tokens} tokens was asked for; this server gives at most "
                f"{self.limits.max_new_tokens}",
                param="max_tokens",
            )
        longest = self._longest_prompt()
        if longest is None:
            return
        counts = self.processor.num_tokens
        vision = sum(
            counts.get(part.branch, 0)
            for turn in turns
            for part in turn.content
            if isinstance(part, Media)
        )
        letters = sum(len(turn.text.encode()) for turn in turns)
        if vision >= longest or letters > longest * _BYTES_PER_TOKEN:
            raise ServingError(
                "context_length_exceeded",
                f"{vision} vision tokens and {letters} bytes of text do not fit the {longest} "
                "tokens of a prompt",
                param="messages",
            )

    def _longest_prompt(self) -> int | None:
        known = [
            most for most in (self.limits.max_prompt_tokens, self.max_tokens) if most is not None
        ]
        return min(known, default=None)

    def _reply_length(self, prompt: int, wanted: int | None) -> int:
        """Return the longest reply to a prompt of so many tokens. Raises `ServingError`."""
        most = self._longest_prompt()
        if most is not None and prompt > most:
            raise ServingError(
                "context_length_exceeded",
                f"the prompt has {prompt} tokens, vision tokens included; at most {most} are taken",
                param="messages",
            )
        left = self.limits.max_new_tokens if self.max_tokens is None else self.max_tokens - prompt
        if left < (wanted or 1):
            raise ServingError(
                "context_length_exceeded",
                f"the prompt has {prompt} tokens, vision tokens included; with a reply of "
                f"{wanted or 1} tokens it exceeds the model's context of {self.max_tokens}; "
                "shorten the messages, or lower max_tokens",
                param="messages",
            )
        return wanted or min(left, self.limits.max_new_tokens)

    def _enter(self, *, always: bool = False) -> None:
        """Count one more open request. Raises `ServingError`."""
        with self._lock:
            if self._open >= self.capacity and not always:
                raise ServingError(
                    "queue_full",
                    f"{self._open} requests are running or waiting, which is the limit; try again",
                )
            self._open += 1

    def _leave(self) -> None:
        with self._lock:
            self._open -= 1

    def _cancel_later(self, stream: ReplyStream) -> None:
        self._put(lambda: self._cancel(stream))

    # What follows runs in the thread of the worker.

    def _run(self) -> None:
        try:
            self._load()
        except BaseException as error:  # noqa: BLE001 (raised again by `wait_ready`)
            self._give_up(error)
            self._ended.set()
            self._loaded.set()
            self._flush()
            return
        if self._state == "loading":
            self._state = "ready"
        self._loaded.set()
        try:
            while not self._closed and self.failure is None:
                self._receive(wait=not (self._calls or self._streams))
                if self._calls:
                    self._calls.popleft()()
                self._step()
        except BaseException as error:  # noqa: BLE001 (nobody may wait for a thread that is gone)
            self._give_up(error)
        self._ended.set()
        failure = self.failure
        end = (
            ReplyEnd("cancelled")
            if failure is None
            else ReplyEnd("error", error=as_serving_error(failure))
        )
        for stream in list(self._streams.values()):
            self._finish(stream, end)
        self._flush()

    def _flush(self) -> None:
        """End what came in after the end of the thread."""
        self._receive(wait=False)
        while self._calls:
            self._calls.popleft()()

    def _load(self) -> None:
        options = self.options
        device = pick_device(options.device)
        if self.kind == "lvlm":
            self.engine, processor = load_engine(
                options.model,
                GenerationOptions(),
                device=device,
                dtype=options.dtype,
                slots=options.slots,
            )
            # A tokenizer must not be used by two threads at a time: the engine has its own.
            self._processor = copy.deepcopy(processor)
        else:
            self.embedder = load_embedder(options.model, device=device, dtype=options.dtype)
        self.decoders.start()

    def _receive(self, *, wait: bool) -> None:
        """Take what came in; with `wait`, until something does."""
        with suppress(queue.Empty):
            while True:
                item = self._inbox.get(block=wait)
                wait = False
                if item is None:
                    self._closed = True
                else:
                    item()

    def _admit(self, stream: ReplyStream, options: GenerationOptions) -> None:
        if stream.end is not None:
            return
        if self._ended.is_set():
            self._finish(stream, ReplyEnd("error", error=_ended()))
            return
        assert self.engine is not None
        try:
            stream.number = self.engine.submit(stream.request, options, stream=True)
        except Exception as error:  # noqa: BLE001 (the request gets the error, the server stays)
            logger.error("a request failed: %s", type(error).__name__)
            self._finish(stream, ReplyEnd("error", error=as_serving_error(error)))
            return
        self._streams[stream.number] = stream

    def _cancel(self, stream: ReplyStream) -> None:
        if stream.end is None:
            self._finish(stream, ReplyEnd("cancelled"))

    def _finish(self, stream: ReplyStream, end: ReplyEnd) -> None:
        """End a stream whose request the engine still has."""
        if stream.number is not None and self.engine is not None:
            self.engine.cancel(stream.number)
            self._streams.pop(stream.number, None)
        try:
            stream.close(end)
        except Exception as error:  # noqa: BLE001 (its listener is gone)
            logger.warning("a listener failed: %s", type(error).__name__)
        self._leave()

    def _step(self) -> None:
        """Run a step of the continuous batch, if it has requests."""
        engine = self.engine
        if engine is None or not engine.pending:
            return
        try:
            events = engine.step()
            self._failures = 0
        except Exception as error:  # noqa: BLE001 (the requests get the error, the server stays)
            self._failures += 1
            logger.error("a step of generation failed: %s", type(error).__name__)
            for stream in list(self._streams.values()):
                self._finish(stream, ReplyEnd("error", error=as_serving_error(error)))
            if self._failures >= _FAILURES:
                self._give_up(error)
            return
        for event in events:
            taker = self._streams.get(event.request)
            if taker is not None:
                self._hand_over(taker, event)

    def _hand_over(self, stream: ReplyStream, event: Event) -> None:
        assert stream.number is not None
        try:
            complete = stream.take(event)
        except Exception as error:  # noqa: BLE001 (its listener is gone; others must not suffer)
            logger.warning("a listener failed: %s", type(error).__name__)
            complete = True
            if stream.end is None:
                with suppress(Exception):
                    stream.close(ReplyEnd("error", error=as_serving_error(error)))
        if event.error is not None and not isinstance(event.error, MedmError):
            logger.error("a reply failed: %s", type(event.error).__name__)
        if complete:
            del self._streams[stream.number]
            if event.finish is None and self.engine is not None:
                self.engine.cancel(stream.number)
            self._leave()

    def _give_up(self, error: BaseException) -> None:
        self.failure, self._state = error, "failed"
        if not isinstance(error, MedmError):
            logger.error("the model failed: %s", type(error).__name__)
        if self.on_failure is not None:
            self.on_failure()

    def _segmenter(self, options: SegmentationOptions) -> Segmenter:
        assert self.engine is not None
        key = options.model_dump_json()
        if key not in self._segmenters:
            self._segmenters[key] = Segmenter(self.engine, options)
        return self._segmenters[key]


def _kind(folder: str) -> Literal["lvlm", "dual-encoder"]:
    """Return the kind of the model of a folder, from its config. Raises `CheckpointError`."""
    from medm.models.dual_encoder.modeling import DualEncoder
    from medm.models.lvlm.modeling import LVLMForConditionalGeneration

    found = kind_of_config(load_config(folder)).model_class
    if issubclass(found, LVLMForConditionalGeneration):
        return "lvlm"
    if issubclass(found, DualEncoder):
        return "dual-encoder"
    raise CheckpointError(
        f"{folder}: holds a {found.__name__}, which is not served; expected a model of kind "
        "lvlm or dual-encoder"
    )


def _shown(turns: Sequence[Turn], sources: Sequence[Content]) -> list[Shown]:
    media = Sample(tuple(turns)).media
    kinds: list[Kind] = ["volume" if one.branch == "volume" else "image" for one in media]
    return [Shown(kind, source) for kind, source in zip(kinds, sources, strict=True)]


def _ended() -> ServingError:
    return ServingError("failed", "the server has ended")


def random_seed() -> int:
    """Return a seed for a sampled reply whose request names none."""
    return secrets.randbits(62)
