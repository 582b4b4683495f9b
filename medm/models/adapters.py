"""LoRA layers inside a part of a model, through peft.

A spec is a mapping of `peft.LoraConfig` fields and lives in the checkpoint's config. The layers are
part of the model from its construction on, so a checkpoint holds base and adapter in one set of
named tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from medm.errors import CheckpointError, RecipeError

ADAPTER = "default"
"""Name of the adapter in peft's module names (`lora_A.default.weight`)."""


def inject(part: nn.Module, spec: Mapping[str, object]) -> None:
    """Put LoRA layers into a part, in place.

    B starts at zero, so the part computes what it did before. Layers whose weights are buffers (the
    memory of SAM 2) are never trained, and get none.

    Raises:
        RecipeError: `target_modules` names nothing in this part, or the part is adapted already.
    """
    if adapted(part):
        raise RecipeError("this part has LoRA layers already; merge them first")
    fields: dict[str, Any] = dict(spec)
    if constant := _constant_layers(part):
        fields["exclude_modules"] = constant
    try:
        inject_adapter_in_model(LoraConfig(**fields), part, adapter_name=ADAPTER)
    except ValueError as error:
        raise RecipeError(f"LoRA cannot be put into {type(part).__name__}: {error}") from None


def _constant_layers(part: nn.Module) -> list[str]:
    """Return the names of layers whose weights are buffers."""
    return [
        name
        for name, module in part.named_modules()
        if "weight" in dict(module.named_buffers(recurse=False))
    ]


def check_unshared(model: nn.Module) -> None:
    """Refuse adapters in layers whose weights another layer uses, too.

    An example is a head tied to the embeddings.

    The other layer would run without the adapter, and merging would change it.

    Raises:
        RecipeError: with the names of both layers.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for layer, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for parameter in module.get_base_layer().parameters():
            users = [
                name.rpartition(".")[0].removesuffix(".base_layer")
                for name in owners[id(parameter)]
            ]
            others = sorted(set(users) - {layer})
            if others:
                raise RecipeError(
                    f"LoRA in {layer}: {', '.join(others)} uses the same weight, so that the "
                    "adapter would be missing there and merging it would change both; leave this "
                    "layer out of targets"
                )


def adapted(part: nn.Module) -> bool:
    """Return whether any layer of the part is adapted."""
    return any(isinstance(module, BaseTunerLayer) for module in part.modules())


def merge(part: nn.Module) -> None:
    """Fold the adapter into the weights it adapts and restore plain layers, in place.

    Raises:
        CheckpointError: the merged weights would not be finite.
    """
    layers = [
        (name, module)
        for name, module in part.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    for name, layer in layers:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise CheckpointError(f"the adapter in {name} cannot be merged: {error}") from None
        parent, _, child = name.rpartition(".")
        setattr(part.get_submodule(parent), child, layer.get_base_layer())
    # peft leaves its own record on the module, which would make it look adapted still.
    if hasattr(part, "peft_config"):
        del part.peft_config
