"""Compiled layers and liger's kernels: the same numbers, the same names, or a reason why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medm.errors import DeviceError, RecipeError
from medm.training.kernels import apply_kernels, compile_layers, generating_part, use_liger
from medm.training.options import TrainOptions
from tests import tiny
from tests.models.test_lvlm import build, collate, example
from tests.training.toys import FULL, trainer, weights


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llm("qwen2.5", tmp_path_factory.mktemp("llm"))


def test_compiled_layers_give_the_same_loss_and_gradients_under_the_same_names(llm: Path) -> None:
    """Traced and differentiated ahead of time as for "inductor", without its C++."""
    model, processor = build(llm, family="qwen2.5")
    batch = collate(
        processor, example(processor), example(processor, "A longer question?", images=2)
    )
    model.train()
    plain = model(**batch).loss
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    names = list(model.state_dict())
    model.zero_grad()
    assert compile_layers(model, backend="aot_eager") > 2
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)
    assert list(model.state_dict()) == names


def test_the_optimiser_in_one_kernel_takes_the_steps_of_the_plain_one(tmp_path: Path) -> None:
    assert TrainOptions().optim == "adamw_torch_fused"
    trained = []
    for optim in ("adamw_torch", "adamw_torch_fused"):
        run = trainer(
            tmp_path / optim,
            parts=FULL,
            max_steps=4,
            save_strategy="no",
            optim=optim,
            weight_decay=0.1,
        )
        run.fit()
        assert bool(run.optimizer.param_groups[0]["fused"]) is optim.endswith("fused")
        trained.append(weights(run.model))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(RecipeError, match="no repeated layers"):
        compile_layers(torch.nn.Linear(2, 2))
    with pytest.raises(RecipeError, match="ZeRO-3"):
        compile_layers(torch.nn.Linear(2, 2), deepspeed="zero3_offload")


def test_liger_is_said_to_be_missing_before_anything_is_trained() -> None:
    with pytest.raises(RecipeError, match="no language model"):
        use_liger(None)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="liger"):
            use_liger(torch.nn.Linear(2, 2))


def test_the_options_of_a_run_choose_the_kernels(
    llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = build(llm, family="qwen2.5")
    assert generating_part(model) is model.language_model
    called: list[object] = []
    monkeypatch.setattr("medm.training.kernels.use_liger", lambda part: called.append(part))
    monkeypatch.setattr(
        "medm.training.kernels.compile_layers", lambda model, deepspeed: called.append(deepspeed)
    )
    apply_kernels(model, TrainOptions())
    assert called == []
    apply_kernels(model, TrainOptions(liger=True, torch_compile=True, deepspeed="zero2"))
    assert called == [model.language_model, "zero2"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ligers_kernels_give_the_loss_of_the_plain_layers(llm: Path) -> None:
    pytest.importorskip("liger_kernel")
    model, processor = build(llm, family="qwen2.5")
    model.cuda()
    batch = collate(processor, example(processor))
    on_gpu = {
        key: value.cuda()
        if isinstance(value, torch.Tensor)
        else {name: t.cuda() for name, t in value.items()}
        for key, value in batch.items()
    }
    plain = model(**on_gpu).loss.item()
    use_liger(model.language_model)
    assert model(**on_gpu).loss.item() == pytest.approx(plain, rel=1e-3)
