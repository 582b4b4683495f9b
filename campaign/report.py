"""The table of a run, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from campaign.harness import GOOD, OUTCOMES, PartResult
from medm.files import atomic_write_text

NOT_RUN = (
    ("GPU out of memory during training and inference", "needs a GPU"),
    ("a rank that dies or stands still on NCCL", "needs GPUs"),
    ("EIO by a real disk, and loss of power of a real machine", "simulated in `untried`"),
    ("EIO in readers that open by descriptor or in compiled code", "images, JSONL, tar shards, safetensors"),
    ("a full disk", "needs a file system of its own; the tests of rows 16, 31 and 32 limit file sizes"),
)  # fmt: skip
"""What no part tries, and why."""


def as_json(results: Sequence[PartResult], setting: dict[str, Any]) -> str:
    """Return the setting, the counts and every outcome that is not right."""
    parts = [
        {
            "name": part.name,
            "title": part.title,
            "seconds": round(part.seconds, 1),
            "counts": {group: dict(counts) for group, counts in part.counts().items()},
            "most_cpu_seconds": max((one.cpu for one in part.outcomes), default=0),
            "most_gib": max((one.gib for one in part.outcomes), default=0),
            "bad": [asdict(one) for one in part.bad()],
        }
        for part in results
    ]
    return json.dumps({"setting": setting, "parts": parts}, indent=1) + "\n"


def as_markdown(results: Sequence[PartResult], setting: dict[str, Any]) -> str:
    """Return the table of counts, and a line for each outcome that is not right."""
    lines = ["# Fault campaign", ""]
    lines += [f"- {key}: {value}" for key, value in setting.items()]
    lines += [
        "", "| part | group | tried | " + " | ".join(OUTCOMES) + " |",
        "|---|---|---|" + "---|" * len(OUTCOMES),
    ]  # fmt: skip
    total: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
    for part in results:
        for group, counts in part.counts().items():
            cells = [counts[outcome] or "" for outcome in OUTCOMES]
            lines.append(f"| {part.name} | {group} | {counts.total()} | " + _cells(cells))
            for outcome in OUTCOMES:
                total[outcome] += counts[outcome]
    lines.append(f"| **all** | | {sum(total.values())} | " + _cells(list(total.values())))
    lines += ["", "| part | seconds | most seconds of a core | most GiB |", "|---|---|---|---|"]
    for part in results:
        cpu = max((one.cpu for one in part.outcomes), default=0)
        gib = max((one.gib for one in part.outcomes), default=0)
        lines.append(f"| {part.name} | {part.seconds:.0f} | {cpu:.1f} | {gib:.2f} |")
    bad = [(part.name, one) for part in results for one in part.bad()]
    lines += ["", f"## Not as intended: {len(bad)}", ""]
    for name, one in bad:
        detail = " ".join(one.detail.split()).replace("|", "\\|")
        lines.append(f"- {name}, {one.case}: **{one.outcome}**; {detail}")
    lines += ["", "## Not run", ""]
    lines += [f"- {what}: {why}" for what, why in NOT_RUN]
    return "\n".join(lines) + "\n"


def _cells(cells: Sequence[object]) -> str:
    return " | ".join(map(str, cells)) + " |"


def write(results: Sequence[PartResult], setting: dict[str, Any], out: Path) -> None:
    """Write `out` (Markdown) and the JSON beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, as_markdown(results, setting))
    atomic_write_text(out.with_suffix(".json"), as_json(results, setting))


def all_right(results: Sequence[PartResult]) -> bool:
    """Return whether every outcome is right."""
    return all(one.outcome in GOOD for part in results for one in part.outcomes)


def machine() -> dict[str, Any]:
    """Return the versions and the machine that the figures belong to."""
    import platform

    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cores": os.cpu_count(),
        "load at the start": round(os.getloadavg()[0], 1),
    }
