"""Ranks with uneven batches of pairs take the steps of one process with all of them.

python -m tests.models.dual_encoder.ranks TOKENIZER RUNNER..., by `tests.launch`. A runner is `ddp`
or a stage of ZeRO. Every runner takes a step in each mode of `same_label` with each loss; the
sizes of the batches change from step to step, and every second step encodes in chunks.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medm.distributed import rank, world_size
from medm.models.dual_encoder.modeling import DualEncoder
from medm.objectives.contrastive import Contrastive
from tests.models.dual_encoder.tiny import make, pairs, section

RATE = 1.0
"""Of plain SGD, so that a step is the gradient."""
LOSSES = ("softmax", "sigmoid")
SIZES = {2: ([3, 1], [0, 4], [2, 2]), 3: ([2, 1, 1], [3, 0, 1], [1, 1, 2])}
"""Pairs of each rank by number of ranks, in turn."""
STEPS = (("negative", None), ("ignore", 2), ("positive", None), ("positive", 1), ("ignore", None))
"""Modes of `same_label`, and chunks."""


def part(start: int, stop: int) -> dict[str, Any]:
    """Some pairs of the whole batch, of which two are of one label; a batch without any holds no
    pixels.
    """
    whole = pairs() | {"pair_labels": torch.tensor([5, 6, 7, 5])}
    fields = ("input_ids", "attention_mask", "pair_labels")
    found: dict[str, Any] = {name: whole[name][start:stop] for name in fields}
    if stop > start:
        found["pixels"] = {"image": whole["pixels"]["image"][start:stop]}
    return found


def ready(tokenizer: str) -> DualEncoder:
    """A model without dropout."""
    model = make(section(tokenizer, logit_bias=-1.0, logit_scale=4.0))[0].train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def summed(loss: Contrastive, model: nn.Module, batch: dict[str, Any], **settings: Any) -> Tensor:
    """The loss of a batch's pairs over those of all. Every weight has a gradient: a bias that the
    loss does not read has 0.
    """
    output = model(**batch, **settings)
    return (loss.loss(output, batch) + 0 * output.logit_bias.sum()) / 4


def runner_of(name: str, model: DualEncoder) -> Any:
    """The model under DDP or DeepSpeed."""
    if name == "ddp":
        return DistributedDataParallel(model)
    import deepspeed

    zero = {"stage": int(name), "stage3_param_persistence_threshold": 0}
    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )[0]


def descend(model: nn.Module) -> float:
    """Take a step of plain SGD; return the largest entry of the gradient."""
    largest = 0.0
    with torch.no_grad():
        for weight in model.parameters():
            assert weight.grad is not None
            largest = max(largest, float(weight.grad.abs().max()))
            weight -= RATE * weight.grad
            weight.grad = None
    return largest


def weights_of(model: DualEncoder, name: str) -> dict[str, Tensor]:
    """Whole weights, which ZeRO-3 holds in shards."""
    if name != "3":
        return {key: weight.detach() for key, weight in model.named_parameters()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {key: safe_get_full_fp32_param(weight) for key, weight in model.named_parameters()}


def run(tokenizer: str, name: str) -> None:
    """Take the steps; each begins with equal weights, and ends with equal ones and equal losses."""
    model = ready(tokenizer)
    single = copy.deepcopy(model)
    runner = runner_of(name, model)
    cases = [(loss, *step) for loss in LOSSES for step in STEPS]
    for number, (loss, same_label, chunk) in enumerate(cases):
        options: dict[str, Any] = {"loss": loss, "same_label": same_label}
        expected = summed(Contrastive(**options, gather=False), single, part(0, 4))
        expected.backward()
        largest = descend(single)

        sizes = SIZES[world_size()][number % 3]
        start = sum(sizes[: rank()])
        batch = part(start, start + sizes[rank()])
        found = summed(Contrastive(**options), runner, batch, chunk=chunk)
        # Gradients are averaged over the ranks; the loss is a sum over the pairs of all.
        if name == "ddp":
            (world_size() * found).backward()
            descend(model)
        else:
            runner.backward(world_size() * found)
            runner.step()

        case = f"{name}, {loss}, {same_label}, {sizes}, chunk {chunk}"
        total = found.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(
            total, expected, atol=1e-6, rtol=0, msg=lambda m, c=case: f"{c}: {m}"
        )
        weights = weights_of(model, name)
        for key, weight in single.named_parameters():
            torch.testing.assert_close(
                weights[key],
                weight,
                atol=1e-6 * max(1.0, largest),
                rtol=0,
                msg=lambda m, k=key, c=case: f"{c}: {k}: {m}",
            )
        single.load_state_dict(weights)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for runner_name in sys.argv[2:]:
        run(sys.argv[1], runner_name)
    dist.destroy_process_group()
