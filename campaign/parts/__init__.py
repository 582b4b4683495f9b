"""The parts of the campaign, in the order in which they run."""

from __future__ import annotations

from importlib import import_module

from campaign.harness import Part

PARTS = (
    "media", "masks", "records", "model_files", "caches", "http", "crafted", "rows", "kills",
    "resumes", "canaries", "stops", "untried",
)  # fmt: skip
"""One module of this package each, which has a `PART`."""


def load(name: str) -> Part:
    """Return a part by its name."""
    part: Part = import_module(f"campaign.parts.{name}").PART
    return part
