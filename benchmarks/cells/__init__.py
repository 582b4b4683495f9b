"""Every cell, by name. Adding one is a class in a file of this folder and a line here."""

from __future__ import annotations

from benchmarks.cells import (
    answering,
    caches,
    checkpoints,
    contrast,
    experts,
    masks,
    ranks,
    serving,
    startup,
    training,
    volumes,
)
from benchmarks.harness import Cell

CELLS: list[type[Cell]] = [
    training.TrainingTokens,
    training.TrainingTokensLarge,
    training.Utilisation,
    training.UtilisationLarge,
    training.UtilisationCompiled,
    training.Waste,
    volumes.CachedReading,
    volumes.CachedReadingOfCT,
    volumes.FirstReading,
    volumes.FirstReadingOfCT,
    training.DataStall,
    answering.OneByOne,
    answering.PaddedBatches,
    answering.Decoding,
    answering.ManyQuestions,
    caches.FirstStage,
    training.PeakMemory,
    training.PeakMemoryLarge,
    checkpoints.Stall,
    checkpoints.Replay,
    contrast.PairsASecond,
    contrast.PairsMemory,
    contrast.ChunkedMemory,
    masks.MasksASecond,
    masks.MaskMemory,
    serving.Pace,
    serving.Waiting,
    serving.Lost,
    serving.Memory,
    startup.Help,
    ranks.TwoRanks,
    experts.EightExperts,
    experts.SixteenExperts,
]
