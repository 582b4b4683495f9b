"""Ranks of which some have masks and others none take the steps of one process with all of them.

python -m tests.models.grounding_ranks LLM RUNNER..., by `tests.launch`. A runner is `ddp` or a
stage of ZeRO. DDP and ZeRO-3 train every registered mask head; ZeRO-2, in which every rank holds
all weights, trains one.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medm.config import validate
from medm.distributed import end_rank, leave_group, rank, world_size
from medm.heads import HEADS
from medm.models import build
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import LVLMOptions
from medm.objectives import TermsOptions
from medm.objectives.terms import Terms, terms_of
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from tests import tiny
from tests.heads.tiny import TINY_HEADS, registered_name

RATE = 0.05
COUNTS = ((3, 1, 0, 0), (0, 0, 0, 1), (0, 3, 1, 0))
"""Masks of each row of the whole batch by step; the first rank has the first two rows."""
FROZEN = {"sam2", "dot-product/siglip"}
"""Heads whose encoder is not trained."""
VARIANTS = {"dot-product": "dot-product/siglip"}
"""Variants that ZeRO-3 trains in place of the head."""
OBJECTIVE = {
    "terms": {
        "language": {"objective": {"name": "language-modeling"}, "weight": 0.5},
        "masks": {"objective": {"name": "segmentation", "points": 40, "presence": 0.5}},
    }
}


def section(llm: str, name: str) -> dict[str, Any]:
    """The `model` section with a tiny head; the language model sees an image in any case."""
    head = TINY_HEADS[name]
    view = "image" if len(head.pixels) == 3 else "volume"
    masks = {
        "view": view,
        "head": {"name": registered_name(name), **head.block},
        "preprocess": {"size": list(head.pixels[1:])},
    }
    given = tiny.lvlm_section(Path(llm))
    given["branches"]["image"]["encoder"]["architecture"]["num_hidden_layers"] = 1
    return {"kind": "lvlm", **given, "masks": masks}


def ready(llm: str, name: str) -> LVLMForConditionalGeneration:
    """A model in training: LoRA and new rows in the language model, and all of the head."""
    torch.manual_seed(0)
    model, _ = build(validate(LVLMOptions, section(llm, name), source="test"))
    assert isinstance(model, LVLMForConditionalGeneration)
    lora = {"tune": "lora", "r": 4, "dropout": 0.0, "new_tokens": {}}
    tuned = ["image.connector", "masks.decoder", "masks.projection"]
    parts = {part: PartOptions(tune="full") for part in tuned}
    parts["llm"] = PartOptions.model_validate(lora)
    if name not in FROZEN:
        parts["masks.encoder"] = PartOptions(tune="full")
    apply_parts(model, parts, TrainOptions())
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(model: LVLMForConditionalGeneration, step: int, rows: range) -> dict[str, Any]:
    """Some rows of the whole batch of a step; without masks there is no field of them."""
    assert model.masks is not None
    branch, counts = model.branch("image"), [COUNTS[step][row] for row in rows]
    ids = torch.full((len(rows), branch.num_tokens + 9), 7)
    labels = torch.full_like(ids, -100)
    pixels, targets, inputs = [], [], []
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        generator = torch.Generator().manual_seed(10 * step + row)
        ids[number] = torch.randint(20, 200, (ids.shape[1],), generator=generator)
        ids[number, : branch.num_tokens] = branch.placeholder_id
        marks = branch.num_tokens + 2 * torch.arange(count) + 2
        ids[number, marks] = model.masks.token_id
        labels[number, branch.num_tokens + 1 + row :] = ids[number, branch.num_tokens + 1 + row :]
        pixels.append(torch.randn(branch.channels, *branch.spatial, generator=generator))
        if count:
            shape = (model.masks.channels, *model.masks.spatial)
            inputs.append(torch.randn(shape, generator=generator))
            targets.append(torch.rand(count, *model.masks.grid, generator=generator) < 0.3)
    found: dict[str, Any] = {"input_ids": ids, "labels": labels}
    found["pixels"] = {"image": torch.stack(pixels)}
    if inputs:
        found["pixels"][model.masks.view] = torch.stack(inputs)
        found["mask_targets"] = torch.cat(targets).to(torch.uint8)
        found["mask_tokens"] = torch.arange(sum(counts))
        with_masks = [count for count in counts if count]
        found["mask_items"] = torch.arange(len(with_masks)).repeat_interleave(
            torch.tensor(with_masks)
        )
    return found


def losses(terms: Terms, model: nn.Module, given: dict[str, Any], counts: Tensor, step: int) -> Any:
    """The losses of a batch; rank 1 draws the points that one process draws for its masks."""
    torch.manual_seed(step)
    if rank() and len(given["input_ids"]) < len(COUNTS[step]):
        torch.randint(2**62, (sum(COUNTS[step][:2]),))
    return terms(model, given, counts)


def runner_of(name: str, model: nn.Module) -> Any:
    """The model under DDP or DeepSpeed."""
    if name == "ddp":
        return DistributedDataParallel(model)
    import deepspeed

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": int(name), "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )[0]


def descend(model: nn.Module) -> None:
    """Take a step of plain SGD. Every trained weight has a gradient."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                assert weight.grad is not None, name
                weight -= RATE * weight.grad
                weight.grad = None


def weights_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Whole trained weights, which ZeRO-3 holds in shards."""
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    if name != "3":
        return trained
    from deepspeed.utils import safe_get_full_fp32_param

    return {key: safe_get_full_fp32_param(weight) for key, weight in trained.items()}


def run(llm: str, name: str, head: str) -> None:
    """Take the steps; losses and weights of each are those of one process with the whole batch."""
    model = ready(llm, head)
    terms = terms_of(validate(TermsOptions, OBJECTIVE, source="test"))
    single = copy.deepcopy(model)
    batches = [
        [batch(single, step, rows) for rows in (range(4), range(2), range(2, 4))]
        for step in range(len(COUNTS))
    ]
    start = {key: weight.detach().clone() for key, weight in weights_of(single, "ddp").items()}
    runner = runner_of(name, model)
    for step, (whole, *parts) in enumerate(batches):
        counts = terms.counts(whole).clamp(min=1)
        expected = losses(terms, single, whole, counts, step)
        expected.total.backward()
        descend(single)

        found = losses(terms, runner, parts[rank()], counts, step)
        # Gradients are averaged over the ranks; the loss is a sum over the items of all.
        if name == "ddp":
            (world_size() * found.total).backward()
            descend(model)
        else:
            runner.backward(world_size() * found.total)
            runner.step()

        case = f"{name}, {head}, step {step}"
        total = found.by_objective.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(
            total, expected.by_objective, atol=2e-5, rtol=1e-4, msg=lambda m, c=case: f"{c}: {m}"
        )
        assert bool(total[1]) == bool(sum(COUNTS[step])), case
        weights = weights_of(model, name)
        for key, weight in weights_of(single, "ddp").items():
            torch.testing.assert_close(
                weights[key],
                weight,
                atol=2e-5,
                rtol=1e-3,
                msg=lambda m, c=f"{case}: {key}": f"{c}: {m}",
            )
    for part in ("masks.head", "masks.projection", "language_model"):
        assert any(
            not torch.equal(weights[key], start[key]) for key in start if key.startswith(part)
        ), part


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for runner_name in sys.argv[2:]:
        for head_name in HEADS.names():
            if runner_name == "3":
                run(sys.argv[1], runner_name, VARIANTS.get(head_name, head_name))
            elif runner_name == "ddp" or head_name == "sam2":
                run(sys.argv[1], runner_name, head_name)
    leave_group()
    end_rank(0)
