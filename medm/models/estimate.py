"""Parameters, memory and tokens of a model before anything is downloaded or trained.

Runs on the meta device.

Needs published configs and tokenizers (kilobytes), never weights. How activations are counted:
`activations`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from medm.errors import CheckpointError
from medm.models import kind_of, preprocess_of
from medm.models.activations import Step, activations
from medm.models.base import MedmModel
from medm.models.options import ModelOptions

STAGES = ("zero0", "zero1", "zero2", "zero3")
"""What is spread over GPUs: nothing (also training without DeepSpeed); optimiser state; and
gradients; and weights (arXiv 1910.02054, section 5)."""

_OPTIMISER_BYTES = {"8bit": 2.0, "adamw": 8.0, "sgd": 0.0, "adafactor": 0.0, "lion": 4.0}
"""Bytes of state per trained parameter by what an optimiser's name holds; Adafactor's rows and
columns round to 0."""

_GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 141)
"""Memory of usual GPUs in GB, which makers count as GiB."""
_MOST_ROWS = 1024
"""Largest micro-batch that is looked for."""
_CUDA_BYTES = 1.5 * 2**30
"""For CUDA's context, the libraries' workspaces and unused parts of blocks."""

_4BIT_BYTES = 0.5 + 4 / 64
"""NF4: half a byte a weight and a float32 scale for each 64."""


@dataclass(frozen=True, slots=True)
class PartSize:
    """One part, or something inside it."""

    name: str
    parameters: int
    trainable: int
    frozen_bytes: float
    """Of the weights that are not trained, in the precision in which the model is loaded."""
    quantized_bytes: float
    """Of those among them that are held in 4 bits."""
    plain: int
    """Parameters that are neither trained nor held in 4 bits."""
    inner: tuple[PartSize, ...] = ()
    """Children of a connector that has several (pooling and MLP; router and experts)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each GPU."""

    stage: str
    weights: float
    gradients: float
    optimiser: float
    """Its state, and the float32 copy of trained weights where they are held in 16 bits."""
    activations: float = 0.0
    """What a step keeps for its backward pass, and under zero0 the 16-bit copies of float32 weights
    (autocast)."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimiser + self.activations

    def fits(self, size: float) -> bool:
        """Return whether a GPU of this many GB holds it beside CUDA's own memory."""
        return self.total + _CUDA_BYTES <= size * 2**30

    def fits_in(self) -> str:
        """The smallest usual GPU that holds it beside CUDA's own memory."""
        size = next((size for size in _GPUS if self.fits(size)), None)
        return f"more than {_GPUS[-1]} GB" if size is None else f"{size} GB"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Cost of a recipe."""

    parts: tuple[PartSize, ...]
    tokens: dict[str, int]
    """Per branch the tokens of one image or volume in the language model's sequence; the most of an
    image that is cut into tiles."""
    memory: tuple[Memory, ...]
    gpus: int
    step: Step | None = None
    """What the activations are of; None where they are not known."""
    unknown: str = ""
    """Why they are not known."""
    items: dict[str, int] = field(default_factory=dict)
    """Per branch the most items of one image or volume: its tiles and the thumbnail, or 1."""
    micro_batches: dict[str, int] = field(default_factory=dict)
    """By ZeRO stage the most rows of a forward pass that fit the GPU that was asked about, 0 where
    one does not; empty where no GPU was."""

    @property
    def parameters(self) -> int:
        """Of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def trainable(self) -> int:
        """Of all parts."""
        return sum(part.trainable for part in self.parts)


def estimate(
    options: ModelOptions,
    *,
    choose: Callable[[MedmModel], object],
    half: bool = False,
    optimiser: str = "adamw_torch",
    gpus: int = 1,
    quantized: Collection[str] = (),
    init_from: str | None = None,
    rows: int = 1,
    length: int | None = None,
    gpu_memory: float | None = None,
) -> Estimate:
    """Sizes of the model that a recipe's `model` section describes.

    Args:
        options: the section.
        choose: freezes, adapts and sets free the parts, in place
            (`medm.training.parts.apply_parts`).
        half: compute in 16 bits (`train.bf16` or `train.fp16`).
        optimiser: by its transformers name.
        gpus: processes that share the state.
        quantized: parts whose linear layers are held in 4 bits.
        init_from: model folder whose config is used in place of the published ones.
        rows: samples of a forward pass on one GPU, each with one image or volume of every branch,
            which has the most tiles that it can have, and one mask for a mask head.
        length: tokens of each, vision tokens included; without it no activations are counted.
        gpu_memory: GB of a GPU, for which the largest micro-batch is searched.

    Raises:
        CheckpointError: a published config or tokenizer is neither in a local folder nor in the
            cache nor on the hub.
        RecipeError: parts that do not fit each other, or a kind of model that cannot be built
            without weights.
    """
    model = skeleton(options, init_from=init_from)
    held = {id(p): p.element_size() for p in model.parameters()}
    choose(model)
    branches = model.encoders()
    connectors = [branch.connector for branch in branches.values()]
    parts = tuple(
        part_size(name, part, held=held, in_4bit=name in quantized, with_inner=part in connectors)
        for name, part in model.parts().items()
    )
    saved = init_from
    if saved is not None and not (Path(saved) / "processor_config.json").is_file():
        saved = None  # not trained yet: as the recipe describes it
    preprocess = preprocess_of(options, init_from=saved)
    items = {
        name: preprocess[name].max_items if name in preprocess else 1  # a kind's own encoders
        for name in branches
    }
    tokens = {name: branch.num_tokens * items[name] for name, branch in branches.items()}
    states = [memory(parts, stage, half=half, optimiser=optimiser, gpus=gpus) for stage in STAGES]
    copies = cast_copies(parts) if half else 0.0
    step, unknown = None, "no length is given"

    def step_of(rows: int, length: int) -> Step:
        learned = max(length - sum(tokens.values()), 1)
        seen = {name: rows * count for name, count in items.items()}
        return Step(rows, length, learned, seen, masks=rows)

    def with_activations(step: Step) -> list[Memory]:
        kept = activations(model, step, half=half)
        return [
            replace(one, activations=kept + (copies if one.stage == "zero0" else 0.0))
            for one in states
        ]

    largest: dict[str, int] = {}
    if length is not None:
        step = step_of(rows, length)
        try:
            counted = with_activations(step)
        except ValueError as error:
            step, unknown = None, str(error)
        else:
            if gpu_memory is not None:
                measured = cache(lambda count: with_activations(step_of(count, length)))

                def fits(size: float, place: int, count: int) -> bool:
                    return measured(count)[place].fits(size)

                for place, stage in enumerate(STAGES):
                    holds = partial(fits, gpu_memory, place)
                    largest[stage] = largest_count(holds, _MOST_ROWS)
            states = counted
    return Estimate(
        parts=parts,
        tokens=tokens,
        memory=tuple(states),
        gpus=gpus,
        step=step,
        unknown="" if step else unknown,
        items=items,
        micro_batches=largest,
    )


def largest_count(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest count up to `most` that fits, 0 for none; more never fits where less does
    not.
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def skeleton(options: ModelOptions, *, init_from: str | None = None) -> MedmModel:
    """The model without memory behind its weights."""
    if init_from is not None and (Path(init_from) / "config.json").is_file():
        config = AutoConfig.from_pretrained(init_from, trust_remote_code=False)
        config.adapters, config.new_rows = {}, {}  # training folds them in
        if control_tokens := getattr(options, "reply_tokens", None):
            # Any ids: their number counts.
            config.control_tokens = dict.fromkeys(control_tokens, 0) | config.control_tokens
        with torch.device("meta"):
            return AutoModel.from_config(config)
    try:
        return kind_of(options).skeleton(options)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n  an estimate needs the published config and tokenizer, not the weights; "
            "connect once, or give a local folder that holds config.json and the tokenizer files"
        ) from None


def part_size(
    name: str,
    part: nn.Module,
    *,
    held: dict[int, int],
    in_4bit: bool = False,
    with_inner: bool = False,
) -> PartSize:
    """Parameters of a part; a tensor that two layers share counts once.

    Args:
        name: of the part.
        part: frozen, adapted and set free.
        held: bytes of an element of each tensor as it was loaded, by the tensor's identity.
        in_4bit: its frozen linear layers are.
        with_inner: list its children, too, where it has several.
    """
    head = (
        part.get_output_embeddings() if isinstance(part, PreTrainedModel) else None
    )  # stays as it is
    layers = [
        layer for layer in part.modules() if isinstance(layer, nn.Linear) and layer is not head
    ]
    linear = {id(layer.weight) for layer in layers} if in_4bit else set()
    total = trainable = plain = 0
    frozen = quantized = 0.0
    for parameter in part.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
        elif id(parameter) in linear:
            quantized += parameter.numel() * _4BIT_BYTES
        else:
            plain += parameter.numel()
            frozen += parameter.numel() * held.get(id(parameter), parameter.element_size())
    inner: tuple[PartSize, ...] = ()
    if with_inner:
        children = [part_size(child, module, held=held) for child, module in part.named_children()]
        children = [child for child in children if child.parameters]
        inner = tuple(children) if len(children) > 1 else ()
    return PartSize(name, total, trainable, frozen + quantized, quantized, plain, inner)


def cast_copies(parts: Collection[PartSize]) -> float:
    """Return the bytes of the 16-bit copies that autocast makes of float32 weights.

    It keeps them for the backward pass.
    """
    total = 0.0
    for part in parts:
        in_float32 = part.frozen_bytes - part.quantized_bytes >= 4 * part.plain
        total += 2 * (part.trainable + (part.plain if in_float32 else 0))
    return total


def memory(
    parts: Collection[PartSize], stage: str, *, half: bool, optimiser: str, gpus: int
) -> Memory:
    """Bytes on each GPU, for each trained parameter T and frozen parameter F.

    zero0 holds T in float32 whatever is computed in, and F as it was loaded: 4 + 4 bytes and the
    optimiser's state. DeepSpeed in 16 bits casts every weight: 2 for F, 2 + 2 for T and a float32
    copy beside the optimiser's state. DeepSpeed in 32 bits makes that copy too: 4 + 4 + 4 and the
    state.
    """
    level, deepspeed = STAGES.index(stage), stage != "zero0"
    trainable = sum(part.trainable for part in parts)
    frozen = sum(part.frozen_bytes for part in parts)
    if half and deepspeed:
        frozen = sum(part.quantized_bytes + 2 * part.plain for part in parts)
    width = 2 if half and deepspeed else 4
    state = next((size for word, size in _OPTIMISER_BYTES.items() if word in optimiser), 8.0)
    return Memory(
        stage=stage,
        weights=(frozen + trainable * width) / (gpus if level >= 3 else 1),
        gradients=trainable * width / (gpus if level >= 2 else 1),
        optimiser=trainable * (state + (4 if deepspeed else 0)) / (gpus if level >= 1 else 1),
    )
