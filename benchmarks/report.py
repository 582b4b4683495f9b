"""The figures as a Markdown table and as a chart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def table(content: dict[str, Any]) -> str:
    """Table of all cells, missed targets included."""
    limits, versions = content["limits"], content["versions"]
    lines = [
        f"Profile `{content['profile']}`: {limits['device']}, {limits['threads']} threads; "
        f"measured limits {limits['matmul'] / 1e9:.0f} GFLOP/s, reads "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        "| cell | what | peer | value | 95 % | target | reached | noise (peer/peer) | gate | "
        "setting |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in content["cells"].values():
        aim = (
            ""
            if cell["target"] is None
            else f"{'≤' if cell['at_most'] else '≥'} {cell['target']:g}"
        )
        reached = {True: "yes", False: "**no**", None: ""}[cell["reached"]]
        if cell["status"] != "measured":
            reached += f" ({cell['status']})"
        setting = ", ".join(f"{key} {value}" for key, value in cell["setting"].items())
        lines.append(
            f"| {cell['name']} | {cell['title']} | {cell['peer']} | {_number(cell['value'])} | "
            f"{_number(cell['low'])} to {_number(cell['high'])} | {aim} | {reached} | "
            f"{_number(cell['noise'])} | {cell['gate']} | {setting} |"
        )
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any], file: Path) -> None:
    """Bars of each value over its target, on a logarithmic axis: right of the line is reached."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [
        c
        for c in content["cells"].values()
        if c["target"] and not math.isnan(c["value"]) and c["value"] > 0
    ]
    gains = [c["target"] / c["value"] if c["at_most"] else c["value"] / c["target"] for c in cells]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(cells) + 1.4), layout="constrained")
    colors = ["#2a7f62" if gain >= 1 else "#b5523b" for gain in gains]
    axes.barh([f"{c['name']} {c['title']}" for c in cells], gains, color=colors)
    axes.bar_label(axes.containers[0], labels=[f" {_number(c['value'])}" for c in cells])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("value over target (right of the line: reached)")
    axes.invert_yaxis()
    axes.set_title(f"profile {content['profile']}")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
