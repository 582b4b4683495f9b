"""A ViT over patches of images or volumes, for published towers that transformers does not have.

Patches, class token, learned positions, blocks, and perhaps a last layer norm. Subclasses define
the differences between the published towers: patch embedding, place of the norms, position of the
class token.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from math import prod
from typing import ClassVar, Literal

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from medm.encoders import NormPlace, VisionTokens
from medm.encoders.base import VisionEncoder
from medm.encoders.preprocessor_file import published_fields
from medm.encoders.sizes import number, whole, wholes
from medm.errors import RecipeError
from medm.types import Config, VisionFeatures

logger = logging.getLogger(__name__)

QKVBias = Literal["none", "full", "query-value"]


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value, in this order.

    Args:
        dim: width of a token.
        heads: number of heads.
        bias: of the projection: on all three, on none, or on query and value as two tensors (BEiT,
            EVA).
    """

    def __init__(self, dim: int, *, heads: int, bias: QKVBias) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias == "full")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias == "query-value" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias == "query-value" else None
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) to (B, N, dim)."""
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        if self.q_bias is not None and self.v_bias is not None:
            query, value = query + self.q_bias, value + self.v_bias
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, N, dim / heads)
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(GradientCheckpointingLayer):
    """Attention and MLP with residuals.

    The layer norms stand before each ("pre") or after each sum ("post").
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        mlp_dim: int,
        norm: Literal["pre", "post"],
        activation: str,
        bias: QKVBias,
        eps: float,
    ) -> None:
        super().__init__()
        self.norm_first = norm == "pre"
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attention = Attention(dim, heads=heads, bias=bias)
        self.up, self.activation, self.down = (
            nn.Linear(dim, mlp_dim),
            ACT2FN[activation],
            nn.Linear(mlp_dim, dim),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) to (B, N, dim)."""
        if self.norm_first:
            tokens = tokens + self.attention(self.norm1(tokens))
            return tokens + self._mlp(self.norm2(tokens))
        tokens = self.norm1(tokens + self.attention(tokens))
        return self.norm2(tokens + self._mlp(tokens))

    def _mlp(self, tokens: Tensor) -> Tensor:
        return self.down(self.activation(self.up(tokens)))


class PlainViT(VisionEncoder):
    """ViT up to the chosen layer.

    Later blocks are not built: they would be weights without a gradient.

    A subclass gives `patches`, a module from pixels to (B, cells, dim) in the order of the grid,
    and sets the class attributes below as published.

    Args:
        architecture: `image_size` and `patch_size` (one number per axis), `num_channels`,
            `hidden_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads`,
            `layer_norm_eps`; what is left out is the published size.
        layer: see `VolumeViTOptions`; a positive number counts blocks from the input.
        others: see `M3DCLIPOptions`.
    """

    can_drop_patches: ClassVar[bool] = True
    truncated_keys: ClassVar[tuple[str, ...]] = (r"^blocks\.\d+\.", r"^norm\.")

    published_sizes: ClassVar[Config]
    published_names: ClassVar[dict[str, str]] = {}
    """Own names of sizes to those of the published `config.json`."""
    block_norm: ClassVar[Literal["pre", "post"]] = "pre"
    block_activation: ClassVar[str] = "gelu"
    block_bias: ClassVar[QKVBias] = "full"
    eps: ClassVar[float] = 1e-5
    class_token_has_position: ClassVar[bool]
    interpolation: ClassVar[Literal["bicubic", "trilinear"]]
    """Interpolation of positions to another grid."""

    def __init__(
        self,
        *,
        architecture: Mapping[str, object],
        layer: int = -1,
        tokens: VisionTokens = "patch",
        norm: NormPlace = "before",
    ) -> None:
        super().__init__()
        sizes = {"layer_norm_eps": self.eps, **self.published_sizes, **architecture}
        depth = whole(sizes, "num_hidden_layers")
        count = depth + 1 + layer if layer < 0 else layer
        if not 1 <= count <= depth:
            raise RecipeError(
                f"layer {layer} does not exist in a tower of {depth} blocks; expected -{depth} to "
                f"{depth}, not 0"
            )
        if norm == "after" and count != depth:
            raise RecipeError(
                f"norm 'after' belongs to the last of the {depth} blocks, found layer {layer}; "
                "expected layer -1, or norm 'before'"
            )
        self.dim, self.tokens, self.depth = whole(sizes, "hidden_size"), tokens, depth
        self.patch_size = self._per_axis(sizes, "patch_size")
        self.native_grid = self._cells(self._per_axis(sizes, "image_size"))
        self.prefix = 0 if tokens == "patch" else 1
        self._told_grids: set[tuple[int, ...]] = set()

        self.channels = (whole(sizes, "num_channels"),)
        self.patches = self.embedding(*self.channels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.dim))
        cells = prod(self.native_grid) + self.class_token_has_position
        self.positions = nn.Parameter(torch.empty(1, cells, self.dim))
        self.blocks = nn.ModuleList(
            Block(
                self.dim,
                heads=whole(sizes, "num_attention_heads"),
                mlp_dim=whole(sizes, "intermediate_size"),
                norm=self.block_norm,
                activation=self.block_activation,
                bias=self.block_bias,
                eps=number(sizes, "layer_norm_eps"),
            )
            for _ in range(count)
        )
        self.norm = (
            nn.LayerNorm(self.dim, eps=number(sizes, "layer_norm_eps"))
            if norm == "after"
            else nn.Identity()
        )
        self._initialize()

    @abstractmethod
    def embedding(self, channels: int) -> nn.Module:
        """Return the module from pixels (B, channels, *spatial) to (B, cells, dim)."""

    def _initialize(self) -> None:
        for parameter in (self.cls_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Own size names, from own or published ones."""
        names = {own: cls.published_names.get(own, own) for own in cls.published_sizes}
        return {own: published[theirs] for own, theirs in names.items() if theirs in published}

    def _per_axis(self, sizes: Mapping[str, object], key: str) -> tuple[int, ...]:
        sides = (
            (whole(sizes, key),) * self.axes
            if isinstance(sizes[key], int)
            else tuple(wholes(sizes, key))
        )
        if len(sides) != self.axes:
            raise RecipeError(
                f"{type(self).__name__}: expected {self.axes} sizes, one an axis, found "
                f"{list(sides)}"
            )
        return sides

    def _cells(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        if len(spatial) != self.axes or any(
            n < p or n % p for n, p in zip(spatial, self.patch_size, strict=True)
        ):
            raise ValueError(
                f"{type(self).__name__}: expected an input of {self.axes} axes, multiples of "
                f"{self.patch_size}, found {spatial}"
            )
        return tuple(n // p for n, p in zip(spatial, self.patch_size, strict=True))

    def grid(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """One cell per patch; an empty grid for the class token alone."""
        cells = self._cells(spatial)
        return (0,) if self.tokens == "cls" else cells

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """pixels: (B, C, *spatial)."""
        spatial = tuple(pixels.shape[2:])
        cells = self._cells(spatial)
        positions = self._positions_for(cells)
        hidden = self.patches(pixels.to(self.cls_token.dtype))  # (B, cells, dim)
        cls_token = self.cls_token.expand(len(hidden), -1, -1)
        if self.class_token_has_position:
            hidden = torch.cat([cls_token, hidden], dim=1) + positions
        else:
            hidden = torch.cat([cls_token, hidden + positions], dim=1)
        hidden = self.sample_patches(hidden, prefix=1)
        grid = self.grid_of(spatial, hidden.shape[1] - 1)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden)  # (B, 1 + cells, dim)
        chosen = {"patch": hidden[:, 1:], "cls_patch": hidden, "cls": hidden[:, :1]}[self.tokens]
        return VisionFeatures(tokens=chosen, grid=grid, prefix=self.prefix)

    def _positions_for(self, cells: tuple[int, ...]) -> Tensor:
        """Return the learned positions, resampled where the grid is not the published one."""
        if cells == self.native_grid:
            return self.positions
        if cells not in self._told_grids:
            self._told_grids.add(cells)
            logger.warning(
                "position embeddings of grid %s are interpolated to %s", self.native_grid, cells
            )
        front = int(self.class_token_has_position)
        table = self.positions[:, front:].transpose(1, 2).unflatten(2, self.native_grid)
        # In float32: half precision has no cubic kernel on every device, and this runs once per
        # batch.
        table = F.interpolate(
            table.float(), size=cells, mode=self.interpolation, align_corners=False
        )
        placed = table.flatten(2).transpose(1, 2).to(self.positions.dtype)  # (1, cells, dim)
        return torch.cat([self.positions[:, :front], placed], dim=1)


class ImageViT(PlainViT):
    """A plain ViT over images whose patches are cut by a convolution with bias."""

    block_activation: ClassVar[str] = "gelu"
    eps: ClassVar[float] = 1e-6
    class_token_has_position: ClassVar[bool] = True
    interpolation: ClassVar[Literal["bicubic", "trilinear"]] = "bicubic"

    def embedding(self, channels: int) -> nn.Module:
        """A convolution whose stride is its kernel."""
        rows, columns = self.patch_size
        return nn.Sequential(
            nn.Conv2d(channels, self.dim, (rows, columns), stride=(rows, columns)),
            Rearrange("b d h w -> b (h w) d"),
        )

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | None = None,
    ) -> Config:
        """Squashed to a square, CLIP's mean and deviation; or what the published file says."""
        side = image_size or whole({**cls.published_sizes, **architecture}, "image_size")
        fields: Config = {
            "size": [side, side],
            "fit": "squash",
            "interpolation": "bicubic",
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        }
        if "do_center_crop" in published:
            fields["fit"] = "crop" if published["do_center_crop"] else "squash"
        return fields | published_fields(published)
