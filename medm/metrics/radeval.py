"""RadEval's scores of radiology reports, where that package is installed.

RadEval (2.2) loads the models of its scores by itself, from the local cache or the hub. Its scores that ask a service
over the network are left out: reports stay on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from medm.metrics.base import DEFAULT, MetricResult, Resampling, check_lengths, mean_result, optional


def radeval(
    predictions: Sequence[str], references: Sequence[str], *, scores: Sequence[str] = ("radgraph",),
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:  # fmt: skip
    """Means over reports of RadEval's per-report scores, each named `radeval/<its name there>`.

    Args:
        predictions: reports.
        references: one report each.
        scores: RadEval's names of what to compute.
        resampling: how the interval is drawn.

    Raises:
        DeviceError: RadEval is not installed.
        ValueError: RadEval gave no number for each report.
    """
    n = check_lengths(predictions, references)
    library = optional("radeval", package="RadEval>=2.2", extra="report")
    if n == 0:
        return []
    evaluator = library.RadEval(metrics=list(scores), per_sample=True, show_progress=False)
    found = evaluator(refs=list(references), hyps=list(predictions))
    signature = f"radeval|version:{version('RadEval')}|per-report mean"
    results = []
    for name, values in found.items():
        if not isinstance(values, (list, tuple)) or len(values) != n:
            raise ValueError(f"radeval: expected {n} numbers under {name!r}, found {type(values).__name__}")
        results.append(mean_result(f"radeval/{name}", [float(value) for value in values], signature, resampling))
    return results
