"""The first stage of training, with a frozen encoder that runs every epoch, or once."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.harness import Cell, GateError, Ratio
from benchmarks.workloads import WORKLOADS
from medm.models.lvlm.configuration import LVLMConfig
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.types import IGNORE_INDEX

PLACEHOLDER = 1


class FirstStage(Ratio, Cell):
    """P10: the second epoch of captions of volumes, 32 slices through a 2-D encoder; only the
    connector is trained.
    """

    name, title, peer = "P10", "stage-1 samples/s with a feature cache", "the same without"
    targets: ClassVar = {"cpu": 3.0, "h200": 2.0}
    workloads: ClassVar[dict[str, str]] = {"cpu": "tiny", "h200": "0.5B"}
    slices, tokens, caption, batch = 32, 64, 60, 4

    @property
    def setting(self) -> dict[str, Any]:
        return {
            "workload": self.workloads[self.profile],
            "slices": f"{self.slices} of 256x256",
            "vision tokens": self.tokens,
            "caption": self.caption,
            "batch": self.batch,
        }

    @cached_property
    def model(self) -> LVLMForConditionalGeneration:
        """Slices through SigLIP, pooled to `tokens`."""
        sizes = WORKLOADS[self.workloads[self.profile]]
        side = 256  # slices of a real size, whatever pictures the workload has
        vision = {**sizes.vision, "image_size": side, "patch_size": 16}
        torch.manual_seed(0)
        config = LVLMConfig(
            text_config={"model_type": "llama", **sizes.text},
            branches={
                "volume": {
                    "encoder": {
                        "name": "slices", "architecture": {},
                        "encoder": {"name": "siglip", "architecture": vision, "layer": -1, "tokens": "patch"},
                    },
                    "connector": {"name": "attention-pooling", "depth": 2, "queries": self.tokens},
                    "channels": 3, "spatial": [self.slices, side, side], "placeholder_id": PLACEHOLDER,
                }
            },
        )  # fmt: skip
        cuda = self.profile == "h200"
        model = LVLMForConditionalGeneration(config).to(
            "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32
        )
        model.requires_grad_(False)
        model.parts()["volume.connector"].requires_grad_(True)
        return model.train()

    @cached_property
    def batches(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same samples with pixels, and with what the encoder made of them."""
        model, rng = self.model, np.random.default_rng(0)
        branch = model.branch("volume")
        vocabulary = model.config.get_text_config().vocab_size
        text = rng.integers(2, vocabulary, (self.batch, self.caption))
        ids = np.concatenate([np.full((self.batch, branch.num_tokens), PLACEHOLDER), text], axis=1)
        labels = np.concatenate(
            [np.full((self.batch, branch.num_tokens), IGNORE_INDEX), text], axis=1
        )
        device = next(model.parameters()).device
        shared = {
            "input_ids": torch.from_numpy(ids).to(device),
            "labels": torch.from_numpy(labels).to(device),
        }
        pixels = torch.randn(self.batch, 3, *branch.spatial, device=device)
        with torch.no_grad():
            tokens = branch.encode(pixels).tokens
        return shared | {"pixels": {"volume": pixels}}, shared | {"features": {"volume": tokens}}

    def _step(self, batch: dict[str, Any]) -> float:
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**batch).loss
        loss.backward()
        return float(loss.detach())

    def gate(self) -> str:
        plain, kept = (self._step(batch) for batch in self.batches)
        if abs(plain - kept) > (2e-3 if self.profile == "h200" else 1e-5):
            raise GateError(f"losses {plain:.6f} and {kept:.6f}")
        return f"losses {plain:.6f} and {kept:.6f}"

    def run_peer(self) -> float:
        self._step(self.batches[0])
        return self.batch

    def run_ours(self) -> float:
        self._step(self.batches[1])
        return self.batch
