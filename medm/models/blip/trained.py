"""Weights of a trained model of kind `blip` as the start of one with other heads."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from medm.errors import CheckpointError
from medm.models.blip.configuration import MedmBlipConfig
from medm.models.blip.modeling import MedmBlip
from medm.models.manifest import verify_weights
from medm.models.published.weights import LoadReport, PretrainedSource

logger = logging.getLogger(__name__)

_OF_A_DATA_SET = ("labels.", "answers.")
"""Beginnings of the names of heads whose classes are those of one data set."""
_UNITS = re.compile(
    r"(?P<join>image\.join)\.|text\..*(?P<cross>crossattention)\."
    r"|(?P<knowledge>knowledge\.\w+)\.|(?!image\.|text\.)(?P<head>\w+)\."
)
"""Names of what a trained model may lack as a whole; all others are required."""


def load_trained(model: MedmBlip, folder: str) -> LoadReport:
    """Load what a trained model of this kind shares with `model`: towers, heads, knowledge.

    A head or source of knowledge that the folder lacks keeps its new weights as a whole; so do
    heads whose classes belong to a data set. What the model lacks is left out. Both are logged.

    Args:
        model: built, with weights of its own.
        folder: that medm saved.

    Raises:
        CheckpointError: a folder of another kind, or with damaged weights; or a tower, or a part of
            a head, that is missing or misshaped.
    """
    source = PretrainedSource(folder)
    kind = source.config().get("model_type")
    if kind != MedmBlipConfig.model_type:
        raise CheckpointError(
            f"model.pretrained {folder}: expected a folder of the kind 'blip' that medm saved, "
            f"found {kind!r}; name published weights as model.path, or those of one tower as "
            "image.encoder.path or text.path"
        )
    verify_weights(Path(folder).expanduser())
    held = {
        name: tensor
        for name, tensor in source.tensors().items()
        if not name.startswith(_OF_A_DATA_SET)
    }
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not model.is_training_only(name)
    }
    report = LoadReport(folder)
    found = {_unit(name) for name in own.keys() & held.keys()}
    new: set[str] = set()
    for name, tensor in own.items():
        unit = _unit(name)
        if name in held and held[name].shape == tensor.shape:
            report.loaded.append(name)
        elif name in held:
            shapes = f"{tuple(held[name].shape)}, expected {tuple(tensor.shape)}"
            report.mismatched.append(f"{name} {shapes}")
        elif unit is None or unit in found:
            report.missing.append(name)
        else:
            new.add(unit)
    report.ignored = sorted(held.keys() - own.keys())
    report.raise_if_partial()
    model.load_state_dict(
        {name: held[name].to(own[name].dtype) for name in report.loaded}, strict=False
    )
    left = sorted({_unit(name) or name for name in report.ignored})
    logger.info(
        "%s: %d tensors; new weights: %s; left out: %s",
        folder,
        len(report.loaded),
        ", ".join(sorted(new)) or "none",
        ", ".join(left) or "none",
    )
    return report


def _unit(name: str) -> str | None:
    """Return the part that a tensor belongs to, which may be new as a whole; None for towers."""
    match = _UNITS.match(name)
    return None if match is None else next(part for part in match.groups() if part is not None)
