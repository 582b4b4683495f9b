"""Two processes on the CPU: torch's DDP, and DeepSpeed's ZeRO stages where a C++ compiler can build
its parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from safetensors.torch import load_file

from medm.models.manifest import verify
from medm.training.deepspeed import checkpoint_classes
from medm.training.safe_load import safe_loading
from tests.launch import COMPILER, needs_compiler, on_two_processes
from tests.training.toys import (
    LORA,
    NEW_TOKENS,
    TOWERS,
    Fixed,
    Scaled,
    Toy,
    ToyConfig,
    collate,
    trainer,
)
from tests.training.two_processes import BOTH_CURVE, CURVE, SCALED_CURVE, UNEVEN, by_name, losses

STAGES = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of both processes: started once, since imports and engines are most of the
    time."""
    path = tmp_path_factory.mktemp("two")
    on_two_processes(
        "tests.training.two_processes", str(path), *(["--deepspeed"] if COMPILER else [])
    )
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The same global batches in one process without DeepSpeed."""
    curves = {}
    for kind, parts in (("toy", LORA), ("towers", TOWERS)):
        run = trainer(tmp_path_factory.mktemp("alone"), kind=kind, **(CURVE | {"parts": parts}))
        run.fit()
        curves[kind] = losses(run)
    return curves


@pytest.mark.parametrize(
    "case", ["ddp", *(pytest.param(stage, marks=needs_compiler) for stage in STAGES)]
)
def test_two_processes_follow_the_curve_of_one(
    case: str, results: list[dict[str, Any]], alone: dict[str, list[float]]
) -> None:
    """Measured worst case 1e-6; a rank that saw other samples, or a mean of means, is off by more
    than 1e-3."""
    assert len(results[0][case]) == CURVE["max_steps"] + 1
    assert results[0][case] == pytest.approx(alone["toy"], abs=1e-4)
    assert results[0][case] == results[1][case]


@needs_compiler
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_new_rows_follow_the_curve_of_ddp(stage: str, results: list[dict[str, Any]]) -> None:
    assert results[0][f"rows-{stage}"] == pytest.approx(results[0]["rows-ddp"], abs=1e-4)
    assert results[0][f"rows-{stage}"] == results[1][f"rows-{stage}"]


ROW_CASES = [
    "rows-ddp",
    *(
        pytest.param(case, marks=needs_compiler)
        for case in ("rows-zero2", "rows-zero3", "tied-zero3")
    ),
]


@pytest.mark.parametrize("case", ROW_CASES)
def test_of_the_vocabulary_new_rows_alone_are_trained(case: str, folder: Path) -> None:
    tied = case.startswith("tied")
    torch.manual_seed(0)
    before = Toy(ToyConfig(tied=tied)).llm
    model = Toy.from_pretrained(folder / case / "final")
    held = [name for name in model.state_dict() if "new_rows" in name]
    assert len(held) == (1 if tied else 2)
    model.merge_adapters()
    for layer, old in (
        (model.llm.get_input_embeddings(), before.get_input_embeddings()),
        (model.llm.get_output_embeddings(), before.get_output_embeddings()),
    ):
        moved = [
            i for i in range(len(old.weight)) if not torch.equal(layer.weight[i], old.weight[i])
        ]
        assert moved == NEW_TOKENS


@pytest.mark.parametrize("case", ["towers", pytest.param("towers-zero2", marks=needs_compiler)])
def test_two_towers_contrast_over_both_processes(
    case: str, results: list[dict[str, Any]], alone: dict[str, list[float]]
) -> None:
    steps = CURVE["max_steps"]  # the held-out loss depends on what a batch is compared with
    assert results[0][case][:steps] == pytest.approx(alone["towers"][:steps], abs=1e-4)


@pytest.mark.parametrize("case", ["contrast", "contrast, uneven", "contrast, one without"])
def test_the_gathered_loss_has_the_gradient_of_the_whole_batch(
    case: str, results: list[dict[str, Any]]
) -> None:
    for difference, size in results[0][case].values():
        assert difference < 1e-6 < 0.1 < size


@needs_compiler
@pytest.mark.parametrize("case", STAGES)
def test_lora_and_a_full_connector_are_saved_in_full_size(case: str, folder: Path) -> None:
    """The model opens without DeepSpeed and computes what the one trained by DDP computes."""
    final = folder / case / "final"
    tensors, expected = (
        load_file(final / "model.safetensors"),
        load_file(folder / "ddp" / "final" / "model.safetensors"),
    )
    assert tensors.keys() == expected.keys()
    assert any("lora_" in name for name in tensors)
    assert all(
        tensors[name].shape == expected[name].shape and tensors[name].numel() for name in tensors
    )
    models = [Toy.from_pretrained(path).eval() for path in (final, folder / "ddp" / "final")]
    batch = collate(
        [{"input_ids": torch.arange(8), "vision": torch.ones(6), "labels": torch.arange(8)}]
    )
    with torch.no_grad():
        losses = [model(**batch).loss_sum / 7 for model in models]  # of 7 labels
        logits = [model.llm(input_ids=batch["input_ids"]).logits for model in models]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "case", ["two terms", pytest.param("two terms-zero3", marks=needs_compiler)]
)
def test_two_objectives_over_two_ranks_are_those_of_one(
    case: str, results: list[dict[str, Any]], tmp_path: Path, folder: Path
) -> None:
    """One process runs the micro-batches of both ranks together, and its first step is worked out
    by hand."""
    merged = [first + second for first, second in zip(*UNEVEN.values(), strict=True)]
    run = trainer(tmp_path, batches=Fixed(merged), **BOTH_CURVE)
    sums, counts = torch.zeros(2), torch.zeros(2)
    for rows in merged[:2]:
        batch = collate([run.train_dataset[row] for row in rows])
        with torch.no_grad():
            output = run.model(**batch)
        for k, term in enumerate(run.terms.terms.values()):
            sums[k] += term.objective.loss(output, batch)
            counts[k] += term.objective.count(batch)
    text, pairs = (sums / counts).tolist()
    run.fit()
    (two, calls), (other, _) = results[0][case], results[1][case]
    assert calls == 6  # micro-batches of four steps, two of which have one alone
    assert two == other
    assert two[0] == pytest.approx([text + 0.25 * pairs, text, 0.25 * pairs], abs=1e-5)
    for found, expected in zip(two, by_name(run), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    trained = load_file(folder / case.replace(" ", "-") / "final" / "model.safetensors")
    for name, tensor in run.model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "case",
    [
        "clamped-ddp",
        *(pytest.param(f"clamped-{stage}", marks=needs_compiler) for stage in ("zero2", "zero3")),
    ],
)
def test_a_clamp_after_the_step_reaches_the_optimizer(
    case: str, results: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Without it the optimizer's own copy is below the bound (1.97), and drifts away from it."""
    run = trainer(tmp_path, **SCALED_CURVE)
    run.fit()
    for rank in (0, 1):
        scale, copy, steps, curve = results[rank][case]
        assert (scale, copy) == (Scaled.smallest, Scaled.smallest)
        assert steps == 4
        assert curve == pytest.approx(losses(run), abs=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        "resumed-ddp",
        *(pytest.param(f"resumed-{stage}", marks=needs_compiler) for stage in ("zero2", "zero3")),
    ],
)
def test_two_processes_resume_bit_for_bit(
    case: str, results: list[dict[str, Any]], folder: Path
) -> None:
    before, after = results[0][case]
    assert before == after
    whole, cut = (
        load_file(folder / case / run / "final" / "model.safetensors") for run in ("whole", "cut")
    )
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []


@needs_compiler
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_share_written_while_training_goes_on_is_the_one_written_in_the_step(
    stage: str, folder: Path
) -> None:
    """Held back until the weights had changed (see `two_processes.resumed`)."""
    aside, at_once = (
        folder / f"resumed-{stage}" / run / "checkpoint-4" for run in ("cut", "whole")
    )
    verify(aside)
    files = {path.relative_to(aside).as_posix() for path in aside.rglob("*.*") if path.is_file()}
    assert files == {
        path.relative_to(at_once).as_posix() for path in at_once.rglob("*.*") if path.is_file()
    }
    shares = sorted(file for file in files if file.endswith("_states.pt"))
    assert len(shares) == {"zero2": 3, "zero3": 4}[stage]
    with safe_loading(checkpoint_classes()):
        for file in shares:
            first, second = (flat(torch.load(path / file)) for path in (aside, at_once))
            assert len(first) > 10
            assert first.keys() == second.keys()
            for place, value in first.items():
                other = second[place]
                assert (
                    torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
                ), place
    weights = [load_file(path / "model.safetensors") for path in (aside, at_once)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def flat(state: Any, place: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists, and what a loss scaler holds, by the way to them."""
    if isinstance(state, LossScaler):
        state = vars(state)
    if not isinstance(state, (Mapping, list, tuple)):
        return {place: state}
    pairs = state.items() if isinstance(state, Mapping) else enumerate(state)
    return {
        way: leaf for key, value in pairs for way, leaf in flat(value, f"{place}/{key}").items()
    }


@needs_compiler
@pytest.mark.parametrize("case", ["full disk, background", "full disk, in the step"])
def test_a_full_disk_of_one_process_stops_all_and_leaves_no_half_checkpoint(
    case: str, results: list[dict[str, Any]]
) -> None:
    for result in results:
        (name, text), step, folders = result[case]
        assert name == "CheckpointError"
        assert "checkpoint-4 failed (process 1: [Errno 28] No space left on device)" in text
        assert step in ((5, 6) if "background" in case else (4,))
        # The other process may be at its end still.
        assert [name for name in folders if name != ".tmp-ranks"] == ["checkpoint-2"]


@needs_compiler
@pytest.mark.parametrize("case", ["planted-model", "planted-optimiser"])
def test_a_pickle_planted_in_a_shard_does_not_run(
    case: str, results: list[dict[str, Any]], folder: Path
) -> None:
    for result in results:
        name, text = result[case]
        assert name == "CheckpointError"
        assert "more than tensors and plain values" in text
    assert not (folder / case / "mark").exists()


def test_a_bad_sample_on_one_process_stops_both(results: list[dict[str, Any]]) -> None:
    names, texts = zip(*(result["poisoned"] for result in results), strict=True)
    assert names == ("NonFiniteError", "NonFiniteError")
    assert sum("is nan on this process" in text for text in texts) == 1


def test_data_that_one_process_cannot_read_stops_both(results: list[dict[str, Any]]) -> None:
    errors, steps = zip(*(result["lost"] for result in results), strict=True)
    assert sorted(errors) in (
        [
            ["InputLostError", "the share is away"],
            ["MedmError", f"process {number}: the share is away"],
        ]
        for number in (0, 1)
    )
    assert steps[0] == steps[1]


def test_bad_records_are_counted_over_both_processes(results: list[dict[str, Any]]) -> None:
    """Neither process sees 11 of them before both have."""
    (first, steps), (second, other_steps) = (result["too many bad"] for result in results)
    assert first == second
    assert first[0] == "DataError"
    assert (
        "13 of 48 training records are bad (27.1%), more than data.bad_records_limit = 0.25"
        in first[1]
    )
    assert steps == other_steps


def test_a_signal_to_one_process_stops_both_at_the_same_step(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["terminated"] == [False, 3, ["checkpoint-3"]]
