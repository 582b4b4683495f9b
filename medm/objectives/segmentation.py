"""Mask loss: cross-entropy and soft Dice, at sampled points or over the whole grid."""

from __future__ import annotations

from typing import Final

import torch
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn import functional as F

from medm.errors import RecipeError
from medm.objectives import AbsentTargets
from medm.objectives.base import Objective, Output
from medm.types import Batch

TARGETS: Final = "mask_targets"
"""Field of the batch with the masks to learn, (M, *grid) of 0 and 1; absent without masks."""
_INTERPOLATION: Final = {2: "bilinear", 3: "trilinear"}


class Segmentation(Objective):
    """Binary cross-entropy and soft Dice of each mask, 2-D and 3-D; a sum over masks.

    The Dice loss of a mask is 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), with p the sigmoid of
    the logits (Mask2Former, arXiv 2112.01527; weights of Sa2VA and UniBiomed: 2.0 and 0.5).

    With `points`, both are taken at points in place of voxels (PointRend, arXiv 1912.08193): of
    `oversample` times as many candidates, the most uncertain ones are `important` of the points,
    and the others are uniform. Logits and targets are interpolated at the points, so their grids
    may differ. Without `points` the logits are interpolated to the grid of the targets.

    Each mask draws its points from a generator of its own. In training its seed comes from torch's
    global random state of the CPU, one number a mask in the order of the batch: checkpoints hold
    that state, so a resumed run continues bit for bit, and micro-batches draw what the whole batch
    draws as long as the model itself draws nothing. Without gradients the seed is fixed: an
    evaluation loss depends on the weights and the masks alone, and an evaluation leaves the random
    state of the training as it is.

    Arithmetic is in fp32. A batch without masks gives 0 with a graph to the model's output.

    Args:
        options: see `SegmentationOptions`.
    """

    term = "masks"

    def __init__(
        self,
        *,
        bce: float = 2.0,
        dice: float = 0.5,
        presence: float = 0.0,
        quality: float = 0.0,
        absent: AbsentTargets = "learn",
        points: int | None = 12544,
        oversample: int = 3,
        important: float = 0.75,
    ) -> None:
        self.bce, self.dice, self.presence, self.quality = bce, dice, presence, quality
        self.absent = absent
        self.points, self.oversample, self.important = points, oversample, important
        self._dice = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, reduction="none")

    @property
    def reads(self) -> frozenset[str]:
        quality = {"mask_quality"} if self.quality else set()
        return frozenset({"mask_logits", "mask_presence", *quality})

    def count(self, batch: Batch) -> Tensor:
        """Return the masks of the batch, those of absent targets included."""
        targets = batch.get(TARGETS)
        if targets is not None:
            return torch.tensor(len(targets), device=targets.device)
        device = next((v.device for v in batch.values() if isinstance(v, Tensor)), None)
        return torch.tensor(0, device=device)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the weighted sum over masks. Raises `RecipeError` where targets do not fit."""
        logits, presence = output["mask_logits"], output["mask_presence"]
        quality = output.get("mask_quality")
        targets = self._targets(batch, logits)
        with torch.autocast(logits.device.type, enabled=False):
            # Every output takes part, whatever its weight: DDP waits for each trained parameter.
            total = 0.0 * (logits.float().sum() + presence.float().sum())
            if quality is not None:
                total = total + 0.0 * quality.float().sum()
            if targets is None:
                return total
            present = targets.flatten(1).any(dim=1)  # (M,)
            learned = torch.ones_like(present) if self.absent == "learn" else present
            total = total + (learned * self.mask_losses(logits.float(), targets.float())).sum()
            if self.presence:
                total = total + self.presence * F.binary_cross_entropy_with_logits(
                    presence.float(), present.float(), reduction="sum"
                )
            if self.quality and quality is not None:
                errors = (quality.float() - _iou(logits.float(), targets)) ** 2
                total = total + self.quality * (learned * errors).sum()
            return total

    def mask_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted cross-entropy and Dice loss of each mask.

        Args:
            logits: (M, *grid).
            targets: (M, *grid) of 0 and 1, perhaps on another grid.

        Returns:
            (M,), in the order of the masks.
        """
        if self.points is None:
            logits, targets = _resized(logits, targets.shape[1:]).flatten(1), targets.flatten(1)
        else:
            coords = self.sample_points(logits, _seeds(len(logits)))  # (M, points, axes)
            logits, targets = sample(logits, coords), sample(targets, coords)  # (M, points)
        entropies = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        dice: Tensor = self._dice(logits.unsqueeze(1), targets.unsqueeze(1)).flatten()
        return self.bce * entropies.mean(dim=1) + self.dice * dice

    @torch.no_grad()
    def sample_points(self, logits: Tensor, seeds: Tensor) -> Tensor:
        """Draw the points of each mask: the most uncertain candidates, then uniform ones.

        Args:
            logits: (M, *grid).
            seeds: (M,) int64, on the CPU.

        Returns:
            (M, points, axes) in 0..1 from face to face of the grid; x first, as `grid_sample`.
        """
        if self.points is None:
            raise ValueError("points is null: the loss covers the grid, and no points are drawn")
        candidates = self.points * self.oversample
        uncertain = int(self.points * self.important)
        axes, device = logits.dim() - 1, logits.device
        drawn = torch.stack(
            [
                torch.rand(
                    candidates + self.points - uncertain,
                    axes,
                    generator=torch.Generator(device).manual_seed(seed),
                    device=device,
                )
                for seed in seeds.tolist()
            ]
        )
        coords, uniform = drawn[:, :candidates], drawn[:, candidates:]
        certainty = sample(logits, coords).abs()  # (M, candidates)
        chosen = certainty.topk(uncertain, dim=1, largest=False).indices
        coords = coords.gather(1, chosen.unsqueeze(-1).expand(-1, -1, axes))
        return torch.cat([coords, uniform], dim=1)

    def _targets(self, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the masks of the batch, None without any. Raises `RecipeError`."""
        targets: Tensor | None = batch.get(TARGETS)
        shape = None if targets is None else targets.shape
        count = shape[0] if shape else 0
        if count != len(logits) or (shape and count and len(shape) != logits.dim()):
            found = f"shape {tuple(shape)}" if shape else "none"
            raise RecipeError(
                f"segmentation: expected the batch field {TARGETS!r} with one mask for each of "
                f"{len(logits)} logits of shape {tuple(logits.shape)}, found {found}; the masks of "
                "a record and the [SEG] of its replies must agree"
            )
        return targets if count else None


def sample(values: Tensor, coords: Tensor) -> Tensor:
    """Interpolate each map at its own points; beyond the outer voxel centers it is constant.

    Mask2Former takes zeros beyond the grid there, which blurs masks that touch the border.

    Args:
        values: (M, *grid), floating point.
        coords: (M, points, axes) in 0..1 from face to face, x first.

    Returns:
        (M, points).
    """
    ones = [1] * (coords.shape[2] - 1)
    places = (2 * coords - 1).unflatten(1, (-1, *ones))  # (M, points, 1.., axes)
    found = F.grid_sample(
        values.unsqueeze(1), places, mode="bilinear", padding_mode="border", align_corners=False
    )  # (M, 1, points, 1..)
    return found.flatten(1)


def _seeds(count: int) -> Tensor:
    """Return the seed of each mask's points, (count,): drawn in training, fixed in evaluation."""
    if not torch.is_grad_enabled():
        return torch.zeros(count, dtype=torch.int64)
    return torch.randint(2**62, (count,))


def _resized(logits: Tensor, grid: torch.Size) -> Tensor:
    """Interpolate (M, *grid) to another grid with the same faces."""
    if logits.shape[1:] == grid:
        return logits
    mode = _INTERPOLATION[len(grid)]
    return F.interpolate(logits.unsqueeze(1), grid, mode=mode, align_corners=False).squeeze(1)


@torch.no_grad()
def _iou(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the IoU of each mask that the logits describe, (M,); 1 where both are empty."""
    masks, wanted = _resized(logits, targets.shape[1:]).flatten(1) > 0, targets.flatten(1) > 0
    union = (masks | wanted).sum(dim=1)
    overlap = (masks & wanted).sum(dim=1)
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)
