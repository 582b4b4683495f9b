"""Beam search over a decoder that gives the scores of the next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Next: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""From texts (R, T) and the rows (R,) of the call before that they continue, None at the first
call, to the logits of the next token (R, V)."""


@torch.no_grad()
def beam_search(
    step: Next,
    prompt: Tensor,
    *,
    beams: int,
    max_length: int,
    min_length: int,
    end_id: int,
    pad_id: int,
) -> Tensor:
    """Return the best text of each row, (B, T), padded on the right.

    A finished text scores the mean log-probability of its generated tokens. The search of a row
    ends when no open text can beat its best finished one, or at `max_length`.

    Args:
        step: the decoder. It is called with `beams` rows for each row of the prompt.
        prompt: (B, P), tokens that every text begins with.
        beams: texts that are kept open; 1 is greedy.
        max_length: tokens of a text, the prompt and the end token included.
        min_length: tokens of a text, the prompt and the end token included, below which it does not
            end.
        end_id: token that ends a text.
        pad_id: token behind a text.
    """
    rows, given = prompt.shape
    if max_length <= given:
        raise ValueError(f"max_length {max_length}: the prompt has {given} tokens already")
    device = prompt.device
    texts = prompt.repeat_interleave(beams, dim=0)  # (B * beams, T)
    scores = torch.full((rows, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams of a row are equal at first
    best: list[tuple[float, Tensor]] = [(-torch.inf, prompt[row]) for row in range(rows)]
    open_rows = torch.ones(rows, dtype=torch.bool, device=device)
    origin: Tensor | None = None
    starts = torch.arange(rows, device=device).unsqueeze(1) * beams
    while texts.shape[1] < max_length and bool(open_rows.any()):
        logs = step(texts, origin).float().log_softmax(dim=1)
        if texts.shape[1] + 1 < min_length:
            logs[:, end_id] = -torch.inf
        vocabulary = logs.shape[1]
        totals = (scores.unsqueeze(2) + logs.view(rows, beams, vocabulary)).flatten(1)
        # Twice as many: at most `beams` of them end here, so that `beams` stay open.
        found, places = totals.topk(min(2 * beams, totals.shape[1]), dim=1)
        sources, tokens = places // vocabulary, places % vocabulary
        length = texts.shape[1] + 1 - given
        last = texts.shape[1] + 1 == max_length
        ended = (tokens == end_id) | last
        for row in range(rows):
            if not open_rows[row]:
                continue
            for place in range(found.shape[1]):
                score = float(found[row, place]) / length
                # An end below the best `beams` candidates is none that the search chose.
                if place >= beams or not bool(ended[row, place]) or score <= best[row][0]:
                    continue
                text = texts[row * beams + int(sources[row, place])]
                best[row] = (score, torch.cat([text, tokens[row, place].unsqueeze(0)]))
        if last:
            break
        kept = found.masked_fill(tokens == end_id, -torch.inf).topk(beams, dim=1)
        scores = kept.values
        sources, tokens = sources.gather(1, kept.indices), tokens.gather(1, kept.indices)
        origin = (starts + sources).flatten()
        texts = torch.cat([texts[origin], tokens.flatten().unsqueeze(1)], dim=1)
        # A longer text's mean can be no better than its sum over the longest text.
        reachable = scores[:, 0] / (max_length - given)
        finished = torch.tensor([score for score, _ in best], device=device)
        open_rows &= finished < reachable
    width = max(len(text) for _, text in best)
    padded = torch.full((rows, width), pad_id, dtype=prompt.dtype, device=device)
    for row, (_, text) in enumerate(best):
        padded[row, : len(text)] = text
    return padded
