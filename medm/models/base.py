"""Contract of every model: named parts, adapters in them, a config, and its kind.

A model may hold state beside its weights that training alone needs (a momentum copy, a queue), and
act after a step.
"""

from __future__ import annotations

import os
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from medm.errors import RecipeError
from medm.imaging import Preprocess
from medm.models.adapters import check_unshared, inject, merge
from medm.models.options import ModelOptions
from medm.models.token_rows import HeldRows, hold_apart, is_tied, merge_rows
from medm.types import (
    MODEL_TYPE_PREFIX,
    Answerer,
    AnswerItem,
    Embedder,
    PredictionField,
    Processor,
    VisionBranch,
)

OptionsT = TypeVar("OptionsT", bound=ModelOptions)
ModelT = TypeVar("ModelT", bound="MedmModel")
ProcessorT = TypeVar("ProcessorT", bound=Processor)

if TYPE_CHECKING:
    from transformers.utils.loading_report import LoadStateDictInfo


class MedmModel(PreTrainedModel, metaclass=ABCMeta):
    """A transformers model whose parts a recipe can freeze, train or adapt one by one.

    A subclass without one of the abstract methods raises `TypeError` when it is constructed.
    """

    base_model_prefix = ""
    supports_gradient_checkpointing = True

    training_only: ClassVar[tuple[str, ...]] = ()
    """Patterns (`momentum.*`) of names in the state dict that training alone needs: persistent
    buffers, and parameters of a part that stays frozen. Checkpoints hold them and a resumed run
    continues with them; the final model folder and exports do not have them. A class that names any
    defines `init_training_state`."""
    zero3_refusal: ClassVar[str | None] = None
    """Reason why models of this class cannot be trained under ZeRO-3, which then is refused before
    weights are read; None where they can."""

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves when they are constructed."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The units that a recipe freezes, trains or adapts, by name."""

    def encoders(self) -> Mapping[str, VisionBranch]:
        """Return the vision branches by name; a model without any has no features to cache."""
        return {}

    @abstractmethod
    def check_same_parts(self, options: ModelOptions, *, source: str) -> None:
        """Raises `RecipeError` when a recipe's `model` section names other parts than this model
        has.
        """

    def upgrade(self, processor: Processor) -> None:
        """Complete a processor that an earlier medm saved with what the model knows."""

    def enable_padding_free(self) -> bool:
        """Prepare for padding-free batches: one row of samples and the start of each.

        Returns:
            False where the model cannot take them.
        """
        return False

    def after_step(self) -> Sequence[nn.Parameter]:
        """Act on the model's own state after an optimizer step: clamp a scale, move a momentum
        copy.

        Called without gradients on every rank, after each step that changed the weights, under
        DeepSpeed too; not after a step that was skipped for an overflow of fp16. Each rank must
        come to the same values. Under ZeRO-3 a large parameter is empty here.

        Returns:
            The trained parameters that were changed: an optimizer that keeps a copy of its own
                takes
            them over.
        """
        return ()

    def init_training_state(self) -> None:
        """Give the state of `training_only` the values that a run begins with, from the weights.

        Called when the model was opened from a folder without that state.
        """
        raise NotImplementedError(
            f"{type(self).__name__} names training_only state {', '.join(self.training_only)}, "
            "so it has to define init_training_state"
        )

    def is_training_only(self, name: str) -> bool:
        """Return whether a name of the state dict is one of `training_only`."""
        return any(fnmatchcase(name, pattern) for pattern in self.training_only)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        training_state: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, by default without `training_only` state.

        Args:
            save_directory: folder.
            is_main_process: as there.
            state_dict: tensors to save in place of the model's own.
            args: as there.
            training_state: keep the state that training alone needs.
            kwargs: as there.
        """
        if self.training_only and not training_state:
            tensors = self.state_dict() if state_dict is None else state_dict
            state_dict = {k: value for k, value in tensors.items() if not self.is_training_only(k)}
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: LoadStateDictInfo) -> None:
        """Begin with fresh training state where a folder has none, as a final model folder."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        absent = {name for name in loading_info.missing_keys if self.is_training_only(name)}
        if absent:
            self.init_training_state()
            loading_info.missing_keys -= absent

    def inject_adapters(self) -> None:
        """Build the LoRA layers and the rows of new tokens that the config names.

        The last step of a constructor before `post_init`.
        """
        for part, spec in self.config.adapters.items():
            inject(self.parts()[part], spec)
        check_unshared(self)
        for part, rows in self._new_rows().items():
            hold_apart(self.parts()[part], rows["ids"], tied=rows["tied"])

    def add_adapter_to_part(self, part: str, spec: Mapping[str, object]) -> None:
        """Put LoRA layers into a part and note them in the config, so that a checkpoint holds
        both.
        """
        inject(self.parts()[part], spec)
        check_unshared(self)
        self.config.adapters = {**self.config.adapters, part: dict(spec)}

    def merge_adapters(self) -> None:
        """Fold adapters and rows of new tokens into the weights: the same model with plain
        layers.
        """
        for part in self.config.adapters:
            merge(self.parts()[part])
        self.config.adapters = {}
        for part in list(self._new_rows()):
            self.merge_new_rows(part)

    def new_token_ids(self, part: str) -> list[int]:
        """Return the ids of the tokens that were added to the vocabulary of a part."""
        return []

    def add_new_rows(self, part: str) -> None:
        """Hold the rows of a part's new tokens apart, and note it in the config.

        Raises:
            RecipeError: the part has no new tokens, or is no language model.
        """
        ids = sorted(self.new_token_ids(part))
        if not ids:
            raise RecipeError(
                f"parts.{part}.new_tokens: the part has no new tokens; list them in "
                "model.control_tokens, or leave new_tokens out"
            )
        tied = is_tied(self.parts()[part])
        hold_apart(self.parts()[part], ids, tied=tied)
        self.config.new_rows = {**self._new_rows(), part: {"ids": ids, "tied": tied}}

    def merge_new_rows(self, part: str) -> None:
        """Write the rows of a part's new tokens into its vocabulary."""
        merge_rows(self.parts()[part])
        self.config.new_rows = {
            name: rows for name, rows in self._new_rows().items() if name != part
        }

    def _new_rows(self) -> dict[str, HeldRows]:
        """Return which rows are held apart, by part. Not every config has the field."""
        return getattr(self.config, "new_rows", {})


class AutoClass(Protocol):
    """One of transformers' Auto classes for models, such as `AutoModel`."""

    def register(
        self,
        config_class: type[PreTrainedConfig],
        model_class: type[PreTrainedModel],
        exist_ok: bool = False,
    ) -> None:
        """See `transformers.AutoModel.register`."""
        ...


@dataclass(frozen=True, slots=True)
class CardText:
    """Sentences of the model card (`README.md`) in a folder that a kind of model saves."""

    tags: tuple[str, ...] = ("medical",)
    """Tags of the Hugging Face Hub."""
    summary: str = (
        "A medical model trained with medm. It can be wrong, and carries the biases of its data. "
        "It was not validated on any\nclinical task."
    )
    """Purpose of the model, and its limits."""
    example: str = ""
    """Python that uses the folder; empty without one."""


class ModelKind(ABC, Generic[OptionsT, ModelT, ProcessorT]):
    """Way from a recipe's `model` section to a model and its processor.

    A line of `medm.models.kinds`, or a plug-in, names the class.

    `medm.models.auto` registers the three classes of every kind with transformers' Auto classes. A
    subclass without one of them, or without an abstract method, raises `TypeError` when it is
    constructed.

    Its processor is a `medm.types.Processor`, the same in training, inference and `medm data
    check`.

    A subclass states its types once: `class LVLM(ModelKind[LVLMOptions,
    LVLMForConditionalGeneration, LVLMProcessor])`.
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    """Config of a saved folder; its `model_type` begins with "medm-"."""
    model_class: ClassVar[type[MedmModel]]
    processor_class: ClassVar[type[ProcessorMixin]]
    """The Auto class finds it by its name, so the name is unlike that of any other processor."""
    auto_classes: ClassVar[tuple[AutoClass, ...]] = (AutoModel,)
    """The Auto classes that open the model; `AutoModel` is among them."""
    pipeline: ClassVar[str] = "conversations"
    """Data pipeline of its records, by its name in `medm.data.pipelines`."""
    needs_mask: ClassVar[bool] = True
    """Whether training batches carry an `attention_mask`.

    False where no token attends to padding on the right, as with causal attention.
    """
    predictor: ClassVar[str] = "generation"
    """Source of predictions that `medm eval` opens a saved model with, by its name in the table
    `medm.evaluation.predictors`."""
    outputs: ClassVar[frozenset[str]] = frozenset({"loss", "loss_sum"})
    """Fields of the model's output in training. A recipe whose objective reads another one is
    refused.

    `ModelOptions.outputs` repeats them where a recipe is to be checked without importing the model.
    """

    def __init__(self) -> None:
        kind = type(self).__name__
        classes = ("config_class", "model_class", "processor_class")
        if missing := [name for name in classes if not hasattr(self, name)]:
            raise TypeError(f"model kind {kind} lacks {', '.join(missing)}")
        if not self.config_class.model_type.startswith(MODEL_TYPE_PREFIX):
            raise TypeError(
                f"model kind {kind}: {self.config_class.__name__}.model_type is "
                f"{self.config_class.model_type!r}; expected a name that begins with "
                f"{MODEL_TYPE_PREFIX!r}"
            )

    def check(self, options: OptionsT) -> None:
        """Refuse what this machine cannot run, before weights are read. Raises `RecipeError`."""

    @abstractmethod
    def build(self, options: OptionsT) -> tuple[ModelT, ProcessorT]:
        """The model, with published weights wherever the section gives a path, and its
        processor.
        """

    def gives(self, config: PreTrainedConfig) -> frozenset[PredictionField]:
        """Return what a saved model with this config predicts for an item of a benchmark.

        By default nothing: such a model is trained, opened and exported, and `medm eval` refuses
        it.
        """
        return frozenset()

    def embedder(self, model: ModelT, processor: ProcessorT, *, batch_size: int) -> Embedder:
        """Return the access to vectors and scores of a model, in eval mode.

        For kinds whose options say `scores_texts`.

        Args:
            model: on its device.
            processor: of the model.
            batch_size: files or texts that are encoded at once.
        """
        raise NotImplementedError(f"model kind {type(self).__name__} scores no texts")

    def answerer(
        self,
        model: ModelT,
        processor: ProcessorT,
        fields: frozenset[PredictionField],
        *,
        batch_size: int,
        max_new_tokens: int | None = None,
    ) -> Answerer:
        """Return the access to answers of a model, in eval mode, for scores during the training.

        For kinds whose options have `predicted_fields`.

        Args:
            model: on its device.
            processor: of the model.
            fields: what is asked for, some of the options' `predicted_fields`.
            batch_size: items that are answered at once.
            max_new_tokens: longest reply in tokens, for kinds whose options have `longest_reply`;
                None for those.
        """
        raise NotImplementedError(f"model kind {type(self).__name__} answers no items in training")

    def check_item(self, processor: ProcessorT, item: AnswerItem) -> None:
        """Refuse an item that a model could not answer. Its pixels are blank.

        Raises:
            DataError: what the model does not read.
        """

    def card_text(self, options: OptionsT) -> CardText:
        """Return the sentences of the model card that depend on the kind."""
        return CardText()

    def skeleton(self, options: OptionsT) -> ModelT:
        """The model without memory behind its weights, for an estimate; it reads published configs
        alone.
        """
        raise RecipeError(
            f"models of kind {options.kind!r} cannot be estimated: they cannot be built without "
            "their weights"
        )

    def processor(self, options: OptionsT) -> ProcessorT:
        """The processor alone. Kinds that can make it without reading weights do."""
        return self.build(options)[1]

    def preprocess(self, options: OptionsT) -> dict[str, Preprocess]:
        """Return the preprocessing of each branch.

        Kinds that know it without their language model override this.
        """
        return dict(self.processor(options).preprocess)

    def adapt(
        self, options: OptionsT, processor: ProcessorT, *, model: ModelT | None = None
    ) -> ProcessorT:
        """Apply a recipe's section over the model and the processor of `init_from`.

        Args:
            options: the section.
            processor: as it was saved.
            model: as it was saved, changed in place; None where the processor alone is needed.

        Returns:
            The processor, with what the section sets in place of what was saved.
        """
        return processor
