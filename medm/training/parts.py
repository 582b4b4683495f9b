"""Freezing, adapters and learning rates, part by part. No other module does it.

Loading never freezes and freezing never loads. Knows no modality: a model gives its parts by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypedDict, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from medm.errors import RecipeError, UnknownNameError
from medm.models.adapters import adapted, merge
from medm.models.token_rows import token_rows, vocabulary
from medm.training.options import PartOptions, TrainOptions
from medm.training.quantize import to_4bit
from medm.types import JsonObject

logger = logging.getLogger(__name__)

ADAPTER_PARAMETER = "lora_"
"""Part of the names of peft's trainable parameters (`lora_A`, `lora_B`, `lora_magnitude_vector`
...)."""


class HasAdapters(Protocol):
    """Config of a model with adapters."""

    adapters: dict[str, JsonObject]
    """Fields of `peft.LoraConfig` by part."""


class HasParts(Protocol):
    """The methods of a model that the trainer calls, beside those of `nn.Module`."""

    @property
    def config(self) -> HasAdapters:
        """The model's config."""
        ...

    def parts(self) -> dict[str, nn.Module]:
        """Part name -> module. Every parameter of the model lies in a part."""
        ...

    def add_adapter_to_part(self, part: str, spec: Mapping[str, object]) -> None:
        """Put LoRA layers into a part and note them in the config."""
        ...

    def add_new_rows(self, part: str) -> None:
        """Store the rows of a part's new tokens separately and note it in the config."""
        ...

    def merge_new_rows(self, part: str) -> None:
        """Write the rows of a part's new tokens into its vocabulary."""
        ...


class ParameterGroup(TypedDict):
    """Group of an optimizer."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    name: str


@dataclass(frozen=True, slots=True)
class PartRow:
    """Training of one part, as a row of `PartTable`."""

    name: str
    tune: str
    parameters: int
    trainable: int
    lr: float | None


@dataclass(frozen=True, slots=True)
class PartTable:
    """Table of the parts and their trained parameters; prints as an aligned table."""

    rows: tuple[PartRow, ...]

    @property
    def trainable(self) -> int:
        """Trainable parameters of all parts."""
        return sum(row.trainable for row in self.rows)

    @property
    def parameters(self) -> int:
        """Parameters of all parts."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        head = ("part", "tune", "parameters", "trainable", "lr")
        body = [
            (
                row.name,
                row.tune,
                f"{row.parameters:,}",
                f"{row.trainable:,}",
                "-" if row.lr is None else f"{row.lr:g}",
            )
            for row in self.rows
        ]
        fraction = 100 * self.trainable / max(self.parameters, 1)
        body.append(("all", f"{fraction:.2f} %", f"{self.parameters:,}", f"{self.trainable:,}", ""))
        widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [head, *body]
        )


def apply_parts(
    model: nn.Module,
    parts: Mapping[str, PartOptions],
    train: TrainOptions,
    *,
    keep_float32: bool = True,
) -> PartTable:
    """Freeze, adapt and unfreeze the parts of a model, in place.

    Args:
        model: has `parts()`; for LoRA also `add_adapter_to_part` and a `config.adapters`.
        parts: part name -> how it is trained; a part that is not named is frozen.
        train: default learning rate and checkpointing.
        keep_float32: hold trained weights in float32 whatever the model was loaded in. False where
            the engine keeps a float32 copy itself (DeepSpeed).

    Raises:
        UnknownNameError: a name that is no part of this model.
        RecipeError: options that this model cannot follow.
    """
    modules = cast(HasParts, model).parts()
    for name in parts:
        if name not in modules:
            raise UnknownNameError("part", name, modules)
    _check_covered(model, modules)
    model.requires_grad_(False)
    for name, module in modules.items():
        options = parts.get(name, PartOptions(tune="frozen"))
        _apply(cast(HasParts, model), name, module, options)
        if options.gradient_checkpointing or (
            options.gradient_checkpointing is None and train.gradient_checkpointing
        ):
            _checkpoint_activations(module, asked=bool(options.gradient_checkpointing), name=name)
    _check_shared(modules, parts)
    if keep_float32:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
    return _table(modules, parts, train)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the parts of which nothing is trained.

    They stay in eval mode: a frozen batch norm must not move either.
    """
    parts = cast(HasParts, model).parts().values()
    return [
        part
        for part in parts
        if not any(parameter.requires_grad for parameter in part.parameters())
    ]


def parameter_groups(
    model: nn.Module, parts: Mapping[str, PartOptions], train: TrainOptions
) -> list[ParameterGroup]:
    """Return the optimizer groups of each part.

    Matrices have weight decay; norms, biases and new tokens have none. A tensor that two parts
    share counts for the first.
    """
    groups: list[ParameterGroup] = []
    seen: set[int] = set()
    for name, module in cast(HasParts, model).parts().items():
        options = parts.get(name)
        trained = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for p in trained}
        if options is None or not trained:
            continue
        decay = train.weight_decay if options.weight_decay is None else options.weight_decay
        new = {id(p) for rows in token_rows(module) for p in rows.parameters()}
        others = [p for p in trained if id(p) not in new]
        for label, lr, weight_decay, members in (
            ("matrices", options.lr, decay, [p for p in others if _rank(p) >= 2]),
            ("vectors", options.lr, 0.0, [p for p in others if _rank(p) < 2]),
            ("new_tokens", _new_token_lr(options), 0.0, [p for p in trained if id(p) in new]),
        ):
            if members:
                groups.append(
                    {
                        "params": members,
                        "lr": lr or train.learning_rate,
                        "weight_decay": weight_decay,
                        "name": f"{name}.{label}",
                    }
                )
    return groups


def _new_token_lr(options: PartOptions) -> float | None:
    return (options.new_tokens and options.new_tokens.lr) or options.lr


def _apply(model: HasParts, name: str, module: nn.Module, options: PartOptions) -> None:
    if token_rows(module):  # of an earlier stage
        model.merge_new_rows(name)
    if adapted(module) and options.adapter == "merge":
        merge(module)
        config = model.config
        config.adapters = {part: spec for part, spec in config.adapters.items() if part != name}
    if options.tune == "full":
        if adapted(module):
            raise RecipeError(
                f"parts.{name}: tune: full, but the weights to start from hold a LoRA adapter for "
                "this part; merge it first (adapter: merge) or train it further (tune: lora)"
            )
        module.requires_grad_(True)
    elif options.tune == "lora":
        _adapt(model, name, module, options)
        for parameter_name, parameter in module.named_parameters():
            parameter.requires_grad_(ADAPTER_PARAMETER in parameter_name)
    if options.new_tokens is not None:
        model.add_new_rows(name)
        for layer in vocabulary(module):
            layer.requires_grad_(False)
        for rows in token_rows(module):
            rows.requires_grad_(True)


def _adapt(model: HasParts, name: str, module: nn.Module, options: PartOptions) -> None:
    spec = options.lora()
    if adapted(module):
        present = dict(model.config.adapters[name])
        changed = [
            f"{key} is {present[key]!r}, the recipe says {value!r}"
            for key, value in spec.items()
            if key != "lora_dropout"
            and key in present
            and value is not None
            and present[key] != value
        ]
        if changed:
            raise RecipeError(
                f"parts.{name}: the weights to start from hold another adapter "
                f"({'; '.join(changed)}); train the same one further, or merge it first (adapter: "
                "merge)"
            )
        if options.quantize == "4bit":
            raise RecipeError(
                f"parts.{name}.quantize: 4bit works with new adapters only; merge this one first "
                "(adapter: merge)"
            )
        return
    if options.quantize == "4bit":
        to_4bit(module, name=name)
    if spec["target_modules"] is None:
        spec["target_modules"] = linear_layers(module)
        if not spec["target_modules"]:
            raise RecipeError(
                f"parts.{name}: tune: lora, but the part has no linear layer; use tune: full"
            )
    model.add_adapter_to_part(name, spec)


def linear_layers(module: nn.Module) -> list[str]:
    """Return the names of every linear layer of a part except its output head."""
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    ]


def _checkpoint_activations(module: nn.Module, *, asked: bool, name: str) -> None:
    """Enable activation checkpointing in a part.

    It covers every transformers model inside the part, and medm's own blocks.
    """
    able = [
        m
        for m in module.modules()
        if isinstance(m, PreTrainedModel) and m.supports_gradient_checkpointing
    ]
    for inner in able:
        # The first name is that of releases from 2026 on.
        enable = (
            getattr(inner, "activation_checkpointing_enable", None)
            or inner.gradient_checkpointing_enable
        )
        enable()
    blocks: list[Any] = [
        m
        for m in module.modules()
        if isinstance(m, GradientCheckpointingLayer) and not m.gradient_checkpointing
    ]
    for block in blocks:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    if asked and not able and not blocks:
        raise RecipeError(
            f"parts.{name}: gradient_checkpointing: this part has no layers that support it; "
            "leave it out"
        )


def _check_covered(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    known = {id(parameter) for module in modules.values() for parameter in module.parameters()}
    lost = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if lost:
        raise ValueError(
            f"{type(model).__name__}.parts() leaves out {len(lost)} parameters "
            f"({', '.join(lost[:3])} ...): every parameter belongs to a part, found parts "
            f"{sorted(modules)}"
        )


def _check_shared(modules: Mapping[str, nn.Module], parts: Mapping[str, PartOptions]) -> None:
    """Raise `RecipeError` for a tensor that is trained in one part and frozen in another."""
    owner: dict[int, str] = {}
    for name, module in modules.items():
        tune = parts[name].tune if name in parts else "frozen"
        for parameter in module.parameters():
            first = owner.setdefault(id(parameter), name)
            other = parts[first].tune if first in parts else "frozen"
            if first != name and "full" in (tune, other) and tune != other:
                raise RecipeError(
                    f"parts.{name}: shares weights with {first} ({other}), so both need the same "
                    "tune"
                )


def _table(
    modules: Mapping[str, nn.Module], parts: Mapping[str, PartOptions], train: TrainOptions
) -> PartTable:
    rows = []
    seen: set[int] = set()
    for name, module in modules.items():
        own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        options = parts.get(name)
        trainable = sum(_numel(parameter) for parameter in own if parameter.requires_grad)
        rows.append(
            PartRow(
                name=name,
                tune=_tune_of(options),
                parameters=sum(_numel(parameter) for parameter in own),
                trainable=trainable,
                lr=_lr_of(options, train) if options and trainable else None,
            )
        )
    return PartTable(tuple(rows))


def _tune_of(options: PartOptions | None) -> str:
    if options is None:
        return "frozen"
    return options.tune if options.new_tokens is None else f"{options.tune}, new tokens"


def _lr_of(options: PartOptions, train: TrainOptions) -> float:
    alone = options.tune == "frozen"  # new tokens are all that is trained
    return (_new_token_lr(options) if alone else options.lr) or train.learning_rate


def _rank(parameter: nn.Parameter) -> int:
    # A parameter that ZeRO-3 has partitioned looks empty; DeepSpeed keeps its shape in
    # `ds_shape`.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _numel(parameter: nn.Parameter) -> int:
    if (packed := getattr(parameter, "quant_state", None)) is not None:  # two weights per byte
        return int(packed.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))
