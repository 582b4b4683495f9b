"""SAM (arXiv 2304.02643) and MedSAM (arXiv 2304.12306) as a mask head.

The modules are those of transformers. A prompt is one token behind those of points, as in LISA
(arXiv 2308.00692).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from medm.errors import CheckpointError
from medm.heads.base import Maps, MaskHead, MaskLogits, Points, zero_of
from medm.heads.sam_pixels import square_pixels
from medm.heads.sam_prompts import best_candidate, image_positions, point_tokens
from medm.types import Config

_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
_IMAGE_POSITIONS = "shared_image_embedding.positional_embedding"

_META = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
        (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
        (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
        (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
        (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
        (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
        (r"^image_encoder\.", "vision_encoder."),
        (
            r"\bpe_layer\.positional_encoding_gaussian_matrix$",
            "shared_embedding.positional_embedding",
        ),
        (r"\bpoint_embeddings\.", "point_embed."),
        (r"\bmask_downscaling\.0\.", "mask_embed.conv1."),
        (r"\bmask_downscaling\.1\.", "mask_embed.layer_norm1."),
        (r"\bmask_downscaling\.3\.", "mask_embed.conv2."),
        (r"\bmask_downscaling\.4\.", "mask_embed.layer_norm2."),
        (r"\bmask_downscaling\.6\.", "mask_embed.conv3."),
        (r"\boutput_upscaling\.0\.", "upscale_conv1."),
        (r"\boutput_upscaling\.1\.", "upscale_layer_norm."),
        (r"\boutput_upscaling\.3\.", "upscale_conv2."),
        (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
        (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
        (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
        (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    )
)
"""Meta's names to those of `SamModel`; all that match are applied, in this order."""


class SamDecoder(nn.Module):
    """Prompt encoder and mask decoder of SAM."""

    def __init__(self, model: SamModel) -> None:
        super().__init__()
        self.prompt_encoder = model.prompt_encoder
        self.mask_decoder = model.mask_decoder
        # Random directions that were never trained; transformers declares them a weight.
        embedding = self.prompt_encoder.shared_embedding
        matrix = embedding.positional_embedding.detach()
        del embedding.positional_embedding
        embedding.register_buffer("positional_embedding", matrix)


class SamHead(MaskHead):
    """SAM: one mask at a quarter of the input's resolution for each prompt.

    `quality` is the predicted IoU. SAM has no score of presence: `presence` is the highest logit of
    the mask, so that it is above 0 exactly where the mask has a pixel. It has no weights of its
    own; its loss raises or lowers the peak of the mask.

    Args:
        architecture: `vision_config`, `prompt_encoder_config` and `mask_decoder_config` of
            transformers; default: ViT-B.
    """

    channels = (3,)
    key_map: ClassVar = (
        (r"^vision_encoder\.", "encoder."),
        (r"^(prompt_encoder|mask_decoder)\b", r"decoder.\1"),
    )
    # A copy of the matrix in the prompt encoder.
    ignored_keys: ClassVar = (r"^shared_image_embedding\.",)

    def __init__(
        self,
        *,
        architecture: Mapping[str, Any],
        multimask: bool = True,
        padding_points: int = 0,
    ) -> None:
        super().__init__()
        self.multimask, self.padding_points = multimask, padding_points
        sizes: dict[str, Any] = {key: dict(value) for key, value in architecture.items()}
        config = SamConfig(**sizes)
        vision: Any = config.vision_config
        model = SamModel(config)
        self.encoder = model.vision_encoder
        self.decoder: SamDecoder = SamDecoder(model)
        self.dim = vision.output_channels
        self._side, self._patch = vision.image_size, vision.patch_size

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Return the sizes in the config of a `SamModel`.

        Raises:
            CheckpointError: config of another model.
        """
        if not published:
            return {}
        if published.get("model_type") != "sam":
            raise CheckpointError(
                "head sam: expected the config of a sam model, found "
                f"{published.get('model_type')!r}"
            )
        parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
        return {key: published[key] for key in parts if key in published}

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | list[int] | None = None,
    ) -> Config:
        """Return the fields for images: a square without regard to aspect, as MedSAM was trained.

        SAM itself was trained on images padded at the right and bottom. MedSAM's pixels are 0..1
        without statistics: `mean: [0, 0, 0]`, `std: [1, 1, 1]` in the recipe.
        """
        vision = architecture.get("vision_config")
        trained = vision.get("image_size") if isinstance(vision, Mapping) else None
        return square_pixels(published, image_size or trained or 1024)

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        if spatial != (self._side, self._side):
            raise ValueError(
                f"head sam: expected {self._side} x {self._side} pixels, the size of its position "
                f"embeddings, found {' x '.join(map(str, spatial))}"
            )
        return tuple(4 * (side // self._patch) for side in spatial)

    def encode(self, pixels: Tensor) -> Maps:
        self.grid(tuple(pixels.shape[2:]))
        return (self.encoder(pixels, return_dict=True).last_hidden_state,)  # (N, dim, ., .)

    def decode(
        self, maps: Maps, prompts: Tensor, items: Tensor, points: Points | None = None
    ) -> MaskLogits:
        encoder, coarse = self.decoder.prompt_encoder, maps[0][items]
        matrix = encoder.shared_embedding.positional_embedding
        padding = encoder.not_a_point_embed.weight  # (1, D)
        grid = (coarse.shape[-2], coarse.shape[-1])
        if points is not None:
            tokens = point_tokens(
                points,
                (self._side, self._side),
                matrix=matrix,
                labels=torch.cat([*encoder.point_embed.parameters()]),
                padding=padding,
                pad=not bool((points.labels >= 2).any()),  # boxes come without padding
            )
        else:
            tokens = padding.expand(len(coarse), self.padding_points, -1)
        tokens = torch.cat([tokens, prompts.unsqueeze(1).to(tokens.dtype)], dim=1)

        logits, quality = self.decoder.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=image_positions(grid, matrix).expand(
                len(coarse), -1, -1, -1
            ),
            sparse_prompt_embeddings=tokens.unsqueeze(1),  # (M, 1, tokens, D)
            dense_prompt_embeddings=encoder.no_mask_embed.weight.view(1, -1, 1, 1),
            multimask_output=self.multimask,
        )
        best, best_quality, _ = best_candidate(logits[:, 0], quality[:, 0])
        if self.training:
            best = best + self._unused_weights()
        return MaskLogits(best, best_quality, best.flatten(1).amax(dim=1))

    def _unused_weights(self) -> Tensor:
        """Return zero that depends on the weights of prompts that a batch may lack."""
        prompts = self.decoder.prompt_encoder
        unused = (prompts.point_embed, prompts.not_a_point_embed, prompts.mask_embed)
        return zero_of(weight for module in unused for weight in module.parameters())

    def rename_published(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of Meta's files (`sam_vit_b_01ec64.pth`, `medsam_vit_b.pth`) by the
        names of `SamModel`.
        """
        named: dict[str, Tensor] = {}
        meta = any(name.startswith("image_encoder.") for name in tensors)
        for name, tensor in tensors.items():
            new = name
            for pattern, replacement in _META if meta else ():
                new = pattern.sub(replacement, new)
            named[new] = tensor
        # transformers ties the two and may save one of them.
        if _POSITIONS not in named and _IMAGE_POSITIONS in named:
            named[_POSITIONS] = named.pop(_IMAGE_POSITIONS)
        return named
