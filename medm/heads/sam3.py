"""SAM 3 (arXiv 2511.16719) as a mask head: a prompt in place of the words of a concept.

SAM 3 finds every instance of a concept that is named in words. Here the one token of its text
features is the prompt. The modules are those of transformers; boxes and points need torchvision's
`roi_align` there and are not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Sam3Config, Sam3Model

from medm.errors import CheckpointError
from medm.heads import Sam3Instances
from medm.heads.base import Maps, MaskHead, MaskLogits, Points, zero_of
from medm.heads.sam_pixels import square_pixels
from medm.types import Config

_PARTS = (
    "vision_config",
    "text_config",
    "detr_encoder_config",
    "detr_decoder_config",
    "mask_decoder_config",
)


class Sam3Decoder(nn.Module):
    """Fusion with the prompt, queries, scores and masks of SAM 3."""

    def __init__(self, model: Sam3Model) -> None:
        super().__init__()
        self.detr_encoder = model.detr_encoder
        self.detr_decoder = model.detr_decoder
        self.dot_product_scoring = model.dot_product_scoring
        self.mask_decoder = model.mask_decoder


class Sam3Head(MaskHead):
    """SAM 3: one mask at 4/14 of the input's resolution for each prompt.

    `presence` is the model's own score that the concept is in the image, `quality` the score of the
    most certain instance.

    Args:
        architecture: the parts of transformers' `Sam3Config`; default: the published sizes.
        instances: see `Sam3Options`.
    """

    channels = (3,)
    key_map: ClassVar = (
        (r"^(?:detector_model\.)?vision_encoder\.", "encoder."),
        (
            r"^(?:detector_model\.)?(detr_encoder|detr_decoder|dot_product_scoring|mask_decoder)\.",
            r"decoder.\1.",
        ),
    )
    ignored_keys: ClassVar = (
        r"^(?:detector_model\.)?(text_encoder|text_projection|geometry_encoder)\.",
        r"^tracker_",
    )

    def __init__(
        self, *, architecture: Mapping[str, Any], instances: Sam3Instances = "union"
    ) -> None:
        super().__init__()
        self.instances = instances
        sizes: dict[str, Any] = {key: dict(value) for key, value in architecture.items()}
        config = Sam3Config(**sizes)
        vision: Any = config.vision_config
        # Words come in as vectors; the text tower and the encoder of boxes are not kept.
        model = Sam3Model(config)
        self.encoder = model.vision_encoder
        self.decoder: Sam3Decoder = Sam3Decoder(model)
        self.dim = vision.fpn_hidden_size
        self._side, self._patch = (
            vision.backbone_config.image_size,
            vision.backbone_config.patch_size,
        )

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Return the sizes in the config of a `Sam3Model`, or of the one in a `Sam3VideoModel`.

        Raises:
            CheckpointError: config of another model.
        """
        if not published:
            return {}
        kind = published.get("model_type")
        detector = published.get("detector_config") if kind == "sam3_video" else published
        if kind not in ("sam3", "sam3_video") or not isinstance(detector, Mapping):
            raise CheckpointError(
                f"head sam3: expected the config of a sam3 or sam3_video model, found {kind!r}"
            )
        return {key: detector[key] for key in _PARTS if key in detector}

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | list[int] | None = None,
    ) -> Config:
        """Return the fields for images: a square without regard to aspect, values of -1 to 1."""
        vision = architecture.get("vision_config")
        backbone = vision.get("backbone_config") if isinstance(vision, Mapping) else None
        trained = backbone.get("image_size") if isinstance(backbone, Mapping) else None
        half = [0.5, 0.5, 0.5]
        return square_pixels(
            {"image_mean": half, "image_std": half, **published}, image_size or trained or 1008
        )

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        if spatial != (self._side, self._side):
            raise ValueError(
                f"head sam3: expected {self._side} x {self._side} pixels, the size of its "
                f"positions, found {' x '.join(map(str, spatial))}"
            )
        return tuple(4 * (side // self._patch) for side in spatial)

    def encode(self, pixels: Tensor) -> Maps:
        self.grid(tuple(pixels.shape[2:]))
        features = self.encoder(pixels, return_dict=True)
        # The coarsest level is not used. Positions (of the level that queries attend to) come last.
        positions = features.fpn_position_encoding[-2].expand(len(pixels), -1, -1, -1)
        *levels, coarsest = features.fpn_hidden_states
        if self.training:
            # Distributed training waits for the gradient of its weights, too.
            levels[-1] = levels[-1] + 0.0 * coarsest.sum()
        return (*levels, positions)

    def decode(
        self, maps: Maps, prompts: Tensor, items: Tensor, points: Points | None = None
    ) -> MaskLogits:
        if points is not None:
            raise ValueError(
                "head sam3 takes no points or boxes: transformers needs torchvision for them; use "
                "head sam2"
            )
        *levels, positions = (level[items] for level in maps)
        words = prompts.unsqueeze(1).to(levels[-1].dtype)  # (M, 1, dim)

        fused = self.decoder.detr_encoder(
            vision_features=[levels[-1]], text_features=words, vision_pos_embeds=[positions]
        )
        queries = self.decoder.detr_decoder(
            vision_features=fused.last_hidden_state,
            text_features=fused.text_features,
            vision_pos_encoding=fused.pos_embeds_flattened,
            spatial_shapes=fused.spatial_shapes,
        )
        scores = self.decoder.dot_product_scoring(
            decoder_hidden_states=queries.intermediate_hidden_states,
            text_features=fused.text_features,
            text_mask=None,
        )[-1].squeeze(-1)  # (M, queries)
        masks = self.decoder.mask_decoder(
            decoder_queries=queries.intermediate_hidden_states[-1],
            backbone_features=list(levels),
            encoder_hidden_states=fused.last_hidden_state,
            prompt_features=words,
        )

        best = scores.argmax(dim=1)  # (M,)
        rows = torch.arange(len(best), device=best.device)
        logits = (
            masks.semantic_seg[:, 0] if self.instances == "union" else masks.pred_masks[rows, best]
        )
        if self.training:
            # Boxes and one kind of mask are left out.
            logits = logits + zero_of(self.decoder.parameters())
        presence = queries.presence_logits[-1].reshape(-1)
        return MaskLogits(logits, scores[rows, best].sigmoid(), presence)
