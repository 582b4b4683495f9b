"""Masks of a grounded reply: SAM 2 prompted by the states at several `[SEG]` of an image."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Sam2Config, Sam2Model

from benchmarks.harness import Cell, Figure, GateError, Ratio
from benchmarks.memory import peak_bytes
from medm.heads.sam2 import HIERA, Sam2Head

IMAGES, MASKS, SIDE = 1, 8, 512
"""Images, masks an image, and pixels of a side, as MedSAM2 takes them."""
TOLERANCE = 1e-4
"""Of a logit against the largest of its mask: batched convolutions add in another order."""


class _Workload:
    """A head with random weights, and transformers' model with the same modules."""

    def __init__(
        self,
        *,
        images: int = IMAGES,
        masks: int = MASKS,
        side: int = SIDE,
        channels: list[int] | None = None,
        **backbone: Any,
    ) -> None:
        torch.manual_seed(0)
        self.masks = masks
        vision: Any = {**HIERA["tiny"]}
        vision["backbone_config"] = {
            **vision["backbone_config"], "image_size": [side, side], **backbone,
        }  # fmt: skip
        if channels is not None:
            vision["backbone_channel_list"] = channels
        vision["backbone_feature_sizes"] = [[side // stride] * 2 for stride in (4, 8, 16)]
        architecture: dict[str, Any] = {
            "vision_config": vision,
            "prompt_encoder_config": {"image_size": side},
        }
        self.head = Sam2Head(architecture=architecture).eval()
        self.stock = Sam2Model(Sam2Config(**architecture)).eval()
        self.stock.vision_encoder = self.head.encoder
        for name in (
            "prompt_encoder", "mask_decoder", "shared_image_embedding", "no_memory_embedding",
        ):  # fmt: skip
            setattr(self.stock, name, getattr(self.head.decoder, name))
        with torch.no_grad():
            self.head.decoder.no_memory_embedding.normal_()
        self.pixels = torch.randn(images, 3, side, side)
        self.prompts = torch.randn(images * masks, self.head.dim)
        self.items = torch.arange(images).repeat_interleave(masks)

    @torch.no_grad()
    def ours(self, pixels: Tensor, prompts: Tensor, items: Tensor) -> Tensor:
        """(M, rows, columns): each image is encoded once, and all its masks are decoded at once."""
        return self.head.decode(self.head.encode(pixels), prompts, items).logits

    def run_ours(self) -> float:
        """Every image by itself, as inference does."""
        for image, prompts in zip(self.pixels, self.prompts.split(self.masks), strict=True):
            self.ours(image[None], prompts, torch.zeros(len(prompts), dtype=torch.int64))
        return len(self.prompts)

    @torch.no_grad()
    def published(self, image: Tensor, prompt: Tensor) -> Tensor:
        """(rows, columns): the image is encoded for one `[SEG]`, whose state is a prompt token
        behind two tokens that are no point (`predict_forward` of UniBiomed and Sa2VA).
        """
        *fine, coarse = self.stock.get_image_embeddings(image[None])
        nothing = torch.zeros(1, 1, 1, 2), -torch.ones(1, 1, 1, dtype=torch.int64)
        sparse, dense = self.stock.prompt_encoder(*nothing, None, None)
        masks, quality, *_ = self.stock.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=self.stock.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=torch.cat([sparse, prompt.view(1, 1, 1, -1)], dim=2),
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=fine,
        )
        return masks[0, 0, quality[0, 0].argmax()]

    def run_published(self) -> float:
        """One `[SEG]` after the other."""
        for item, prompt in zip(self.items.tolist(), self.prompts, strict=True):
            self.published(self.pixels[item], prompt)
        return len(self.prompts)

    def check_same(self) -> str:
        """Compare every logit of every mask. Raises `GateError`."""
        ours = self.ours(self.pixels, self.prompts, self.items)
        largest = 0.0
        for mask, item, prompt in zip(ours, self.items.tolist(), self.prompts, strict=True):
            wanted = self.published(self.pixels[item], prompt)
            off = (mask - wanted).abs().max() / wanted.abs().max()
            largest = max(largest, float(off))
        if largest > TOLERANCE:
            raise GateError(f"logits differ by {largest:.1e} of the largest of their mask")
        if not ours[0].allclose(ours[1], rtol=1e-3):
            return f"{len(ours)} masks: logits differ by {largest:.1e} of the largest"
        raise GateError("the masks of two prompts are equal: nothing is proven")


@cache
def workload() -> _Workload:
    """Shared by the cells."""
    return _Workload()


class _MaskCell(Cell):
    @property
    def setting(self) -> dict[str, Any]:
        return {
            "head": "sam2, Hiera tiny, random weights",
            "image": f"{SIDE} px",
            "images": IMAGES,
            "masks an image": MASKS,
            "dtype": "float32",
        }

    def gate(self) -> str:
        """Both give the same logits."""
        return workload().check_same()


class MasksASecond(_MaskCell, Ratio):
    """P17: masks of replies with several `[SEG]`."""

    name, title, peer = "P17", "masks/s, 8 [SEG] an image", "transformers, image encoded per [SEG]"
    targets: ClassVar = {"cpu": 3.0}

    def run_peer(self) -> float:
        return workload().run_published()

    def run_ours(self) -> float:
        return workload().run_ours()


class MaskMemory(_MaskCell, Figure):
    """Peak memory above the weights of an image and its masks decoded at once, over one mask."""

    name, title, at_most = "P17-memory", "peak memory above weights, 8 masks at once", True
    peer = "transformers, one mask"
    targets: ClassVar = {"cpu": 2.0}

    def values(self, rounds: int) -> list[float]:
        load = workload()
        image, prompts = load.pixels[:1], load.prompts[: load.masks]
        items = torch.zeros(len(prompts), dtype=torch.int64)
        ratios = []
        for _ in range(min(rounds, 3)):  # an allocation is counted, not timed
            peer = peak_bytes(lambda: load.published(image[0], prompts[0]))
            ratios.append(peak_bytes(lambda: load.ours(image, prompts, items)) / peer)
        return ratios
