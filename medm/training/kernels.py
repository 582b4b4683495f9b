"""Faster layers for a model that is built: compiled ones, and liger's Triton kernels on a GPU.

Both change layers in place. Names of weights, and so checkpoints, do not change.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from medm.errors import DeviceError, RecipeError
from medm.llms.attention import in_one_kernel
from medm.llms.lm_head import is_causal_lm
from medm.models.base import MedmModel
from medm.training.options import TrainOptions

if TYPE_CHECKING:
    from medm.llms.lm_head import CausalLM


def compile_layers(
    model: nn.Module, *, deepspeed: str | None = None, backend: str = "inductor"
) -> int:
    """Compile each repeated layer of transformers' encoders and decoders. Return their number.

    A layer is the largest module without data-dependent control flow: the code around it
    (scattering vision tokens, choosing labeled positions) depends on the values of a batch. Layers
    of one kind share compiled code.

    Args:
        model: not yet wrapped.
        deepspeed: the recipe's key.
        backend: of `torch.compile`.

    Raises:
        RecipeError: no layer can be compiled, or ZeRO-3 fetches weights inside each of them.
    """
    if deepspeed is not None and "zero3" in deepspeed:
        raise RecipeError(
            "train.torch_compile: cannot be combined with ZeRO-3, which fetches weights by layer; "
            "use zero2"
        )
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise RecipeError(
            "train.torch_compile: this model has no repeated layers of transformers; leave the "
            "key out"
        )
    for layer in layers:
        layer.compile(backend=backend)
    return len(layers)


def generating_part(model: MedmModel) -> CausalLM | None:
    """Return the part of a model that is a causal language model, or None."""
    return next((part for part in model.parts().values() if is_causal_lm(part)), None)


def apply_kernels(model: MedmModel, options: TrainOptions) -> None:
    """Use liger's kernels, and compile layers, as the options of the run say."""
    if options.liger:
        use_liger(generating_part(model))
    if options.torch_compile:
        compile_layers(model, deepspeed=options.deepspeed)


def any_lengths(model: MedmModel, options: TrainOptions, device: torch.device) -> bool:
    """Return whether padding-free rows may have any lengths.

    Compiled layers need one kernel for all sequences.
    """
    if not options.torch_compile:
        return True
    dtype = torch.bfloat16 if options.bf16 else torch.float16 if options.fp16 else torch.float32
    part = generating_part(model)
    return part is not None and in_one_kernel(part, device=device, dtype=dtype)


def use_liger(language_model: nn.Module | None) -> None:
    """Replace norms, rotary embeddings and gated layers by liger's (arXiv 2410.10989), in place.

    Its fused cross-entropy is not used: the head runs at labeled positions only.

    Args:
        language_model: a causal language model of transformers; None if the model has none.

    Raises:
        DeviceError: liger-kernel is not installed, or there is no GPU.
        RecipeError: there is no language model, or liger has no kernels for its family.
    """
    if language_model is None:
        raise RecipeError(
            "train.liger: there is no language model to use its kernels in; leave the key out"
        )
    require_liger()
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    family = (
        language_model.config.model_type
        if is_causal_lm(language_model)
        else type(language_model).__name__
    )
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise RecipeError(f"train.liger: has no kernels for {family!r}; leave the key out")
    _apply_liger_kernel_to_instance(
        language_model, fused_linear_cross_entropy=False, cross_entropy=False
    )


def require_liger() -> None:
    """Raise `DeviceError` if liger-kernel is not installed, or there is no GPU."""
    if find_spec("liger_kernel") is None:
        raise DeviceError(
            "train.liger: liger-kernel is not installed; pip install 'medm[liger]', or leave the "
            "key out"
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            "train.liger: its kernels need a CUDA device, found none; leave the key out"
        )
