"""The scores of one task, with the metadata that they depend on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from medm.evaluation.cases import Case
from medm.metrics.base import MetricResult
from medm.metrics.compare import Comparison
from medm.tasks.base import Scores
from medm.types import JsonObject


@dataclass(slots=True)
class TaskReport:
    """Result of scoring one task."""

    task: str
    summary: str
    """Its one-line description in the registry."""
    folder: Path
    """Folder of its files."""
    metadata: JsonObject
    """Data, split, model, generation options and versions: all that the numbers depend on."""
    n: int
    answered: int
    """Items with a reply, an empty one included; the others have an error, or no line."""
    scores: Scores
    comparisons: list[Comparison] = field(default_factory=list)
    against: str | None = None
    worst: list[Case] = field(default_factory=list)
    random: list[Case] = field(default_factory=list)

    def as_json(self) -> JsonObject:
        """Return everything but the cases, which hold texts and images."""
        return {
            "task": self.task,
            **self.metadata,
            "n": self.n,
            "answered": self.answered,
            "scores": [result.as_dict() for result in self.scores.results],
            "published": [result.as_dict() for result in self.scores.original],
            "groups": {
                name: {
                    value: [_without_items(result) for result in results]
                    for value, results in group.items()
                }
                for name, group in self.scores.groups.items()
            },
            "notes": self.scores.notes,
            "empty_replies": self.scores.empty,
            "inference_errors": self.scores.failed,
            "against": self.against,
            "comparison": [comparison.as_dict() for comparison in self.comparisons],
        }


def _without_items(result: MetricResult) -> JsonObject:
    return {key: value for key, value in result.as_dict().items() if key != "per_item"}
