"""Opening a model folder that medm saved: config, weights and processor, each verified."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig

from medm.errors import CheckpointError
from medm.models.auto import register
from medm.models.base import MedmModel
from medm.models.kinds import kind_of_config
from medm.models.manifest import verify_weights
from medm.models.published.weights import LoadReport, read_object
from medm.models.small_files import check_small_files, count_values, opening
from medm.types import MODEL_TYPE_PREFIX, Processor

logger = logging.getLogger(__name__)

_SMALL = 2**26
"""Parameters that a config may always describe."""


def open_config(folder: str) -> PreTrainedConfig:
    """See `medm.models.load_config`."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: not a model folder; expected config.json, weights and "
            "processor_config.json in it"
        )
    register()
    check_small_files(path)  # a config of endless layers would not even be read
    config = opening(
        path, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False), what="config.json"
    )
    if not config.model_type.startswith(MODEL_TYPE_PREFIX):
        raise CheckpointError(
            f"{folder}: a model of type {config.model_type!r}, which medm did not save; "
            "'medm import' turns published folders into medm models"
        )
    # medm saves neither. A folder from elsewhere may name a kernel of the hub, which would be
    # fetched and run.
    config._attn_implementation = None
    config._experts_implementation = None
    # medm reads outputs by name, which a config could switch off.
    for part in (config, *vars(config).values()):
        if isinstance(part, PreTrainedConfig):
            part.return_dict = True
    return config


def open_saved(folder: str) -> tuple[MedmModel, Processor]:
    """See `medm.models.load`."""
    path, config = Path(folder).expanduser(), open_config(folder)
    verify_weights(path)
    processor = opening(
        path,
        lambda: AutoProcessor.from_pretrained(path, trust_remote_code=False),
        what="its tokenizer or processor",
    )
    opening(path, lambda: _check_extent(path, config), what="its model")
    # Mismatched tensors are let through here, so that the report below names them as it names the
    # others.
    model, report = opening(
        path,
        lambda: AutoModel.from_pretrained(
            path,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        ),
        what="its model",
    )
    loaded = LoadReport(
        folder,
        missing=sorted(report["missing_keys"]),
        unexpected=sorted(report["unexpected_keys"]),
        mismatched=[
            f"{k} {tuple(found)}, expected {tuple(own)}"
            for k, found, own in sorted(report["mismatched_keys"])
        ],
    )
    loaded.raise_if_partial()
    opening(path, lambda: _check_processor(path, config, processor), what="its processor")
    _report_unknown_fields(path, config, processor)
    model.upgrade(processor)
    model.eval()
    return model, processor


def _check_processor(folder: Path, config: PreTrainedConfig, processor: Processor) -> None:
    """Raise `CheckpointError` for a processor of another kind of model or of other branches, and
    for placeholders with other ids than the model's.
    """
    file, expected = folder / "processor_config.json", kind_of_config(config).processor_class
    # By name: transformers may have imported the module of a plug-in a second time.
    if type(processor).__name__ != expected.__name__:
        raise CheckpointError(
            f"{file}: expected a {expected.__name__}, found a {type(processor).__name__}; the file "
            "is damaged, or of another model"
        )
    entries = getattr(config, "encoder_entries", None)
    if entries is not None:
        views = sorted(name for name in processor.preprocess if "@" not in name)
        if views != sorted(entries()):
            raise CheckpointError(
                f"{file}: branches {', '.join(views) or 'none'}; the model of config.json has "
                f"{', '.join(sorted(entries())) or 'none'}. The file is damaged, or of another "
                "model"
            )
    for name, token in getattr(processor, "placeholder_ids", {}).items():
        if (known := config.branches[name]["placeholder_id"]) != token:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'}: the placeholder of the branch {name} has the id "
                f"{token}; the model of config.json expects {known}. The file is damaged, or of "
                "another model"
            )


def _check_extent(folder: Path, config: PreTrainedConfig) -> None:
    """Raise `CheckpointError` for a config of a model much larger than its weights.

    Tensors that the weights do not hold would be allocated before they are reported.
    """
    with torch.device("meta"):
        blank = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False)
    declared = sum(parameter.numel() for parameter in blank.parameters())
    held = count_values(folder)
    if declared > 2 * held + _SMALL:
        raise CheckpointError(
            f"{folder / 'config.json'}: describes a model of {declared} parameters, and the "
            f"weights hold {held} numbers; the file is damaged, or of another model"
        )


def open_processor(folder: str) -> Processor:
    """See `medm.models.load_processor`."""
    path = Path(folder).expanduser()
    if not (path / "processor_config.json").is_file():
        raise CheckpointError(f"{folder}: not a model folder; expected processor_config.json in it")
    register()
    check_small_files(path)
    return opening(
        path,
        lambda: AutoProcessor.from_pretrained(path, trust_remote_code=False),
        what="its tokenizer or processor",
    )


def _report_unknown_fields(folder: Path, config: PreTrainedConfig, processor: Processor) -> None:
    """Warn of the fields of a saved model that this medm does not know."""
    taken = {*inspect.signature(type(processor)).parameters, "processor_class"}
    for name, known in (
        ("config.json", lambda key: hasattr(type(config)(), key) or key.endswith("_token_id")),
        ("processor_config.json", taken.__contains__),
    ):
        unknown = sorted(key for key in read_object(folder / name) if not known(key))
        if unknown:
            logger.warning(
                "%s: %s is not known here and has no effect; a later medm may have written it",
                folder / name,
                ", ".join(unknown),
            )
