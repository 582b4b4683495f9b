"""Continuous batching of many requests.

Knows embeddings and a causal language model; no text, no images.

Beyond `generate` on padded batches: prompts are prefilled in one row without padding; a shared
prefix (an image, a system turn) is prefilled once; a finished request is evicted and the next one,
prefilled already, is admitted to its slot; a decode step writes one token to the KV cache in place
and moves nothing else; the weight of the LM head is prepacked on a CPU; and decode steps can be
compiled. The replies equal those of one request at a time.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from medm.errors import DataError, DeviceError
from medm.inference.prepacked_head import PrepackedLMHead
from medm.inference.runners import (
    MAX_PREFILL_TOKENS,
    MIN_PREFIX,
    Prefilled,
    Text,
    pick_runner,
    shared_length,
)
from medm.inference.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from medm.llms.lm_head import CausalLM

Finish: TypeAlias = Literal["stop", "length", "cancelled", "error"]
"""Reason for the end of a request: an end token, its longest length, `cancel`, or an error."""


@dataclass(slots=True)
class Prompt:
    """One prompt and the settings of its reply."""

    embeds: Tensor | None
    """(T, D) token embeddings, vision tokens in their places. None: the decoder's `embed` makes
    them at prefill."""
    signature: np.ndarray
    """(T,) int64: token ids, and for a vision token a hash of its content. A shared prefix is equal
    here."""
    max_new_tokens: int
    """Longest reply in tokens, the end token included."""
    stops: frozenset[int] | None = None
    """Ids that end the reply; those of the decoder without it."""
    sampling: Sampling | None = None
    """Settings under which tokens are drawn; None for greedy decoding."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Outcome of a step for one request: one more token, or its end, or both."""

    request: int
    token: int | None = None
    finish: Finish | None = None
    error: Exception | None = None
    """The cause of `finish` "error"."""


@dataclass(eq=False, slots=True)
class _Row:
    """A request that is not finished."""

    request: int
    prompt: Prompt
    limit: int
    """Longest reply in tokens."""
    stops: frozenset[int]
    sampler: Sampler | None
    tokens: list[int] = field(default_factory=list)
    """The reply so far. A row that loses its slot is prefilled again with them behind its
    prompt."""

    @property
    def signature(self) -> np.ndarray:
        """(T,) of the prompt and the reply so far."""
        own = self.prompt.signature
        return np.concatenate([own, np.array(self.tokens, np.int64)]) if self.tokens else own


Embed = Callable[[Sequence[Prompt]], "list[Tensor]"]
"""The embeddings (T, D) of prompts that come without them."""


class Decoder:
    """Continuous batching on one language model.

    `submit` requests, then `step` until none is pending.

    One thread at a time may use a decoder.

    Args:
        language_model: a causal language model of transformers, in eval mode. In slots if each of
            its tokens attends to all before it; otherwise its rows are decoded one after another.
        stops: ids that end a reply.
        end_sequence: ids that end a reply together, one after another; none without them.
        suppress: ids that are never generated.
        slots: requests that are decoded at the same time; as many more may be prefilled.
        compiled: compile decode steps, on a GPU to CUDA graphs. All slots then take part in every
            step.
        max_tokens: most tokens of a prompt and its reply together. A reply ends there; a longer
            prompt is refused.
        embed: makes the embeddings of prompts that come without them.
        ids: numbers for requests; decoders may share them.
    """

    def __init__(
        self,
        language_model: CausalLM,
        *,
        stops: Collection[int],
        end_sequence: Sequence[int] = (),
        suppress: Collection[int] = (),
        slots: int = 16,
        compiled: bool = False,
        max_tokens: int | None = None,
        embed: Embed | None = None,
        ids: Iterator[int] | None = None,
    ) -> None:
        self.language_model, self.slots, self.compiled = language_model, slots, compiled
        self.stops, self.max_tokens = frozenset(stops), max_tokens
        self.end_sequence = list(end_sequence)
        self._embed_prompts = embed
        self._ids = itertools.count() if ids is None else ids
        self._runner = pick_runner(
            language_model, suppress=suppress, slots=slots, compiled=compiled
        )
        self.prepacked_head = PrepackedLMHead(language_model)
        """Entered by each step; a loop of steps may hold it throughout."""
        self._waiting: deque[_Row] = deque()
        self._ready: deque[tuple[_Row, Prefilled, Tensor]] = deque()
        """Prefilled rows that wait for a slot, with the first token of their reply."""
        self._active: list[_Row] = []
        """The row of each place of the runner."""
        self._cancelled: set[int] = set()
        self._events: list[TokenEvent] = []
        self._limit = slots
        """Slots in use; fewer than `slots` after the memory ran out, until no request is
        pending."""

    @property
    def pending(self) -> int:
        """Requests that are not finished, and events that `step` has not returned yet."""
        return len(self._waiting) + len(self._ready) + len(self._active) + len(self._events)

    def submit(self, prompt: Prompt) -> int:
        """Queue a request and return its number.

        A request that can never fit ends with an error in the next step.
        """
        if not self.pending:
            self._limit = self.slots
        request, length = next(self._ids), len(prompt.signature)
        left = prompt.max_new_tokens if self.max_tokens is None else self.max_tokens - length
        problem = None
        if length == 0 or prompt.max_new_tokens < 1:
            problem = (
                f"expected a prompt and a reply of 1 token or more, found {length} and "
                f"{prompt.max_new_tokens}"
            )
        elif left < 1:
            problem = (
                f"the prompt has {length} tokens, but a prompt and its reply have at most "
                f"{self.max_tokens}"
            )
        if problem is not None:
            self._events.append(TokenEvent(request, finish="error", error=DataError(problem)))
            return request
        stops = self.stops if prompt.stops is None else prompt.stops
        sampler = (
            None
            if prompt.sampling is None
            else Sampler(prompt.sampling, device=self.language_model.device)
        )
        self._waiting.append(
            _Row(request, prompt, min(left, prompt.max_new_tokens), stops, sampler)
        )
        return request

    def cancel(self, request: int) -> None:
        """End a request at the next step, which frees its slot.

        Does nothing for a request that is finished.
        """
        self._cancelled.add(request)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Evict cancelled requests, prefill and admit waiting ones, and run one decode step.

        Returns:
            The tokens that were generated since the last step, and the ends of requests.

        Raises:
            Exception: the language model fails for a whole batch. The requests stay; they can be
                tried again or cancelled.
        """
        try:
            with self.prepacked_head:
                self._step()
        except torch.OutOfMemoryError:
            self._shrink()
        except BaseException:  # the KV cache may be half written
            self._requeue()
            raise
        events, self._events = self._events, []
        return events

    def decode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the reply to each prompt as token ids, up to and with the end token.

        Raises:
            RuntimeError: other requests are pending.
            Exception: the error of a request that has one.
        """
        if self.pending:
            raise RuntimeError(f"expected a decoder without requests, found {self.pending} pending")
        replies: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row].signature), row))
        rows = {self.submit(prompts[row]): row for row in order}
        try:
            with self.prepacked_head:
                while self.pending:
                    for event in self.step():
                        if event.error is not None:
                            raise event.error
                        if event.token is not None:
                            replies[rows[event.request]].append(event.token)
        finally:
            self._clear()
        return replies

    def release(self) -> None:
        """Release the memory of the KV cache, which is otherwise kept for later requests."""
        self._requeue()

    def _clear(self) -> None:
        """Drop the requests and events of an interrupted `decode`."""
        if self.pending:
            self._requeue()
            self._waiting.clear()
            self._events.clear()

    def _step(self) -> None:
        self._evict_cancelled()
        if self._waiting and not self._ready and len(self._active) < self._limit:
            self._prefill_waiting()
        while self._ready and len(self._active) < self._limit:
            row, prefilled, first = self._ready[0]
            self._runner.admit(prefilled, first, expected=len(self._ready) + len(self._waiting))
            self._active.append(row)
            self._ready.popleft()
        for place, token in reversed(list(enumerate(self._runner.last_tokens()))):
            self._report(place, token)
        if self._active:
            draws = any(row.sampler is not None for row in self._active)
            self._runner.advance(partial(_choose, self._active) if draws else None)

    def _report(self, place: int, token: int) -> None:
        """Report the newest token of a row; evict the row if its reply ends with it."""
        row = self._active[place]
        row.tokens.append(token)
        if row.sampler is not None:
            row.sampler.keep()
        finish: Finish | None = None
        end = self.end_sequence
        if token in row.stops or (end and row.tokens[-len(end) :] == end):
            finish = "stop"
        elif len(row.tokens) == row.limit:
            finish = "length"
        self._events.append(TokenEvent(row.request, token, finish))
        if finish is not None:
            self._evict(place)

    def _evict(self, place: int) -> None:
        self._runner.evict(place)
        self._active[place] = self._active[-1]
        self._active.pop()

    def _evict_cancelled(self) -> None:
        if not self._cancelled:
            return
        cancelled, self._cancelled = self._cancelled, set()
        rows = [*self._waiting, *(row for row, _, _ in self._ready), *self._active]
        self._events += [
            TokenEvent(row.request, finish="cancelled") for row in rows if row.request in cancelled
        ]
        self._waiting = deque(row for row in self._waiting if row.request not in cancelled)
        self._ready = deque(item for item in self._ready if item[0].request not in cancelled)
        for place in reversed(range(len(self._active))):
            if self._active[place].request in cancelled:
                self._evict(place)

    def _prefill_waiting(self) -> None:
        """Prefill the next requests.

        Without a decode step that waits for it, one request per slot is prefilled, however many
        slots are free: a few tokens take as long to prefill as some hundred.
        """
        rows = self._next()
        try:
            self._ready.extend(self._prefill(rows))
        except BaseException:
            self._waiting.extendleft(reversed(rows))
            raise

    def _next(self) -> list[_Row]:
        """Take the next requests from the queue.

        Those that share a prefix with the first one precede others.
        """
        rows = list(self._waiting)
        if self._runner.shares_prefixes:
            first = rows[0].signature
            alike = [row for row in rows if shared_length(first, row.signature) >= MIN_PREFIX]
            taken = {row.request for row in alike}
            rows = alike + [row for row in rows if row.request not in taken]
        chosen = rows[: self._limit]
        if self._active:  # they wait for the prefill: as many as fit one row of it
            left = MAX_PREFILL_TOKENS[
                "cuda" if self.language_model.device.type == "cuda" else "cpu"
            ]
            ends = np.cumsum([len(row.prompt.signature) + len(row.tokens) for row in chosen])
            chosen = chosen[: max(1, int(np.searchsorted(ends, left, side="right")))]
        taken = {row.request for row in chosen}
        self._waiting = deque(row for row in self._waiting if row.request not in taken)
        return chosen

    def _prefill(self, rows: list[_Row]) -> list[tuple[_Row, Prefilled, Tensor]]:
        """Prefill rows.

        If that fails, each is tried by itself, and only those that fail then get the error.
        """
        try:
            texts = [
                Text(embeds, row.signature)
                for row, embeds in zip(rows, self._embeds(rows), strict=True)
            ]
            prefilled = list(self._runner.prefill(texts))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (reported as the error of the request)
            if len(rows) == 1:
                self._events.append(TokenEvent(rows[0].request, finish="error", error=error))
                return []
            return [ready for row in rows for ready in self._prefill([row])]
        return [
            (rows[position], state, _choose([rows[position]], state.token, state.logits))
            for position, state in prefilled
        ]

    def _embeds(self, rows: list[_Row]) -> list[Tensor]:
        """Return the embeddings of the prompt and of the reply so far of each row."""
        missing = [row.prompt for row in rows if row.prompt.embeds is None]
        made = iter(
            self._embed_prompts(missing) if missing and self._embed_prompts is not None else []
        )
        embeds = [next(made) if row.prompt.embeds is None else row.prompt.embeds for row in rows]
        embed_tokens = self.language_model.get_input_embeddings()
        for place, row in enumerate(rows):
            if row.tokens:
                tokens = torch.tensor(row.tokens, device=embeds[place].device)
                embeds[place] = torch.cat([embeds[place], embed_tokens(tokens)])
        return embeds

    def _requeue(self) -> None:
        """Take every row back into the queue; it is prefilled again with the reply so far."""
        rows = [*self._active, *(row for row, _, _ in self._ready)]
        for row in rows:
            if row.sampler is not None:
                row.sampler.undo()
        self._active, self._ready = [], deque()
        self._waiting.extendleft(reversed(rows))
        self._runner.release()

    def _shrink(self) -> None:
        """Continue with half of the rows after the memory ran out.

        A single row that does not fit gets an error.
        """
        count = max(len(self._active) + len(self._ready), min(self._limit, len(self._waiting)))
        self._requeue()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if count > 1:
            self._limit = count // 2
            return
        row = self._waiting.popleft()
        error = DeviceError(
            f"out of memory on {self.language_model.device} with one prompt of "
            f"{len(row.prompt.signature)} tokens; use a lower precision (bfloat16) or a smaller "
            "model"
        )
        self._events.append(TokenEvent(row.request, finish="error", error=error))


def _choose(rows: Sequence[_Row], tokens: Tensor, logits: Tensor) -> Tensor:
    """Return the next token of each row, (R,): the most probable one, or a sampled one."""
    tokens = tokens.clone()
    for place, row in enumerate(rows):
        if row.sampler is not None:
            tokens[place : place + 1] = row.sampler.draw(logits[place : place + 1])
    return tokens
