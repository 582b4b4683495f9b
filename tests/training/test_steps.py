"""What a model does after a step, and the state that training alone needs: checkpoints, resume, the
final folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from medm.cli.recipes import find
from medm.errors import RecipeError
from medm.models import MODELS
from medm.models.lvlm.build import LVLM
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import LVLMOptions
from medm.training.recipe import load_recipe
from medm.training.run import train
from tests import shrink
from tests.training.test_trainer import StopAt, same
from tests.training.toys import (
    BOTH,
    TOWERS,
    Both,
    Fixed,
    Momentum,
    Scaled,
    ScaledConfig,
    trainer,
    weights,
)

STATE = {"slow.0.weight", "slow.0.bias", "slow.2.weight", "slow.2.bias", "queue"}


def test_two_objectives_train_in_one_run_of_the_model_and_are_logged(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    run = trainer(
        tmp_path,
        kind="both",
        parts=BOTH,
        held_out=5,
        eval_strategy="steps",
        eval_steps=3,
        **settings,
    )
    before = weights(run.model)
    run.fit()
    model = run.model
    assert isinstance(model, Both)
    assert len(model.asked) == 3 * 2 + 1  # micro-batches, and one of held-out data
    assert set(model.asked) == {
        frozenset({"loss_sum", "image_embeds", "text_embeds", "logit_scale"})
    }
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["loss/text"] + entry["loss/pairs"], rel=1e-5)
    moved = {
        name.split(".")[0]
        for name, tensor in weights(model).items()
        if not torch.equal(tensor, before[name])
    }
    assert moved == {"towers", "text"}


def test_the_held_out_loss_of_two_objectives_divides_each_by_its_own_items(tmp_path: Path) -> None:
    """Batches of 3 and 2: labels and pairs stand in other proportions in them."""
    run = trainer(tmp_path, kind="both", parts=BOTH, held_out=5, per_device_eval_batch_size=3)
    found = run.evaluate()["eval_loss"]
    model, data = run.model.eval(), run.eval_dataset
    sums, counts = torch.zeros(2), torch.zeros(2)
    for rows in ([0, 1, 2], [3, 4]):
        batch = run.eval_collator([data[row] for row in rows])
        with torch.no_grad():
            output = model(**batch)
        objectives = [term.objective for term in run.terms.terms.values()]
        sums += torch.stack([objective.loss(output, batch) for objective in objectives])
        counts += torch.stack([objective.count(batch) for objective in objectives])
    assert counts.tolist() != [5, 5]
    assert found == pytest.approx(
        (sums[0] / counts[0] + 0.25 * sums[1] / counts[1]).item(), rel=1e-6
    )


def test_the_model_acts_once_after_each_optimizer_step(tmp_path: Path) -> None:
    settings = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 0,
        "save_strategy": "no",
    }
    run = trainer(tmp_path, kind="scaled", parts=TOWERS, **settings)
    model = run.model
    assert isinstance(model, Scaled)
    scales: list[float] = []
    before = model.after_step
    model.after_step = lambda: (scales.append(model.towers.scale[0].item()), before())[1]
    run.fit()
    assert model.steps == 4
    assert min(scales) < Scaled.smallest  # so that something was clamped
    assert model.towers.scale[0].item() >= Scaled.smallest


def test_a_step_that_was_skipped_for_an_overflow_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, kind="scaled", parts=TOWERS, max_steps=3, save_strategy="no")
    skipped = iter(
        [False, False, True, True, False, False]
    )  # asked for by us, then by transformers
    monkeypatch.setattr(
        type(run.accelerator), "optimizer_step_was_skipped", property(lambda _: next(skipped))
    )
    run.fit()
    assert run.model.steps == 2
    assert list(skipped) == []


def test_a_resumed_run_continues_with_momentum_and_queue_bit_for_bit(tmp_path: Path) -> None:
    settings = {
        "kind": "momentum",
        "parts": TOWERS,
        "max_steps": 8,
        "save_steps": 4,
        "save_total_limit": None,
    }
    whole = trainer(tmp_path / "whole", **settings)
    start = weights(whole.model)
    whole.fit()
    assert all(
        not torch.equal(start[name], tensor)
        for name, tensor in weights(whole.model).items()
        if name in STATE
    )
    assert set(load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")) == set(start)
    stopped = trainer(tmp_path / "cut", callbacks=[StopAt(5)], **settings)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        stopped.fit()
    resumed = trainer(tmp_path / "cut", **settings)
    for tensor in (*resumed.model.parameters(), *resumed.model.buffers()):
        tensor.data.add_(1)
    assert resumed.fit(resume=True)
    assert same(whole.model, resumed.model)


@pytest.mark.parametrize("background", [True, False])
def test_the_final_folder_lacks_training_state_and_opens(
    tmp_path: Path, background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(
        tmp_path,
        kind="momentum",
        parts=TOWERS,
        max_steps=2,
        save_steps=2,
        save_in_background=background,
    )
    run.fit()
    run.save_whole(tmp_path / "final")
    in_checkpoint = set(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    in_final = set(load_file(tmp_path / "final" / "model.safetensors"))
    assert in_checkpoint - in_final == STATE
    assert "queue_count" in in_final  # no pattern names it
    caplog.clear()
    opened, report = Momentum.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not report["missing_keys"]
    assert [line for line in caplog.messages if "queue" in line] == []
    own, trained = weights(opened), weights(run.model)
    assert all(torch.equal(own[name], trained[name]) for name in in_final)
    assert torch.equal(own["slow.0.weight"], own["towers.first.0.weight"])
    assert not torch.equal(trained["slow.0.weight"], trained["towers.first.0.weight"])
    assert not own["queue"].any()
    # A checkpoint opens with the state that it holds.
    assert same(Momentum.from_pretrained(tmp_path / "checkpoint-2"), run.model)


def test_a_class_with_training_state_says_how_it_begins(tmp_path: Path) -> None:
    class Forgetful(Momentum):
        init_training_state = Momentum.__mro__[2].init_training_state

    Forgetful(ScaledConfig()).save_pretrained(tmp_path)
    with pytest.raises(
        NotImplementedError, match=r"Forgetful names training_only state slow\.\*, queue"
    ):
        Forgetful.from_pretrained(tmp_path)


class Slow(LVLMForConditionalGeneration):
    zero3_refusal = "its momentum copy is a mean of whole weights"


class SlowOptions(LVLMOptions):
    kind: Literal["slow"] = "slow"


class SlowKind(LVLM):
    model_class = Slow

    def build(self, options: LVLMOptions) -> tuple[Slow, object]:
        raise AssertionError("weights were read")


@pytest.mark.parametrize("given", ["zero3", "zero3_offload", "file", "zero2"])
def test_zero3_is_refused_by_name_before_anything_is_loaded(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given == "file":
        given = str(tmp_path / "ds.json")
        Path(given).write_text('{"zero_optimization": {"stage": 3}}')
    name = "medm-vl-2d/pretrain"
    overrides = [
        *shrink.overrides(name, tmp_path),
        f'data.train=[{{"path": "{shrink.records(name)}"}}]',
        f"output_dir={tmp_path / 'out'}",
        "model.kind=slow",
        f"train.deepspeed={given}",
    ]
    with MODELS.temporary():
        MODELS.add("slow", SlowKind, "with a momentum copy", options=SlowOptions)
        recipe = load_recipe(find(name), overrides)
        if given == "zero2":  # comes as far as the arguments, which start DeepSpeed
            monkeypatch.setattr(
                "medm.training.run.training_arguments", lambda *_: pytest.skip("not refused")
            )
            with pytest.raises(pytest.skip.Exception):
                train(recipe)
            return
        words = (
            "models of kind 'slow' cannot be trained under ZeRO-3: its momentum copy is a mean "
            "of whole weights"
        )
        with pytest.raises(RecipeError, match=words):
            train(recipe)


def test_batches_of_several_sizes_in_one_step(tmp_path: Path) -> None:
    """Micro-batches of 5 and 2 in one step: the loss is that of the counted items, worked out from
    the outputs."""
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    run = trainer(
        tmp_path, kind="both", parts=BOTH, batches=Fixed([[0, 1, 2, 3, 4], [5, 6]]), **settings
    )
    data, sums, counts = run.train_dataset, torch.zeros(2), torch.zeros(2)
    for rows in ([0, 1, 2, 3, 4], [5, 6]):
        batch = run.data_collator([data[row] for row in rows])
        with torch.no_grad():
            output = run.model(**batch)
        for k, term in enumerate(run.terms.terms.values()):
            sums[k] += term.objective.loss(output, batch)
            counts[k] += term.objective.count(batch)
    assert counts.tolist() == [sum(7 - index % 4 for index in range(7)), 7]
    run.fit()
    (entry,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert entry["loss/text"] == pytest.approx((sums[0] / counts[0]).item(), rel=1e-5)
    assert entry["loss/pairs"] == pytest.approx((0.25 * sums[1] / counts[1]).item(), rel=1e-5)
