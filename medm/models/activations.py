"""Memory of the activations that a training step keeps for its backward pass.

Found by running the step without memory.

Each part runs forward on the meta device, and what autograd would save is added up: adapters,
frozen weights, gated layers and precisions count as they are. Counted are tensors, each storage
once, without the weights. Assumed: attention keeps queries, keys, values and its output (flash or
memory-efficient kernels, not the plain one); a layer that recomputes keeps its input, and one layer
at a time is recomputed; logits exist for 4096 labels at most, each in 16 bits, in float32 for the
loss, and as a gradient; a mask head draws one mask for each row. Not counted are kernels'
workspaces, fragmentation and CUDA itself (about 1 GiB), the work of frozen encoders, which keeps
nothing, and the loss of masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from medm.llms.lm_head import is_causal_lm
from medm.models.base import MedmModel
from medm.types import VisionBranch

if TYPE_CHECKING:
    from medm.llms.lm_head import CausalLM
    from medm.models.lvlm.grounding import MaskBranch

HEAD_LABELS = 4096
"""Labels whose logits exist at a time (`medm.models.lvlm.token_loss.HEAD_CHUNK`)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of one GPU."""

    rows: int
    """Samples (`per_device_train_batch_size`)."""
    length: int
    """Tokens of a row, vision tokens included."""
    labels: int
    """Labelled tokens of a row, at most."""
    items: dict[str, int]
    """Images or volumes by branch."""
    masks: int = 0
    """Images that a mask head reads, each with one mask."""


def activations(model: MedmModel, step: Step, *, half: bool) -> float:
    """Bytes that are kept between the forward and the backward pass, the loss included.

    Args:
        model: on the meta device, frozen and adapted; its precision is changed.
        step: what goes through it.
        half: compute in 16 bits.

    Raises:
        ValueError: the model has no language model, or a part decides by numbers that do not exist
            here.
    """
    language_model = model.parts().get("llm")
    if not is_causal_lm(language_model):
        raise ValueError("they are known for models with a language model alone")
    dtype = torch.bfloat16 if half else torch.float32
    nn.Module.to(model, dtype).train()
    total, begun = 0.0, False
    try:
        with _fused_attention():
            for name, branch in model.encoders().items():
                items = step.items.get(name, 0)
                layers = nn.ModuleList([branch.encoder, branch.connector])
                if items and any(parameter.requires_grad for parameter in layers.parameters()):
                    begun = True
                    total += _kept(layers, partial(_through_branch, branch, items, dtype))
            total += _kept(
                language_model, partial(_through_llm, language_model, step, dtype, begun)
            )
            masks = getattr(model, "masks", None)
            if masks is not None and step.masks:
                begun |= any(weight.requires_grad for weight in language_model.parameters())
                width = language_model.get_input_embeddings().embedding_dim
                total += _kept(
                    masks, partial(_through_masks, masks, step.masks, width, dtype, begun)
                )
    except (
        RuntimeError,
        NotImplementedError,
    ) as error:  # what torch raises for a number that a meta tensor lacks
        raise ValueError(str(error).partition("\n")[0]) from None
    head = language_model.get_output_embeddings()
    labels = min(step.rows * step.labels, HEAD_LABELS)
    return total + labels * head.weight.shape[0] * (10 if half else 8)


def _through_branch(branch: VisionBranch, items: int, dtype: torch.dtype) -> None:
    pixels = torch.empty(items, branch.channels, *branch.spatial, dtype=dtype, device="meta")
    branch.connector(branch.encode(pixels), torch.zeros(items, dtype=torch.int64, device="meta"))


def _through_llm(language_model: CausalLM, step: Step, dtype: torch.dtype, begun: bool) -> None:
    """Run the forward pass of the language model on the meta device.

    `begun`: a gradient has to reach what comes before, so a frozen language model keeps its
    activations too.
    """
    width = language_model.get_input_embeddings().embedding_dim
    embeds = torch.empty(
        step.rows, step.length, width, dtype=dtype, device="meta", requires_grad=begun
    )
    # A mask of four axes is taken as it is: to build one, transformers looks at numbers.
    mask = torch.zeros(step.rows, 1, 1, 1, dtype=dtype, device="meta")
    language_model.get_decoder()(inputs_embeds=embeds, attention_mask=mask, use_cache=False)


def _through_masks(
    masks: MaskBranch, count: int, width: int, dtype: torch.dtype, begun: bool
) -> None:
    """`begun`: the states that prompt the masks have a gradient."""
    states = torch.empty(count, width, dtype=dtype, device="meta", requires_grad=begun)
    pixels = torch.empty(count, masks.channels, *masks.spatial, dtype=dtype, device="meta")
    items = torch.arange(count)  # numbers: some heads group masks by them
    masks.head(pixels, masks.projection(states), items)


class _Attention(torch.autograd.Function):
    """Attention that keeps what the fused kernels keep, and computes nothing."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> None:
        raise NotImplementedError("nothing is computed")


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Replace attention by one that keeps what the fused kernels keep.

    On the meta device torch would take the plain attention, which keeps every weight of every
    head.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        return cast(Tensor, _Attention.apply(query, key, value))

    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def _kept(part: nn.Module, forward: Callable[[], None]) -> float:
    """Return the bytes that autograd saves in a forward pass of a part.

    Layers that recompute keep their inputs.
    """
    own = {_storage(tensor) for tensor in (*part.parameters(), *part.buffers())}
    saved: dict[int, tuple[int, int | None]] = {}
    """Bytes of each storage, and the recomputing layer that kept it."""
    alive: list[Tensor] = []
    inside: list[int] = []
    inputs: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            alive.append(tensor)  # else its place could be another storage's
            saved.setdefault(
                _storage(tensor),
                (tensor.untyped_storage().nbytes(), inside[-1] if inside else None),
            )
        return tensor

    def enter(layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        inside.append(id(layer))
        inputs.append(
            next(value.nbytes for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        )

    layers = [
        m
        for m in part.modules()
        if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(lambda *_: inside.pop() and None) for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.gradient_checkpointing = True
    by_layer: dict[int | None, int] = {None: 0}
    for size, kept_by in saved.values():
        by_layer[kept_by] = by_layer.get(kept_by, 0) + size
    outside = by_layer.pop(None)
    return outside + (max(by_layer.values()) + sum(inputs) if by_layer else 0)


def _storage(tensor: Tensor) -> int:
    """Equal for tensors that share memory; a meta tensor has no address of data."""
    return tensor.untyped_storage()._cdata
