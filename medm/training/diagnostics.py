"""Gradient conflicts between tasks, and the experts that each task is routed to.

The callback measures cosines and sizes of the tasks' gradients between steps, on batches that were
just trained on. It changes no weights, gradients, optimizer states, random states or buffers.
Knows no modality: the objective gives the loss of some rows, the model its parts, and a module that
routes its routing weights.

Definitions (gradient surgery, arXiv 2001.06782), for the gradients g, h of two tasks on the same
weights and batch: cosine <g, h> / (|g| |h|); a conflict where it is below zero; magnitude
similarity 2 |g| |h| / (|g|^2 + |h|^2).
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypedDict, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medm.distributed import all_gather_objects
from medm.errors import RecipeError
from medm.objectives.base import RowLosses
from medm.objectives.terms import Losses, Terms
from medm.types import Batch, Example

logger = logging.getLogger(__name__)

ROW_TASKS = "row_tasks"
"""Batch key: (B,) the task of each row. Taken out before the model sees the batch."""
OTHER = "(other)"
"""Rows whose task the model does not know."""
FOLDER = "diagnostics"

_Measure: TypeAlias = Literal["cosine", "magnitude"]
_TABLES: tuple[tuple[_Measure, str], ...] = (
    ("cosine", "cosine"),
    ("magnitude", "magnitude similarity"),
)
"""Measures of the Markdown page, with their titles."""
_MAPS: tuple[tuple[_Measure, float, str], ...] = (
    ("cosine", -1.0, "RdBu"),
    ("magnitude", 0.0, "viridis"),
)
"""Measures of the image, with the lower end of the scale and the color map."""


class GroupMeans(TypedDict):
    """Means over the batches for one group of weights; None for pairs that never met in a batch."""

    pairs: list[list[int]]
    """Batches that hold both tasks."""
    cosine: list[list[float | None]]
    conflict: list[list[float | None]]
    magnitude: list[list[float | None]]
    norm: list[float | None]
    """By task."""
    mean: dict[str, float | None]
    """Of each measure, over the pairs of two different tasks."""


class Measurement(TypedDict):
    """One measurement, as it stands in the JSON file."""

    step: int
    batches: int
    gradients: dict[str, GroupMeans]
    """By group of weights."""
    routing: dict[str, dict[str, list[float]]]
    """Routing weight of each expert, by part and task."""


class HasRoutingWeights(Protocol):
    """A part that routes."""

    def routing_weights(self) -> dict[str, list[float]]:
        """Return the mean routing weight of each expert, by task, since the last reset."""
        ...

    def reset_routing_weights(self) -> None:
        """Reset the sums of the routing weights."""
        ...


@dataclass(frozen=True, slots=True)
class TaskTaggingCollator:
    """A collator whose batches also hold the task of each row."""

    collate: Callable[[Sequence[Example | None]], Batch]
    other: int
    """Task of the dummy row of a batch whose records were all left out."""

    def __call__(self, examples: Sequence[Example | None]) -> Batch:
        batch = self.collate(examples)
        tasks = [example.task_id for example in examples if example is not None] or [self.other]
        return {**batch, ROW_TASKS: torch.tensor(tasks)}


class BatchRecorder(Terms):
    """Terms that keep the last training batches for a measurement.

    Args:
        terms: those of the run.
        batches: number that is kept, on the device of the training.
    """

    def __init__(self, terms: Terms, *, batches: int) -> None:
        super().__init__(terms.terms)
        self.seen: deque[Batch] = deque(maxlen=batches)

    def counts(self, batch: Batch) -> Tensor:
        return super().counts(without_tasks(batch))

    def __call__(self, model: nn.Module, batch: Batch, counts: Tensor) -> Losses:
        if ROW_TASKS in batch and torch.is_grad_enabled():
            self.seen.append(dict(batch))
        return super().__call__(model, without_tasks(batch), counts)

    def loss_of_rows(self, model: nn.Module, batch: Batch, rows: Tensor) -> Tensor | None:
        """Return the mean loss of some rows of a recorded batch (`RowLosses`)."""
        return row_losses(self).loss_of_rows(model, without_tasks(batch), rows)


def row_losses(terms: Terms) -> RowLosses:
    """Return the single objective of a run, whose loss is a sum over rows.

    Raises:
        RecipeError: there are several, or its loss is not a sum over rows.
    """
    if len(terms.terms) > 1:
        raise RecipeError(
            "diagnostics: measures the gradients of one objective, and the recipe has "
            f"{', '.join(terms.terms)}; leave out diagnostics"
        )
    (term,) = terms.terms.values()
    if not isinstance(term.objective, RowLosses):
        raise RecipeError(
            f"diagnostics: the loss of {type(term.objective).__name__} is not a sum over rows; "
            "leave out diagnostics"
        )
    return term.objective


def require_measurable(
    terms: Terms, tasks: Sequence[str], *, packing: bool, deepspeed: str | None
) -> None:
    """Raise at the start for a run that cannot be measured.

    Raises:
        RecipeError: with the key to change.
    """
    if not tasks:
        raise RecipeError(
            "diagnostics: compares tasks, and the model has none; name them in model.tasks"
        )
    if packing:
        raise RecipeError("diagnostics: needs one sample a row; set data.packing: false")
    if deepspeed is not None:
        raise RecipeError(
            "diagnostics: measures whole gradients, without DeepSpeed; set train.deepspeed: null"
        )
    row_losses(terms)


def without_tasks(batch: Batch) -> Batch:
    """Return the batch as models take it."""
    return {key: value for key, value in batch.items() if key != ROW_TASKS}


def gradient_groups(parts: Mapping[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """Return the groups of weights that are measured.

    Each part with trained weights is a group. If several of its children have trained weights, each
    of them is a group too; the children of a list are one group each: `image.connector`,
    `image.connector.router`, `image.connector.experts.0`.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, part in parts.items():
        whole = _trained(part)
        if not whole:
            continue
        groups[name] = whole
        inner: dict[str, nn.Module] = {}
        for child_name, child in part.named_children():
            if isinstance(child, nn.ModuleList):
                inner |= {f"{child_name}.{i}": item for i, item in enumerate(child)}
            else:
                inner[child_name] = child
        found = {
            child_name: trained
            for child_name, child in inner.items()
            if (trained := _trained(child))
        }
        if len(found) > 1:
            groups |= {f"{name}.{child_name}": trained for child_name, trained in found.items()}
    return groups


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class PairSums:
    """Running sums over batches for one group of weights.

    There is one (T, T) sum for each measure, and the norm of each task's gradient.
    """

    def __init__(self, tasks: int) -> None:
        self.count, self.cosine, self.conflict, self.magnitude = (
            torch.zeros(tasks, tasks, dtype=torch.float64) for _ in range(4)
        )
        self.norm = torch.zeros(tasks, dtype=torch.float64)
        self.norm_count = torch.zeros(tasks, dtype=torch.float64)

    def add(self, products: Tensor, present: Sequence[int]) -> None:
        """Add one batch.

        Args:
            products: (P, P) scalar products of the gradients of the tasks that the batch holds,
                float64.
            present: these tasks. One without any gradient here has no direction and is left out.
        """
        norms = products.diagonal().clamp(min=0).sqrt()
        some = [k for k in range(len(present)) if norms[k] > 0]
        for k in range(len(present)):
            self.norm[present[k]] += norms[k]
            self.norm_count[present[k]] += 1
        for k in some:
            for m in some:
                i, j = present[k], present[m]
                cosine = products[k, m] / (norms[k] * norms[m])
                self.count[i, j] += 1
                self.cosine[i, j] += cosine.clamp(-1, 1)
                self.conflict[i, j] += float(cosine < 0)
                self.magnitude[i, j] += 2 * norms[k] * norms[m] / (norms[k] ** 2 + norms[m] ** 2)

    def tensors(self) -> list[Tensor]:
        """Return every sum, to be added to those of other ranks."""
        return [self.count, self.cosine, self.conflict, self.magnitude, self.norm, self.norm_count]

    def means(self) -> GroupMeans:
        """Return the means, JSON-able; None for pairs that never met in a batch.

        `mean` is over the pairs of two different tasks.
        """
        off = ~torch.eye(len(self.count), dtype=torch.bool)
        met = float(self.count[off].sum())
        return {
            "pairs": [[int(x) for x in row] for row in self.count.tolist()],
            "cosine": _divided(self.cosine, self.count),
            "conflict": _divided(self.conflict, self.count),
            "magnitude": _divided(self.magnitude, self.count),
            "norm": _divided(self.norm[None], self.norm_count[None])[0],
            "mean": {
                name: float(getattr(self, name)[off].sum()) / met if met else None
                for name in ("cosine", "conflict", "magnitude")
            },
        }


def _divided(sums: Tensor, counts: Tensor) -> list[list[float | None]]:
    return [
        [x / n if n else None for x, n in zip(row, row_counts, strict=True)]
        for row, row_counts in zip(sums.tolist(), counts.tolist(), strict=True)
    ]


def measure(
    model: nn.Module,
    recorder: BatchRecorder,
    groups: Mapping[str, list[nn.Parameter]],
    *,
    tasks: int,
) -> dict[str, PairSums]:
    """Return the sums over the recorded batches, under the weights as they are now.

    Every task of a batch runs the same rows with the same random numbers; only the labels that
    count differ.
    """
    parameters = list({id(p): p for group in groups.values() for p in group}.values())
    place = {id(parameter): k for k, parameter in enumerate(parameters)}
    sums = {name: PairSums(tasks) for name in groups}
    with _restored_state(model, parameters[0].device):
        for number, batch in enumerate(recorder.seen):
            present: list[int] = []
            gradients: list[tuple[Tensor | None, ...]] = []
            for task in sorted(set(batch[ROW_TASKS].tolist())):
                torch.manual_seed(number)
                loss = recorder.loss_of_rows(model, batch, batch[ROW_TASKS] == task)
                if loss is not None:
                    present.append(min(task, tasks - 1))
                    gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
            if not present:
                continue
            products = [_products([g[k] for g in gradients]) for k in range(len(parameters))]
            for name, group in groups.items():
                sums[name].add(
                    torch.stack([products[place[id(parameter)]] for parameter in group]).sum(0),
                    present,
                )
    return sums


def _products(gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the (P, P) scalar products of the gradients of one weight, in float64 on the CPU."""
    size = len(gradients)
    some = [k for k, gradient in enumerate(gradients) if gradient is not None]
    products = torch.zeros(size, size, dtype=torch.float64)
    if some:
        rows = torch.stack([g.flatten().float() for g in gradients if g is not None])
        products[torch.tensor(some)[:, None], torch.tensor(some)] = (rows @ rows.T).cpu().double()
    return products


@contextmanager
def _restored_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore random states and buffers at the end of the block.

    `autograd.grad` leaves the gradients of the weights alone.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    spread = device.type not in ("cpu", "meta")
    with torch.random.fork_rng(
        devices=[device] if spread else [], device_type=device.type if spread else "cuda"
    ):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


class GradientConflictCallback(TrainerCallback):
    """Measures gradient conflicts every few steps.

    Writes JSON, a Markdown table and an image below the output folder.

    Args:
        recorder: the trainer's terms.
        parts: of the model.
        tasks: names, in the order of their ids.
        every: steps between two measurements.
    """

    def __init__(
        self,
        recorder: BatchRecorder,
        parts: Mapping[str, nn.Module],
        *,
        tasks: Sequence[str],
        every: int,
    ) -> None:
        self.recorder, self.parts, self.every = recorder, dict(parts), every
        self.tasks = [*tasks, OTHER]
        self.measurements: list[Measurement] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Keep, in a resumed run, the measurements up to its checkpoint."""
        file = Path(args.output_dir or "") / FOLDER / "tug_of_war.json"
        if state.global_step and file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))["measurements"]
            self.measurements = [entry for entry in known if entry["step"] <= state.global_step]
        for part in self._routing().values():
            part.reset_routing_weights()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        if state.global_step % self.every:
            return
        assert model is not None  # the Trainer always passes it
        # Before the measurement, whose own forward passes would count too.
        routing = {name: part.routing_weights() for name, part in self._routing().items()}
        sums = measure(model, self.recorder, gradient_groups(self.parts), tasks=len(self.tasks))
        batches = len(self.recorder.seen)
        for part in self._routing().values():
            part.reset_routing_weights()
        everywhere = all_gather_objects(
            ({name: pairs.tensors() for name, pairs in sums.items()}, batches)
        )
        for name, pairs in sums.items():
            for k, total in enumerate(pairs.tensors()):
                total.copy_(torch.stack([tensors[name][k] for tensors, _ in everywhere]).sum(0))
        entry: Measurement = {
            "step": state.global_step,
            "batches": sum(count for _, count in everywhere),
            "gradients": {name: pairs.means() for name, pairs in sums.items()},
            "routing": {name: tasks for name, tasks in routing.items() if tasks},
        }
        self.measurements.append(entry)
        if state.is_world_process_zero:
            self._write(Path(args.output_dir or "") / FOLDER)

    def _routing(self) -> dict[str, HasRoutingWeights]:
        """Return the parts that route."""
        return {
            name: cast(HasRoutingWeights, part)
            for name, part in self.parts.items()
            if hasattr(part, "routing_weights")
        }

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"tasks": self.tasks, "measurements": self.measurements}
        (folder / "tug_of_war.json").write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8"
        )
        page = markdown(self.tasks, self.measurements)
        (folder / "tug_of_war.md").write_text(page, encoding="utf-8")
        draw(self.tasks, self.measurements[-1], folder / "tug_of_war.png")


def markdown(tasks: Sequence[str], measurements: Sequence[Measurement]) -> str:
    """Return the last measurement in full, and the means of all, as Markdown."""
    last = measurements[-1]
    lines = [
        f"# Gradients between tasks, step {last['step']}",
        "",
        f"Over {last['batches']} batches; pairs are two tasks that met in a batch. Conflict: "
        "cosine below 0.",
        "",
        *_table(
            ["weights", "step", "mean cosine", "conflicting pairs", "magnitude similarity"],
            [
                [name, str(entry["step"]), *(_number(value) for value in found["mean"].values())]
                for name in last["gradients"]
                for entry in measurements
                if (found := entry["gradients"].get(name)) is not None
            ],
        ),
    ]
    for name, found in last["gradients"].items():
        seen = _seen(found["pairs"])
        for key, title in _TABLES:
            rows = [[tasks[i], *(_number(found[key][i][j]) for j in seen)] for i in seen]
            lines += [
                "",
                f"## {name}: {title}",
                "",
                *_table(["task", *(tasks[j] for j in seen)], rows),
            ]
    for name, weights in last["routing"].items():
        experts = [f"expert {k}" for k in range(len(next(iter(weights.values()))))]
        rows = [[task, *map(_number, row)] for task, row in weights.items()]
        lines += [
            "",
            f"## {name}: routing weights since the last measurement",
            "",
            *_table(["task", *experts], rows),
        ]
    return "\n".join([*lines, ""])


def _seen(pairs: Sequence[Sequence[int]]) -> list[int]:
    """Return the tasks that had a gradient."""
    return [i for i in range(len(pairs)) if pairs[i][i]]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def draw(tasks: Sequence[str], entry: Measurement, path: Path) -> bool:
    """Draw heat maps of cosines, magnitude similarities and routing.

    Without matplotlib, log that and return False.
    """
    if find_spec("matplotlib") is None:
        logger.info("no %s: matplotlib is not installed (pip install 'medm[plot]')", path.name)
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps: list[tuple[str, Sequence[Sequence[float | None]], list[str], list[str], float, str]] = []
    for name, found in entry["gradients"].items():
        seen = _seen(found["pairs"])
        names = [tasks[i] for i in seen]
        for key, low, colors in _MAPS:
            maps.append(
                (
                    f"{name}: {key}",
                    [[found[key][i][j] for j in seen] for i in seen],
                    names,
                    names,
                    low,
                    colors,
                )
            )
    for name, weights in entry["routing"].items():
        rows = list(weights.values())
        experts = [str(k) for k in range(len(rows[0]))]
        maps.append((f"{name}: routing", rows, list(weights), experts, 0.0, "viridis"))
    columns, lines = 2, -(-len(maps) // 2)
    figure = Figure(figsize=(9, 3.4 * max(lines, 1)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, values, down, across, low, colors) in enumerate(maps):
        axes = figure.add_subplot(lines, columns, number + 1)
        if not values:
            axes.set_axis_off()
            continue
        grid = [[float("nan") if value is None else value for value in row] for row in values]
        image = axes.imshow(grid, vmin=low, vmax=1.0, cmap=colors)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(across)), across, fontsize=7)
        axes.set_yticks(range(len(down)), down, fontsize=7)
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=110)
    return True
