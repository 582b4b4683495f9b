"""Ranks with uneven batches of studies take the steps of one process with all of them.

python -m tests.models.blip.ranks TOKENIZER RUNNER..., by `tests.launch`. A runner is `ddp` or a
stage of ZeRO. The momentum copy and the queue move from step to step, and wrap.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from medm.distributed import rank, world_size
from medm.models.blip.modeling import MedmBlip
from medm.objectives.answers import AnswerClasses
from medm.objectives.classification import Multilabel
from medm.objectives.image_text_contrast import ImageTextContrast
from medm.objectives.language_modeling import LanguageModeling
from medm.objectives.matching import ImageTextMatching
from tests.models.blip.tiny import ANSWERS, knowledge, make, section, studies
from tests.models.dual_encoder.ranks import descend, runner_of, weights_of

OBJECTIVES: tuple[Any, ...] = (
    ImageTextContrast(),
    ImageTextMatching(),
    LanguageModeling(),
    Multilabel(),
    AnswerClasses(),
)
SIZES = ([3, 1], [2, 2], [0, 4], [1, 3])
"""Studies of each rank, by step. In the first, one has closed questions alone, the other open
ones."""


def total(model: Any, batch: dict[str, Any]) -> Tensor:
    """The sum of all terms over the items of all ranks."""
    output, whole = model(**batch), studies()
    losses = [
        0.01 * objective.loss(output, batch) / objective.count(whole) for objective in OBJECTIVES
    ]
    return sum(losses[1:], losses[0])


def after(model: MedmBlip) -> None:
    """What the trainer calls behind a step."""
    with torch.no_grad():
        model.after_step()


def run(tokenizer: str, name: str) -> None:
    """Take the steps; each ends with equal losses, weights and training state."""
    (Path(tokenizer) / name).mkdir(exist_ok=True)
    content = section(tokenizer, knowledge=knowledge(Path(tokenizer) / name))
    content["heads"] = [*content["heads"], "answers"]
    content["answers"] = {**ANSWERS, "encoders": "separate", "dim": 16}
    model = make(content)[0].train()
    single = copy.deepcopy(model)
    runner = runner_of(name, model)
    for number, sizes in enumerate(SIZES):
        with patch("medm.distributed.world_size", return_value=1):
            expected = total(single, studies())
        expected.backward()
        for weight in single.momentum.parameters():
            weight.grad = torch.zeros_like(weight)  # `descend` asks each weight for a gradient
        largest = descend(single)
        after(single)

        start = sum(sizes[: rank()])
        found = total(runner, studies(start, start + sizes[rank()]))
        if name == "ddp":
            (world_size() * found).backward()
            for weight in model.momentum.parameters():
                weight.grad = torch.zeros_like(weight)
            descend(model)
        else:
            runner.backward(world_size() * found)
            runner.step()
        after(model)

        case = f"{name}, step {number}, {sizes}"
        loss = found.detach().clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(
            loss, expected, atol=1e-6, rtol=1e-5, msg=lambda m, c=case: f"{c}: {m}"
        )
        weights = weights_of(model, name)
        state = dict(single.named_parameters()) | dict(single.named_buffers())
        weights |= dict(model.named_buffers())
        for key, value in state.items():
            torch.testing.assert_close(
                weights[key],
                value.detach(),
                atol=1e-5 * max(1.0, largest),
                rtol=0,
                msg=lambda m, k=key, c=case: f"{c}: {k}: {m}",
            )
        single.load_state_dict(model.state_dict())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for runner_name in sys.argv[2:]:
        run(sys.argv[1], runner_name)
    dist.destroy_process_group()
