"""The recipe of a training run: one YAML file, every section owned by its room. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ValidationInfo, field_validator, model_validator

from medm.config import Options, apply_overrides, flatten, read_yaml, validate
from medm.data.options import DataOptions
from medm.errors import suggest
from medm.models import MODELS
from medm.models.options import ModelOptions
from medm.objectives import OBJECTIVES
from medm.registry import named
from medm.training.options import DiagnosticsOptions, Part, TrainOptions, flatten_parts


class Recipe(Options):
    """Everything that decides a training run."""

    model: named(MODELS, key="kind", default="lvlm")  # type: ignore[valid-type]
    """The model, put together from parts by name; `kind` is `lvlm` unless said."""
    data: DataOptions
    """What is trained and evaluated on."""
    parts: Annotated[dict[str, Part], BeforeValidator(flatten_parts)]
    """Part of the model -> how it is trained. A part that is not named is frozen."""
    train: TrainOptions = TrainOptions()
    """The run itself, in the words of `transformers.TrainingArguments`."""
    objective: named(OBJECTIVES, default="language-modeling") = "language-modeling"  # type: ignore[valid-type]
    """What is minimised, by name, and its options."""
    diagnostics: DiagnosticsOptions | None = None
    """Measure gradients between tasks and routing shares on the way; null does not."""
    init_from: str | None = None
    """Folder of a trained model to start from. Not the same thing as `--resume`, which continues this run."""
    output_dir: str
    """Folder for checkpoints and the trained model."""

    @field_validator("parts", mode="before")
    @classmethod
    def _known_parts(cls, parts: Any, info: ValidationInfo) -> Any:
        """Before a misspelled part is told to lack its `tune`."""
        model = info.data.get("model")
        known = model.part_names() if isinstance(model, ModelOptions) else None
        parts = flatten_parts(parts)
        if known is not None and isinstance(parts, Mapping):
            unknown = [f"no part {name!r}{suggest(str(name), known)}" for name in parts if name not in known]
            if unknown:
                raise ValueError("; ".join(unknown))
        return parts

    @field_validator("parts")
    @classmethod
    def _something_to_train(cls, parts: dict[str, Any]) -> dict[str, Any]:
        if all(part.tune == "frozen" for part in parts.values()):
            raise ValueError("nothing to train: name at least one part with tune: full or tune: lora")
        return parts

    @model_validator(mode="after")
    def _objective_fits_the_model(self) -> Recipe:
        given = self.model.outputs if isinstance(self.model, ModelOptions) else None
        if given is not None and (missing := sorted(self.objective.reads() - given)):
            raise ValueError(
                f"objective: {self.objective.name!r} reads {', '.join(missing)}, and a model of kind "
                f"{self.model.kind!r} gives {', '.join(sorted(given))}; choose another objective or kind of model"
            )
        return self


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, as typed on the command line.

    Raises:
        RecipeError: with every problem of the file, one a line.
    """
    changed = apply_overrides(read_yaml(path), overrides, short_form=short_form)
    return validate(Recipe, changed, source=str(path))


def short_form(place: Sequence[str]) -> str | None:
    """Key that a plain word stands for at a place of a recipe."""
    if place[0] == "parts" and len(place) > 1:
        return "tune"
    return "name" if place[-1] in ("encoder", "connector", "llm", "objective") else None


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as plain values."""
    return recipe.model_dump(mode="json")


def dump(recipe: Mapping[str, Any]) -> str:
    """A resolved recipe as YAML that `load_recipe` reads again."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=120)


HARMLESS = frozenset(
    f"train.{name}"
    for name in (
        "save_strategy", "save_steps", "save_total_limit", "save_in_background",
        "logging_steps", "logging_first_step", "report_to",
        "run_name", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory", "ddp_timeout",
        "require_gpu", "per_device_eval_batch_size",
    )
) | {
    "output_dir", "data.bad_records_limit", "data.cache", "data.cache.dir", "data.cache.max_gb", "data.cache.branches",
    "diagnostics", "diagnostics.every", "diagnostics.batches",
}  # fmt: skip
"""What may differ between a run and its continuation without changing what is learned."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two resolved recipes and matters for what is learned: one line a key."""
    old, new = flatten(before), flatten(now)
    return [
        f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(set(old) | set(new))
        if key not in HARMLESS and old.get(key) != new.get(key)
    ]
