"""Memory of SAM 2: the modules that carry a mask from frame to frame, those of transformers.

`Sam2Memory` (`medm.heads.sam2_memory`) runs them over the slices of a volume.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Sam2VideoConfig, Sam2VisionConfig
from transformers.models.sam2_video.modeling_sam2_video import (
    Sam2VideoFeedForward,
    Sam2VideoMemoryAttention,
    Sam2VideoMemoryEncoder,
    Sam2VideoPositionEmbeddingSine,
)

from medm.errors import RecipeError
from medm.heads.base import MaskLogits

MEMORY_FIELDS = (
    "num_maskmem",
    "sigmoid_scale_for_mem_enc",
    "sigmoid_bias_for_mem_enc",
    "enable_occlusion_spatial_embedding",
    "max_object_pointers_in_encoder",
    "enable_temporal_pos_encoding_for_object_pointers",
    "memory_attention_hidden_size",
    "memory_attention_num_layers",
    "memory_attention_num_attention_heads",
    "memory_attention_downsample_rate",
    "memory_attention_feed_forward_hidden_size",
    "memory_attention_feed_forward_hidden_act",
    "memory_encoder_hidden_size",
    "memory_encoder_output_channels",
    "rope_parameters",
    "mask_downsampler_embed_dim",
    "mask_downsampler_kernel_size",
    "mask_downsampler_stride",
    "mask_downsampler_padding",
    "mask_downsampler_total_stride",
    "mask_downsampler_hidden_act",
    "memory_fuser_num_layers",
    "memory_fuser_embed_dim",
    "memory_fuser_intermediate_dim",
    "memory_fuser_kernel_size",
    "memory_fuser_padding",
    "memory_fuser_hidden_act",
)
"""Fields of `Sam2VideoConfig` that an architecture may set."""

_WIDTH = 64
"""Width of a memory, which transformers writes into its attention."""


class Decoded(NamedTuple):
    """Masks of M prompts, and what the memory keeps of them."""

    masks: MaskLogits
    token: Tensor
    """(M, D), output token of the mask, from which its object pointer is made."""


class SliceMemory(NamedTuple):
    """What is kept of a slice and its mask."""

    features: Tensor
    """(cells, 1, width)."""
    positions: Tensor
    """(cells, 1, width)."""
    pointer: Tensor
    """(1, dim), the object pointer."""


class Sam2MemoryModules(nn.Module):
    """Memory attention, memory encoder and object pointers of SAM 2.

    The memory is for inference alone: in training every slice is an image of its own. Its weights
    are buffers, so that no optimizer moves them and distributed training waits for no gradient of
    theirs.

    Args:
        vision: config of the head's encoder.
        architecture: fields of `Sam2VideoConfig` (`MEMORY_FIELDS`).
        era: 2.0 has neither positions in time for the object pointers nor an embedding of
            occlusion.

    Raises:
        RecipeError: a width of the memory that transformers does not have.
    """

    def __init__(
        self, vision: Sam2VisionConfig, architecture: Mapping[str, Any], era: Literal["2.0", "2.1"]
    ) -> None:
        super().__init__()
        fields = {key: architecture[key] for key in MEMORY_FIELDS if key in architecture}
        config = Sam2VideoConfig(vision_config=vision.to_dict(), **fields)
        config._attn_implementation = "sdpa"
        dim, self.width = vision.fpn_hidden_size, config.memory_encoder_output_channels
        if self.width != _WIDTH or dim % _WIDTH:
            raise RecipeError(
                f"head sam2, memory: expected memory_encoder_output_channels {_WIDTH} and a width "
                f"of the maps that is a multiple of it, found {self.width} and {dim}; set memory: "
                "false"
            )
        self.config, self.dim = config, dim
        self.memory_attention = Sam2VideoMemoryAttention(config)
        self.memory_encoder = Sam2VideoMemoryEncoder(config)
        self.mask_downsample = nn.Conv2d(1, 1, kernel_size=4, stride=4)
        self.object_pointer_proj = Sam2VideoFeedForward(dim, dim, dim, 3)
        self.temporal_positional_encoding_projection_layer = (
            nn.Linear(dim, self.width) if era == "2.1" else None
        )
        self.memory_temporal_positional_encoding: Tensor = nn.Parameter(
            torch.zeros(config.num_maskmem, 1, 1, self.width)
        )
        self.no_memory_positional_encoding: Tensor = nn.Parameter(torch.zeros(1, 1, dim))
        self.no_object_pointer: Tensor = nn.Parameter(torch.zeros(1, dim))
        self.occlusion_spatial_embedding_parameter: Tensor | None = (
            nn.Parameter(torch.zeros(1, self.width)) if era == "2.1" else None
        )
        _as_buffers(self)

    def pointer(self, token: Tensor, present: Tensor) -> Tensor:
        """Return the object pointer (1, dim) of an output token; a learned one of an absent target.

        Args:
            token: (1, dim) of the mask decoder.
            present: (1,) bool.
        """
        weight = present.to(token.dtype).unsqueeze(1)
        return weight * self.object_pointer_proj(token) + (1 - weight) * self.no_object_pointer

    def remember(
        self, coarse: Tensor, mask: Tensor, present: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Return features and positions of the memory of a slice, each (cells, 1, width).

        Args:
            coarse: (1, dim, rows, columns), as the encoder gives it.
            mask: (1, 1, *image) in 0..1.
            present: (1,) bool.
            dtype: of the stored features; None keeps that of the weights.
        """
        scale, bias = self.config.sigmoid_scale_for_mem_enc, self.config.sigmoid_bias_for_mem_enc
        features, positions = self.memory_encoder(coarse, mask * scale + bias)
        if self.occlusion_spatial_embedding_parameter is not None:
            absent = (~present).to(features.dtype).view(-1, 1, 1, 1)
            features = (
                features + absent * self.occlusion_spatial_embedding_parameter[..., None, None]
            )
        cells = features.flatten(2).permute(2, 0, 1)
        return cells.to(dtype or cells.dtype), positions.flatten(2).permute(2, 0, 1)

    def image_positions(self, coarse: Tensor) -> Tensor:
        """Return the sine positions of the cells of a map, of its shape."""
        sines = Sam2VideoPositionEmbeddingSine(self.dim // 2, normalize=True)
        return sines(coarse.shape, coarse.device, coarse.dtype)

    def attend(
        self,
        coarse: Tensor,
        positions: Tensor,
        memories: Sequence[tuple[int, SliceMemory]],
        pointers: Sequence[tuple[int, Tensor]],
        num_slices: int,
    ) -> Tensor:
        """Condition a slice on memories.

        Args:
            coarse: (1, dim, rows, columns), as the encoder gives it.
            positions: see `image_positions`.
            memories: distance in slices and memory; 0 for a conditioning slice at any distance.
            pointers: distance in slices and object pointer (1, dim).
            num_slices: of the volume.

        Returns:
            (1, dim, rows, columns).
        """
        self._set_grid((coarse.shape[-2], coarse.shape[-1]))
        tokens = [memory.features.to(coarse.dtype) for _, memory in memories]
        # Distance 0 takes the last row, as published.
        places = [
            memory.positions + self.memory_temporal_positional_encoding[distance - 1]
            for distance, memory in memories
        ]
        if pointers:
            pointer_tokens, pointer_places = self._pointer_tokens(pointers, num_slices)
            tokens.append(pointer_tokens)
            places.append(pointer_places)
        conditioned = self.memory_attention(
            coarse.flatten(2).permute(2, 0, 1),  # (cells, 1, dim)
            torch.cat(tokens),
            positions.flatten(2).permute(2, 0, 1),
            torch.cat(places).to(coarse.dtype),
            len(tokens[-1]) if pointers else 0,
        )
        return conditioned.reshape(-1, self.dim).T.reshape(coarse.shape)

    def _pointer_tokens(
        self, pointers: Sequence[tuple[int, Tensor]], num_slices: int
    ) -> tuple[Tensor, Tensor]:
        """A pointer is cut into tokens of the memory's width."""
        pieces = self.dim // self.width
        stacked = torch.cat([pointer for _, pointer in pointers])  # (P, dim)
        tokens = stacked.reshape(-1, 1, self.width)
        if self.temporal_positional_encoding_projection_layer is None:
            return tokens, torch.zeros_like(tokens)
        most = min(num_slices, self.config.max_object_pointers_in_encoder)
        distances = torch.tensor(
            [distance for distance, _ in pointers], device=stacked.device, dtype=torch.float32
        )
        sines = _sines(distances / (most - 1), self.dim).to(stacked.dtype)
        places = self.temporal_positional_encoding_projection_layer(sines)  # (P, width)
        return tokens, places.repeat_interleave(pieces, dim=0).unsqueeze(1)

    def _set_grid(self, grid: tuple[int, int]) -> None:
        """Rotary positions of this many cells. They are no weights, and are made where they are
        used, so that neither image size nor precision of a loaded model changes them.
        """
        config = copy.deepcopy(self.config)
        config.memory_attention_rope_feat_sizes = [grid[1], grid[0]]
        config.memory_attention_num_layers = 0
        device = self.no_object_pointer.device
        for name, buffer in Sam2VideoMemoryAttention(config).named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(self.memory_attention.get_submodule(owner), leaf, buffer.to(device))


def _sines(positions: Tensor, dim: int) -> Tensor:
    """Sine embedding (P, dim) of positions (P,), as in "Attention is all you need"."""
    half = dim // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32)
    angles = positions.unsqueeze(1) / 10000 ** (2 * (steps // 2) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _as_buffers(root: nn.Module) -> None:
    for module in root.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach())
