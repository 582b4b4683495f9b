"""SAM 2 (arXiv 2408.00714) as a mask head: Hiera encoder, prompt tokens, mask decoder.

The modules are those of transformers; its processor, which needs torchvision, is not used. A prompt
is one token behind the tokens of points, as in Sa2VA (arXiv 2501.04001) and UniBiomed (arXiv
2504.21336).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Sam2Config, Sam2Model

from medm.errors import CheckpointError, RecipeError
from medm.heads import Sam2Era, Sam2Size
from medm.heads.base import Maps, MaskHead, MaskLogits, Points, zero_of
from medm.heads.sam2_keys import MEMORY, era_of, is_meta, transformers_names
from medm.heads.sam2_memory import Sam2Memory
from medm.heads.sam2_memory_modules import MEMORY_FIELDS, Decoded, Sam2MemoryModules
from medm.heads.sam_pixels import square_pixels
from medm.heads.sam_prompts import best_candidate, image_positions, point_tokens
from medm.types import Config

_WIDE: Config = {
    "backbone_channel_list": [896, 448, 224, 112],
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 112,
        "embed_dim_per_stage": [112, 224, 448, 896],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 3, 16, 3],
        "global_attention_blocks": [12, 16, 20],
        "window_positional_embedding_background_size": [14, 14],
    },
}
_LARGE: Config = {
    "backbone_channel_list": [1152, 576, 288, 144],
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 144,
        "embed_dim_per_stage": [144, 288, 576, 1152],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 6, 36, 4],
        "global_attention_blocks": [23, 33, 43],
        "window_size_per_stage": [8, 4, 16, 8],
    },
}
_TINY: Config = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "blocks_per_stage": [1, 2, 7, 2],
        "global_attention_blocks": [5, 7, 9],
    },
}
_SMALL: Config = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "blocks_per_stage": [1, 2, 11, 2],
        "global_attention_blocks": [7, 10, 13],
    },
}
HIERA: Mapping[Sam2Size, Config] = {
    "tiny": _TINY,
    "small": _SMALL,
    "base_plus": _WIDE,
    "large": _LARGE,
    "medsam2": _TINY,
}
"""`vision_config` of the published encoders (`sam2/configs` of facebookresearch/sam2)."""

IMAGE_SIZE = 1024
_STRIDE = 16
"""Pixels of a cell of the coarsest map, which the mask decoder attends to."""
_ERA_FLAGS = (
    "enable_temporal_pos_encoding_for_object_pointers",
    "enable_occlusion_spatial_embedding",
)


class Sam2Decoder(nn.Module):
    """Prompt encoder and mask decoder of SAM 2, and the modules of its memory if there are any."""

    def __init__(self, model: Sam2Model, memory: Sam2MemoryModules | None) -> None:
        super().__init__()
        self.prompt_encoder = model.prompt_encoder
        self.mask_decoder = model.mask_decoder
        self.shared_image_embedding = model.shared_image_embedding
        self.no_memory_embedding = model.no_memory_embedding
        self.memory = memory


class Sam2Head(MaskHead):
    """SAM 2: one mask at a quarter of the input's resolution for each prompt.

    Maps are the three levels of the feature pyramid at strides 4, 8 and 16, as the encoder makes
    them. What depends on decoder weights is added in `decode`: the two convolutions of the fine
    levels, and the embedding that says that no memory came in. The latter is a constant beside the
    (trained) embedding that says that no mask came in, and slices that memory conditions do without
    it.

    Args:
        architecture: `vision_config`, `prompt_encoder_config` and `mask_decoder_config` of
            transformers, and the fields of `Sam2VideoConfig` about memory; each may be absent.

    Raises:
        RecipeError: `size`, `era` and the architecture contradict each other.
    """

    channels = (3,)
    key_map: ClassVar = (
        (r"^vision_encoder\.", "encoder."),
        (
            r"^(prompt_encoder|mask_decoder|shared_image_embedding|no_memory_embedding)\b",
            r"decoder.\1",
        ),
    )
    # With memory its tensors have been renamed before these are looked at.
    ignored_keys: ClassVar = (MEMORY,)

    def __init__(
        self,
        *,
        architecture: Mapping[str, Any],
        size: Sam2Size | None = None,
        era: Sam2Era | None = None,
        multimask: bool = True,
        padding_points: int = 2,
        memory: bool = False,
    ) -> None:
        super().__init__()
        self.multimask, self.padding_points = multimask, padding_points
        self.era = _era(architecture, era)
        config = _config(architecture, size)
        vision: Any = config.vision_config
        model = Sam2Model(config)
        self.encoder = model.vision_encoder
        modules = Sam2MemoryModules(vision, architecture, self.era or "2.1") if memory else None
        self.decoder: Sam2Decoder = Sam2Decoder(model, modules)
        self.dim = vision.fpn_hidden_size
        backbone = vision.backbone_config
        self._num_blocks = sum(backbone.blocks_per_stage)
        self._patch = backbone.patch_stride[0]
        # The window of the positions is tiled over the first stage; three poolings follow.
        self._multiple = self._patch * max(
            backbone.window_size_per_stage[0], 2 ** (len(backbone.blocks_per_stage) - 1)
        )

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Return the sizes in the config of a `Sam2Model` or `Sam2VideoModel`.

        Raises:
            CheckpointError: config of another model.
        """
        if not published:
            return {}
        kind = published.get("model_type")
        if kind not in ("sam2", "sam2_video"):
            raise CheckpointError(
                f"head sam2: expected the config of a sam2 or sam2_video model, found {kind!r}"
            )
        parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config", *MEMORY_FIELDS)
        return {key: published[key] for key in parts if key in published}

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | list[int] | None = None,
    ) -> Config:
        """Return the fields for images: a square without regard to aspect, ImageNet's statistics.

        The filter is bilinear, SAM 2's. UniBiomed resizes bicubic: `interpolation: bicubic` in the
        recipe.
        """
        prompts = architecture.get("prompt_encoder_config")
        trained = prompts.get("image_size") if isinstance(prompts, Mapping) else None
        size = image_size or trained or IMAGE_SIZE
        return square_pixels(published, size)

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        if len(spatial) != 2 or any(side <= 0 or side % self._multiple for side in spatial):
            raise ValueError(
                f"head sam2: expected rows and columns that are multiples of {self._multiple}, "
                f"found {' x '.join(map(str, spatial))}"
            )
        return tuple(side // self._patch for side in spatial)

    def encode(self, pixels: Tensor) -> Maps:
        self.grid(tuple(pixels.shape[2:]))
        features = self.encoder(pixels, return_dict=True)
        return tuple(features.fpn_hidden_states)  # strides 4, 8, 16, each (N, dim, ., .)

    def decode(
        self, maps: Maps, prompts: Tensor, items: Tensor, points: Points | None = None
    ) -> MaskLogits:
        fine = [level[items] for level in self.fine_levels(maps)]
        coarse = maps[-1] + self.decoder.no_memory_embedding.view(1, -1, 1, 1)
        masks = self.decode_levels(fine, coarse[items], prompts, points).masks
        if self.training:
            masks = masks._replace(logits=masks.logits + self._unused_weights())
        return masks

    def memory(self) -> Sam2Memory:
        return Sam2Memory(self)

    def fine_levels(self, maps: Maps) -> list[Tensor]:
        """Return the levels at strides 4 and 8 with the channels of the decoder."""
        decoder = self.decoder.mask_decoder
        return [decoder.conv_s0(maps[0]), decoder.conv_s1(maps[1])]

    def decode_levels(
        self,
        fine: list[Tensor],
        coarse: Tensor,
        prompts: Tensor | None,
        points: Points | None = None,
        *,
        mask: Tensor | None = None,
        multimask: bool | None = None,
    ) -> Decoded:
        """Decode one mask for each row of the levels.

        Args:
            fine: see `fine_levels`, each (M, ...).
            coarse: (M, dim, rows, columns), conditioned on memory or on its absence.
            prompts: (M, D); None in slices that memory alone prompts.
            points: beside the prompts.
            mask: (M, 1, 4 rows, 4 columns), logits of a mask that prompts.
            multimask: in place of the head's own.
        """
        encoder = self.decoder.prompt_encoder
        matrix = encoder.shared_embedding.positional_embedding
        padding = encoder.not_a_point_embed.weight  # (1, D)
        grid = (coarse.shape[-2], coarse.shape[-1])
        if points is not None:
            tokens = point_tokens(
                points,
                (grid[0] * _STRIDE, grid[1] * _STRIDE),
                matrix=matrix,
                labels=encoder.point_embed.weight,
                padding=padding,
                pad=True,
            )
        else:
            tokens = padding.expand(len(coarse), self.padding_points, -1)
        if prompts is not None:
            tokens = torch.cat([tokens, prompts.unsqueeze(1).to(tokens.dtype)], dim=1)

        if mask is None:
            dense = encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(1, -1, *grid)
        else:
            dense = encoder.mask_embed(mask)
        several = self.multimask if multimask is None else multimask
        positions = image_positions(grid, self.decoder.shared_image_embedding.positional_embedding)
        logits, quality, outputs, presence = self.decoder.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=positions.expand(len(coarse), -1, -1, -1),
            sparse_prompt_embeddings=tokens.unsqueeze(1),  # (M, 1, tokens, D)
            dense_prompt_embeddings=dense,
            multimask_output=several,
            high_resolution_features=fine,
        )
        best_logits, best_quality, best = best_candidate(logits[:, 0], quality[:, 0])
        rows = torch.arange(len(best), device=best.device)
        masks = MaskLogits(best_logits, best_quality, presence[:, 0, 0])
        return Decoded(masks, outputs[:, 0][rows, best])

    def _unused_weights(self) -> Tensor:
        """Return zero that depends on the weights of prompts that a batch may lack."""
        prompts = self.decoder.prompt_encoder
        unused = (prompts.point_embed, prompts.not_a_point_embed, prompts.mask_embed)
        return zero_of(weight for module in unused for weight in module.parameters())

    def rename_published(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors by the names of `Sam2VideoModel`, checked for size and generation.

        Raises:
            CheckpointError: an encoder of another size; a file that mixes SAM 2.0 and 2.1, or is of
                the other one than the head; no memory in the file of a head with memory.
        """
        named = transformers_names(tensors) if is_meta(tensors) else dict(tensors)
        self._check_size(named)
        found = era_of(named, source="SAM 2 weights")
        if self.decoder.memory is None:
            built = self.era
        elif found is None:
            raise CheckpointError(
                "SAM 2 weights: the file holds no memory (memory_attention, memory_encoder), and "
                "the head has memory: true; use the file of the video model, or set memory: false"
            )
        else:
            built = self.era or "2.1"
        if found is not None and built is not None and found != built:
            raise CheckpointError(
                f"SAM 2 weights: the file is of SAM {found}, the head was built for SAM {built}; "
                f"set era: '{found}' in the block of the head"
            )
        if self.decoder.memory is None:
            return named
        return {
            f"decoder.memory.{name}" if re.match(MEMORY, name) else name: tensor
            for name, tensor in named.items()
        }

    def _check_size(self, tensors: Mapping[str, Tensor]) -> None:
        prefix = "vision_encoder.backbone.blocks."
        blocks = {
            name.removeprefix(prefix).partition(".")[0]
            for name in tensors
            if name.startswith(prefix)
        }
        own = self._num_blocks
        if blocks and len(blocks) != own:
            fits = next(
                (size for size, config in HIERA.items() if sum(_blocks(config)) == len(blocks)),
                None,
            )
            raise CheckpointError(
                f"SAM 2 weights: the file holds an encoder of {len(blocks)} blocks, the head was "
                f"built with {own}" + (f"; set size: {fits}" if fits else "")
            )


def _blocks(vision: Mapping[str, Any]) -> list[int]:
    backbone = vision.get("backbone_config") or {}
    return list(backbone.get("blocks_per_stage") or [1, 2, 7, 2])


def _config(architecture: Mapping[str, Any], size: Sam2Size | None) -> Sam2Config:
    """Return the config of transformers. Raises `RecipeError`."""
    vision = architecture.get("vision_config")
    if vision is None:
        vision = HIERA[size or "tiny"]
    elif size is not None and _blocks(vision) != _blocks(HIERA[size]):
        raise RecipeError(
            f"head sam2: size {size!r} has {_blocks(HIERA[size])} blocks in its stages, but the "
            f"architecture has {_blocks(vision)}; leave size out"
        )
    # The fallback from the one mask to the candidates replaces masks in inference alone, so that a
    # head would be trained on other masks than it gives.
    decoder = dict(architecture.get("mask_decoder_config") or {})
    decoder["dynamic_multimask_via_stability"] = False
    return Sam2Config(
        vision_config=dict(vision),
        prompt_encoder_config=dict(architecture.get("prompt_encoder_config") or {}),
        mask_decoder_config=decoder,
    )


def _era(architecture: Mapping[str, Any], era: Sam2Era | None) -> Sam2Era | None:
    """Return the generation that options and published config agree on. Raises `RecipeError`."""
    flags = {bool(architecture[key]) for key in _ERA_FLAGS if key in architecture}
    if len(flags) > 1:
        raise RecipeError(
            "head sam2: the config mixes SAM 2.0 and 2.1: "
            + ", ".join(f"{key} is {architecture[key]}" for key in _ERA_FLAGS)
            + "; expected both true (2.1) or both false (2.0)"
        )
    published: Sam2Era | None = None if not flags else "2.1" if flags == {True} else "2.0"
    if era is not None and published is not None and era != published:
        raise RecipeError(
            f"head sam2: era {era!r}, but the published config is of SAM {published}; leave era out"
        )
    return era or published
