"""Every cell, by name. Adding one is a class in a file of this folder and a line here."""

from __future__ import annotations

from benchmarks.cells import training
from benchmarks.harness import Cell

CELLS: list[type[Cell]] = [
    training.TrainingTokens,
    training.Utilisation,
    training.Waste,
    training.PeakMemory,
]
