"""Gradients between tasks: numbers computed by hand, and a run that is measured learns exactly what
it would have."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from medm.cli.recipes import find
from medm.errors import RecipeError
from medm.objectives.base import Objective, Output
from medm.objectives.contrastive import Contrastive
from medm.objectives.language_modeling import LanguageModeling
from medm.objectives.terms import Term, Terms
from medm.training.diagnostics import (
    ROW_TASKS,
    BatchRecorder,
    GradientConflictCallback,
    PairSums,
    gradient_groups,
    measure,
    require_measurable,
)
from medm.training.recipe import load_recipe
from medm.types import Batch
from tests import shrink


class Linear(Objective):
    """The loss of a row is its scalar product with the weights, so its gradient is the row."""

    term = "linear"
    reads = frozenset({"products"})

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["x"]))

    def loss(self, output: Output, batch: Batch) -> Tensor:
        assert ROW_TASKS not in batch
        return output["products"].sum()

    def loss_of_rows(self, model: nn.Module, batch: Batch, rows: Tensor) -> Tensor | None:
        return model(**batch)["products"][rows].mean()


class Noisy(nn.Module):
    """Draws a random number, moves a running count, and computes a scalar product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        torch.rand(())
        return {"products": x @ self.weight}


def recorded(
    rows: list[list[float]], tasks: list[int], model: nn.Module, batches: int = 4
) -> BatchRecorder:
    recorder = BatchRecorder(Terms.of(Linear()), batches=batches)
    batch = {"x": torch.tensor(rows).float(), ROW_TASKS: torch.tensor(tasks)}
    recorder(model, batch, recorder.counts(batch))
    return recorder


def test_gradients_of_three_tasks_by_hand() -> None:
    """Task means (3, 0), (0, 2) and (-1, -1): at right angles, and twice at 135 degrees."""
    model = Noisy()
    recorder = recorded([[3, 0], [0, 1], [0, 3], [-1, -1]], [0, 1, 1, 2], model)
    found = measure(model, recorder, {"all": [model.weight]}, tasks=4)["all"].means()
    r = 0.5**0.5
    nothing = [None] * 4
    assert found["cosine"] == [
        [pytest.approx(x, abs=1e-12) for x in (1, 0, -r)] + [None],
        [pytest.approx(x, abs=1e-12) for x in (0, 1, -r)] + [None],
        [pytest.approx(x) for x in (-r, -r, 1)] + [None],
        nothing,
    ]
    assert found["conflict"][0][:3] == [0, 0, 1]
    assert found["magnitude"][0][1] == pytest.approx(2 * 3 * 2 / (9 + 4))
    assert found["magnitude"][1][2] == pytest.approx(2 * 2 * 2**0.5 / (4 + 2))
    assert found["norm"][:3] == pytest.approx([3, 2, 2**0.5])
    assert found["mean"]["cosine"] == pytest.approx(-2 * r / 3)
    assert found["mean"]["conflict"] == pytest.approx(2 / 3)


def test_means_are_over_the_batches_in_which_a_pair_met() -> None:
    pairs = PairSums(3)
    pairs.add(torch.tensor([[1.0, 1.0], [1.0, 4.0]]).double(), [0, 1])  # cosine 1/2, similarity 4/5
    pairs.add(torch.tensor([[4.0, -4.0], [-4.0, 4.0]]).double(), [0, 1])  # cosine -1, similarity 1
    pairs.add(torch.tensor([[9.0]]).double(), [2])
    pairs.add(
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(), [0, 2]
    )  # no gradient: no direction, but a norm
    means = pairs.means()
    assert means["cosine"][0] == [1.0, -0.25, None]
    assert means["conflict"][1][0] == 0.5
    assert means["magnitude"][0][1] == pytest.approx(0.9)
    assert means["pairs"] == [[3, 2, 0], [2, 2, 0], [0, 0, 1]]
    assert means["norm"] == pytest.approx([4 / 3, 2.0, 1.5])


def test_measuring_leaves_gradients_buffers_and_random_numbers_alone() -> None:
    model = Noisy()
    recorder = recorded([[3, 0], [0, 1]], [0, 1], model, batches=1)
    model.weight.grad = torch.tensor([5.0, 7.0])
    state, calls = torch.get_rng_state(), float(model.calls)
    measure(model, recorder, {"all": [model.weight]}, tasks=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert float(model.calls) == calls
    assert model.weight.grad.tolist() == [5.0, 7.0]
    assert model.weight.tolist() == [1.0, 1.0]


def test_experts_and_router_are_groups_of_their_own_and_frozen_parts_are_none() -> None:
    connector = nn.Module()
    connector.router, connector.experts = (
        nn.Linear(2, 2),
        nn.ModuleList(nn.Linear(2, 2) for _ in range(2)),
    )
    llm = nn.Module()
    llm.model, llm.head = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    parts = {"llm": llm, "encoder": nn.Linear(2, 2).requires_grad_(False), "connector": connector}
    groups = gradient_groups(parts)
    assert list(groups) == [
        "llm",
        "connector",
        "connector.router",
        "connector.experts.0",
        "connector.experts.1",
    ]
    assert [len(group) for group in groups.values()] == [2, 6, 2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": []}, "model.tasks"),
        ({"packing": True}, "data.packing"),
        ({"deepspeed": "zero2"}, "train.deepspeed"),
        ({"terms": Terms.of(Contrastive())}, "Contrastive"),
        (
            {"terms": Terms({"text": Term(LanguageModeling()), "pairs": Term(Contrastive())})},
            "the recipe has text, pairs",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_at_the_start(
    changes: dict[str, object], words: str
) -> None:
    given = {
        "terms": Terms.of(LanguageModeling()),
        "tasks": ["vqa"],
        "packing": False,
        "deepspeed": None,
    } | changes
    with pytest.raises(RecipeError, match=words):
        require_measurable(given.pop("terms"), given.pop("tasks"), **given)  # type: ignore[arg-type]


def test_a_continued_run_keeps_what_it_measured_before(tmp_path: Path) -> None:
    (tmp_path / "diagnostics").mkdir()
    known = {"tasks": [], "measurements": [{"step": 2}, {"step": 4}, {"step": 6}]}
    (tmp_path / "diagnostics" / "tug_of_war.json").write_text(json.dumps(known), encoding="utf-8")
    recorder = BatchRecorder(Terms.of(Linear()), batches=1)
    callback = GradientConflictCallback(recorder, {}, tasks=["a"], every=2)
    callback.on_train_begin(
        SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=4), None
    )
    assert [entry["step"] for entry in callback.measurements] == [2, 4]


def test_a_measured_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Experts, router and adapters, with dropout; and what is written names tasks, parts and
    experts."""
    from safetensors.torch import load_file

    from medm.training.run import train

    name = "uni-med/small"
    given = [
        *shrink.overrides(name, tmp_path, steps=3),
        f'data.train=[{{"path": "{shrink.records(name)}"}}]',
        "model.tasks=[vqa, report]",
        "train.save_strategy=no",
        "train.per_device_train_batch_size=4",
    ]
    outcomes = []
    for folder, more in (
        ("plain", []),
        ("measured", ["diagnostics.every=1", "diagnostics.batches=2"]),
    ):
        recipe = load_recipe(find(name), [*given, f"output_dir={tmp_path / folder}", *more])
        outcomes.append(train(recipe))
    plain, measured = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "measured")
    )
    assert plain.keys() == measured.keys()
    assert all(torch.equal(plain[key], measured[key]) for key in plain)
    assert outcomes[0].loss == outcomes[1].loss

    written = tmp_path / "measured" / "diagnostics"
    content = json.loads((written / "tug_of_war.json").read_text(encoding="utf-8"))
    assert content["tasks"] == ["vqa", "report", "(other)"]
    assert [entry["step"] for entry in content["measurements"]] == [1, 2, 3]
    last = content["measurements"][-1]
    assert last["batches"] == 2
    assert {"llm", "image.connector", "image.connector.router", "image.connector.experts.4"} <= set(
        last["gradients"]
    )
    llm = last["gradients"]["llm"]
    assert llm["pairs"][0][1] > 0
    assert llm["cosine"][0][0] == pytest.approx(1.0)
    assert llm["cosine"][0][1] == llm["cosine"][1][0]
    # Text alone never reaches the connector: such a task has no direction there.
    assert last["gradients"]["image.connector"]["cosine"][2][2] is None
    for row in last["routing"]["image.connector"].values():
        assert sum(row) == pytest.approx(1.0)
    assert "image.connector.experts.0" in (written / "tug_of_war.md").read_text(encoding="utf-8")
    assert (written / "tug_of_war.png").read_bytes().startswith(b"\x89PNG")
