"""What each rank reads of a mixture of shards.

python -m tests.data.shard_ranks MANIFEST JSONL OUT, by `tests.launch`. Every rank writes the captions
of its batches over two epochs, and what was counted, to OUT-RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader

from medm.data.options import DataOptions, SourceOptions
from medm.data.pairs import Pairs
from medm.distributed import rank, world_size
from medm.training.data import TrainingData
from medm.training.options import TrainOptions
from tests.data.test_pairs import processor, text_of

GLOBAL_BATCH = 4


def batches(manifest: str, lines: str) -> dict[str, Any]:
    """Return the captions of each batch by epoch, and the counts of all ranks."""
    data = TrainingData(
        DataOptions(
            train=[SourceOptions(path=manifest), SourceOptions(path=lines)],
            bad_records="skip",
            bad_records_limit=None,
        ),
        TrainOptions(per_device_train_batch_size=GLOBAL_BATCH // world_size(), seed=5),
        Pairs(processor()),
        rank=rank(),
        world=world_size(),
    )
    epochs = []
    for epoch in range(2):
        data.sampler.start(epoch)
        data.train.set_epoch(epoch)
        loading: Any = DataLoader(data.train, batch_sampler=data.sampler, collate_fn=list)
        epochs.append(
            [[text_of(example) for example in examples if example] for examples in loading]
        )
    return {"epochs": epochs, "counts": data.counts}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = batches(*sys.argv[1:3])
    Path(f"{sys.argv[3]}-{rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
