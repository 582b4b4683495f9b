"""Costs against numbers worked out by hand, and against the model that is really built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medm.config import validate
from medm.errors import CheckpointError
from medm.models import build
from medm.models.estimate import (
    Estimate,
    Memory,
    PartSize,
    cast_copies,
    estimate,
    largest_count,
    memory,
)
from medm.models.lvlm.options import LVLMOptions
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from tests.cli.runner import medm
from tests.tiny import lvlm_section, save_llm

FULL, FROZEN = PartOptions(tune="full"), PartOptions(tune="frozen")
LORA = PartOptions(tune="lora", r=4, targets=["q_proj"])


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llm("qwen2.5", tmp_path_factory.mktemp("llm"))


def options_of(llm: Path, **changes: Any) -> LVLMOptions:
    return validate(LVLMOptions, lvlm_section(llm) | changes, source="test")


def chooser(**parts: PartOptions) -> Any:
    named = {name.replace("_", "."): part for name, part in parts.items()}
    return lambda model: apply_parts(model, named, TrainOptions(), keep_float32=False)


def test_parameters_by_hand(llm: Path) -> None:
    """Tiny Qwen2.5: V 320, D 32, F 64, 2 layers, 4 heads of 8, 2 for keys and values, tied, biases
    on q, k, v."""
    result = estimate(options_of(llm), choose=chooser(llm=LORA, image_connector=FULL))
    layer = (32 * 32 + 32) + 2 * (32 * 16 + 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32
    lora = 2 * (4 * 32 + 32 * 4)  # A (4, 32) and B (32, 4) in each of two layers
    connector = (24 * 32 + 32) + (32 * 32 + 32)
    block = 4 * (24 * 24 + 24) + (24 * 48 + 48) + (48 * 24 + 24) + 4 * 24
    tower = (3 * 16 * 24 + 24) + 16 * 24 + 3 * block  # patches of 4 x 4 x 3, 16 positions, 3 blocks
    sizes = {part.name: (part.parameters, part.trainable) for part in result.parts}
    assert sizes == {
        "llm": (320 * 32 + 2 * layer + 32 + lora, lora),
        "image.encoder": (tower, 0),
        "image.connector": (connector, connector),
    }
    assert result.trainable == lora + connector
    assert result.tokens == {"image": 16}


def test_the_built_model_has_the_same_sizes(llm: Path) -> None:
    model, _ = build(options_of(llm))
    table = apply_parts(model, {"llm": FULL, "image.encoder": FULL}, TrainOptions())
    result = estimate(options_of(llm), choose=chooser(llm=FULL, image_encoder=FULL))
    assert [(r.name, r.parameters, r.trainable) for r in table.rows] == [
        (p.name, p.parameters, p.trainable) for p in result.parts
    ]


def test_what_a_router_costs_and_that_the_dense_baseline_has_the_same_experts(llm: Path) -> None:
    """Router of a task token of 4 and a visual token of 24: (28, 8), (8, 3); experts (24, 32), (32,
    32), three times."""

    def connector(gate: str) -> PartSize:
        section = lvlm_section(llm) | {"tasks": ["vqa", "cls"]}
        block = {
            "name": "moe",
            "num_experts": 3,
            "gate": gate,
            "route_by": "task+token",
            "router_dim": 8,
            "task_dim": 4,
        }
        section["branches"]["image"]["connector"] = block
        result = estimate(
            validate(LVLMOptions, section, source="test"), choose=chooser(image_connector=FULL)
        )
        return next(part for part in result.parts if part.name == "image.connector")

    router = 2 * 4 + (28 * 8 + 8) + (8 * 3 + 3)
    experts = 3 * ((24 * 32 + 32) + (32 * 32 + 32))
    assert connector("soft").parameters == experts + router
    assert connector("constant").parameters == experts  # equal experts, without a router
    assert connector("soft").trainable == experts + router


def test_memory_by_hand() -> None:
    """1000 trained and 600 frozen parameters, loaded in float32, on 4 GPUs with AdamW."""
    parts = [PartSize("a", 1000, 1000, 0, 0, 0), PartSize("b", 600, 0, 2400, 0, 600)]
    table = {
        # stage: weights, gradients, optimiser; in 16 bits
        "zero0": (1000 * 4 + 600 * 4, 4000, 8000),
        "zero1": (1600 * 2, 2000, 1000 * 12 / 4),
        "zero2": (1600 * 2, 2000 / 4, 1000 * 12 / 4),
        "zero3": (1600 * 2 / 4, 2000 / 4, 1000 * 12 / 4),
    }
    for stage, (weights, gradients, optimiser) in table.items():
        found = memory(parts, stage, half=True, optimiser="adamw_torch", gpus=4)
        assert (found.weights, found.gradients, found.optimiser) == (weights, gradients, optimiser)
        assert found.total == weights + gradients + optimiser
    whole = memory(parts, "zero2", half=False, optimiser="adamw_torch", gpus=4)
    assert (whole.weights, whole.gradients, whole.optimiser) == (6400, 1000, 3000)
    assert memory(parts, "zero0", half=True, optimiser="adamw_bnb_8bit", gpus=1).optimiser == 2000
    assert memory(parts, "zero0", half=True, optimiser="sgd", gpus=1).optimiser == 0


def test_loaded_precision_and_4_bits_count(llm: Path) -> None:
    plain = estimate(options_of(llm), choose=chooser(llm=LORA), half=True)
    half = estimate(options_of(llm, dtype="bfloat16"), choose=chooser(llm=LORA), half=True)
    lora = plain.trainable
    frozen = plain.parameters - lora
    assert plain.memory[0].weights == 4 * lora + 4 * frozen
    assert half.memory[0].weights == 4 * lora + 2 * frozen
    small = estimate(
        options_of(llm, dtype="bfloat16"), choose=chooser(llm=LORA), half=True, quantized=["llm"]
    )
    linear = 2 * (
        2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    )  # weights of the two layers; the head stays as it is
    saved = half.memory[0].weights - small.memory[0].weights
    assert saved == linear * (2 - 0.5625)


@pytest.mark.parametrize(
    ("total", "gpu"),
    [
        (6.4, "8 GB"),
        (6.6, "12 GB"),
        (22, "24 GB"),
        (30, "32 GB"),
        (78, "80 GB"),
        (150, "more than 141 GB"),
    ],
)
def test_the_smallest_gpu_that_holds_it(total: float, gpu: str) -> None:
    """1.5 GiB are CUDA's."""
    assert Memory("zero0", total * 2**30 - 300, 100, 100, 100).fits_in() == gpu


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 100, 1024])
def test_the_largest_count_is_found_with_few_questions(most: int) -> None:
    asked: list[int] = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= most

    assert largest_count(fits, 1024) == most
    assert len(asked) <= 22


def test_the_largest_micro_batch_fits_and_one_more_does_not(llm: Path) -> None:
    def of(rows: int, gpu_memory: float | None = None) -> Estimate:
        return estimate(
            options_of(llm),
            choose=chooser(llm=LORA),
            rows=rows,
            length=32,
            gpu_memory=gpu_memory,
        )

    size = (of(5).memory[0].total + 1.5 * 2**30) / 2**30  # GB that five rows fill
    rows = of(1, gpu_memory=size).micro_batches["zero0"]
    assert rows == 5
    assert of(rows).memory[0].fits(size)
    assert not of(rows + 1).memory[0].fits(size)
    assert of(1, gpu_memory=1.0).micro_batches["zero0"] == 0
    assert of(1).micro_batches == {}


def test_autocast_keeps_copies_of_float32_weights() -> None:
    parts = [
        PartSize("a", 1000, 1000, 0, 0, 0),
        PartSize("b", 600, 0, 2400, 0, 600),
        PartSize("c", 50, 0, 100, 0, 50),
    ]
    assert cast_copies(parts) == 2 * 1000 + 2 * 600


def test_what_is_missing_is_named() -> None:
    section = lvlm_section(Path("/nowhere/Qwen2.5"))
    with pytest.raises(CheckpointError, match=r"(?s)/nowhere/Qwen2\.5.*not the weights"):
        estimate(validate(LVLMOptions, section, source="test"), choose=lambda model: None)


def test_the_command(llm: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": lvlm_section(llm),
                "data": {"train": [{"path": "none.json"}]},
                "parts": {"llm": {"tune": "lora", "r": 4}, "image.connector": "full"},
                "train": {"bf16": True},
                "output_dir": "out",
            }
        )
    )
    done = medm("estimate", str(recipe), "parts.llm.r=8", "--gpus", "2")
    assert done.code == 0, done.err
    assert "one image: 16 tokens" in done.out
    assert "zero3" in done.out
    assert "2 GPU(s), 16 bits, adamw_torch" in done.out
    assert "activations: 8 samples of 2048 tokens, 2032 of them learned at most" in done.out
    assert "fits in" in done.out and "8 GB" in done.out
    short = medm("estimate", str(recipe), "--length", "64")
    assert "8 samples of 64 tokens, 48 of them" in short.out
    assert (
        "without activations (no length is given)"
        in medm("estimate", str(recipe), "data.max_length=null").out
    )
    assert not (tmp_path / "out").exists()


def test_the_command_says_which_micro_batch_keeps_the_batch(llm: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    section = {
        "model": lvlm_section(llm),
        "data": {"train": [{"path": "none.json"}]},
        "parts": {"llm": {"tune": "lora", "r": 4}},
        "train": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        "output_dir": "out",
    }
    recipe.write_text(yaml.safe_dump(section))
    done = medm("estimate", str(recipe), "--length", "32", "--gpu-memory", "24")
    assert done.code == 0, done.err
    assert "largest micro-batch on 24 GB, for 12 samples of a step and GPU" in done.out
    line = next(
        line for line in done.out.splitlines() if line.startswith("zero2") and "train.per" in line
    )
    assert line.endswith("train.per_device_train_batch_size=12 train.gradient_accumulation_steps=1")
    small = medm("estimate", str(recipe), "--length", "32", "--gpu-memory", "1")
    assert "one sample does not fit" in small.out
