"""VISTA3D as a head: equal to MONAI's model with its own weights, whole and in windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets.segresnet_ds import SegResNetDS2
from monai.networks.nets.vista3d import VISTA3D, ClassMappingClassify, PointMappingSAM
from torch import Tensor

from medm.errors import CheckpointError, RecipeError
from medm.heads import VISTA3DOptions
from medm.heads.base import Points
from medm.heads.vista3d import VISTA3DHead
from medm.imaging import preprocess_from_dict
from medm.models.mask_heads import load_head
from medm.models.published.weights import load_module

WIDTH, BLOCKS = 8, (1, 1, 1)
SIZES: dict[str, Any] = {"width": WIDTH, "blocks_down": list(BLOCKS)}


def published() -> VISTA3D:
    """MONAI's own model, as `vista3d132` puts it together."""
    torch.manual_seed(0)
    return VISTA3D(
        image_encoder=SegResNetDS2(
            in_channels=1,
            blocks_down=BLOCKS,
            norm="instance",
            out_channels=WIDTH,
            init_filters=WIDTH,
            dsdepth=1,
        ),
        class_head=ClassMappingClassify(n_classes=6, feature_size=WIDTH, use_mlp=True),
        point_head=PointMappingSAM(feature_size=WIDTH, n_classes=6, last_supported=4),
    ).eval()


def loaded(model: VISTA3D, **options: Any) -> VISTA3DHead:
    head = VISTA3DHead(architecture=SIZES, **options)
    report = load_module(
        head,
        head.rename_published(model.state_dict()),
        source="test",
        key_map=head.key_map,
        ignored=head.ignored_keys,
    )
    assert len(report.loaded) == len(head.state_dict())
    branches = {".".join(name.split(".")[:2]) for name in report.ignored}
    assert {name for name in branches if not name.startswith("point_head")} == {
        "image_encoder.up_layers",
        "class_head.class_embeddings",
    }
    return head.eval()


def prompts_of(model: VISTA3D, classes: list[int]) -> Tensor:
    """Rows of the class table."""
    return model.class_head.class_embeddings.weight[classes].detach()


def test_the_mask_of_a_class_is_that_of_its_row_as_a_prompt() -> None:
    model = published()
    head = loaded(model)
    pixels, classes = torch.randn(1, 1, 8, 16, 12), [1, 4, 2]
    with torch.no_grad():
        expected = model(pixels, class_vector=torch.tensor(classes)[:, None])  # (3, 1, *grid)
        found = head(pixels, prompts_of(model, classes), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(found.logits, expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.presence, expected.flatten(1).amax(1), rtol=1e-5, atol=1e-5)
    assert found.logits.shape[1:] == head.grid((8, 16, 12))


def test_windows_equal_the_sliding_window_of_monai() -> None:
    model = published()
    head = loaded(model, patch=(8, 8, 16), overlap=0.25)
    pixels, classes = torch.randn(2, 1, 16, 12, 12), [1, 4]
    items = torch.tensor([1, 1, 0, 0])

    def predict(patch: Tensor) -> Tensor:
        return model(patch, class_vector=torch.tensor(classes)[:, None], transpose=True)

    with torch.no_grad():
        # Along the last axis the volume is smaller than the patch.
        options: dict[str, Any] = {"overlap": 0.25, "mode": "gaussian"}
        expected = torch.cat(
            [
                sliding_window_inference(volume[None], (8, 8, 12), 1, predict, **options)
                for volume in pixels
            ]
        )  # (2, classes, *grid)
        prompts = prompts_of(model, classes).repeat(2, 1)
        found = head(pixels, prompts, items)
        whole = loaded(model, patch=None)(pixels, prompts, items)
    assert found.logits.shape == (4, 16, 12, 12)
    torch.testing.assert_close(found.logits, expected[[1, 0]].flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.logits, whole.logits, atol=1e-3)


def test_windows_of_two_dozen_parts_cover_the_volume_evenly() -> None:
    """Logits that are the same everywhere stay the same: the weights are a mean."""
    head = VISTA3DHead(architecture=SIZES, patch=(8, 8, 8), overlap=0.5)
    windows = head.eval()._windows((16, 12, 20))
    assert len(windows) == 3 * 2 * 4
    blended = head._blended([torch.full((1, 8, 8, 8), 3.0)] * len(windows), (16, 12, 20))
    torch.testing.assert_close(blended, torch.full((1, 16, 12, 20), 3.0))


def test_training_reads_the_volume_as_a_whole_and_reaches_every_weight() -> None:
    torch.manual_seed(0)
    head = VISTA3DHead(architecture=SIZES, patch=(8, 8, 8)).train()
    pixels = torch.randn(2, 1, 16, 8, 8)
    assert len(head._windows((16, 8, 8))) == 1
    prompts = torch.randn(3, WIDTH, requires_grad=True)
    out = head(pixels, prompts, torch.tensor([1, 0, 1]))
    out.logits.pow(2).sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    assert prompts.grad is not None and prompts.grad.any(dim=1).all()
    assert len(head.eval()._windows((16, 8, 8))) == 3


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_equals_one_by_one(training: bool) -> None:
    torch.manual_seed(0)
    head = VISTA3DHead(architecture=SIZES, patch=(8, 8, 8)).train(training)
    pixels, prompts = torch.randn(3, 1, 12, 8, 8), torch.randn(3, WIDTH)
    items = torch.tensor([2, 0, 2])
    together = head(pixels, prompts, items)
    for mask, item in enumerate(items.tolist()):
        alone = head(pixels[item : item + 1], prompts[mask : mask + 1], torch.tensor([0]))
        for whole, own in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[mask], own[0], rtol=1e-4, atol=1e-5)


def test_a_file_of_monai_is_opened_without_running_it(tmp_path: Path) -> None:
    model = published()
    file = tmp_path / "model.pt"
    torch.save(model.state_dict(), file)
    head = VISTA3DHead(architecture=SIZES)
    load_head(head, VISTA3DOptions(name="vista3d", path=str(file)))
    expected = loaded(model).state_dict()
    assert all(torch.equal(head.state_dict()[name], expected[name]) for name in expected)
    again = tmp_path / "own.pt"
    torch.save(head.state_dict(), again)
    load_head(VISTA3DHead(architecture=SIZES), VISTA3DOptions(name="vista3d", path=str(again)))
    with pytest.raises(CheckpointError, match="of another shape"):
        wide = VISTA3DHead(architecture={**SIZES, "width": 16})
        load_head(wide, VISTA3DOptions(name="vista3d", path=str(file)))
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, file)
    with pytest.raises(CheckpointError, match=r"MONAI's VISTA3D .* found conv\.weight"):
        load_head(head, VISTA3DOptions(name="vista3d", path=str(file)))


def test_the_default_sizes_are_those_of_the_published_model() -> None:
    from monai.networks.nets.vista3d import vista3d132

    with torch.device("meta"):
        head, model = VISTA3DHead(architecture={}), vista3d132()
    report = load_module(
        head,
        model.state_dict(),
        source="test",
        key_map=head.key_map,
        ignored=head.ignored_keys,
    )
    assert len(report.loaded) == len(head.state_dict())
    assert head.dim == 48


def test_the_preprocessing_is_that_of_the_bundle() -> None:
    fields = VISTA3DHead.preprocess_from({}, VISTA3DHead.architecture_from({"other": 1}))
    preprocess = preprocess_from_dict({"kind": "volume", **fields})
    assert preprocess.size == [128, 128, 128]
    assert VISTA3DHead(architecture=SIZES).grid((128, 128, 128)) == (128, 128, 128)
    assert VISTA3DHead.preprocess_from({}, {}, [64, 64, 32])["size"] == [64, 64, 32]


def test_what_does_not_fit_is_refused() -> None:
    head = VISTA3DHead(architecture=SIZES)
    with pytest.raises(ValueError, match=r"multiples of 4 along each axis, found \[8, 8, 10\]"):
        head(torch.randn(1, 1, 8, 8, 10), torch.randn(1, WIDTH), torch.tensor([0]))
    with pytest.raises(ValueError, match="3 axes"):
        head.grid((8, 8))
    with pytest.raises(ValueError, match="single voxel"):
        head.grid((4, 4, 4))
    with pytest.raises(RecipeError, match="patch: vista3d: expected multiples of 4"):
        VISTA3DHead(architecture=SIZES, patch=(8, 8, 9))
    with pytest.raises(RecipeError, match="unknown key 'depth'"):
        VISTA3DHead(architecture={"depth": 2})
    points = Points(torch.zeros(1, 1, 3), torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="takes no points"):
        head(torch.randn(1, 1, 8, 8, 8), torch.randn(1, WIDTH), torch.tensor([0]), points)
