from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from medm.data.collator import Collator
from medm.data.packing import PackedBatches, PackingCollator, plan_bins
from medm.data.sampling import Mixture, Shuffle
from medm.types import IGNORE_INDEX, Batch, Example
from tests.data.test_sampling import log_normal

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FAMILIES: list[type[PreTrainedConfig]] = [
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    PhiConfig,
    Phi3Config,
]


def item(value: float) -> np.ndarray:
    return np.full((1, 2, 2), value, np.float32)


def examples(lengths: list[int], seed: int = 0) -> list[Example]:
    """Random tokens; the first third of each is not learned, and the first token of all is always
    labelled in one."""
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        ids = rng.integers(3, 64, length).tolist()
        silent = 0 if number == 0 else length // 3
        made.append(Example(ids, [IGNORE_INDEX] * silent + ids[silent:]))
    return made


# -- planning --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 100), max_size=60), st.integers(100, 130))
def test_every_item_is_in_one_bin_and_no_bin_is_too_full(lengths: list[int], capacity: int) -> None:
    bins = plan_bins(lengths, capacity)
    assert sorted(i for group in bins for i in group) == [
        i for i, length in enumerate(lengths) if length
    ]
    sums = [sum(lengths[i] for i in group) for group in bins]
    assert all(0 < total <= capacity for total in sums)
    # best fit, longest first, never needs more than 11/9 of the optimum and 4 bins (Johnson 1973)
    assert (
        len(bins) <= 11 / 9 * math.ceil(sum(lengths) / capacity) + 4 or min(lengths) > capacity // 3
    )


def test_best_fit_by_hand() -> None:
    assert plan_bins([4, 8, 1, 4, 2, 1, 0], 10) == [[1, 2, 5], [0, 3, 4]]
    assert plan_bins([], 10) == []
    assert plan_bins([10, 10], 10) == [[0], [1]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("capacity", "vision"), [(2048, 0), (1024, 64), (4096, 256)])
def test_waste_on_log_normal_lengths(seed: int, capacity: int, vision: int) -> None:
    lengths = np.minimum(log_normal(5000, seed) + vision, capacity)
    bins = plan_bins(lengths, capacity)
    assert 1 - lengths.sum() / (len(bins) * capacity) <= 0.03


def test_the_number_of_bins_does_not_depend_on_the_order() -> None:
    lengths = log_normal(3000)
    counts = {
        len(plan_bins(lengths[np.random.default_rng(s).permutation(3000)], 2048)) for s in range(5)
    }
    assert len(counts) == 1


def test_an_item_that_fits_nowhere_is_refused_with_numbers() -> None:
    with pytest.raises(
        ValueError, match="item 1 has 11 tokens, more than the 10 of a row; items are never split"
    ):
        plan_bins([3, 11], 10)


# -- rows ------------------------------------------------------------------------------------------


def test_rows_by_hand() -> None:
    batch = PackingCollator(pad_id=9, capacity=6)(
        [
            Example([1, 2, 3], [1, 2, 3], {"image": [item(1)]}, task_id=1),
            Example([4, 5, 6, 7], [-100, -100, 6, 7], {"image": [item(2)]}, task_id=2),
            None,
            Example([8, 8], [8, 8], {"image": [item(3), item(4)]}, task_id=3),
        ]
    )
    # In order they fit into two rows, as few as best fit finds.
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9, 9], [4, 5, 6, 7, 8, 8]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100, -100], [-100, -100, 6, 7, -100, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]]
    assert "attention_mask" not in batch
    assert batch["pixels"]["image"][:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert batch["task_ids"]["image"].tolist() == [1, 2, 3, 3]


def test_pixels_follow_the_rows_when_best_fit_moves_examples() -> None:
    lengths = [6, 6, 4, 4]  # in order three rows of 10, best fit two
    made = [
        Example([n + 1] * length, [n + 1] * length, {"image": [item(n)]}, task_id=n)
        for n, length in enumerate(lengths)
    ]
    batch = PackingCollator(pad_id=0, capacity=10)(made)
    first_tokens = [row[start].item() - 1 for row in batch["input_ids"] for start in (0, 6)]
    assert batch["input_ids"].shape == (2, 10)
    assert (
        batch["pixels"]["image"][:, 0, 0, 0].tolist()
        == first_tokens
        == batch["task_ids"]["image"].tolist()
    )


def test_flat_is_one_row_without_padding() -> None:
    batch = PackingCollator(pad_id=0, capacity=4, padding_free=True)(examples([3, 4, 2]))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 7, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (4, 4)


def test_records_left_out_and_rounded_widths() -> None:
    batch = PackingCollator(pad_id=5, capacity=8, pad_to_multiple_of=8)([None])
    assert batch["input_ids"].tolist() == [[5] * 8]
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 4, 5]]


# -- what a model makes of it ----------------------------------------------------------------------


def tiny(config: type[PreTrainedConfig], attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES), attn_implementation=attention).eval()


def summed_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.parametrize("config", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_packed_rows_give_the_loss_and_gradient_of_padded_ones(
    config: type[PreTrainedConfig], attention: str, padding_free: bool
) -> None:
    model = tiny(config, attention)
    data = examples([7, 12, 5, 3, 9])
    padded = summed_loss(model, Collator(pad_id=0)(data))
    padded.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = PackingCollator(pad_id=0, capacity=20, padding_free=padding_free)(data)
    assert batch["input_ids"].shape == ((1, 36) if padding_free else (2, 19))
    packed = summed_loss(model, batch)
    packed.backward()
    assert packed.item() == pytest.approx(padded.item(), rel=1e-5)
    for name, gradient in expected.items():
        found = dict(model.named_parameters())[name].grad
        assert found is not None
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_sample_sees_its_neighbour(attention: str) -> None:
    """Other tokens in the first sample of a row change nothing in the second, and the other way
    round."""
    model = tiny(LlamaConfig, attention)
    first, second, other = examples([6, 5, 6], seed=1)
    collate = PackingCollator(pad_id=0, capacity=16)
    with torch.no_grad():
        a = model(**without_labels(collate([first, second])), use_cache=False).logits
        b = model(**without_labels(collate([other, second])), use_cache=False).logits
        alone = model(input_ids=torch.tensor([second.input_ids])).logits
    torch.testing.assert_close(a[:, 6:11], b[:, 6:11], atol=0, rtol=0)
    torch.testing.assert_close(a[:, 6:11], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a[:, :6], b[:, :6])


def test_a_cache_would_let_samples_see_each_other() -> None:
    """Why the training path has `use_cache=False`: transformers finds packed samples only without a
    cache."""
    model = tiny(LlamaConfig, "sdpa")
    first, second, other = examples([6, 5, 6], seed=1)
    collate = PackingCollator(pad_id=0, capacity=16)
    with torch.no_grad():
        a = model(**without_labels(collate([first, second])), use_cache=True).logits
        b = model(**without_labels(collate([other, second])), use_cache=True).logits
    assert not torch.allclose(a[:, 6:11], b[:, 6:11])


def without_labels(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "labels"}


# -- batches ---------------------------------------------------------------------------------------


def test_an_epoch_of_packed_batches_holds_every_record_once_in_full_rows() -> None:
    lengths = log_normal(2000)
    lengths[[3, 77]] = 0  # left out by the check
    ranks = [
        PackedBatches(
            Shuffle(2000),
            lengths=lengths,
            capacity=2048,
            batch_size=2,
            rank=rank,
            world=2,
            accumulation=2,
        )
        for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1])
    for epoch in range(2):
        for batches in ranks:
            batches.set_epoch(epoch)
        drawn = [index for batches in ranks for batch in batches for index in batch]
        assert sorted(drawn) == [index for index in range(2000) if index not in (3, 77)]
    processed = sum(2 * 2048 for batches in ranks for batch in batches if batch)
    assert lengths.sum() / processed > 0.97


def test_the_collator_needs_no_more_rows_than_were_planned() -> None:
    lengths = log_normal(500)
    batches = PackedBatches(Shuffle(500), lengths=lengths, capacity=2048, batch_size=3)
    collate = PackingCollator(pad_id=0, capacity=2048)
    for batch in batches:
        rows = collate([Example([1] * int(lengths[i]), [1] * int(lengths[i])) for i in batch])[
            "input_ids"
        ]
        assert rows.shape[0] <= 3 and rows.shape[1] <= 2048


@pytest.mark.parametrize("mixed", [False, True])
def test_packed_batches_resume_and_differ_between_epochs(mixed: bool) -> None:
    def fresh() -> PackedBatches:
        order = Mixture([100, 200], [1, 1], seed=1) if mixed else Shuffle(300, seed=1)
        return PackedBatches(
            order, lengths=log_normal(300), capacity=2048, batch_size=1, rank=1, world=2
        )

    whole = fresh()
    drawn = []
    for epoch in range(4):
        whole.set_epoch(epoch)
        drawn.append(list(whole))
    assert drawn[0] != drawn[1] and len({len(batches) for batches in drawn}) == 1
    resumed = fresh()
    resumed.start(2, 5)
    assert list(resumed) == drawn[2][5:]
