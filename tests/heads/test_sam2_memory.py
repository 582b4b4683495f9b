"""Masks carried through slices, against the video model of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from medm.errors import RecipeError
from medm.heads.sam2 import Sam2Head
from medm.heads.sam2_memory import ABSENT_LOGIT, Sam2Memory
from tests.heads.test_sam2 import ERA_20, ERA_21, like, make_video_model
from tests.heads.tiny import TINY_MEMORY, build_head

SLICES = 9
"""More than the four memories and the five pointers of the tiny model."""


@pytest.fixture(
    scope="module",
    params=[(ERA_20, 1.0), (ERA_21, 1.0), (ERA_21, 0.0)],
    ids=["2.0", "2.1", "2.1, presence near 0"],
)
def model(request) -> Sam2VideoModel:
    era, presence = request.param
    model = make_video_model(era)
    with torch.no_grad():
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(presence)
    return model


@pytest.fixture(scope="module")
def head(model) -> Sam2Head:
    era = "2.1" if model.config.enable_occlusion_spatial_embedding else "2.0"
    return like(model, memory=True, era=era)


def volume(seed: int = 3) -> torch.Tensor:
    return torch.randn(SLICES, 3, 128, 128, generator=torch.Generator().manual_seed(seed))


def target() -> torch.Tensor:
    """Logits of a square."""
    logits = torch.full((32, 32), -5.0)
    logits[8:20, 10:24] = 5.0
    return logits


def theirs(
    model: Sam2VideoModel, pixels: torch.Tensor, masks: dict[int, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Propagation of transformers, forward and then backward, from masks at full resolution."""
    session = Sam2VideoInferenceSession(
        video=pixels, video_height=128, video_width=128, dtype=torch.float32
    )
    index = session.obj_id_to_idx(1)
    logits, presence = [None] * len(pixels), [None] * len(pixels)
    for slice_index, mask in masks.items():
        session.add_mask_inputs(index, slice_index, mask[None, None])
        session.obj_with_new_inputs = [1]
        model(inference_session=session, frame_idx=slice_index)
    for reverse in (False, True):
        for out in model.propagate_in_video_iterator(session, min(masks), reverse=reverse):
            if logits[out.frame_idx] is None:
                logits[out.frame_idx] = out.pred_masks[0, 0]
                presence[out.frame_idx] = out.object_score_logits.flatten()
    return torch.stack(logits), torch.cat(presence)


def followed(memory, maps, conditioning):
    """Masks and presence of one target in every slice."""
    logits, presence = memory.propagate(
        lambda index: tuple(level[index : index + 1] for level in maps),
        len(maps[0]),
        [conditioning],
    )
    return logits[:, 0], presence[:, 0]


@pytest.mark.parametrize("conditioned", [(0,), (3,), (2, 6)])
def test_propagation_equals_the_video_model(model, head, conditioned):
    """After masks, with what the published predictors do: bfloat16 memory, binary masks of
    conditioning slices, blanked masks of absent targets."""
    pixels = volume()
    whole = torch.nn.functional.interpolate(
        target()[None, None], scale_factor=4, mode="bilinear", align_corners=False
    )[0, 0]
    logits, presence = theirs(model, pixels, {i: (whole > 0).float() for i in conditioned})
    memory = Sam2Memory(head, binarize=True, blank_absent=True, dtype=torch.bfloat16)
    with torch.no_grad():
        maps = head.encode(pixels)
    ours, score = followed(memory, maps, dict.fromkeys(conditioned, target()))
    assert ours.shape == (SLICES, 32, 32)
    tracked = [i for i in range(SLICES) if i not in conditioned]
    torch.testing.assert_close(ours[tracked], logits[tracked], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(score, presence, atol=1e-4, rtol=1e-4)
    if presence.min() > 0:
        assert ours.std(dim=(1, 2)).gt(0).all()
    for index in conditioned:
        assert torch.equal(ours[index], target())


def test_a_prompted_slice_is_decoded_without_memory(head):
    pixels = volume()
    prompt = torch.randn(128)
    with torch.no_grad():
        maps = head.encode(pixels)
        alone = head.decode(maps, prompt.unsqueeze(0), torch.tensor([4]))
    logits, presence = followed(Sam2Memory(head), maps, {4: prompt})
    torch.testing.assert_close(logits[4], alone.logits[0])
    torch.testing.assert_close(presence[4], alone.presence[0])
    assert not torch.allclose(logits[3], logits[4])


def test_the_prompt_reaches_every_slice(head):
    with torch.no_grad():
        maps = head.encode(volume())
    memory = Sam2Memory(head)
    first, _ = followed(memory, maps, {4: torch.full((128,), 2.0)})
    second, _ = followed(memory, maps, {4: torch.full((128,), -2.0)})
    assert (first - second).abs().amax(dim=(1, 2)).gt(0).all()


def test_slices_between_two_prompts_know_both(head):
    with torch.no_grad():
        maps = head.encode(volume())
    memory = Sam2Memory(head)
    prompt, other = torch.full((128,), 2.0), torch.full((128,), -2.0)
    one, _ = followed(memory, maps, {1: prompt, 7: prompt})
    two, _ = followed(memory, maps, {1: prompt, 7: other})
    torch.testing.assert_close(one[1], two[1])
    assert not torch.allclose(one[4], two[4], atol=1e-6, rtol=0)


def test_targets_together_equal_each_alone_and_ask_for_one_slice_at_a_time(head):
    with torch.no_grad():
        maps = head.encode(volume())
    given = [{2: torch.full((128,), 2.0)}, {5: torch.full((128,), -2.0), 7: target()}]
    memory, asked = head.memory(), []

    def maps_of(index):
        asked.append(index)
        return tuple(level[index : index + 1] for level in maps)

    logits, presence = memory.propagate(maps_of, SLICES, given)
    assert max(asked.count(index) for index in range(SLICES)) <= 3
    for number, own in enumerate(given):
        alone, score = followed(memory, maps, own)
        torch.testing.assert_close(logits[:, number], alone)
        torch.testing.assert_close(presence[:, number], score)


def test_blanking_and_binary_memory_are_choices(head):
    with torch.no_grad():
        maps = head.encode(volume())
    conditioning = {0: torch.full((128,), 0.7)}
    plain, presence = followed(Sam2Memory(head), maps, conditioning)
    binary, _ = followed(Sam2Memory(head, binarize=True), maps, conditioning)
    assert torch.equal(plain[0], binary[0])
    assert not torch.allclose(plain[1], binary[1], atol=1e-6, rtol=0)
    assert (plain > ABSENT_LOGIT).all()
    blanked, score = followed(Sam2Memory(head, blank_absent=True), maps, conditioning)
    absent = score <= 0
    assert (blanked[absent] == ABSENT_LOGIT).all()
    assert (blanked[~absent] > ABSENT_LOGIT).all()
    torch.testing.assert_close(presence[0], score[0])


def test_memory_adapts_to_the_grid_of_the_slices(head):
    """Rotary positions of 16 x 16 cells, where the config says 64 x 64."""
    with torch.no_grad():
        maps = head.encode(torch.randn(3, 3, 256, 256))
    logits, _ = followed(Sam2Memory(head), maps, {1: torch.randn(128)})
    assert logits.shape == (3, 64, 64)
    assert logits.isfinite().all()


def test_memory_is_not_trained_but_saved(head):
    names = {name for name, _ in head.named_parameters()}
    saved = head.state_dict()
    assert "decoder.memory.memory_attention.layer_norm.weight" in saved
    assert not any(name.startswith("decoder.memory") for name in names)


def test_faulty_calls_are_refused(head):
    with pytest.raises(RecipeError, match="set memory: true"):
        Sam2Memory(build_head("sam2"))
    with pytest.raises(RecipeError, match=r"expected memory_encoder_output_channels 64"):
        build_head("sam2", memory=True, architecture={"memory_encoder_output_channels": 32})
    with torch.no_grad():
        maps = head.encode(volume()[:2])
    memory = Sam2Memory(head)
    with pytest.raises(ValueError, match="no conditioning slice"):
        followed(memory, maps, {})
    with pytest.raises(ValueError, match="slice 2 of a volume of 2"):
        followed(memory, maps, {2: torch.ones(128)})
    with pytest.raises(ValueError, match=r"expected a prompt \(128,\) or logits \(32, 32\)"):
        followed(memory, maps, {0: torch.ones(8, 8)})
    assert TINY_MEMORY["num_maskmem"] < SLICES
