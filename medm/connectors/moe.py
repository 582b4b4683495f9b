"""Mixture-of-experts connector (Uni-Med, arXiv 2409.17508).

Several MLPs, and a router that weighs them per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medm.connectors import Activation, Gate, Method, Mode, RouteBy, UnseenTask
from medm.connectors.base import Connector
from medm.connectors.mlp import build_mlp
from medm.connectors.windows import Windows
from medm.errors import RecipeError
from medm.types import VisionFeatures

PAPER_ROUTER_FACTOR = 4
"""Hidden width of the paper's router, as a multiple of its input."""
CORRECTED_ROUTER_DIM = 256
CORRECTED_TASK_DIM = 64
LARGEST_LOGIT = 1e4
"""Half precision can overflow to infinity before the gate; beyond this the weights are 0 and 1
anyway."""
UNSEEN = "(unseen)"
"""Key of the routing weights of items without a known task."""


class Router(nn.Module):
    """Routing weights of the experts for each token, from the token, its task, or both.

    Args:
        dim: width of the visual tokens.
        num_tasks: length of `tasks`.
        others: see `MoEOptions`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        gate: Gate,
        route_by: RouteBy,
        mode: Mode,
        top_k: int,
        num_tasks: int,
        unseen_task: UnseenTask,
        task_dim: int | None,
        router_dim: int | None,
    ) -> None:
        super().__init__()
        self.num_experts, self.gate, self.route_by, self.mode, self.top_k = (
            num_experts,
            gate,
            route_by,
            mode,
            top_k,
        )
        self.num_tasks, self.unseen_task = num_tasks, unseen_task
        self.learned = gate in ("soft", "sparse")
        self.needs_task = gate == "hard" or (self.learned and route_by != "token")
        self.task_tokens: nn.Parameter | None = None
        self.layers: nn.Sequential | None = None
        if not self.learned:
            return
        in_dim = dim if route_by != "task" else 0
        if route_by != "token":
            task_dim = task_dim or (dim if mode == "paper" else CORRECTED_TASK_DIM)
            in_dim += task_dim
            self.task_tokens = nn.Parameter(torch.empty(num_tasks, task_dim).normal_(std=0.02))
        hidden = router_dim or (
            PAPER_ROUTER_FACTOR * in_dim if mode == "paper" else CORRECTED_ROUTER_DIM
        )
        self.layers = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, num_experts)
        )

    def forward(self, tokens: Tensor, task_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return routing weights (B, N, experts) and the load-balance loss or None.

        The weights are float32 and sum to 1 over the experts.

        Args:
            tokens: (B, N, dim).
            task_ids: (B,), positions in the list of tasks; a larger number is an unseen task; a
                negative one a dummy item, which takes the mean of the tasks and whose output has no
                effect.
        """
        constant = tokens.new_full(
            (*tokens.shape[:2], self.num_experts), 1 / self.num_experts, dtype=torch.float32
        )
        if self.gate == "constant":
            return constant, None
        known: Tensor | None = None
        unseen: Tensor | None = None
        loss: Tensor | None = None
        if self.needs_task:
            known, unseen = self._known(task_ids, tokens)
        if self.gate == "hard" and known is not None and unseen is not None:
            weights = self._one_hot(known, unseen)[:, None]
        else:
            weights, loss = self._normalize(self._logits(tokens, known, unseen))
        weights = weights.expand_as(constant)
        if unseen is not None and self.unseen_task == "constant":
            weights = torch.where(unseen[:, None, None], constant, weights)
        return weights, loss

    def _known(self, task_ids: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the task ids (B,), 0 for unseen tasks, and a mask (B,) of the unseen ones."""
        if task_ids is None:
            known = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
            unseen = torch.ones_like(known, dtype=torch.bool)
        else:
            unseen = (task_ids < 0) | (task_ids >= self.num_tasks)
            known = task_ids.masked_fill(unseen, 0)
        wrong = unseen if task_ids is None else task_ids >= self.num_tasks
        if self.unseen_task == "error" and wrong.device.type != "cpu":
            torch._assert_async(
                ~wrong.any()
            )  # the data was checked before; a step does not wait for it
        elif self.unseen_task == "error" and bool(wrong.any()):
            found = "no task at all" if task_ids is None else f"ids {task_ids[wrong].tolist()}"
            raise ValueError(
                f"moe: {int(wrong.sum())} of {len(wrong)} items have a task that the router does "
                f"not know ({found}; known are 0 to {self.num_tasks - 1}); name their task, or "
                "set unseen_task to 'mean' or 'constant'"
            )
        return known, unseen

    def _one_hot(self, known: Tensor, unseen: Tensor) -> Tensor:
        """Return (B, experts): 1 for the expert of the task.

        An unseen task gets the mean over the tasks.
        """
        table = torch.eye(self.num_tasks, self.num_experts, device=known.device)
        return torch.where(unseen[:, None], table.mean(dim=0), table[known])

    def _logits(self, tokens: Tensor, known: Tensor | None, unseen: Tensor | None) -> Tensor:
        """Return the logits (B, N, experts), or (B, 1, experts) when routing by task alone."""
        assert self.layers is not None
        inputs = tokens
        if self.task_tokens is not None and known is not None and unseen is not None:
            task = torch.where(
                unseen[:, None], self.task_tokens.mean(dim=0), self.task_tokens[known]
            )[:, None]
            # The task token comes first, as in the paper.
            alone = self.route_by == "task"
            inputs = (
                task if alone else torch.cat([task.expand(-1, tokens.shape[1], -1), tokens], dim=-1)
            )
        return self.layers(inputs).float().clamp(-LARGEST_LOGIT, LARGEST_LOGIT)

    def _normalize(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return routing weights from logits, and the load-balance loss of the corrected mode."""
        if self.gate == "sparse":
            kept, experts = logits.topk(self.top_k, dim=-1)
            chosen = kept.softmax(dim=-1)
            if self.top_k == 1 and self.mode == "corrected":
                # The softmax of one number is 1 for any logit, so the router would get no gradient.
                # The value stays 1, the gradient is that of the probability.
                best = logits.softmax(dim=-1).gather(-1, experts)
                chosen = best / best.detach()
            weights = torch.zeros_like(logits).scatter(-1, experts, chosen)
        elif self.mode == "paper":
            # sigmoid(z) / sum(sigmoid(z)) through logarithms: the quotient itself is 0/0 once all
            # sigmoids vanish.
            weights = F.logsigmoid(logits).softmax(dim=-1)
        else:
            weights = logits.softmax(dim=-1)
        if self.mode == "paper" or not (self.training and torch.is_grad_enabled()):
            return weights, None
        # Switch Transformer (arXiv 2101.03961), eq. 4: 1 when all experts are used equally, larger
        # otherwise.
        probability = logits.softmax(dim=-1).flatten(0, 1).mean(dim=0)
        used = (weights != 0).float() / self.top_k if self.gate == "sparse" else weights
        return weights, self.num_experts * (used.flatten(0, 1).mean(dim=0) * probability).sum()


class MoEConnector(Connector):
    """Experts of the same shape, mixed for each token with the routing weights.

    Uni-Med as in the paper: `num_experts=5, gate="soft", route_by="task+token", mode="paper",
    resample="projection", window=[1, 4]` and the tasks vqa, refer, identify, caption, cls.
    A dense baseline of equal size is `gate="constant"`.

    Args:
        in_dim, out_dim, grid, prefix: see `Connector`.
        others: see `MoEOptions`.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        grid: tuple[int, ...],
        prefix: int = 0,
        num_experts: int = 5,
        gate: Gate = "soft",
        route_by: RouteBy = "token",
        mode: Mode = "corrected",
        top_k: int = 2,
        tasks: Sequence[str] = (),
        unseen_task: UnseenTask = "error",
        task_dim: int | None = None,
        router_dim: int | None = None,
        resample: Literal["none"] | Method = "none",
        window: int | Sequence[int] = 2,
        depth: int = 2,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, grid=grid, prefix=prefix)
        self.windows = (
            None if resample == "none" else Windows(resample, window, grid, connector="moe")
        )
        width = in_dim if self.windows is None else self.windows.width(in_dim)
        if gate == "sparse" and top_k > num_experts:
            raise RecipeError(f"moe: top_k {top_k} asks for more than the {num_experts} experts")
        self.router = Router(
            width,
            num_experts=num_experts,
            gate=gate,
            route_by=route_by,
            mode=mode,
            top_k=top_k,
            num_tasks=len(tasks),
            unseen_task=unseen_task,
            task_dim=task_dim,
            router_dim=router_dim,
        )
        self.needs_task = self.router.needs_task
        self.refuses_unseen_tasks = self.needs_task and unseen_task == "error"
        if self.needs_task and not tasks:
            raise RecipeError(
                "moe: this gate routes by task, and there is no list of tasks; give 'tasks'"
            )
        if gate == "hard" and num_experts < len(tasks):
            raise RecipeError(
                f"moe: gate 'hard' needs one expert per task; {num_experts} experts for tasks "
                f"{list(tasks)}"
            )
        self.experts = nn.ModuleList(
            build_mlp(width, out_dim, depth=depth, activation=activation)
            for _ in range(num_experts)
        )
        self.tasks = tuple(tasks)
        self._skips = gate in ("sparse", "hard")
        self._losses: dict[str, Tensor] = {}
        self._weight_sums: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """One per window, or one per token of the encoder."""
        return super().num_tokens if self.windows is None else self.windows.count

    def forward(self, features: VisionFeatures, task_ids: Tensor | None = None) -> Tensor:
        """See `Connector`."""
        tokens = (
            features.tokens if self.windows is None else self.windows(features)
        )  # (B, N, width)
        weights, loss = self.router(tokens, task_ids)  # (B, N, experts)
        self._losses = {} if loss is None else {"load_balance": loss}
        self._record(weights.detach(), task_ids)
        return self._mix_chosen(tokens, weights) if self._skips else self._mix_all(tokens, weights)

    def _mix_all(self, tokens: Tensor, weights: Tensor) -> Tensor:
        mixed = None
        for i, expert in enumerate(self.experts):
            part = expert(tokens)  # (B, N, out_dim)
            part = part * weights[..., i, None].to(part.dtype)
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return mixed

    def _mix_chosen(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Run each expert on the tokens routed to it.

        An expert without tokens runs on an empty batch, at no cost, so that all ranks call the same
        modules under ZeRO-3.
        """
        flat, weights = tokens.flatten(0, 1), weights.flatten(0, 1)  # (T, width), (T, experts)
        mixed = None
        for i, expert in enumerate(self.experts):
            rows = weights[:, i].nonzero().squeeze(1)
            part = expert(flat[rows])
            part = part * weights[rows, i, None].to(part.dtype)
            mixed = part.new_zeros(len(flat), self.out_dim) if mixed is None else mixed
            mixed = mixed.index_add(0, rows, part)
        assert mixed is not None
        return mixed.unflatten(0, tokens.shape[:2])

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return `load_balance` of the last training forward in corrected mode.

        A second call returns nothing: the first one frees the graph.
        """
        losses, self._losses = self._losses, {}
        return losses

    @torch.no_grad()
    def _record(self, weights: Tensor, task_ids: Tensor | None) -> None:
        """Add to the sums (tasks + 1, experts + 1), whose last column counts tokens.

        The size is fixed.
        """
        if self._weight_sums is None or self._weight_sums.device != weights.device:
            # Long runs add small numbers to large sums. Apple's devices have no float64.
            precision = torch.float32 if weights.device.type == "mps" else torch.float64
            shape = (len(self.tasks) + 1, len(self.experts) + 1)
            self._weight_sums = torch.zeros(shape, dtype=precision, device=weights.device)
        if task_ids is None:
            task_ids = torch.full((len(weights),), len(self.tasks), device=weights.device)
        counts = weights.new_full((len(weights), 1), weights.shape[1])
        sums = torch.cat([weights.sum(dim=1), counts], dim=1).to(self._weight_sums.dtype)
        sums = sums * (task_ids >= 0)[:, None]  # a dummy item does not count
        self._weight_sums.index_add_(0, task_ids.clamp(0, len(self.tasks)), sums)

    def routing_weights(self) -> dict[str, list[float]]:
        """Return the mean routing weight of each expert by task since the last reset.

        Tasks that were not seen are left out.
        """
        if self._weight_sums is None:
            return {}
        sums = self._weight_sums.tolist()
        names = (*self.tasks, UNSEEN)
        return {
            name: [x / row[-1] for x in row[:-1]]
            for name, row in zip(names, sums, strict=True)
            if row[-1]
        }

    def reset_routing_weights(self) -> None:
        """Reset the sums of the routing weights."""
        self._weight_sums = None
