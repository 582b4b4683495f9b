"""The recipe of a training run: one YAML file, every section owned by its package. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import (
    BeforeValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from medm.config import Mark, Options, ResumeSafe, apply_overrides, flatten, read_yaml, validate
from medm.data.options import DataOptions
from medm.errors import MedmError, suggest
from medm.metrics import smaller_is_better
from medm.models import MODELS, outputs_of
from medm.models.options import ModelOptions
from medm.objectives import (
    OBJECTIVES,
    LanguageModelingOptions,
    ObjectiveOptions,
    TermsOptions,
)
from medm.registry import EACH_ITEM, EACH_VALUE, NamedBlock, sections_in
from medm.tasks import TASKS
from medm.training.options import (
    DiagnosticsOptions,
    MonitorOptions,
    Part,
    PartOptions,
    TrainOptions,
    flatten_parts,
)


class Recipe(Options):
    """Complete description of a training run."""

    model: Annotated[ModelOptions, NamedBlock(MODELS, key="kind", default="lvlm")]
    """The model, built from parts by name; the default `kind` is `lvlm`."""
    data: DataOptions
    """Training and evaluation data."""
    parts: Annotated[dict[str, Part], BeforeValidator(flatten_parts)]
    """Training of each part of the model, by name. A part that is not named is frozen."""
    train: TrainOptions = TrainOptions()
    """Options of the run, with the names of `transformers.TrainingArguments`."""
    objective: Annotated[
        ObjectiveOptions | TermsOptions,
        NamedBlock(OBJECTIVES, default="language-modeling", beside=(("terms", TermsOptions),)),
    ] = LanguageModelingOptions(name="language-modeling")
    """The objective that is minimized, by name, and its options; or several (`terms`), each with a
    weight."""
    diagnostics: ResumeSafe[DiagnosticsOptions | None] = None
    """Measure gradients between tasks and routing weights during the run; null does not."""
    monitors: ResumeSafe[list[MonitorOptions]] = []
    """Scores of tasks after each evaluation, on all ranks: replies of language models; zero-shot
    scores of models that score texts, such as dual encoders; labels, reports and retrieval of
    models of studies."""
    init_from: str | None = None
    """Folder of a trained model to start from. `--resume`, in contrast, continues this run."""
    output_dir: ResumeSafe[str]
    """Folder for checkpoints and the trained model."""

    @field_validator("parts", mode="before")
    @classmethod
    def _known_parts(cls, parts: object, info: ValidationInfo) -> object:
        """Report unknown part names before the check of their blocks."""
        model = info.data.get("model")
        known = model.part_names() if isinstance(model, ModelOptions) else None
        parts = flatten_parts(parts)
        if known is not None and isinstance(parts, Mapping):
            unknown = [
                f"no part {name!r}{_nearest(str(name), known)}"
                for name in parts
                if name not in known
            ]
            if unknown:
                raise ValueError("; ".join(unknown))
        return parts

    @field_validator("parts")
    @classmethod
    def _something_to_train(cls, parts: dict[str, PartOptions]) -> dict[str, PartOptions]:
        if all(part.tune == "frozen" and part.new_tokens is None for part in parts.values()):
            raise ValueError(
                "nothing to train: name at least one part with tune: full or tune: lora"
            )
        return parts

    @model_validator(mode="after")
    def _new_tokens_exist(self) -> Recipe:
        asked = [name for name, part in self.parts.items() if part.new_tokens is not None]
        if asked and self.init_from is None and not getattr(self.model, "reply_tokens", None):
            raise ValueError(
                f"parts.{asked[0]}.new_tokens: the model has no new tokens; list them in "
                "model.control_tokens, or leave new_tokens out"
            )
        return self

    @model_validator(mode="after")
    def _monitors_have_their_moment(self) -> Recipe:
        labels = [monitor.task.label for monitor in self.monitors]
        metric = (self.train.metric_for_best_model or "").removeprefix("eval_")
        self._best_score_is_of_a_monitor(metric, labels)
        if not self.monitors:
            return self
        for monitor in self.monitors:
            name = monitor.task.name
            if monitor.scores_texts and not self.model.scores_texts:
                raise ValueError(
                    f"monitors: {name} needs a model that scores texts (kind 'dual-encoder'), and "
                    f"this one is {self.model.kind!r}; leave it out"
                )
            if monitor.scores_texts and monitor.samples:
                raise ValueError(f"monitors: {name} has no replies; leave samples out")
            if monitor.max_new_tokens and self.model.longest_reply is None:
                raise ValueError(
                    "monitors: max_new_tokens is for language models, and this one is "
                    f"{self.model.kind!r}; leave it out"
                )
            if not monitor.scores_texts and not self.model.predicted_fields():
                raise ValueError(
                    f"monitors: {name} needs a model that answers during the training (kind "
                    f"'lvlm' or 'blip'), and this one is {self.model.kind!r}; leave it out"
                )
        if self.train.eval_strategy == "no":
            raise ValueError(
                "monitors: scored after each evaluation, and train.eval_strategy is no; set it to "
                "steps or epoch"
            )
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"monitors: {', '.join(twice)} stands twice; one key would hold both")
        return self

    def _best_score_is_of_a_monitor(self, metric: str, labels: list[str]) -> None:
        """Refuse a score of no monitor, or of a test split, for the choice of the best weights."""
        label = metric.rpartition("_")[0]
        if (label in TASKS or metric.startswith("zero-shot-")) and label not in labels:
            expected = " or ".join(f"{one}_accuracy" for one in labels) or "one in monitors"
            raise ValueError(
                f"train.metric_for_best_model: {metric} is of no monitor; expected {expected}"
            )
        if (
            label in labels
            and self.train.greater_is_better is None
            and smaller_is_better(metric.rpartition("_")[2])
        ):
            raise ValueError(
                f"train.metric_for_best_model: of {metric} smaller values are better; set "
                "train.greater_is_better: false"
            )
        for monitor in self.monitors:
            if monitor.task.label == label and monitor.split == "test" and not monitor.scores_texts:
                raise ValueError(
                    f"monitors: {label} scores its test split, and train.metric_for_best_model "
                    "chooses the best weights by it; set split: val"
                )

    @model_validator(mode="after")
    def _objective_fits_the_model(self) -> Recipe:
        given = outputs_of(self.model)
        for name, objective in self.objective.objectives().items():
            if missing := sorted(objective.reads() - given):
                advice = self.model.missing_fields_advice(frozenset(missing))
                raise ValueError(
                    f"objective: {name!r} reads {', '.join(missing)}, and this model of kind "
                    f"{self.model.kind!r} gives {', '.join(sorted(given))}; "
                    f"{advice or 'choose another objective or kind of model'}"
                )
        return self

    @model_validator(mode="after")
    def _every_part_is_taught(self) -> Recipe:
        read: frozenset[str] = frozenset().union(
            *(objective.reads() for objective in self.objective.objectives().values())
        )
        for name, why in self.model.untaught_parts(read).items():
            part = self.parts.get(name)
            if part is not None and part.tune != "frozen":
                raise ValueError(f"parts.{name}: tune {part.tune} would train nothing: {why}")
        return self


def _nearest(part: str, known: Iterable[str]) -> str:
    """Return the nearest known part, or say that the model has nothing that the name begins with.

    `masks.encoder` is close to `image.encoder` in letters alone.
    """
    owner, _, rest = part.partition(".")
    owners = sorted({name.partition(".")[0] for name in known})
    near = suggest(owner, owners)
    if rest and owner not in owners and "did you mean" not in near:
        return f": the model section has no {owner!r} (known: {', '.join(sorted(known))})"
    return suggest(part, known)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, as typed on the command line.

    Raises:
        RecipeError: with every problem of the file, one per line.
    """
    changed = apply_overrides(read_yaml(path), overrides, short_form=short_form)
    return validate(Recipe, changed, source=str(path))


def short_form(place: Sequence[str]) -> str | None:
    """Return the key that the short form of a block sets, by its place in a recipe."""
    if place[0] == "parts" and len(place) > 1:
        return "tune"
    return "name" if place[-1] in ("encoder", "connector", "llm", "objective") else None


def resolved(recipe: Recipe) -> dict[str, object]:
    """Return the recipe with all defaults, as plain values."""
    return recipe.model_dump(mode="json")


def dump(recipe: Mapping[str, object]) -> str:
    """Return a resolved recipe as YAML, for `load_recipe`."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def _with_defaults(recipe: Mapping[str, object]) -> Mapping[str, object]:
    """Return a resolved recipe with the keys of this version; unchanged if it is not valid now."""
    try:
        return resolved(Recipe.model_validate(recipe))
    except (ValidationError, MedmError):
        return recipe


def resume_safe_keys(
    section: type[Options], value: Mapping[str, object], place: str = ""
) -> Iterator[str]:
    """Yield the dotted keys that are marked `ResumeSafe`, in a section and those below it.

    Args:
        section: options class of the section.
        value: the section as plain values. It decides which part's options stand behind a name.
        place: dotted key of the section, ending in a dot; empty for a whole recipe.
    """
    for key, field in section.model_fields.items():
        if Mark.RESUME_SAFE in field.metadata:
            yield f"{place}{key}"
            continue
        for steps, options in sections_in(field):
            for where, block in _blocks(value.get(key), steps, f"{place}{key}"):
                if isinstance(options, NamedBlock):
                    name = str(block.get(options.key))
                    if name in options.registry:
                        yield from resume_safe_keys(
                            options.registry.entry(name).options, block, f"{where}."
                        )
                else:
                    yield from resume_safe_keys(options, block, f"{where}.")


def _blocks(
    value: object, steps: Sequence[str], place: str
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield the mappings at the end of the steps of `sections_in`, each with its dotted key."""
    if not steps:
        if isinstance(value, Mapping):
            yield place, value
    elif steps[0] == EACH_ITEM and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _blocks(item, steps[1:], f"{place}.{index}")
    elif steps[0] == EACH_VALUE and isinstance(value, Mapping):
        for name, item in value.items():
            yield from _blocks(item, steps[1:], f"{place}.{name}")


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """List the changes between two resolved recipes that matter for what is learned.

    There is one line per key. Keys that are marked `ResumeSafe` do not matter, nor does a key that
    an earlier version of medm did not know and that has its default now.
    """
    before, now = _with_defaults(before), _with_defaults(now)
    safe = {key for recipe in (before, now) for key in resume_safe_keys(Recipe, recipe)}
    old, new = flatten(before), flatten(now)
    return [
        f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
        and not any(f"{key}.".startswith(f"{above}.") for above in safe)
    ]
