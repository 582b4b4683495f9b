"""Speedup of the sparse gate, which runs only the selected experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.harness import GateError, Ratio
from medm.connectors.moe import MoEConnector
from medm.types import VisionFeatures


class EightExperts(Ratio):
    """M8: forward and backward; the peer runs every expert on every token and multiplies with
    zeros, as published.
    """

    name, title, peer = "M8", "sparse gate, 8 experts, top 2", "every expert, zeros for the others"
    targets: ClassVar = {"cpu": 1.0, "h200": 1.0}
    experts: ClassVar[int] = 8
    dim, out, tokens, batch = 512, 1024, 144, 4

    @property
    def setting(self) -> dict[str, Any]:
        return {
            "experts": self.experts,
            "width": f"{self.dim} to {self.out}",
            "tokens": f"{self.batch} x {self.tokens}",
        }

    @cached_property
    def inputs(self) -> tuple[MoEConnector, VisionFeatures]:
        """The connector, and features in place of an encoder's output."""
        device, dtype = (
            ("cuda", torch.bfloat16) if self.profile == "h200" else ("cpu", torch.float32)
        )
        torch.manual_seed(0)
        grid = (1, self.tokens)
        connector = MoEConnector(
            in_dim=self.dim,
            out_dim=self.out,
            grid=grid,
            num_experts=self.experts,
            gate="sparse",
            top_k=2,
        ).to(device, dtype)
        return connector, VisionFeatures(
            torch.randn(self.batch, self.tokens, self.dim, device=device, dtype=dtype), grid
        )

    def gate(self) -> str:
        connector, _ = self.inputs
        ours, theirs = self._run(connector._mix_chosen), self._run(connector._mix_all)
        difference = float((ours - theirs).abs().max())
        if difference > (3e-2 if self.profile == "h200" else 1e-5):
            raise GateError(f"largest difference {difference:.1e}")
        return f"largest difference {difference:.1e}"

    def run_peer(self) -> float:
        self._run(self.inputs[0]._mix_all)
        return self.batch

    def run_ours(self) -> float:
        self._run(self.inputs[0]._mix_chosen)
        return self.batch

    def _run(self, mix: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        connector, features = self.inputs
        connector.zero_grad(set_to_none=True)
        weights, _ = connector.router(features.tokens, None)
        mixed = mix(features.tokens, weights)
        mixed.square().mean().backward()
        return mixed.detach()


class SixteenExperts(EightExperts):
    """M16."""

    name, title = "M16", "sparse gate, 16 experts, top 2"
    experts: ClassVar[int] = 16
