"""Linear and few-shot probes: logistic regression on the vectors of a frozen encoder."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from medm.errors import DataError, RecipeError
from medm.metrics.base import MetricResult, Resampling, mean_result, with_note
from medm.tasks.base import FAILED, Record, Scores
from medm.tasks.zero_shot import ClassTask, class_results
from medm.types import JsonObject, PredictionField, Sample


class Probe(ClassTask):
    """Classifiers that are trained on the vectors of the training files of a card, and scored on
    its test files.

    Args:
        options: see `medm.tasks.ProbeOptions`.
    """

    needs: frozenset[PredictionField] = frozenset({"embeddings"})

    def __init__(
        self,
        *,
        card: str,
        only: Sequence[str] = (),
        shots: Sequence[int] = (),
        draws: int = 3,
        l2: float = 0.01,
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(card=card, only=only, rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.shots, self.draws, self.l2 = tuple(shots), draws, l2
        if len(self.cards) > 1:
            raise RecipeError(f"card {card}: a probe is trained for one set; name one card")
        ((self.name, self.card),) = self.cards.items()
        if self.card.labels == "multi":
            raise RecipeError(f"card {card}: a probe gives one class a file, and this set several")
        if "train" not in self.card.splits:
            raise RecipeError(
                f"card {card}: has no split train, on which a probe is trained; give it in a card "
                f"of your own (base: {card})"
            )

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        if split != "train":
            yield from super().samples(folder, "train", rng=rng)
        yield from super().samples(folder, split, rng=rng)

    def is_empty(self, record: Record) -> bool:
        return record.get("embedding") is None

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        places = [place for place, record in enumerate(records) if record["split"] != "train"]
        training = [record for record in records if record["split"] == "train"]
        train = [record for record in training if _has_vector(record)]
        test = [records[place] for place in places]
        drawn = self.resampling_of(records).part(places)
        if not training or not test:
            empty = mean_result("accuracy", [], "labels:equal", drawn)
            return [with_note(empty, "undefined: training files or test files are missing")]
        classes = list(self.card.classes) or sorted({str(row["answer"]) for row in records})
        if not train:
            missing = [{**record, "prediction": "", "scores": None} for record in test]
            return class_results(self.card, classes, missing, drawn)
        vectors = _matrix(train)
        labels = np.array([classes.index(str(record["answer"])) for record in train])
        scored = self._classified(test, classes, fit(vectors, labels, len(classes), l2=self.l2))
        results = class_results(self.card, classes, scored, drawn)
        return results + [
            self._few_shot(shots, vectors, labels, test, classes, drawn) for shots in self.shots
        ]

    def _scores(self, rows: Sequence[JsonObject]) -> Scores:
        scores = super()._scores(rows)
        train = sum(row["split"] == "train" for row in rows)
        scores.notes.append(
            f"trained on {train} files and scored on {len(rows) - train}; l2 {self.l2:g}"
        )
        return scores

    def _classified(
        self, test: Sequence[Record], classes: Sequence[str], weights: np.ndarray
    ) -> list[Record]:
        """The test records with the scores of a classifier (D + 1, K)."""
        rows: list[Record] = []
        for record in test:
            if not _has_vector(record):
                rows.append({**record, "prediction": "", "scores": None})
                continue
            logits = _matrix([record])[0] @ weights[:-1] + weights[-1]
            scores = dict(zip(classes, logits.tolist(), strict=True))
            rows.append({**record, "prediction": classes[int(logits.argmax())], "scores": scores})
        return rows

    def _few_shot(
        self,
        shots: int,
        vectors: np.ndarray,
        labels: np.ndarray,
        test: Sequence[Record],
        classes: Sequence[str],
        drawn: Resampling,
    ) -> MetricResult:
        """Mean accuracy over random choices of so many training files of each class."""
        hits = np.zeros((self.draws, len(test)))
        for draw in range(self.draws):
            rng = np.random.default_rng([self.resampling.seed, draw])
            picked: list[int] = []
            for label in range(len(classes)):
                own = np.flatnonzero(labels == label)
                if len(own) < shots:
                    raise DataError(
                        f"shots: {shots}, but class {classes[label]!r} has {len(own)} training "
                        "files with a vector"
                    )
                picked += rng.permutation(own)[:shots].tolist()
            weights = fit(vectors[picked], labels[picked], len(classes), l2=self.l2)
            scored = self._classified(test, classes, weights)
            hits[draw] = [record["prediction"] == record["answer"] for record in scored]
        signature = f"labels:equal|shots:{shots}|draws:{self.draws}|l2:{self.l2:g}"
        result = mean_result(f"{shots}-shot-accuracy", hits.mean(axis=0), signature, drawn)
        each = ", ".join(f"{value:.3f}" for value in hits.mean(axis=1))
        return with_note(result, f"mean of {self.draws} draws: {each}")


def fit(vectors: np.ndarray, labels: np.ndarray, classes: int, *, l2: float) -> np.ndarray:
    """Return weights (D + 1, K) of a multinomial logistic regression, the biases last.

    They minimize the sum of the cross-entropy and l2 / 2 times the sum of the squared weights,
    without the biases, by L-BFGS from zero in float64: the result does not depend on chance.

    Args:
        vectors: (N, D).
        labels: (N,) class numbers.
        classes: K.
        l2: the penalty.
    """
    import torch

    inputs, targets = torch.from_numpy(vectors), torch.from_numpy(labels)
    weights = torch.zeros(inputs.shape[1], classes, dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, biases],
        max_iter=1000,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = inputs @ weights + biases
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        loss = loss + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return np.vstack([weights.detach().numpy(), biases.detach().numpy()])


def _has_vector(record: Record) -> bool:
    return record.get(FAILED) is None and record.get("embedding") is not None


def _matrix(records: Sequence[Record]) -> np.ndarray:
    """(N, D) vectors of length 1.

    Raises:
        DataError: they differ in their numbers.
    """
    sizes = {len(record["embedding"]) for record in records}
    if len(sizes) > 1:
        raise DataError(f"expected vectors of one length, found {sorted(sizes)}")
    vectors = np.array([record["embedding"] for record in records], dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
