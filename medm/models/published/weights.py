"""Published weights: finding files, renaming tensors, and refusing what does not fit.

The one place that reads model files of other programs. Loading reports every tensor that was used,
ignored, missing or misshaped, and a partial load is an error: a model that is half random looks
alive and scores like noise.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from medm.encoders.key_map import map_key
from medm.errors import CheckpointError, unavailable
from medm.models.published import blip, open_clip

logger = logging.getLogger(__name__)

T = TypeVar("T")

BUNDLE_TYPE = "medm-encoder"
"""`model_type` in the `config.json` of an encoder that medm exported: sizes, preprocessing and
tensors by own names."""

TOWER_PREFIXES = (
    "model.vision_tower.",
    "vision_tower.",
    "model.vision_model.",
    "vision_model.",
    "model.visual.",
    "visual.",
)
"""Beginnings of the names of a vision tower's tensors in the published layouts of vision-language
models: llava-hf, Gemma 3 (MedGemma), InternVL, Idefics and SmolVLM, Qwen-VL (Lingshu)."""

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pretrained_ViT.bin",
)


class PretrainedSource:
    """A folder, a file or a Hugging Face id that holds a config and weights.

    Args:
        path: as in a recipe. Ids are looked up in the local cache first and then on the hub.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._local = Path(path).expanduser()
        self._in_file: dict[str, str] = {}
        self._sizes: dict[str, Any] | None = None

    def config(self) -> dict[str, Any]:
        """`config.json`, or an empty mapping for a bare weight file or a folder without one.

        A dual encoder in open_clip's layout and a file of BLIP have none that says every size: they
        are read from the tensors.
        """
        if published := self._json("config.json"):
            return published
        if self._sizes is None:  # whole files of weights are read for them
            self._sizes = self._config_of_tensors()
        return self._sizes

    def preprocessor(self) -> dict[str, Any]:
        """Return the config of the image processor, or an empty mapping.

        It is `preprocessor_config.json`, or the image processor of a `processor_config.json` or
        of open_clip's config.
        """
        if alone := self._json("preprocessor_config.json"):
            return alone
        inner = self._json("processor_config.json").get("image_processor")
        if isinstance(inner, dict):
            return inner
        return open_clip.preprocessor_of(
            self._json("open_clip_config.json").get("preprocess_cfg", {})
        )

    def has_config(self) -> bool:
        """Return True if a file has the sizes, be it transformers' or open_clip's."""
        return bool(self._json("config.json") or self._json("open_clip_config.json"))

    def in_file(self, name: str) -> str:
        """Return the name in the file of a tensor that `tensors` gave."""
        return self._in_file.get(name, name)

    def is_bundle(self) -> bool:
        """Return whether medm exported the folder as an encoder."""
        return self._json("config.json").get("model_type") == BUNDLE_TYPE

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its published name; those of a dual encoder, of BLIP and of norms under
        TensorFlow's names by that of transformers.

        Raises:
            CheckpointError: there are no weights, a file is damaged, or it would run code when
                opened.
        """
        tensors = {
            name: tensor for file in self._files() for name, tensor in read_tensors(file).items()
        }
        if open_clip.is_open_clip(tensors):
            tensors, self._in_file = open_clip.stock_names(tensors)
        elif blip.is_blip(tensors):
            tensors, self._in_file = blip.stock_names(tensors)
        else:
            self._in_file = {_norm_name(name): name for name in tensors}
            tensors = {new: tensors[name] for new, name in self._in_file.items()}
        return tensors

    def tensors_under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names in the files begin so; of safetensors files no other is read."""
        return {
            name: tensor
            for file in self._files()
            for name, tensor in read_tensors(file, prefix=prefix).items()
        }

    def encoder_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a published encoder.

        Of a vision-language model they are those of its vision tower, without prefix.

        Of safetensors files no other tensor is read, so that a tower of a model of 27 billion
        parameters costs what the tower costs.

        Raises:
            CheckpointError: as `tensors`, or none of the names begins as a vision tower's do.
        """
        config = self._json("config.json")
        if not (
            {"vision_config", "vision_tower"} & config.keys()
            and {"text_config", "llm_config"} & config.keys()
        ):
            tensors = self.tensors()
            if self.config().get("model_type") != blip.BLIP:
                return tensors
            return {
                name.removeprefix(blip.VISION): tensor
                for name, tensor in tensors.items()
                if name.startswith(blip.VISION)
            }
        files = self._files()
        names = [name for file in files for name in tensor_names(file)]
        prefix = next(
            (p for p in TOWER_PREFIXES if any(name.startswith(p) for name in names)), None
        )
        if prefix is None:
            raise CheckpointError(
                f"{self.path}: a {config.get('model_type')} model, none of whose {len(names)} "
                f"tensors begins with {', '.join(TOWER_PREFIXES)}; found {', '.join(names[:3])}"
            )
        return {
            name.removeprefix(prefix): tensor
            for file in files
            for name, tensor in read_tensors(file, prefix=prefix).items()
        }

    def _config_of_tensors(self) -> dict[str, Any]:
        """Sizes of a dual encoder in open_clip's layout and of BLIP; empty for everything else."""
        published = self._json("open_clip_config.json")
        files = [self._local] if self._local.is_file() else list(self._local.glob("*.pt*"))
        if not published and [file.suffix in (".pt", ".pth") for file in files] != [True]:
            return {}
        tensors = {
            name: tensor for file in self._files() for name, tensor in read_tensors(file).items()
        }
        if open_clip.is_open_clip(tensors):
            stock = open_clip.stock_names(tensors)[0]
            return open_clip.config_of(stock, published.get("model_cfg", {}))
        return blip.config_of(blip.stock_names(tensors)[0]) if blip.is_blip(tensors) else {}

    def _files(self) -> list[Path]:
        """Every file of weights. Raises `CheckpointError` where there are none."""
        if self._local.is_file():
            return [self._local]
        for name in _INDEXES:
            if (index := self._find(name)) is not None:
                return [self._require(shard) for shard in _shards(index)]
        for name in _FILES:
            if (file := self._find(name)) is not None:
                return [file]
        others = (
            sorted(self._local.glob("*.pth")) + sorted(self._local.glob("*.pt"))
            if self._local.is_dir()
            else []
        )
        if len(others) == 1:
            return others
        if not self._local.exists():
            missing = FileNotFoundError("nothing of it is in the cache, or it holds no weights")
            raise CheckpointError(unavailable(str(self.path), missing, key="path"))
        raise CheckpointError(
            f"{self.path}: no weights; expected one of {', '.join(_INDEXES + _FILES)}, or one "
            ".pth file"
        )

    def _json(self, name: str) -> dict[str, Any]:
        if self._local.is_file():
            beside = self._local.parent / name
            file = beside if beside.is_file() else None
        else:
            file = self._find(name)
        return read_object(file) if file is not None else {}

    def _find(self, name: str) -> Path | None:
        if self._local.is_dir():
            return self._local / name if (self._local / name).is_file() else None
        try:
            found = cached_file(self.path, name, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(unavailable(str(self.path), error, key="path")) from None
        return Path(found) if found is not None else None

    def _require(self, name: str) -> Path:
        file = self._find(name)
        if file is None:
            raise CheckpointError(f"{self.path}: the index names {name}, which is missing")
        return file


def _norm_name(name: str) -> str:
    """Return today's name of a layer norm's tensor that has TensorFlow's name, as in old BERTs."""
    name = re.sub(r"\bLayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"\bLayerNorm\.beta$", "LayerNorm.bias", name)


def read_object(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises `CheckpointError`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as JSON ({error}); fetch or copy it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: expected an object at the top, found {type(content).__name__}"
        )
    return content


def _shards(index: Path) -> list[str]:
    """The weight files that an index names, all of them beside it."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names")
    for name in set(shards.values()):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names {name!r}; expected the name of a file beside it")
    return sorted(set(shards.values()))


def tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors of one file. Raises `CheckpointError`.

    Of a safetensors file no tensor is read.
    """
    if file.suffix != ".safetensors":
        return list(read_tensors(file))
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged safetensors file ({error})") from None


def read_tensors(file: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of one safetensors or torch file.

    Torch files are opened without running what they pickle.

    Args:
        file: safetensors or torch.
        prefix: beginning of the names that are read; every other tensor is left in the file.

    Raises:
        CheckpointError: damaged, or holds objects other than tensors and plain values.
    """
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as handle:
                names: list[str] = list(handle.keys())
                return {name: handle.get_tensor(name) for name in names if name.startswith(prefix)}
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged safetensors file ({error})") from None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not opened. It is damaged, or holds pickled objects, which could run any "
            f"code; ask for a safetensors file ({type(error).__name__}: "
            f"{str(error).splitlines()[0]})"
        ) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise CheckpointError(f"{file}: expected a mapping of names to tensors")
    tensors = {str(name).removeprefix("module."): value for name, value in content.items()}
    return {name: value for name, value in tensors.items() if name.startswith(prefix)}


@dataclass(slots=True)
class LoadReport:
    """Report on every tensor of one load."""

    source: str
    loaded: list[str] = field(default_factory=list)
    """Names of the source, as `ignored`; the others are names of the module."""
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    published: dict[str, str] = field(default_factory=dict)
    """Own name to that of the source, for every tensor that was renamed or kept."""

    def raise_if_partial(self) -> None:
        """Raises `CheckpointError` naming what is missing, unexpected or misshaped."""
        problems = [
            f"{len(names)} {what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape", self.mismatched),
            )
            if names
        ]
        if problems:
            raise CheckpointError(
                f"{self.source}: the tensors do not fit the model; nothing was loaded\n  "
                + "\n  ".join(problems)
            )

    def __str__(self) -> str:
        return f"{self.source}: {len(self.loaded)} tensors loaded, {len(self.ignored)} unused"


def rename(
    tensors: Mapping[str, Tensor],
    *,
    key_map: Iterable[tuple[str, str]],
    ignored: Iterable[str],
    report: LoadReport,
) -> dict[str, Tensor]:
    """Map published names to own names.

    A name that matches `ignored` is left out and noted; other names stay as they are.
    """
    rules = tuple(key_map)
    useless = [re.compile(pattern) for pattern in ignored]
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if any(pattern.search(name) for pattern in useless):
            report.ignored.append(name)
            continue
        new = map_key(name, rules)
        if new in renamed:
            raise CheckpointError(
                f"{report.source}: two tensors become {new!r}; the second is {name!r}"
            )
        renamed[new] = tensor
        report.published[new] = name
    return renamed


def load_module(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    key_map: Iterable[tuple[str, str]] = (),
    ignored: Iterable[str] = (),
    truncated: Iterable[str] = (),
) -> LoadReport:
    """Load published tensors into a module, all or nothing.

    Args:
        module: built, with weights of its own.
        tensors: by published name.
        source: for messages.
        key_map: see `VisionEncoder.key_map`.
        ignored: see `VisionEncoder.ignored_keys`.
        truncated: patterns of own names that the module does not have on purpose (blocks behind the
            chosen layer).

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshaped.
    """
    report = LoadReport(source)
    renamed = rename(tensors, key_map=key_map, ignored=ignored, report=report)
    own = module.state_dict()
    skip = [re.compile(pattern) for pattern in truncated]
    for name, tensor in list(renamed.items()):
        if name in own and own[name].shape != tensor.shape:
            report.mismatched.append(
                f"{name} {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            )
        elif name in own:
            report.loaded.append(report.published[name])
        elif any(pattern.search(name) for pattern in skip):
            report.ignored.append(report.published[name])
            del renamed[name]
        else:
            report.unexpected.append(name)
    report.missing = sorted(own.keys() - renamed.keys())
    report.raise_if_partial()
    module.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in renamed.items()})
    logger.info("%s", report)
    return report


def group(
    tensors: Mapping[str, T], prefixes: Mapping[str, str], *, source: str
) -> dict[str, dict[str, T]]:
    """Tensors (or what else stands under their names) by part, without their prefix.

    Raises:
        CheckpointError: names under none of the prefixes.
    """
    groups: dict[str, dict[str, T]] = {name: {} for name in prefixes}
    unknown = []
    for name, tensor in tensors.items():
        for part, prefix in prefixes.items():
            if found := re.match(prefix, name):
                groups[part][name[found.end() :]] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} tensors belong to no known part: {', '.join(unknown[:5])}"
        )
    return groups


def save_bundle(
    folder: Path,
    encoder: nn.Module,
    *,
    name: str,
    architecture: Mapping[str, object],
    options: Mapping[str, object],
    preprocess: Mapping[str, object],
) -> None:
    """Write an encoder so that a recipe can name the folder as its `path`.

    Args:
        folder: exists.
        encoder: with the weights.
        name: registered name.
        architecture: its sizes.
        options: its other keywords, for the reader; a recipe says them itself.
        preprocess: description of the pixels that belong to it.
    """
    bundle = {
        "model_type": BUNDLE_TYPE,
        "encoder": name,
        "architecture": dict(architecture),
        "options": dict(options),
        "preprocess": dict(preprocess),
    }
    (folder / "config.json").write_text(json.dumps(bundle, indent=2) + "\n", encoding="utf-8")
    save_tensors(encoder.state_dict(), folder / "model.safetensors")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """One safetensors file."""
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
        file,
        metadata={"format": "pt"},
    )
