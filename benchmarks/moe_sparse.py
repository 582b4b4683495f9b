"""How much faster the sparse gate is for running only the experts that were chosen.

    python -m benchmarks.moe_sparse [--dim 512] [--out 1024] [--tokens 144] [--batch 4] [--device cpu]

Both sides are the same connector with the same weights and top 2; the peer runs every expert on every token and
multiplies with zeros, as the published code does. The two are checked to give the same numbers before each ratio.
Rounds are interleaved (peer, ours, ours, peer), and the figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from medm.connectors.moe import MoEConnector
from medm.types import VisionFeatures

ROUNDS = 5


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of one run, with the device waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(connector: MoEConnector, features: VisionFeatures, *, backward: bool) -> float:
    """Time of all experts over time of the chosen ones."""

    def run(mix: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.set_grad_enabled(backward):
            weights, _ = connector.router(features.tokens, None)
            mixed = mix(features.tokens, weights)
            if backward:
                mixed.square().mean().backward()
        return mixed.detach()

    peer, ours = connector._mix_all, connector._mix_chosen
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[features.tokens.dtype]
    torch.testing.assert_close(run(ours), run(peer), atol=tolerance, rtol=tolerance)
    device = features.tokens.device.type
    ratios = []
    for _ in range(ROUNDS):
        times = [seconds(lambda side=side: run(side), device) for side in (peer, ours, ours, peer)]  # type: ignore[misc]
        ratios.append((times[0] + times[3]) / (times[1] + times[2]))
    return statistics.median(ratios)


def main() -> None:
    """Print one line for each number of experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("dim", 512), ("out", 1024), ("tokens", 144), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    print(f"{arguments}, {dtype}, top 2; time of all experts / time of the chosen ones")
    for experts in (4, 8, 16):
        torch.manual_seed(0)
        with torch.device(arguments.device):
            grid = (1, arguments.tokens)
            connector = MoEConnector(
                in_dim=arguments.dim, out_dim=arguments.out, grid=grid, num_experts=experts, gate="sparse", top_k=2
            ).to(dtype)
            features = VisionFeatures(torch.randn(arguments.batch, arguments.tokens, arguments.dim, dtype=dtype), grid)
        forward, training = (ratio(connector, features, backward=backward) for backward in (False, True))
        print(f"{experts:3} experts: forward {forward:5.2f} x, forward and backward {training:5.2f} x")


if __name__ == "__main__":
    main()
