"""RadEval's scores of radiology reports, where that package is installed.

RadEval (2.2) loads the models of its scores by itself, from the local cache or the hub. Its scores
that ask a service over the network are left out: reports stay on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    Resampling,
    check_lengths,
    is_blank,
    mean_result,
    optional,
    undefined,
)


def require_radeval() -> ModuleType:
    """Return the package. Raises `DeviceError` where it is not installed."""
    return optional("radeval", package="RadEval>=2.2", extra="report")


def radeval(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    scores: Sequence[str] = ("radgraph",),
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Means over reports of RadEval's per-report scores, each named `radeval/<its name there>`.

    A blank prediction scores 0, where RadEval would label it "No Finding" or leave it out. RadCliQ,
    where less is better and nothing is worst, is then undefined.

    Args:
        predictions: reports.
        references: one report each.
        scores: see `RadEvalOptions`.
        resampling: how the interval is drawn.

    Raises:
        DeviceError: RadEval is not installed.
        ValueError: RadEval gave no number for each report.
    """
    n = check_lengths(predictions, references)
    library = require_radeval()
    if n == 0:
        return []
    evaluator = library.RadEval(metrics=list(scores), per_sample=True, show_progress=False)
    found = evaluator(refs=list(references), hyps=list(predictions))
    blank = [is_blank(text) for text in predictions]
    signature = f"radeval|version:{version('RadEval')}|per-report mean"
    results = []
    for name, values in found.items():
        if not isinstance(values, (list, tuple)) or len(values) != n:
            raise ValueError(
                f"radeval: expected {n} numbers under {name!r}, found {type(values).__name__}"
            )
        numbers = [
            0.0 if empty else float(value) for empty, value in zip(blank, values, strict=True)
        ]
        result = mean_result(f"radeval/{name}", numbers, signature, resampling)
        if any(blank) and "radcliq" in name:
            result = undefined(
                result,
                f"undefined: {sum(blank)} of {n} predictions are blank, and it has no worst value",
            )
        results.append(result)
    return results
