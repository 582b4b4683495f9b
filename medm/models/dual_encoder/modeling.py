"""Dual encoder: a vector for each image and each text, and the scale of scores.

Knows nothing of losses: an objective compares the vectors, over all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead
from transformers.utils.generic import ModelOutput

from medm.config import flatten
from medm.distributed import row_counts, world_size
from medm.encoders import ENCODERS
from medm.encoders.base import VisionEncoder
from medm.errors import RecipeError
from medm.models.base import MedmModel
from medm.models.dual_encoder.configuration import DualEncoderConfig, ImageEntry, TextEntry
from medm.models.dual_encoder.options import DualEncoderOptions, Pool
from medm.models.options import ModelOptions
from medm.text_encoders import TEXT_ENCODERS
from medm.text_encoders.base import TextEncoder
from medm.types import VisionFeatures

MAX_LOG_SCALE = math.log(100.0)


@dataclass
class DualEncoderOutput(ModelOutput):
    """Vectors of the pairs of a batch, not normalized."""

    image_embeds: Tensor | None = None
    """(N, D)."""
    text_embeds: Tensor | None = None
    """(N, D)."""
    logit_scale: Tensor | None = None
    """(1,), factor of the scores."""
    logit_bias: Tensor | None = None
    """(1,), summand of the scores, where the model has one."""


class Scale(nn.Module):
    """Scale and bias of scores. The scale is held as a logarithm, and called as a factor.

    Args:
        factor: at the start.
        bias: at the start; None for a model without one.
    """

    def __init__(self, factor: float, bias: float | None) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(factor)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), float(bias)))

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Return the factor (1,) and the summand (1,)."""
        return self.logit_scale.exp(), self.logit_bias


class Pooling(nn.Module):
    """Vision features to one vector an item: layer norm, then the pooling.

    Args:
        pool: see `ImageTowerOptions`.
        encoder: whose features come in.
        norm: whether there is a layer norm.

    Raises:
        RecipeError: the encoder does not give what is pooled.
    """

    def __init__(self, pool: Pool, encoder: VisionEncoder, *, norm: bool) -> None:
        super().__init__()
        self.pool, self.prefix = pool, encoder.prefix
        if pool == "encoder" and encoder.pooled_dim is None:
            raise RecipeError(
                "model.image.pool: encoder, but this encoder has no pooled vector; set pool to "
                "cls, mean or attention"
            )
        if pool == "cls" and not encoder.prefix:
            raise RecipeError(
                "model.image.pool: cls, but the encoder gives no class token; set "
                "model.image.encoder.tokens: cls_patch where it has one, or another pool"
            )
        self.dim = int(encoder.pooled_dim or 0) if pool == "encoder" else encoder.dim
        published = getattr(getattr(encoder, "tower", None), "config", None)
        eps = getattr(published, "layer_norm_eps", getattr(encoder, "eps", 1e-5))
        self.norm = nn.LayerNorm(self.dim, eps=eps) if norm else nn.Identity()
        self.head = None
        if pool == "attention":
            heads = getattr(published, "num_attention_heads", max(self.dim // 64, 1))
            width = getattr(published, "intermediate_size", 4 * self.dim)
            act = getattr(published, "hidden_act", "gelu_pytorch_tanh")
            self.head = SiglipMultiheadAttentionPoolingHead(
                SiglipVisionConfig(
                    hidden_size=self.dim,
                    num_attention_heads=heads,
                    intermediate_size=width,
                    hidden_act=act,
                    layer_norm_eps=eps,
                )
            )

    def forward(self, features: VisionFeatures) -> Tensor:
        """(N, dim), one vector an item."""
        if self.pool == "encoder":
            if features.pooled is None:
                raise RecipeError(
                    "model.image.pool: encoder, but cached features hold tokens alone; leave "
                    "data.cache_features out"
                )
            return self.norm(features.pooled)
        tokens = features.tokens  # (N, prefix + cells, dim)
        if self.pool == "cls":
            return self.norm(tokens[:, 0])
        cells = self.norm(tokens[:, features.prefix :])
        return cells.mean(dim=1) if self.head is None else self.head(cells)

    def each(self, features: VisionFeatures) -> Tensor:
        """(N, cells, dim), the vector that each cell of the grid would have alone."""
        if self.pool == "encoder":
            raise RecipeError(
                "vectors of single cells: model.image.pool is encoder, whose vector is not made "
                "of the tokens; train with pool: mean or attention for them"
            )
        cells = self.norm(features.tokens[:, features.prefix :])  # (N, cells, dim)
        if self.head is None:
            return cells
        alone = self.head(cells.flatten(0, 1).unsqueeze(1))  # (N * cells, dim)
        return alone.unflatten(0, cells.shape[:2])


class Readout(nn.Module):
    """From the features of an encoder to the common space: pooling and projection."""

    def __init__(self, pooling: Pooling, projection: nn.Module) -> None:
        super().__init__()
        self.pooling, self.projection = pooling, projection

    def forward(self, features: VisionFeatures, task_ids: Tensor | None = None) -> Tensor:
        """(N, embed_dim). `task_ids` is what every connector of medm is called with."""
        return self.projection(self.pooling(features))


class ImageTower(nn.Module):
    """Pixels to vectors; a `medm.types.VisionBranch`.

    Args:
        entry: of the config.
        embed_dim: width of the common space.
    """

    num_tokens = 1
    """One vector an item."""

    def __init__(self, entry: ImageEntry, *, embed_dim: int) -> None:
        super().__init__()
        self.encoder_bypassed = False
        self.encoder: VisionEncoder = ENCODERS.constructor(entry.encoder)()
        self.spatial, self.channels = tuple(entry.spatial), entry.channels
        pooling = Pooling(entry.pool, self.encoder, norm=entry.norm)
        self.readout = Readout(
            pooling, _projection(entry.projection, pooling.dim, embed_dim, tower="image")
        )

    @property
    def connector(self) -> nn.Module:
        """Pooling and projection."""
        return self.readout

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Vision features of (N, C, *spatial); a frozen encoder keeps nothing for the backward
        pass.
        """
        frozen = not any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.encoder(pixels)

    def from_cached(self, features: VisionFeatures | Tensor) -> VisionFeatures:
        """Return features that were encoded before, of the tower's input size."""
        if isinstance(features, VisionFeatures):
            return features
        tokens = features.to(**self.encoder.device_and_dtype)
        return VisionFeatures(tokens, self.encoder.grid(self.spatial), self.encoder.prefix)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, embed_dim)."""
        return self.readout(self.encode(pixels))

    def from_features(self, features: Tensor) -> Tensor:
        """Cached features (N, tokens, dim) to (N, embed_dim)."""
        return self.readout(self.from_cached(features))

    def blank(self, rows: int) -> Tensor:
        """Return blank input: pixels, or features where the encoder is bypassed."""
        like = self.encoder.device_and_dtype
        if self.encoder_bypassed:
            cells = math.prod(self.encoder.grid(self.spatial))
            return torch.zeros(rows, self.encoder.prefix + cells, self.encoder.dim, **like)
        return torch.zeros(rows, self.channels, *self.spatial, **like)


class TextTower(nn.Module):
    """Token ids to vectors.

    Args:
        entry: of the config.
        embed_dim: width of the common space.
    """

    def __init__(self, entry: TextEntry, *, embed_dim: int) -> None:
        super().__init__()
        self.encoder: TextEncoder = TEXT_ENCODERS.constructor(entry.encoder)()
        self.projection = _projection(entry.projection, self.encoder.dim, embed_dim, tower="text")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(N, T) to (N, embed_dim)."""
        return self.projection(self.encoder(input_ids, attention_mask).pooled)

    def blank(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ids and a mask of blank texts."""
        width = self.encoder.max_length if self.encoder.pads_to_max_length else 1
        ids = torch.zeros(rows, width, dtype=torch.long, device=device)
        return ids, torch.ones_like(ids)


class DualEncoder(MedmModel):
    """Image tower, text tower and the scale of scores.

    `forward` takes what the collator of pairs makes (`medm.data.pairs`).
    """

    config_class = DualEncoderConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    accepts_loss_kwargs = True
    """As for every model of medm: objectives divide by the items of the whole step."""

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__(config)
        self.image = ImageTower(config.image_entry(), embed_dim=config.embed_dim)
        self.text = TextTower(config.text_entry(), embed_dim=config.embed_dim)
        self.scale = Scale(config.logit_scale, config.logit_bias)
        self.set_training_options(chunk=config.chunk, patch_dropout=config.patch_dropout)
        self.inject_adapters()
        self.post_init()

    def parts(self) -> dict[str, nn.Module]:
        """The units that a recipe freezes, trains or adapts. Norm and pooling belong to the image
        encoder.
        """
        parts: dict[str, nn.Module] = {
            "image.encoder": nn.ModuleList([self.image.encoder, self.image.readout.pooling]),
            "image.projection": self.image.readout.projection,
            "text.encoder": self.text.encoder,
            "text.projection": self.text.projection,
            "scale": self.scale,
        }
        return {name: part for name, part in parts.items() if not isinstance(part, nn.Identity)}

    def set_training_options(self, *, chunk: int | None, patch_dropout: float) -> None:
        """Set what a recipe says and a checkpoint does not hold.

        Args:
            chunk: pairs that are encoded at a time.
            patch_dropout: fraction of the patches that the image encoder leaves out.

        Raises:
            RecipeError: patches are to be left out by an encoder that reads all of them.
        """
        encoder = self.image.encoder
        if patch_dropout and not encoder.can_drop_patches:
            able = (n for n in ENCODERS.names() if ENCODERS.get(n).can_drop_patches)
            raise RecipeError(
                f"model.image.patch_dropout: {patch_dropout}, but {type(encoder).__name__} reads "
                f"the whole image; expected 0, or an encoder of {', '.join(able)}"
            )
        encoder.patch_dropout = patch_dropout
        self.config.chunk, self.config.patch_dropout = chunk, patch_dropout

    def encoders(self) -> dict[str, ImageTower]:
        return {self.config.branch: self.image}

    def check_same_parts(self, options: ModelOptions, *, source: str) -> None:
        if not isinstance(options, DualEncoderOptions):
            raise RecipeError(
                f"init_from {source}: holds a model of kind 'dual-encoder', not "
                f"{options.kind!r}. Change the recipe or init_from"
            )
        config = cast(DualEncoderConfig, self.config)
        held: dict[str, object] = {
            "branch": config.branch,
            "embed_dim": config.embed_dim,
            **flatten({"image": config.image, "text": config.text}),
        }
        named = flatten(options.model_dump(include={"branch", "embed_dim", "image", "text"}))
        differences = [
            f"{key} {held[key]!r}, not {value!r}"
            for key, value in named.items()
            if key in held and held[key] != value and "architecture" not in key.split(".")
        ]
        if (config.logit_bias is None) != (options.logit_bias is None):
            differences.append(f"logit_bias {config.logit_bias!r}, not {options.logit_bias!r}")
        if differences:
            raise RecipeError(
                f"init_from {source}: holds {'; '.join(differences)}. Change the recipe or "
                "init_from"
            )

    @torch.no_grad()
    def after_step(self) -> Sequence[nn.Parameter]:
        """Hold the scale within 1 and 100."""
        scale = self.scale.logit_scale
        if not scale.requires_grad:
            return ()
        held = scale.clamp(0.0, MAX_LOG_SCALE)
        if torch.equal(held, scale):
            return ()
        scale.copy_(held)
        return (scale,)

    def get_image_features(self, pixels: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the vectors of images or volumes, not normalized.

        Args:
            pixels: (N, C, *spatial), or a mapping of the branch to them.
        """
        return self.image(pixels if isinstance(pixels, Tensor) else pixels[self.config.branch])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the vectors of texts, not normalized.

        Args:
            input_ids: (N, T), padded on the right.
            attention_mask: (N, T), 0 at padding; all tokens without it.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.text(input_ids, mask)

    def get_patch_features(
        self, pixels: Tensor | Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Return a vector for each cell of the token grid, not normalized, and the grid.

        Args:
            pixels: as those of `get_image_features`.

        Returns:
            (N, cells, embed_dim), and the sizes of the grid, whose product is the cells.
        """
        given = pixels if isinstance(pixels, Tensor) else pixels[self.config.branch]
        features = self.image.encode(given)
        readout = self.image.readout
        return readout.projection(readout.pooling.each(features)), features.grid

    def forward(
        self,
        pixels: Mapping[str, Tensor] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        chunk: int | None = None,
        **kwargs: Any,
    ) -> DualEncoderOutput:
        """Encode the pairs of a batch. A batch without pairs gives no rows, through every weight.

        Args:
            pixels: by branch (N, C, *spatial).
            input_ids: (N, T), padded on the right.
            attention_mask: (N, T), 0 at padding.
            features: by branch what the encoder gave before, in place of `pixels`.
            chunk: pairs that are encoded at a time; the backward pass encodes each chunk again.
                Default: the recipe's `model.chunk`.
            kwargs: fields of the batch that the objective reads.

        Raises:
            ValueError: images and texts differ in number, or there are no texts.
        """
        if input_ids is None:
            raise ValueError("forward encodes pairs; for images alone call get_image_features")
        branch = self.config.branch
        cached = (features or {}).get(branch)
        seen = (pixels or {}).get(branch) if cached is None else cached
        if seen is None:  # a batch without pairs
            seen = self.image.blank(0)
        if len(seen) != len(input_ids):
            raise ValueError(
                f"{len(seen)} items of '{branch}' and {len(input_ids)} texts: expected one text "
                "for each"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        bypassed = cached is not None or self.image.encoder_bypassed
        image = self.image.from_features if bypassed else self.image
        size = chunk or (self.config.chunk if self.training else None)
        rounds = self._rounds(seen, size)
        scale, bias = self.scale()
        return DualEncoderOutput(
            image_embeds=_in_chunks(image, (seen,), lambda: (self.image.blank(1),), size, rounds),
            text_embeds=_in_chunks(
                self.text,
                (input_ids, mask),
                lambda: self.text.blank(1, input_ids.device),
                size,
                rounds,
            ),
            logit_scale=scale,
            logit_bias=bias,
        )

    def _rounds(self, rows: Tensor, size: int | None) -> int:
        """Return the chunks of this batch, the same number on every rank that trains.

        Ranks may hold different numbers of pairs, and ZeRO-3 waits for a rank that runs a module
        fewer times.
        """
        if size is None:
            return 1
        most = len(rows)
        if self.training and torch.is_grad_enabled() and world_size() > 1:
            most = max(row_counts(rows))
        return max(-(-most // size), 1)


def _in_chunks(
    tower: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    blank: Callable[[], tuple[Tensor, ...]],
    size: int | None,
    rounds: int,
) -> Tensor:
    """Run a tower on some rows at a time, each time under activation checkpointing.

    Args:
        tower: one or more tensors of rows to (rows, D).
        inputs: its tensors.
        blank: makes the same of one blank row, for rounds without rows.
        size: rows of a chunk; None runs all of them at once and keeps the activations.
        rounds: number of chunks.
    """
    if size is None:
        return _rows(tower, inputs, blank)
    chunks = [
        tuple(rows[start : start + size] for rows in inputs)
        for start in range(0, rounds * size, size)
    ]
    encoded = [
        checkpoint(_rows, tower, rows, blank, use_reentrant=False)
        if torch.is_grad_enabled()
        else _rows(tower, rows, blank)
        for rows in chunks
    ]
    return torch.cat(encoded)


def _rows(
    tower: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
    blank: Callable[[], tuple[Tensor, ...]],
) -> Tensor:
    return tower(*rows) if len(rows[0]) else tower(*blank())[:0]


def _projection(kind: str, dim: int, embed_dim: int, *, tower: str) -> nn.Module:
    """Return the module from a tower's width to the common space."""
    if kind == "none":
        if dim != embed_dim:
            raise RecipeError(
                f"model.{tower}.projection: none, but the encoder gives vectors of {dim}, and "
                f"model.embed_dim is {embed_dim}; make them equal, or set projection: linear"
            )
        return nn.Identity()
    if kind == "linear":
        layer = nn.Linear(dim, embed_dim, bias=False)
        nn.init.normal_(layer.weight, std=dim**-0.5)
        return layer
    hidden = (dim + embed_dim) // 2
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
    )
