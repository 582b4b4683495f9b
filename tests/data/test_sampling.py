from __future__ import annotations

import logging
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from medm.data.sampling import (
    DistributedBatchSampler,
    IndexOrder,
    Mixture,
    Sequential,
    Shuffle,
    balance,
    group_by_length,
)
from medm.errors import RecipeError


def log_normal(count: int, seed: int = 0) -> np.ndarray:
    """Token lengths of mean about 218, as measured on instruction data."""
    return np.clip(
        np.random.default_rng(seed).lognormal(np.log(218) - 0.245, 0.7, count), 4, 2048
    ).astype(int)


def optimiser_steps(
    order: IndexOrder, epoch: int, *, world: int, batch_size: int, accumulation: int, **more: object
) -> list:
    """The samples of every optimiser step, over all ranks and micro-batches."""
    ranks = [
        DistributedBatchSampler(
            order, batch_size=batch_size, rank=r, world=world, accumulation=accumulation, **more
        )  # type: ignore[arg-type]
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    micro = [
        sorted(i for batches in ranks for i in batches.batch(epoch, step))
        for step in range(len(ranks[0]))
    ]
    return [sorted(chain(*micro[k : k + accumulation])) for k in range(0, len(micro), accumulation)]


LAYOUTS = [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (1, 2, 4), (2, 2, 2), (4, 1, 2)]
LENGTHS = log_normal(103)


@pytest.mark.parametrize(("world", "batch_size", "accumulation"), LAYOUTS[1:])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"lengths": LENGTHS, "group_by_length": True},
        {"lengths": LENGTHS, "balance_ranks": True},
    ],
)
def test_a_step_holds_the_same_samples_however_it_is_divided(
    world: int, batch_size: int, accumulation: int, drop_last: bool, more: dict[str, object]
) -> None:
    order = Shuffle(103, seed=3)
    one = optimiser_steps(
        order, 2, world=1, batch_size=8, accumulation=1, drop_last=drop_last, **more
    )
    many = optimiser_steps(
        order,
        2,
        world=world,
        batch_size=batch_size,
        accumulation=accumulation,
        drop_last=drop_last,
        **more,
    )
    assert many == one
    seen = sorted(chain(*one))
    assert len(set(seen)) == len(seen) == (96 if drop_last else 103)


def test_two_ranks_of_two_see_the_batch_of_four_in_its_order() -> None:
    one = DistributedBatchSampler(Shuffle(40), batch_size=4)
    first, second = (
        DistributedBatchSampler(Shuffle(40), batch_size=2, rank=rank, world=2) for rank in (0, 1)
    )
    assert len(one) == len(first) == 10
    assert all(one.batch(0, s) == first.batch(0, s) + second.batch(0, s) for s in range(10))


def test_the_tail_is_dealt_out_and_no_rank_is_left_behind() -> None:
    ranks = [
        DistributedBatchSampler(Sequential(9), batch_size=2, rank=rank, world=4)
        for rank in range(4)
    ]
    assert [list(batches) for batches in ranks] == [
        [[0, 1], [8]],
        [[2, 3], []],
        [[4, 5], []],
        [[6, 7], []],
    ]
    assert [
        len(DistributedBatchSampler(Sequential(9), batch_size=2, rank=r, world=4, drop_last=True))
        for r in range(4)
    ] == [1] * 4


@pytest.mark.parametrize("mixed", [False, True])
def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(mixed: bool) -> None:
    def fresh() -> DistributedBatchSampler:
        order = (
            Mixture([50, 20, 31], [1, 2, 3], min_distance=8, seed=1)
            if mixed
            else Shuffle(101, seed=1)
        )
        return DistributedBatchSampler(
            order,
            batch_size=2,
            rank=1,
            world=2,
            accumulation=2,
            lengths=LENGTHS[:101],
            group_by_length=not mixed,
        )

    whole = fresh()
    drawn = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        drawn.append(list(whole))
    assert drawn[0] != drawn[1]
    for epoch, done in [(0, 0), (0, 7), (1, 25), (2, 26), (2, 0)]:
        resumed = fresh()
        resumed.start(epoch, done)
        resumed.set_epoch(epoch)  # what a training loop calls at the start of every epoch
        assert list(resumed) == drawn[epoch][done:]
        if epoch < 2:
            resumed.set_epoch(epoch + 1)
            assert list(resumed) == drawn[epoch + 1]


def test_resuming_reads_no_data() -> None:
    class Data:
        read = 0

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> int:
            Data.read += 1
            return index

    batches = DistributedBatchSampler(Shuffle(1000), batch_size=4)
    expected = batches.batch(0, 249)
    batches.start(0, 249)
    assert [batch.tolist() for batch in DataLoader(Data(), batch_sampler=batches)] == [expected]  # type: ignore[arg-type]
    assert Data.read == 4


@pytest.mark.parametrize(("epoch", "done"), [(0, -1), (0, 11)])
def test_positions_outside_an_epoch_are_refused(epoch: int, done: int) -> None:
    with pytest.raises(ValueError, match="but an epoch has 10"):
        DistributedBatchSampler(Shuffle(40), batch_size=4).start(epoch, done)


def padded(batches: DistributedBatchSampler, lengths: np.ndarray) -> float:
    """Tokens processed for a useful one."""
    rows = [lengths[batch] for batch in batches if batch]
    return float(sum(len(row) * row.max() for row in rows) / sum(row.sum() for row in rows))


@pytest.mark.parametrize(("batch_size", "plain"), [(8, 1.7), (16, 2.0), (32, 2.4)])
def test_grouping_by_length_saves_padding(batch_size: int, plain: float) -> None:
    lengths = log_normal(20_000)
    order = Shuffle(len(lengths))
    assert padded(DistributedBatchSampler(order, batch_size=batch_size), lengths) > plain
    grouped = DistributedBatchSampler(
        order, batch_size=batch_size, lengths=lengths, group_by_length=True
    )
    assert padded(grouped, lengths) < 1.2


@pytest.mark.parametrize(
    "lengths", [np.full(50, 7), np.arange(50), np.zeros(50, int), np.asarray([3])]
)
def test_grouping_takes_any_lengths(lengths: np.ndarray) -> None:
    """Data of one kind or one length is as good as mixed data."""
    order = Shuffle(len(lengths))(0)
    grouped = group_by_length(order, lengths, 4, seed=0, epoch=0, window=3)
    assert sorted(grouped) == list(range(len(lengths)))
    assert lengths.max() in lengths[grouped[:4]]


def test_grouped_epochs_differ_in_batches_and_order() -> None:
    batches = DistributedBatchSampler(
        Shuffle(400), batch_size=4, lengths=log_normal(400), group_by_length=True, window=5
    )
    first = [frozenset(batches.batch(0, step)) for step in range(len(batches))]
    second = [frozenset(batches.batch(1, step)) for step in range(len(batches))]
    assert len(set(first) & set(second)) < 10


@given(st.lists(st.integers(0, 2048), min_size=1, max_size=40), st.integers(1, 6))
def test_balancing_deals_every_position_once_and_evenly(lengths: list[int], parts: int) -> None:
    dealt = balance(np.asarray(lengths), parts)
    assert sorted(int(i) for part in dealt for i in part) == list(range(len(lengths)))
    counts = [len(part) for part in dealt]
    assert len(counts) == parts and max(counts) - min(counts) <= 1


def test_balanced_ranks_have_about_the_same_tokens() -> None:
    lengths = log_normal(4096)

    def worst(balance_ranks: bool) -> float:
        """Tokens of the fullest rank over the mean, averaged over the steps."""
        ranks = [
            DistributedBatchSampler(
                Shuffle(4096),
                batch_size=16,
                rank=r,
                world=4,
                lengths=lengths,
                balance_ranks=balance_ranks,
            )
            for r in range(4)
        ]
        loads = np.asarray(
            [[lengths[b.batch(0, s)].sum() for b in ranks] for s in range(len(ranks[0]))]
        )
        return float((loads.max(axis=1) / loads.mean(axis=1)).mean())

    assert worst(True) < 1.01 < 1.15 < worst(False)


WEIGHTS = [2, 2, 5, 5, 4, 4, 4, 4, 8, 8, 4]
"""Uni-Med's ratios."""
SIZES = [900, 1000, 4919, 19755, 1200, 5000, 700, 800, 30000, 20000, 40000]


def smallest_gap(stream: np.ndarray) -> int:
    """Draws from one coming of a record to its next, at least."""
    order = np.argsort(stream, kind="stable")  # the places of each record, rising
    gaps = np.diff(order)[np.diff(stream[order]) == 0]
    return int(gaps.min())


def test_shares_of_a_mixture_are_its_weights() -> None:
    mixture = Mixture(SIZES, WEIGHTS, draws=100_000, min_distance=64)
    sources = np.searchsorted(np.cumsum(SIZES), mixture(0), side="right")
    shares = np.bincount(sources) / 100_000
    assert np.abs(shares / (np.asarray(WEIGHTS) / 50) - 1).max() < 0.01
    for start in range(0, 100_000 - 500, 333):  # and in any stretch, to within a draw at either end
        counts = np.bincount(sources[start : start + 500], minlength=len(SIZES))
        assert np.abs(counts - 500 * np.asarray(WEIGHTS) / 50).max() <= 2


def test_no_record_comes_twice_in_a_step_on_any_rank_across_rounds_and_epochs() -> None:
    mixture = Mixture(SIZES, WEIGHTS, draws=40_000, min_distance=64, seed=2)
    stream = np.concatenate([mixture(epoch) for epoch in range(3)])
    assert max(Counter(stream.tolist()).values()) > 5  # small sources do go round
    assert smallest_gap(stream) >= 64
    ranks = [
        DistributedBatchSampler(mixture, batch_size=16, rank=rank, world=4) for rank in range(4)
    ]
    for step in range(0, len(ranks[0]), 25):
        drawn = [index for batches in ranks for index in batches.batch(1, step)]
        assert len(set(drawn)) == len(drawn) == 64


def test_records_of_a_source_are_seen_equally_often() -> None:
    mixture = Mixture([10, 1000], [1, 1], draws=400, min_distance=4)
    seen = Counter(np.concatenate([mixture(epoch) for epoch in range(10)]).tolist())
    assert {seen[index] for index in range(10)} == {200}
    assert {seen[index] for index in range(10, 1010)} == {2}
    assert len(mixture) == 400 and mixture.counts.tolist() == [200, 200]


def test_a_small_source_goes_round_without_repeating_within_a_step() -> None:
    mixture = Mixture([9, 500], [1, 3], draws=2000, min_distance=16)
    assert smallest_gap(mixture(0)) >= 16


def test_a_source_too_small_for_the_step_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Mixture([3, 500], [1, 1], min_distance=16)
    assert "source 0 has 3 records but is drawn about 8 times a step" in caplog.text


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 9)), min_size=1, max_size=5),
    st.integers(1, 300),
    st.integers(1, 8),
    st.integers(0, 4),
)
@settings(deadline=None)
def test_a_mixture_of_anything(
    sources: list[tuple[int, float]], draws: int, min_distance: int, epoch: int
) -> None:
    sizes, weights = zip(*sources, strict=True)
    mixture = Mixture(sizes, weights, draws=draws, min_distance=min_distance)
    stream = mixture(epoch)
    assert len(stream) == len(mixture) == draws
    assert np.array_equal(
        stream, Mixture(sizes, weights, draws=draws, min_distance=min_distance)(epoch)
    )
    ends = np.cumsum(sizes)
    counts = np.bincount(np.searchsorted(ends, stream, side="right"), minlength=len(sizes))
    assert np.array_equal(counts, mixture.counts)
    assert np.abs(counts - np.asarray(weights) / sum(weights) * draws).max() < 1 + 1e-9


@pytest.mark.parametrize(("sizes", "weights"), [([3], [1, 1]), ([3, 0], [1, 1]), ([3, 3], [1, 0])])
def test_a_mixture_needs_records_and_weights(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(RecipeError, match="a mixture needs a weight above 0 for each source"):
        Mixture(sizes, weights)


def test_unrepeated_stretches() -> None:
    mixture = Mixture([100, 1000], [1, 3], min_distance=390)
    assert mixture.unrepeated == 392
    assert smallest_gap(mixture(0)) >= 390
