"""Greedy decoding of many prompts at once. Knows embeddings and a causal language model; no text, no images.

Continuous batching with prefix caching. Beyond `generate` on padded batches: prompts are prefilled in one row without
padding; a shared prefix (an image, a system turn) is prefilled once; a finished prompt is evicted and the next one,
prefilled already, is admitted to its slot; a decode step writes one token to the KV cache in place and moves nothing
else; the weight of the LM head is prepacked on a CPU; and decode steps can be compiled. The replies equal those of one
prompt at a time.
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
"""Tokens by which the KV cache grows."""

MIN_PREFIX = 16
"""Fewest tokens of a shared prefix for which a prefill of its own pays."""

MAX_PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Most tokens that are prefilled in one row, by device; a longer prompt is prefilled alone. More would not fit
the cache of a CPU, fewer would leave a GPU idle."""

ROWS_PER_GROUP = 8
"""Rows of one attention call on a CPU, which reads the keys of the longest of them; a GPU has one group."""

COMPILE_MODE: str | None = "reduce-overhead"
"""Mode of `torch.compile`, as transformers compiles decoding: CUDA graphs; without effect on a CPU."""


@dataclass(slots=True)
class Prompt:
    """One prompt, ready to be decoded."""

    embeds: Tensor
    """(T, D) token embeddings, vision tokens in their places."""
    signature: np.ndarray
    """(T,) int64: token ids, and for a vision token a hash of its content. A shared prefix is equal here."""
    max_new_tokens: int
    """Longest reply in tokens, the end token included."""


LayerKV = tuple[Tensor, Tensor]
"""Keys (1, heads, T, D) and values (1, heads, T, D') of one text in one layer."""

KVCache = list[LayerKV]
"""Keys and values of every layer."""


class GreedyDecoder:
    """Decodes prompts on one language model.

    Args:
        language_model: one that `supports` accepts; its attention is switched to `PER_DOCUMENT`.
        stops: ids that end a reply.
        suppress: ids that are never generated.
        slots: prompts that are decoded at the same time; as many more may be prefilled.
        compiled: compile decode steps, on a GPU to CUDA graphs. All slots then take part in every step.
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
        self._run = torch.compile(self._step, mode=COMPILE_MODE) if compiled else self._step
        self._slots: _Slots | None = None

    @staticmethod
    def supports(language_model: Any) -> bool:
        """Return True if each token attends to all before it, which the KV cache requires."""
        return attends_to_all(language_model)

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the reply to each prompt as token ids, up to and with the end token."""
        if not prompts:
            return []
        self.suppress = self.suppress.to(prompts[0].embeds.device)
        with self._head:
            return self._decode(prompts)

    def _decode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        replies: list[list[int]] = [[] for _ in prompts]
        waiting = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row].embeds), row))
        slots, self._slots = self._slots, None  # not slots that an error left inconsistent
        if slots is None or slots.count < min(self.slots, len(prompts)):
            count = self.slots if self.compiled else min(self.slots, len(prompts))
            slots = _Slots(count, device=prompts[0].embeds.device, static_shapes=self.compiled)
        ready: deque[tuple[int, KVCache, Tensor]] = deque()
        while waiting or ready or slots.prompts:
            if waiting and not ready and len(slots.prompts) < slots.count:
                # One per slot, however many are free: few tokens take as long to prefill as some hundred.
                newcomers, waiting = self._next(prompts, waiting, slots.count)
                ready.extend(self._prefill(prompts, newcomers))
            while ready and len(slots.prompts) < slots.count:
                slots.admit(*ready.popleft())
            for place, token in reversed(list(enumerate(slots.last_tokens()))):
                row = slots.prompts[place]
                replies[row].append(token)
                if token in self.stops or len(replies[row]) == prompts[row].max_new_tokens:
                    slots.evict(place)
            if slots.prompts:
                slots.advance(self._run)
        self._slots = slots
        return replies

    def forget(self) -> None:
        """Release the KV cache, which is otherwise kept from one call to the next."""
        self._slots = None

    def _next(self, prompts: Sequence[Prompt], waiting: list[int], count: int) -> tuple[list[int], list[int]]:
        """Choose the next prompts to prefill; those that share a prefix with the first of them precede others."""
        first = prompts[waiting[0]].signature
        alike = [row for row in waiting if shared_length(first, prompts[row].signature) >= MIN_PREFIX]
        chosen = (alike + [row for row in waiting if row not in set(alike)])[:count]
        taken = set(chosen)
        return chosen, [row for row in waiting if row not in taken]

    def _prefill(self, prompts: Sequence[Prompt], rows: list[int]) -> Iterator[tuple[int, KVCache, Tensor]]:
        """Yield each prompt with its KV cache and the first token of the reply, (1,)."""
        groups = shared_prefixes(rows, [prompts[row].signature for row in rows])
        shared = [(length, members) for length, members in groups if length]
        prefixes = [
            kv_cache for kv_cache, _ in self._prefill_texts([prompts[m[0]].embeds[:n] for n, m in shared], None)
        ]
        prefix_of = {row: prefix for prefix, (_, members) in zip(prefixes, shared, strict=True) for row in members}
        lengths = {row: length for length, members in shared for row in members}
        # Prompts with a shared prefix run apart: only they have more keys than queries.
        for part in ([row for row in rows if row in prefix_of], [row for row in rows if row not in prefix_of]):
            texts = [prompts[row].embeds[lengths.get(row, 0) :] for row in part]
            prefilled = self._prefill_texts(
                texts, [prefix_of[row] for row in part] if part and part[0] in prefix_of else None
            )
            for row, (kv_cache, first) in zip(part, prefilled, strict=True):
                yield row, kv_cache, first

    def _prefill_texts(self, texts: list[Tensor], prefixes: list[KVCache] | None) -> Iterator[tuple[KVCache, Tensor]]:
        """Yield the KV cache of each text, its prefix included, and the token that follows it, (1,)."""
        capacity = MAX_PREFILL_TOKENS["cuda" if texts and texts[0].is_cuda else "cpu"]
        for chosen in _bins([len(text) for text in texts], capacity):
            own_prefixes = None if prefixes is None else [prefixes[i] for i in chosen]
            yield from self._prefill_row([texts[i] for i in chosen], own_prefixes)

    def _prefill_row(self, texts: list[Tensor], prefixes: list[KVCache] | None) -> Iterator[tuple[KVCache, Tensor]]:
        device = texts[0].device
        lengths = [len(text) for text in texts]
        starts = [0] * len(texts) if prefixes is None else [prefix[0][0].shape[2] for prefix in prefixes]
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        kv_lengths = [length + start for length, start in zip(lengths, starts, strict=True)]
        row = torch.cat(texts)[None]
        cache = _RowCache(lengths, prefixes)
        output = self.language_model(
            inputs_embeds=row,
            attention_mask=no_mask(self.language_model, row),
            position_ids=torch.cat([torch.arange(a, b) for a, b in zip(starts, kv_lengths, strict=True)])[None].to(
                device
            ),
            **{self._cache_argument: cache},
            use_cache=True,
            logits_to_keep=(ends[1:] - 1).to(device),
            cu_seq_lens_q=ends.to(device),
            max_length_q=max(lengths),
            cu_seq_lens_k=torch.tensor([0, *np.cumsum(kv_lengths)], dtype=torch.int32).to(device),
            max_length_k=max(kv_lengths),
        )
        first = self._choose(output.logits[0])
        for number in range(len(texts)):
            yield cache.of(number), first[number : number + 1]

    def _step(
        self, tokens: Tensor, lengths: Tensor, kv_cache: KVCache, kv_lengths: list[tuple[int, int]] | None = None
    ) -> Tensor:
        """Return the token after `tokens` in each row, (R,), and write their keys and values at `lengths`.

        `kv_lengths` is passed to `attend_per_document`.
        """
        kv_length = kv_cache[0][0].shape[2]
        mask = torch.arange(kv_length, device=tokens.device) <= lengths[:, None]
        output = self.language_model(
            inputs_embeds=self.language_model.get_input_embeddings()(tokens[:, None]),
            attention_mask=mask[:, None, None],  # (R, 1, 1, kv_length)
            position_ids=lengths[:, None],
            **{self._cache_argument: _SlotCache(kv_cache, lengths)},
            use_cache=True,
            logits_to_keep=1,
            kv_lengths=kv_lengths,
        )
        return self._choose(output.logits[:, -1])

    def _choose(self, logits: Tensor) -> Tensor:
        """Return the most probable token of each row, (R, V) to (R,)."""
        if len(self.suppress):
            logits = logits.index_fill(1, self.suppress, -torch.inf)
        return logits.argmax(dim=-1)


class _Slots:
    """Slots of continuous batching: the prompts being decoded stand in the first of `count` rows.

    Args:
        count: rows.
        device: of the KV cache.
        static_shapes: every decode step sees the same tensors in full, as CUDA graphs require.
    """

    def __init__(self, count: int, *, device: torch.device, static_shapes: bool) -> None:
        self.count, self.static_shapes, self.prompts = count, static_shapes, list[int]()
        self._lengths: list[int] = []
        self._tokens = torch.zeros(count, dtype=torch.long, device=device)
        self._positions = torch.zeros(count, dtype=torch.long, device=device)
        self._kv_cache: KVCache = []
        """(count, heads, capacity, D): the keys and values of a row stand at the front."""

    def admit(self, prompt: int, kv_cache: KVCache, first: Tensor) -> None:
        """Admit a prefilled prompt with its KV cache and the first token of its reply."""
        place, length = len(self.prompts), kv_cache[0][0].shape[2]
        if not self._kv_cache or self._kv_cache[0][0].shape[2] <= length:
            self._grow(kv_cache, length + 1)
        for buffers, states in zip(self._kv_cache, kv_cache, strict=True):
            buffers[0][place, :, :length], buffers[1][place, :, :length] = states[0][0], states[1][0]
        self._tokens[place : place + 1] = first
        self._positions[place] = length
        self.prompts.append(prompt)
        self._lengths.append(length)

    def last_tokens(self) -> list[int]:
        """Return the newest token of each prompt."""
        tokens: list[int] = self._tokens[: len(self.prompts)].tolist()
        return tokens

    def evict(self, place: int) -> None:
        """Evict the prompt of a slot; the last one moves into it."""
        last = len(self.prompts) - 1
        if place != last:
            length = self._lengths[last]
            for buffers in self._kv_cache:
                for side in buffers:
                    side[place, :, :length] = side[last, :, :length]
            self._tokens[place], self._positions[place] = self._tokens[last], self._positions[last]
            self.prompts[place], self._lengths[place] = self.prompts[last], length
        self.prompts.pop()
        self._lengths.pop()

    def advance(self, step: Callable[..., Tensor]) -> None:
        """Run one decode step: one more token for each prompt."""
        count, kv_length = len(self.prompts), max(self._lengths) + 1
        if self._kv_cache[0][0].shape[2] < kv_length:
            self._grow(self._kv_cache, kv_length)
        if self.static_shapes:
            self._positions[count:] = 0
            self._tokens.copy_(step(self._tokens, self._positions, self._kv_cache))
        else:
            kv_cache = [(keys[:count, :, :kv_length], values[:count, :, :kv_length]) for keys, values in self._kv_cache]
            kv_lengths = None
            if count > ROWS_PER_GROUP and not self._tokens.is_cuda:
                groups = [self._lengths[start : start + ROWS_PER_GROUP] for start in range(0, count, ROWS_PER_GROUP)]
                kv_lengths = [(len(group), max(group) + 1) for group in groups]
            self._tokens[:count] = step(self._tokens[:count], self._positions[:count], kv_cache, kv_lengths)
        self._positions += 1
        self._lengths = [length + 1 for length in self._lengths]

    def _grow(self, like: KVCache, needed: int) -> None:
        # A compiled step is recorded anew for each size, so the capacity doubles.
        capacity = BLOCK << ((needed - 1) // BLOCK).bit_length() if self.static_shapes else -(-needed // BLOCK) * BLOCK
        grown = []
        for layer, sides in enumerate(like):
            pair = []
            for side, states in enumerate(sides):
                buffer = states.new_zeros(self.count, states.shape[1], capacity, states.shape[3])
                if self._kv_cache:
                    previous = self._kv_cache[layer][side]
                    buffer[:, :, : previous.shape[2]] = previous
                if self.static_shapes:
                    torch._dynamo.mark_static_address(buffer)
                pair.append(buffer)
            grown.append((pair[0], pair[1]))
        self._kv_cache = grown


class _RowCache(Cache):
    """KV cache of several texts that are prefilled in one row, each behind its prefix, if any."""

    def __init__(self, lengths: list[int], prefixes: list[KVCache] | None) -> None:
        super().__init__(layers=[])
        self._lengths, self._prefixes = lengths, prefixes
        self._sides: list[tuple[list[Tensor], list[Tensor]]] = []
        """Per layer the keys and the values of each text."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = (list(states.split(self._lengths, dim=2)) for states in (key_states, value_states))
        if self._prefixes is not None:
            keys = [
                torch.cat([prefix[layer_idx][0], own], dim=2) for prefix, own in zip(self._prefixes, keys, strict=True)
            ]
            values = [
                torch.cat([prefix[layer_idx][1], own], dim=2)
                for prefix, own in zip(self._prefixes, values, strict=True)
            ]
            key_states, value_states = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        self._sides.append((keys, values))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def of(self, text: int) -> KVCache:
        """Return the KV cache of one text, its prefix included."""
        return [(keys[text], values[text]) for keys, values in self._sides]


class _SlotCache(Cache):
    """KV cache (R, heads, capacity, D) to which each row appends one token at its length."""

    def __init__(self, kv_cache: KVCache, lengths: Tensor) -> None:
        super().__init__(layers=[])
        self._kv_cache, self._lengths = kv_cache, lengths
        self._rows = torch.arange(len(lengths), device=lengths.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._kv_cache[layer_idx]
        keys[self._rows, :, self._lengths] = key_states[:, :, 0]
        values[self._rows, :, self._lengths] = value_states[:, :, 0]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _bins(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Yield positions of texts in the given order, as many at a time as fit into `capacity` tokens."""
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
    """Return the number of leading elements that are equal."""
    width = min(len(one), len(other))
    differing = np.flatnonzero(one[:width] != other[:width])
    return int(differing[0]) if len(differing) else width


def shared_prefixes(rows: Sequence[int], signatures: Sequence[np.ndarray]) -> list[tuple[int, list[int]]]:
    """Return groups of rows with the length of their shared prefix; 0 for rows without one of note.

    The last token of a prompt is never shared: its logits give the first token of the reply.
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
            if common >= MIN_PREFIX and (len(group) + 1) * common >= len(group) * (
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
