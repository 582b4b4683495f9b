"""Vision towers and connectors on two processes whose weights are spread over both (ZeRO-3), run by
test_zero3.py.

The two processes route to different experts, and to none of the same in the last step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from medm.connectors.moe import MoEConnector
from medm.connectors.pooling import AttentionPoolingConnector
from medm.distributed import end_rank, leave_group
from medm.encoders.eva_clip import EVACLIPEncoder
from medm.encoders.volume_vit import M3DCLIPEncoder

STEPS, LR = 3, 1e-2
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TASKS = ["a", "b", "c"]
ROUTED = [([0, 0], [1, 1]), ([2, 1], [0, 0]), ([-1, -1], [2, 2])]
"""Tasks of each step: of the first process's items, and of the second's."""


class Towers(nn.Module):
    """Everything that owns weights outside a linear layer, or runs its layers only for some
    tokens."""

    def __init__(self) -> None:
        super().__init__()
        volume = {"image_size": [8, 16, 16], "patch_size": [4, 8, 8]}
        self.volume = M3DCLIPEncoder(architecture=SIZES | volume, norm="after")
        self.image = EVACLIPEncoder(
            architecture=SIZES | {"image_size": 16, "patch_size": 8}, ln_vision="learned"
        )
        sizes = {"in_dim": 24, "out_dim": 16, "grid": (2, 2, 2), "tasks": TASKS, "num_experts": 3}
        self.hard = MoEConnector(**sizes, gate="hard")
        self.sparse = MoEConnector(**sizes, gate="sparse", route_by="task+token", mode="paper")
        self.attention = AttentionPoolingConnector(in_dim=24, out_dim=16, grid=(2, 2), heads=2)

    def forward(self, volumes: Tensor, task_ids: Tensor) -> Tensor:
        seen = self.volume(volumes)
        outputs = (
            self.hard(seen, task_ids),
            self.sparse(seen, task_ids),
            self.attention(self.image(volumes[:, :, 0].expand(-1, 3, -1, -1))),
        )
        return torch.stack([(output - 1).square().mean() for output in outputs]).sum()


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Two items of one process."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2, 1, 8, 16, 16, generator=generator), torch.tensor(ROUTED[step][rank])


def towers() -> Towers:
    torch.manual_seed(0)
    return Towers()


def main(folder: Path) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    model = towers()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    losses = []
    for step in range(STEPS):
        loss = engine(*batch(step, rank))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    (folder / f"{rank}.json").write_text(json.dumps(losses))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if rank == 0:
            torch.save(
                {name: value.detach().clone() for name, value in model.named_parameters()},
                folder / "final.pt",
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_group()
    end_rank(0)
