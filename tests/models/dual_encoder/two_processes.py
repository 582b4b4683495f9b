"""Two ranks with uneven batches of pairs, in chunks, take the step of one process with all of them.

python -m tests.models.dual_encoder.two_processes TOKENIZER STAGE, by `tests.launch`. Stage 0 is
DDP.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medm.distributed import rank
from medm.models.dual_encoder.modeling import DualEncoder
from medm.objectives.contrastive import Contrastive
from tests.models.dual_encoder.tiny import make, pairs, section

RATE = 0.1


def part(start: int, stop: int) -> dict[str, Any]:
    """Some pairs of the whole batch; a batch without any holds no pixels."""
    whole = pairs()
    found: dict[str, Any] = {
        name: whole[name][start:stop] for name in ("input_ids", "attention_mask")
    }
    if stop > start:
        found["pixels"] = {"image": whole["pixels"]["image"][start:stop]}
    return found


def ready(tokenizer: str) -> DualEncoder:
    model = make(section(tokenizer))[0].train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def stepped(model: DualEncoder) -> dict[str, torch.Tensor]:
    """Weights after a step of one process with all pairs."""
    batch = part(0, 4)
    output = model(**batch)
    (Contrastive(gather=False).loss(output, batch) / 4).backward()
    with torch.no_grad():
        return {name: weight - RATE * weight.grad for name, weight in model.named_parameters()}


def run(tokenizer: str, stage: int, split: int) -> None:
    model = ready(tokenizer)
    expected = stepped(copy.deepcopy(model))
    batch = part(0, split) if rank() == 0 else part(split, 4)
    objective = Contrastive()
    runner: Any
    if stage:
        import deepspeed

        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        runner = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": zero,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )[0]
    else:
        runner = DistributedDataParallel(model)
    # Gradients are averaged over two ranks; the loss is a sum over the pairs of both.
    loss = 2 * objective.loss(runner(**batch, chunk=2), batch) / 4
    if stage:
        runner.backward(loss)
        runner.step()
    else:
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= RATE * weight.grad
    for name, weight in model.named_parameters():
        if stage == 3:
            from deepspeed.utils import safe_get_full_fp32_param

            found = safe_get_full_fp32_param(weight)
        else:
            found = weight.detach()
        torch.testing.assert_close(
            found, expected[name], atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for split in (3, 4):
        run(sys.argv[1], int(sys.argv[2]), split)
    dist.destroy_process_group()
