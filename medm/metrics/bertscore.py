"""BERTScore (Zhang et al. 2020) with a local encoder.

Torch is imported inside the functions.

The one metric that reads files: the encoder's folder, named by the caller. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medm.errors import CheckpointError
from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    References,
    Resampling,
    as_references,
    check_lengths,
    mean_result,
    undefined,
    with_note,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def bertscore(
    predictions: Sequence[str],
    references: References,
    *,
    path: str,
    layer: int = -1,
    batch_size: int = 32,
    device: str = "cpu",
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean precision, recall and F1, without idf weights and without rescaling.

    With several references, the one with the best F1 counts.

    Special tokens may be matched but are not averaged, as in bert-score. An empty text scores 0.
    Undefined where the encoder does not know the language of the references: unknown tokens all
    match each other.

    Raises:
        CheckpointError: there is no encoder at `path`.
    """
    check_lengths(predictions, references)
    targets = as_references(references)
    texts = sorted({*predictions, *(text for item in targets for text in item)})
    embedded = dict(zip(texts, _embed(texts, path, layer, batch_size, device), strict=True))
    unknown, cut = _unknown_and_cut({text for item in targets for text in item}, path)
    scores = [
        max(
            (greedy_match(*embedded[prediction], *embedded[text]) for text in item),
            key=lambda score: score[2],
        )
        for prediction, item in zip(predictions, targets, strict=True)
    ]
    signature = f"bertscore|{Path(path).name}|layer:{layer}|idf:no|rescale:no|mean"
    results = [
        mean_result(f"bertscore-{name}", [score[column] for score in scores], signature, resampling)
        for column, name in enumerate(("precision", "recall", "f1"))
    ]
    if unknown > _MANY_UNKNOWN:
        reason = (
            f"{unknown:.0%} of the tokens of the references are unknown to this encoder and would "
            "match each other"
        )
        return [undefined(result, reason) for result in results]
    note = (
        f"{cut} references are longer than the encoder reads and are compared by their beginning"
        if cut
        else None
    )
    return [with_note(result, note) for result in results]


_MANY_UNKNOWN = 0.1
"""Fraction of unknown tokens from which on texts are in a language that the encoder does not
know."""


def greedy_match(
    mine: Tensor, my_content: Tensor, theirs: Tensor, their_content: Tensor
) -> tuple[float, float, float]:
    """Precision, recall, F1 of two texts.

    Args:
        mine: (T, D) unit vectors of the prediction.
        my_content: (T,) False for special tokens.
        theirs: (S, D) of the reference.
        their_content: (S,) likewise.
    """
    if not my_content.any() or not their_content.any():
        return 0.0, 0.0, 0.0
    similarity = mine @ theirs.T  # (T, S)
    precision = similarity.max(dim=1).values[my_content].mean().item()
    recall = similarity.max(dim=0).values[their_content].mean().item()
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0


def require_encoder(path: str) -> None:
    """Check that an encoder exists, without loading its weights.

    Raises:
        CheckpointError: there is none at `path`.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"bertscore: no encoder at {path} on this machine ({error})"
        ) from None


def _embed(
    texts: Sequence[str], path: str, layer: int, batch_size: int, device: str
) -> list[tuple[Tensor, Tensor]]:
    """Unit vectors (T, D) and content mask (T,) of each text, on the CPU."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        model = AutoModel.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise CheckpointError(
            f"bertscore: no encoder at {path} on this machine ({error})"
        ) from None
    model.to(device).eval()
    longest = _longest(tokenizer, model.config)
    result: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        special = batch.pop("special_tokens_mask").bool()  # [B, T]
        with torch.inference_mode():
            states = (
                model(**batch.to(device), output_hidden_states=True)
                .hidden_states[layer]
                .cpu()
                .float()
            )
        states = torch.nn.functional.normalize(states, dim=-1)  # [B, T, D]
        for row, mask, is_special in zip(
            states, batch["attention_mask"].cpu().bool(), special, strict=True
        ):
            result.append((row[mask], ~is_special[mask]))
    return result


def _longest(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Tokens that the encoder reads of a text."""
    return min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512), 512)


def _unknown_and_cut(references: set[str], path: str) -> tuple[float, int]:
    """Return the fraction of unknown tokens in the references, and the number of truncated ones."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    longest = _longest(
        tokenizer, AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    )
    special = tokenizer.num_special_tokens_to_add()
    rows = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in references
    ]
    tokens = sum(map(len, rows))
    unknown = (
        sum(row.count(tokenizer.unk_token_id) for row in rows)
        if tokenizer.unk_token_id is not None
        else 0
    )
    return unknown / tokens if tokens else 0.0, sum(len(row) + special > longest for row in rows)
