"""Prompts of the SAM family: points and positions as tokens, and the best of several masks."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from medm.heads.base import Points


def position_tokens(coords: Tensor, matrix: Tensor) -> Tensor:
    """Return random Fourier features of places.

    Computed in float32, also under autocast: eight bits of mantissa cannot tell neighboring pixels
    of a large image apart.

    Args:
        coords: (..., 2), x and y in 0..1.
        matrix: (2, D / 2), Gaussian.

    Returns:
        (..., D), in the precision of `matrix`.
    """
    coords, wide = 2 * coords.float() - 1, matrix.float()
    # Sums of products, because autocast would run a matrix product in half precision.
    angles = 2 * pi * (coords[..., :1] * wide[0] + coords[..., 1:] * wide[1])
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(matrix.dtype)


def image_positions(grid: tuple[int, int], matrix: Tensor) -> Tensor:
    """Return the positions (1, D, *grid) of the centers of the cells of an image."""
    rows, columns = (
        (torch.arange(size, device=matrix.device, dtype=torch.float32) + 0.5) / size
        for size in grid
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return position_tokens(torch.stack([x, y], dim=-1), matrix).permute(2, 0, 1).unsqueeze(0)


def point_tokens(
    points: Points,
    image: tuple[int, int],
    *,
    matrix: Tensor,
    labels: Tensor,
    padding: Tensor,
    pad: bool,
) -> Tensor:
    """Return the tokens of points and corners of boxes.

    Args:
        points: M prompts of P points each.
        image: rows and columns of the input.
        matrix: see `position_tokens`.
        labels: (4, D), embeddings of the labels 0 to 3.
        padding: (1, D), embedding of a place that is no point.
        pad: append one such place.

    Returns:
        (M, P, D), or (M, P + 1, D) with `pad`.

    Raises:
        ValueError: shapes or labels that are no points.
    """
    coords, kinds = points
    if coords.ndim != 3 or coords.shape[-1] != 2 or kinds.shape != coords.shape[:2]:
        raise ValueError(
            "points: expected coordinates (M, P, 2) in rows and columns, and labels (M, P); found "
            f"{tuple(coords.shape)} and {tuple(kinds.shape)}"
        )
    if kinds.numel() and not (int(kinds.min()) >= -1 and int(kinds.max()) < len(labels)):
        raise ValueError(
            f"points: expected labels -1 to {len(labels) - 1}, found "
            f"{sorted(set(kinds.flatten().tolist()))}"
        )
    size = coords.new_tensor([image[1], image[0]], dtype=torch.float32)
    # A coordinate names the center of a pixel; the grid of positions begins at its corner.
    tokens = position_tokens((coords.flip(-1).float() + 0.5) / size, matrix)  # (M, P, D)
    tokens = torch.where(
        (kinds < 0).unsqueeze(-1), padding, tokens + labels[kinds.clamp(min=0)].to(tokens.dtype)
    )
    if pad:
        tokens = torch.cat([tokens, padding.expand(len(tokens), 1, -1)], dim=1)
    return tokens


def best_candidate(logits: Tensor, quality: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each prompt the candidate with the highest predicted IoU.

    Args:
        logits: (M, K, rows, columns).
        quality: (M, K).

    Returns:
        Logits (M, rows, columns), quality (M,), and its number (M,) among the K.
    """
    best = quality.argmax(dim=1)  # (M,)
    prompts = torch.arange(len(best), device=best.device)
    return logits[prompts, best], quality[prompts, best], best
