"""Tensor names of SAM 2: Meta's, those of transformers, and the generation that they belong to.

Meta's files (`sam2_hiera_large.pt`, `sam2.1_hiera_tiny.pt`, `MedSAM2_latest.pt`) and models built
around Meta's code (Sa2VA, UniBiomed) use the first, `Sam2Model` and `Sam2VideoModel` the second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from medm.errors import CheckpointError

Era: TypeAlias = Literal["2.0", "2.1"]

MEMORY = (
    r"^(memory_attention|memory_encoder|memory_temporal_positional_encoding"
    r"|no_memory_positional_encoding|no_object_pointer|mask_downsample|object_pointer_proj"
    r"|temporal_positional_encoding_projection_layer|occlusion_spatial_embedding_parameter)\b"
)
"""Names, as in transformers, of the tensors that carry masks through the frames of a video."""

_ONLY_2_1 = (
    "temporal_positional_encoding_projection_layer.weight",
    "occlusion_spatial_embedding_parameter",
)

_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.g_weight$", ".gamma"),
        (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
        (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
        (r"^sam_prompt_encoder\.", "prompt_encoder."),
        (r"^sam_mask_decoder\.", "mask_decoder."),
        (r"\bpatch_embed\.proj\.", "patch_embed.projection."),
        (
            r"\bpe_layer\.positional_encoding_gaussian_matrix$",
            "shared_embedding.positional_embedding",
        ),
        (r"\bmask_downscaling\.0\.", "mask_embed.conv1."),
        (r"\bmask_downscaling\.1\.", "mask_embed.layer_norm1."),
        (r"\bmask_downscaling\.3\.", "mask_embed.conv2."),
        (r"\bmask_downscaling\.4\.", "mask_embed.layer_norm2."),
        (r"\bmask_downscaling\.6\.", "mask_embed.conv3."),
        (r"\boutput_upscaling\.0\.", "upscale_conv1."),
        (r"\boutput_upscaling\.1\.", "upscale_layer_norm."),
        (r"\boutput_upscaling\.3\.", "upscale_conv2."),
        (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
        (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
        (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
        (r"\.dwconv\.", ".depthwise_conv."),
        (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
        (r"\.gamma$", ".scale"),
        (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
        (r"^no_mem_embed$", "no_memory_embedding"),
        (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
        (r"^no_obj_ptr$", "no_object_pointer"),
        (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
        (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
        (r"^obj_ptr_proj\.", "object_pointer_proj."),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.norm(\d|_final_attn)?\.", r".layer_norm\1."),
    )
)
"""All that match are applied, in this order."""

_MLP_LAYER = re.compile(
    r"^(.*(?:\.mlp|iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d+"
    r"|object_pointer_proj))\.layers\.(\d+)\.(weight|bias)$"
)
_MASK_LAYER = re.compile(r"^(.*\.mask_downsampler)\.encoder\.(\d+)\.(weight|bias)$")
_POINT = re.compile(r"^(prompt_encoder\.)point_embeddings\.(\d+)\.weight$")


def is_meta(names: Iterable[str]) -> bool:
    """Return True for the names of Meta's files."""
    return any(name.startswith(("image_encoder.", "sam_mask_decoder.")) for name in names)


def transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a SAM 2 model of Meta under the names of transformers.

    Args:
        tensors: by Meta's names, without the prefix of a model around it. The names of Sa2VA and
            UniBiomed, which write `g_weight` for `gamma`, are read, too.

    Returns:
        Every tensor, by the name in `Sam2VideoModel`. The point embeddings are stacked, and the
        matrix of the positions stands under both of its names.

    Raises:
        CheckpointError: two tensors become one, or a point embedding is missing.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in _RENAMES:
            new = pattern.sub(replacement, new)
        if new in renamed:
            raise CheckpointError(f"SAM 2: two tensors become {new!r}; the second is {name!r}")
        renamed[new] = tensor
    renamed = _stack_points(_name_layers(renamed))
    positions = renamed.get("prompt_encoder.shared_embedding.positional_embedding")
    if positions is not None:
        renamed["shared_image_embedding.positional_embedding"] = positions
    return renamed


def _name_layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Meta counts the layers of an MLP and of the mask downsampler, transformers names them."""
    last: dict[str, int] = {}
    for name in tensors:
        if found := _MLP_LAYER.match(name) or _MASK_LAYER.match(name):
            last[found[1]] = max(last.get(found[1], 0), int(found[2]))

    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name
        if found := _MLP_LAYER.match(name):
            prefix, number, kind = found[1], int(found[2]), found[3]
            inner = "proj_in" if number == 0 else f"layers.{number - 1}"
            new = f"{prefix}.{'proj_out' if number == last[prefix] else inner}.{kind}"
        elif found := _MASK_LAYER.match(name):
            # Convolution, norm and activation take three numbers; a last convolution follows.
            prefix, number, kind = found[1], int(found[2]), found[3]
            inner = f"layers.{number // 3}.{'layer_norm' if number % 3 else 'conv'}"
            new = f"{prefix}.{'final_conv' if number == last[prefix] else inner}.{kind}"
        named[new] = tensor
    return named


def _stack_points(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta has one embedding for each label of a point, transformers one table."""
    rows = {int(found[2]): name for name in tensors if (found := _POINT.match(name))}
    if not rows:
        return tensors
    if sorted(rows) != list(range(len(rows))):
        raise CheckpointError(
            f"SAM 2: expected the point embeddings 0 to {max(rows)}, found {sorted(rows)}"
        )
    stacked = torch.cat([tensors.pop(rows[number]) for number in sorted(rows)])
    tensors["prompt_encoder.point_embed.weight"] = stacked
    return tensors


def era_of(names: Iterable[str], *, source: str) -> Era | None:
    """Return the generation of a SAM 2 video model, by the names of its tensors.

    SAM 2.1 added positions in time to the object pointers, and an embedding of occlusion. Loaded as
    the other generation every further tensor fits, and the masks of a volume drift.

    Args:
        names: as in transformers.
        source: for messages.

    Returns:
        None for an image model: the two generations do not differ there.

    Raises:
        CheckpointError: the file mixes both.
    """
    names = set(names)
    if not any(name.startswith("memory_attention.") for name in names):
        return None
    found = [name for name in _ONLY_2_1 if name in names]
    if len(found) == len(_ONLY_2_1):
        return "2.1"
    if found:
        missing = next(name for name in _ONLY_2_1 if name not in names)
        raise CheckpointError(
            f"{source}: neither SAM 2.0 nor SAM 2.1: it has {found[0]}, which 2.0 lacks, and not "
            f"{missing}, which 2.1 has; fetch the file again, or convert it anew"
        )
    return "2.0"
