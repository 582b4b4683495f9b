"""Greedy decoding of many prompts at once. Knows embeddings and a causal language model; no text, no images.

What `generate` on padded batches does not do: prompts are read in one row without padding; what several begin with (an
image, a system turn) is read once; a prompt whose reply is finished leaves and the next one, read before, takes its
place; keys and values of one more token are written where they stay, nothing else is moved; the head's weight is packed
on a CPU; and steps can be compiled. The replies are those of one prompt at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from medm.inference.prepacked_head import PrepackedLMHead
from medm.llms.attention import PER_DOCUMENT, attends_to_all, no_mask
from medm.llms.cache import cache_argument

BLOCK = 128
"""Tokens by which the room for keys and values grows."""

MIN_SHARED = 16
"""Tokens that a common beginning must have to be worth being read by itself."""

MAX_READ = {"cpu": 2048, "cuda": 8192}
"""Tokens of prompts that are read in one row, by device; a longer prompt is read alone. On a CPU more would leave its
cache, on a GPU fewer would leave it idle."""

TOGETHER = 8
"""Rows whose attention reaches as far as the longest of them needs; on a GPU all do."""

MODE: str | None = "reduce-overhead"
"""Of `torch.compile`, as transformers compiles decoding: CUDA graphs; on a CPU it says nothing."""


@dataclass(slots=True)
class Prompt:
    """One prompt, ready to be decoded."""

    embeds: Tensor
    """(T, D) token embeddings, vision tokens in their places."""
    signature: np.ndarray
    """(T,) int64. Two prompts share what they have equal here: token ids, and for a vision token its content."""
    max_new_tokens: int
    """Longest reply in tokens, the end token included."""


Held = list[tuple[Tensor, Tensor]]
"""Per layer keys (1, heads, T, D) and values (1, heads, T, D') of one text."""


class GreedyDecoder:
    """Decodes prompts on one language model.

    Args:
        language_model: one that `supports` says yes to; its attention is switched to `PER_DOCUMENT`.
        stops: ids that end a reply.
        suppress: ids that are never said.
        slots: prompts that are decoded at the same time; as many more may have been read.
        compiled: run steps as torch compiles them, on a GPU as CUDA graphs. All slots then take part in every step.
    """

    def __init__(
        self, language_model: Any, *, stops: Collection[int], suppress: Collection[int] = (), slots: int = 16,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        self.language_model, self.slots, self.compiled = language_model, slots, compiled
        self.stops, self.suppress = frozenset(stops), torch.tensor(sorted(suppress), dtype=torch.long)
        language_model.set_attn_implementation(PER_DOCUMENT)
        self._head = PrepackedLMHead(language_model)
        self._cache_argument = cache_argument(language_model.forward)
        self._run = torch.compile(self._step, mode=MODE) if compiled else self._step
        self._slots: _Slots | None = None

    @staticmethod
    def supports(language_model: Any) -> bool:
        """Whether each token attends to all before it, as what is kept here takes for granted."""
        return attends_to_all(language_model)

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The reply to each prompt as token ids, up to and with the end token."""
        if not prompts:
            return []
        self.suppress = self.suppress.to(prompts[0].embeds.device)
        with self._head:
            return self._decode(prompts)

    def _decode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        replies: list[list[int]] = [[] for _ in prompts]
        waiting = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row].embeds), row))
        slots, self._slots = self._slots, None  # not those that an error left in disorder
        if slots is None or slots.count < min(self.slots, len(prompts)):
            count = self.slots if self.compiled else min(self.slots, len(prompts))
            slots = _Slots(count, device=prompts[0].embeds.device, still=self.compiled)
        ready: deque[tuple[int, Held, Tensor]] = deque()
        while waiting or ready or slots.prompts:
            if waiting and not ready and len(slots.prompts) < slots.count:
                # As many as there are slots, whatever is free: few tokens take as long to read as some hundred.
                newcomers, waiting = self._next(prompts, waiting, slots.count)
                ready.extend(self._read(prompts, newcomers))
            while ready and len(slots.prompts) < slots.count:
                slots.enter(*ready.popleft())
            for place, token in reversed(list(enumerate(slots.said()))):
                row = slots.prompts[place]
                replies[row].append(token)
                if token in self.stops or len(replies[row]) == prompts[row].max_new_tokens:
                    slots.leave(place)
            if slots.prompts:
                slots.advance(self._run)
        self._slots = slots
        return replies

    def forget(self) -> None:
        """Give back the room for keys and values, which is kept from one call to the next."""
        self._slots = None

    def _next(self, prompts: Sequence[Prompt], waiting: list[int], count: int) -> tuple[list[int], list[int]]:
        """The next prompts to read; those that begin like the first of them come along before others."""
        first = prompts[waiting[0]].signature
        alike = [row for row in waiting if shared_length(first, prompts[row].signature) >= MIN_SHARED]
        chosen = (alike + [row for row in waiting if row not in set(alike)])[:count]
        taken = set(chosen)
        return chosen, [row for row in waiting if row not in taken]

    def _read(self, prompts: Sequence[Prompt], rows: list[int]) -> Iterator[tuple[int, Held, Tensor]]:
        """Each prompt with its keys and values, and the first token of the reply, (1,)."""
        groups = shared_beginnings(rows, [prompts[row].signature for row in rows])
        shared = [(length, members) for length, members in groups if length]
        beginnings = [held for held, _ in self._run_texts([prompts[m[0]].embeds[:n] for n, m in shared], None)]
        before = {row: held for held, (_, members) in zip(beginnings, shared, strict=True) for row in members}
        lengths = {row: length for length, members in shared for row in members}
        # Those with a beginning by themselves: the others need not know of longer keys.
        for part in ([row for row in rows if row in before], [row for row in rows if row not in before]):
            texts = [prompts[row].embeds[lengths.get(row, 0) :] for row in part]
            read = self._run_texts(texts, [before[row] for row in part] if part and part[0] in before else None)
            for row, (held, first) in zip(part, read, strict=True):
                yield row, held, first

    def _run_texts(self, texts: list[Tensor], before: list[Held] | None) -> Iterator[tuple[Held, Tensor]]:
        """Keys and values of each text, those before it included, and the token that follows it, (1,)."""
        capacity = MAX_READ["cuda" if texts and texts[0].is_cuda else "cpu"]
        for chosen in _bins([len(text) for text in texts], capacity):
            held = None if before is None else [before[i] for i in chosen]
            yield from self._run_row([texts[i] for i in chosen], held)

    def _run_row(self, texts: list[Tensor], before: list[Held] | None) -> Iterator[tuple[Held, Tensor]]:
        device = texts[0].device
        lengths = [len(text) for text in texts]
        starts = [0] * len(texts) if before is None else [held[0][0].shape[2] for held in before]
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        reaches = [length + start for length, start in zip(lengths, starts, strict=True)]
        row = torch.cat(texts)[None]
        cache = _RowCache(lengths, before)
        output = self.language_model(
            inputs_embeds=row,
            attention_mask=no_mask(self.language_model, row),
            position_ids=torch.cat([torch.arange(a, b) for a, b in zip(starts, reaches, strict=True)])[None].to(device),
            **{self._cache_argument: cache},
            use_cache=True,
            logits_to_keep=(ends[1:] - 1).to(device),
            cu_seq_lens_q=ends.to(device),
            max_length_q=max(lengths),
            cu_seq_lens_k=torch.tensor([0, *np.cumsum(reaches)], dtype=torch.int32).to(device),
            max_length_k=max(reaches),
        )
        first = self._choose(output.logits[0])
        for number in range(len(texts)):
            yield cache.of(number), first[number : number + 1]

    def _step(
        self, tokens: Tensor, lengths: Tensor, rooms: Held, reaches: list[tuple[int, int]] | None = None
    ) -> Tensor:
        """The token after `tokens` in each row, (R,); their keys and values are put behind the row's `lengths`.

        `reaches` is what attention takes as `row_reaches`.
        """
        reach = rooms[0][0].shape[2]
        mask = torch.arange(reach, device=tokens.device) <= lengths[:, None]
        output = self.language_model(
            inputs_embeds=self.language_model.get_input_embeddings()(tokens[:, None]),
            attention_mask=mask[:, None, None],  # (R, 1, 1, reach)
            position_ids=lengths[:, None],
            **{self._cache_argument: _SlotCache(rooms, lengths)},
            use_cache=True,
            logits_to_keep=1,
            row_reaches=reaches,
        )
        return self._choose(output.logits[:, -1])

    def _choose(self, logits: Tensor) -> Tensor:
        """(R, V) to (R,)."""
        if len(self.suppress):
            logits = logits.index_fill(1, self.suppress, -torch.inf)
        return logits.argmax(dim=-1)


class _Slots:
    """Prompts that are being answered, in the first rows of tensors that hold `count` of them.

    Args:
        count: rows.
        device: where.
        still: every step sees the same tensors in full, as CUDA graphs want it, whoever is there.
    """

    def __init__(self, count: int, *, device: torch.device, still: bool) -> None:
        self.count, self.still, self.prompts = count, still, list[int]()
        self._lengths: list[int] = []
        self._tokens = torch.zeros(count, dtype=torch.long, device=device)
        self._positions = torch.zeros(count, dtype=torch.long, device=device)
        self._rooms: Held = []
        """(count, heads, room, D): a row's keys and values stand at the front."""

    def enter(self, prompt: int, held: Held, first: Tensor) -> None:
        """One more, with what it has read and the token that it says first."""
        place, length = len(self.prompts), held[0][0].shape[2]
        if not self._rooms or self._rooms[0][0].shape[2] <= length:
            self._grow(held, length + 1)
        for room, states in zip(self._rooms, held, strict=True):
            room[0][place, :, :length], room[1][place, :, :length] = states[0][0], states[1][0]
        self._tokens[place : place + 1] = first
        self._positions[place] = length
        self.prompts.append(prompt)
        self._lengths.append(length)

    def said(self) -> list[int]:
        """The newest token of each."""
        tokens: list[int] = self._tokens[: len(self.prompts)].tolist()
        return tokens

    def leave(self, place: int) -> None:
        """One less: the last takes its place."""
        last = len(self.prompts) - 1
        if place != last:
            length = self._lengths[last]
            for room in self._rooms:
                for side in room:
                    side[place, :, :length] = side[last, :, :length]
            self._tokens[place], self._positions[place] = self._tokens[last], self._positions[last]
            self.prompts[place], self._lengths[place] = self.prompts[last], length
        self.prompts.pop()
        self._lengths.pop()

    def advance(self, step: Callable[..., Tensor]) -> None:
        """One more token for each."""
        count, reach = len(self.prompts), max(self._lengths) + 1
        if self._rooms[0][0].shape[2] < reach:
            self._grow(self._rooms, reach)
        if self.still:
            self._positions[count:] = 0
            self._tokens.copy_(step(self._tokens, self._positions, self._rooms))
        else:
            rooms = [(keys[:count, :, :reach], values[:count, :, :reach]) for keys, values in self._rooms]
            reaches = None
            if count > TOGETHER and not self._tokens.is_cuda:
                groups = [self._lengths[start : start + TOGETHER] for start in range(0, count, TOGETHER)]
                reaches = [(len(group), max(group) + 1) for group in groups]
            self._tokens[:count] = step(self._tokens[:count], self._positions[:count], rooms, reaches)
        self._positions += 1
        self._lengths = [length + 1 for length in self._lengths]

    def _grow(self, like: Held, needed: int) -> None:
        # Each size that a compiled step meets is recorded anew, so they double.
        capacity = BLOCK << ((needed - 1) // BLOCK).bit_length() if self.still else -(-needed // BLOCK) * BLOCK
        grown = []
        for layer, sides in enumerate(like):
            rooms = []
            for side, states in enumerate(sides):
                room = states.new_zeros(self.count, states.shape[1], capacity, states.shape[3])
                if self._rooms:
                    held = self._rooms[layer][side]
                    room[:, :, : held.shape[2]] = held
                if self.still:
                    torch._dynamo.mark_static_address(room)
                rooms.append(room)
            grown.append((rooms[0], rooms[1]))
        self._rooms = grown


class _RowCache(Cache):
    """Keys and values of several texts read in one row; where texts follow on others, those stand before them."""

    def __init__(self, lengths: list[int], before: list[Held] | None) -> None:
        super().__init__(layers=[])
        self._lengths, self._before = lengths, before
        self._sides: list[tuple[list[Tensor], list[Tensor]]] = []
        """Per layer the keys and the values of each text."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = (list(states.split(self._lengths, dim=2)) for states in (key_states, value_states))
        if self._before is not None:
            keys = [torch.cat([held[layer_idx][0], own], dim=2) for held, own in zip(self._before, keys, strict=True)]
            values = [
                torch.cat([held[layer_idx][1], own], dim=2) for held, own in zip(self._before, values, strict=True)
            ]
            key_states, value_states = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        self._sides.append((keys, values))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def of(self, text: int) -> Held:
        """Of one text, with what stands before it."""
        return [(keys[text], values[text]) for keys, values in self._sides]


class _SlotCache(Cache):
    """Room for keys and values (R, heads, room, D), into which each row writes one more behind its length."""

    def __init__(self, rooms: Held, lengths: Tensor) -> None:
        super().__init__(layers=[])
        self._rooms, self._lengths = rooms, lengths
        self._rows = torch.arange(len(lengths), device=lengths.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._rooms[layer_idx]
        keys[self._rows, :, self._lengths] = key_states[:, :, 0]
        values[self._rows, :, self._lengths] = value_states[:, :, 0]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _bins(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Places of texts in the given order, as many at a time as `capacity` tokens hold."""
    chosen: list[int] = []
    left = capacity
    for place, length in enumerate(lengths):
        if chosen and length > left:
            yield chosen
            chosen, left = [], capacity
        chosen.append(place)
        left -= length
    if chosen:
        yield chosen


def shared_length(one: np.ndarray, other: np.ndarray) -> int:
    """Leading elements that are equal."""
    width = min(len(one), len(other))
    differing = np.flatnonzero(one[:width] != other[:width])
    return int(differing[0]) if len(differing) else width


def shared_beginnings(rows: Sequence[int], signatures: Sequence[np.ndarray]) -> list[tuple[int, list[int]]]:
    """Groups of rows with the length of what all of a group begin with; 0 for rows that share nothing of note.

    The last token of a prompt is never shared: it has to run to say what comes next.
    """
    order = sorted(range(len(rows)), key=lambda place: signatures[place].tolist())
    groups: list[tuple[int, list[int]]] = []
    group: list[int] = []
    length = 0

    def close() -> None:
        groups.append((length if len(group) > 1 else 0, [rows[place] for place in group]))

    for place in order:
        if group:
            common = min(length, shared_length(signatures[group[0]], signatures[place]), len(signatures[place]) - 1)
            # Joining must not cost the group more shared tokens than the newcomer brings.
            if common >= MIN_SHARED and (len(group) + 1) * common >= len(group) * (
                length if len(group) > 1 else common
            ):
                group.append(place)
                length = common
                continue
            close()
        group, length = [place], len(signatures[place]) - 1
    if group:
        close()
    return groups
