"""Results, intervals and comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medm.metrics import METRICS, smaller_is_better
from medm.metrics.base import (
    Clusters,
    MetricResult,
    Resampling,
    check_lengths,
    draws,
    mean_result,
    summed_result,
)
from medm.metrics.compare import compare, randomization_test
from medm.metrics.match import exact_match


def test_the_interval_is_that_of_a_naive_bootstrap() -> None:
    scores = np.random.default_rng(3).random(40)
    result = mean_result("m", scores.tolist(), "s", Resampling(rounds=4000, seed=1))
    random = np.random.default_rng(99)
    naive = [random.choice(scores, 40).mean() for _ in range(4000)]
    low, high = np.quantile(naive, [0.025, 0.975])
    assert result.value == pytest.approx(scores.mean())
    assert result.low == pytest.approx(low, abs=0.01)
    assert result.high == pytest.approx(high, abs=0.01)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    scores = np.random.default_rng(0).random(30).tolist()
    first, again, other = (
        mean_result("m", scores, "s", Resampling(seed=seed)) for seed in (5, 5, 6)
    )
    assert (first.low, first.high) == (again.low, again.high) != (other.low, other.high)


def test_every_draw_has_n_items() -> None:
    rows = np.concatenate(list(draws(7, Resampling(rounds=130))))
    assert rows.shape == (130, 7)
    assert (rows.sum(axis=1) == 7).all()
    assert rows.mean(axis=0) == pytest.approx(np.ones(7), abs=0.35)


def test_groups_are_drawn_whole_as_a_naive_bootstrap_of_groups_does() -> None:
    scores = np.array([1.0, 1, 1, 1, 0, 0, 0.5, 0.2, 0.2])
    members = ("a", "a", "a", "a", "b", "b", "c", "d", "d")
    drawn = Resampling(rounds=4000, seed=1, clusters=Clusters("volume", members))
    rows = np.concatenate(list(draws(9, drawn)))
    for first, second in ((0, 3), (4, 5), (7, 8)):
        assert np.array_equal(rows[:, first], rows[:, second])
    assert (rows[:, [0, 4, 6, 7]].sum(axis=1) == 4).all()  # as many groups as there are
    result = mean_result("m", scores, "s", drawn)
    random = np.random.default_rng(99)
    groups = [scores[:4], scores[4:6], scores[6:7], scores[7:]]
    naive = [
        np.concatenate([groups[i] for i in random.integers(4, size=4)]).mean() for _ in range(4000)
    ]
    low, high = np.quantile(naive, [0.025, 0.975])
    assert (result.low, result.high) == (
        pytest.approx(low, abs=0.01),
        pytest.approx(high, abs=0.01),
    )
    alone = mean_result("m", scores, "s", Resampling(rounds=4000, seed=1))
    assert result.high - result.low > 1.3 * (alone.high - alone.low)
    assert result.signature == "s|cluster:volume"
    assert (result.as_dict()["cluster_by"], result.as_dict()["clusters"]) == ("volume", 4)


def test_a_group_of_one_item_each_changes_nothing_but_the_signature() -> None:
    scores = np.random.default_rng(0).random(12)
    alone = mean_result("m", scores, "s", Resampling(rounds=100))
    each = mean_result(
        "m", scores, "s", Resampling(rounds=100, clusters=Clusters("id", tuple("abcdefghijkl")))
    )
    assert (each.low, each.high) == (alone.low, alone.high)
    with pytest.raises(ValueError, match="signature"):
        compare(alone, each)


def test_groups_of_other_items_are_refused() -> None:
    drawn = Resampling(clusters=Clusters("volume", ("a", "b", "b")))
    with pytest.raises(
        ValueError, match=r"2 items are scored, but groups by 'volume' are given for 3"
    ):
        mean_result("m", [0.0, 1.0], "s", drawn)
    assert mean_result("m", [0.0, 1.0], "s", drawn.part([0, 2])).clusters == Clusters(
        "volume", ("a", "b")
    )


def test_a_single_group_has_no_interval_and_no_test() -> None:
    drawn = Resampling(rounds=50, clusters=Clusters("volume", ("a", "a", "a")))
    first, second = (
        mean_result("m", [1.0, 1, 0], "s", drawn),
        mean_result("m", [0.0, 1, 0], "s", drawn),
    )
    assert math.isnan(first.low)
    found = compare(first, second)
    assert math.isnan(found.low)
    assert found.p_value == 1
    ratio = lambda sums: sums[:, 0] / sums[:, 1]  # noqa: E731
    pair = [summed_result("p", np.array([[v, 1.0]] * 3), ratio, "s", drawn) for v in (1.0, 0.0)]
    assert math.isnan(compare(*pair).p_value)


def test_signs_are_exchanged_by_whole_groups() -> None:
    """Twelve items of three scans that all favour the first: by item very surprising, by scan 2 in
    8."""
    first, second = np.ones(12), np.zeros(12)
    members = tuple(np.repeat(["a", "b", "c"], 4).tolist())
    grouped = Resampling(rounds=8000, clusters=Clusters("volume", members))
    assert randomization_test(first, second, Resampling(rounds=8000)) < 0.005
    assert randomization_test(first, second, grouped) == pytest.approx(2 / 8, abs=0.02)


def test_a_corpus_metric_is_resampled_as_a_corpus() -> None:
    # tp, tp + fp: items of very different size. The mean of item ratios would be 0.5, the corpus
    # value is 10 / 101.
    statistics = np.array([[1.0, 1.0], [0.0, 1.0], [9.0, 99.0]])
    result = summed_result(
        "p", statistics, lambda sums: sums[:, 0] / sums[:, 1], "s", Resampling(rounds=200)
    )
    assert result.value == pytest.approx(10 / 101)
    assert result.per_item is None
    assert 0 <= result.low <= result.value <= result.high <= 1


def test_no_items_is_undefined_and_not_zero() -> None:
    result = exact_match([], [])[0]
    assert result.n == 0
    assert math.isnan(result.value)
    assert result.as_dict()["value"] is None


def test_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        check_lengths(["a", "b"], ["a"])


def test_a_result_becomes_json() -> None:
    result = mean_result("m", [1.0, 0.0], "s", Resampling(rounds=10))
    stored = result.as_dict()
    assert stored["per_item"] == [1.0, 0.0]
    assert set(stored) == {"name", "n", "signature", "value", "low", "high", "per_item"}


def test_a_clear_difference_is_found_and_an_equal_pair_is_not() -> None:
    random = np.random.default_rng(0)
    base = random.random(80)
    better = mean_result("m", (base + 0.2 + 0.05 * random.random(80)).tolist(), "s", Resampling())
    worse = mean_result("m", base.tolist(), "s", Resampling())
    found = compare(better, worse)
    assert found.test == "randomisation"
    assert found.p_value == pytest.approx(1 / 1001)
    assert 0.19 < found.low < found.difference < found.high < 0.26
    same = compare(worse, worse)
    assert same.p_value == 1
    assert (same.low, same.high) == (0, 0)


def test_randomisation_equals_the_exact_permutation_test() -> None:
    first, second = np.array([1.0, 0.9, 0.8, 0.4]), np.array([0.5, 0.6, 0.7, 0.5])
    deltas = first - second  # 0.5, 0.3, 0.1, -0.1
    signs = np.array(np.meshgrid(*[[1, -1]] * 4)).reshape(4, -1).T
    exact = (abs(signs @ deltas) >= abs(deltas.sum()) - 1e-12).mean()
    assert randomization_test(first, second, Resampling(rounds=20000)) == pytest.approx(
        exact, abs=0.01
    )


def test_pairing_matters() -> None:
    """Two systems with wide but shared scatter: unpaired intervals overlap, the paired one excludes
    0."""
    base = np.linspace(0, 1, 30)
    first = mean_result("m", (base + 0.02).tolist(), "s", Resampling())
    second = mean_result("m", base.tolist(), "s", Resampling())
    assert first.low < second.high
    assert compare(first, second).low == pytest.approx(0.02)


def test_a_corpus_metric_is_compared_by_the_bootstrap() -> None:
    hits = np.array([[1.0, 1.0]] * 30)
    misses = np.array([[0.0, 1.0]] * 30)
    ratio = lambda sums: sums[:, 0] / sums[:, 1]  # noqa: E731
    found = compare(
        summed_result("p", hits, ratio, "s", Resampling()),
        summed_result("p", misses, ratio, "s", Resampling()),
    )
    assert found.test == "bootstrap"
    assert found.difference == 1
    assert found.p_value < 0.01


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (MetricResult("n", 0, 2, 0, 0, "s", [0.0, 0.0]), "name"),
        (MetricResult("m", 0, 2, 0, 0, "t", [0.0, 0.0]), "signature"),
        (MetricResult("m", 0, 3, 0, 0, "s", [0.0, 0.0, 0.0]), "n is"),
        (MetricResult("m", 0, 2, 0, 0, "s"), "corpus metric"),
    ],
)
def test_unlike_results_are_not_compared(other: MetricResult, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        compare(MetricResult("m", 0, 2, 0, 0, "s", [0.0, 0.0]), other)


def test_a_stored_result_can_still_be_compared() -> None:
    fresh = mean_result("m", [1.0, 0.0, 1.0], "s", Resampling())
    stored = MetricResult("m", 1 / 3, 3, 0, 0, "s", [0.0, 0.0, 1.0])
    assert compare(fresh, stored).difference == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_of_the_table_exists_and_takes_its_options(name: str) -> None:
    import inspect

    entry = METRICS.entry(name)
    parameters = inspect.signature(METRICS.get(name)).parameters
    assert "resampling" in parameters
    assert set(entry.options.model_fields) - {"name"} <= set(parameters)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in METRICS.names()
        if METRICS.entry(n).options.takes == "text" and n not in ("bertscore", "radeval")
    ],
)
def test_every_text_metric_knows_right_from_wrong(name: str) -> None:
    """Contract of every member: equal texts beat unrelated ones, and the order of the items does
    not matter."""
    if name == "meteor":
        from medm.metrics.meteor import wordnet_available

        if not wordnet_available():
            pytest.skip("the WordNet files are not on this machine")
    if name == "meteor-java":
        pytest.importorskip("pycocoevalcap", reason="pycocoevalcap (104 MB) is not installed")
    metric = METRICS.get(name)
    answers = (
        ["yes", "no"]
        if name == "closed-accuracy"
        else ["A. the heart is enlarged", "B. there is a small pleural effusion"]
    )
    if name == "unibiomed-phrase":  # lower case and a full stop are part of what it looks for
        answers = [f"{answer.lower()}." for answer in answers]
    right = metric(answers, answers, resampling=Resampling(rounds=20))[0]
    wrong = metric(answers[::-1], answers, resampling=Resampling(rounds=20))[0]
    assert right.value > wrong.value
    assert right.n == 2
    assert right.signature
    swapped = metric(answers[::-1], answers[::-1], resampling=Resampling(rounds=20))[0]
    assert swapped.value == pytest.approx(right.value)
    with pytest.raises(ValueError):
        metric(answers, answers[:1])


def test_the_results_of_which_smaller_values_are_better() -> None:
    smaller = (
        "box-malformed", "choice-unparsed", "hd95", "false-positive-rate", "radeval/radcliq-v1",
        "image-to-text-median-rank",
    )  # fmt: skip
    assert all(smaller_is_better(name) for name in smaller)
    larger = ("token-f1", "auroc", "image-to-text-R@1", "hit-rate@0.5", "radeval/radgraph", "nsd")
    assert not any(smaller_is_better(name) for name in larger)
