"""Options of the sections `parts`, `train`, `diagnostics`, `monitors` of a recipe. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from medm.config import Mark, Options, ResumeSafe
from medm.registry import NamedBlock
from medm.tasks import TASKS, TaskOptions, ZeroShotOptions

T = TypeVar("T")


class DiagnosticsOptions(Options):
    """Measurement of gradient conflicts between tasks (`medm.training.diagnostics`).

    It has no effect on the training.
    """

    every: int = Field(ge=1)
    """Steps between two measurements."""
    batches: int = Field(default=4, ge=1)
    """Batches that a measurement is averaged over: the last ones of the training. Each costs one
    forward and backward pass, and memory for one gradient, per task."""


class MonitorOptions(Options):
    """Scores of a task after each evaluation (`medm.training.task_monitor`), without effect on the
    training.
    """

    task: Annotated[TaskOptions, NamedBlock(TASKS)]
    """A task by name, and its options: `{name: zero-shot, card: NAME}` for models that score texts;
    for language models one that scores replies (`custom` for records of your own); for models of
    studies one that scores what their heads give (labels, reports, vectors)."""
    data: str
    """Folder of the task, or for a suite the one that holds a folder for each set."""
    split: str | None = None
    """Split that is scored. Default: val; for zero-shot test. The best weights are not chosen by
    scores of the test split of other tasks."""
    limit: int | None = Field(default=None, ge=1)
    """Score only the first N items."""
    batch_size: int = Field(default=32, ge=1)
    """Items that each rank answers at once."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest reply of a language model in tokens. Default: 256, as in inference."""
    samples: int = Field(default=0, ge=0)
    """Items whose question, reply and reference are shown after each evaluation, the first N: in
    `samples/` of the output folder, and as a table in TensorBoard and Weights & Biases where
    `train.report_to` names them. They hold text of the records; by default none is shown."""

    @property
    def scores_texts(self) -> bool:
        """The task scores texts of classes."""
        return isinstance(self.task, ZeroShotOptions)


class NewTokenOptions(Options):
    """Training of the rows of new tokens, without weight decay. `train` is short for `{}`."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the rows. Default: that of their part."""


def _train(value: object) -> object:
    return {} if value == "train" else value


_LORA_FIELDS = ("r", "alpha", "dropout", "targets", "rslora", "dora", "quantize")


class PartOptions(Options):
    """Training of one part of the model. `image.encoder: frozen` is short for `{tune: frozen}`."""

    tune: Literal["frozen", "full", "lora"]
    """`frozen`: not at all; `full`: every weight; `lora`: low-rank adapters beside the frozen
    weights."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of this part. Default: `train.learning_rate`."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of this part's matrices. Default: `train.weight_decay`. Norms and biases never
    decay."""
    gradient_checkpointing: bool | None = None
    """Recompute this part's activations in the backward pass. Default:
    `train.gradient_checkpointing`."""
    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / r (alpha / sqrt(r) with
    `rslora`). Default: 2 r."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout before the adapters."""
    targets: str | list[str] | None = None
    """Layers with an adapter: a regular expression for the full name inside the part, or a list of
    name suffixes (`[q_proj, v_proj]`). Default: every linear layer except the LM head."""
    rslora: bool = False
    """Scale by 1 / sqrt(r) (arXiv 2312.03732), which keeps the update of large ranks from
    vanishing."""
    dora: bool = False
    """Train magnitude and direction separately (DoRA, arXiv 2402.09353)."""
    quantize: Literal["none", "4bit"] = "none"
    """Hold the frozen weights under the adapters in 4 bits (NF4, arXiv 2305.14314); needs
    bitsandbytes and a GPU."""
    adapter: Literal["keep", "merge"] = "keep"
    """Handling of an adapter in `init_from`: train it further, or merge it into the weights
    first."""
    new_tokens: Annotated[NewTokenOptions, BeforeValidator(_train)] | None = None
    """Of the token embeddings and the LM head, train only the rows of the model's control tokens,
    for any `tune`: `train`, or `{lr: ...}`. Without it `full` trains every row, `frozen` and `lora`
    none."""

    @model_validator(mode="after")
    def _no_idle_option(self) -> PartOptions:
        if self.tune != "lora":
            idle = self._changed(_LORA_FIELDS)
            if idle:
                raise ValueError(
                    f"{', '.join(idle)}: has an effect only with tune: lora, found tune: "
                    f"{self.tune}"
                )
        if self.tune == "frozen":
            idle = self._changed(("lr", "weight_decay"))
            if idle:
                raise ValueError(
                    f"{', '.join(idle)}: has no effect on a frozen part; leave it out or choose "
                    "another tune"
                )
        return self

    def _changed(self, names: Sequence[str]) -> list[str]:
        return [
            name for name in names if getattr(self, name) != type(self).model_fields[name].default
        ]

    def lora(self) -> dict[str, object]:
        """Return the adapter as fields of `peft.LoraConfig`, JSON-able.

        None for `target_modules` means the default.
        """
        return {
            "r": self.r,
            "lora_alpha": 2 * self.r if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
        }


def _short_form(value: object) -> object:
    return {"tune": value} if isinstance(value, str) else value


Part = Annotated[PartOptions, BeforeValidator(_short_form)]
"""A part's block, or only its `tune`."""


def flatten_parts(value: object) -> object:
    """Return `{image: {encoder: frozen}}` as `{image.encoder: frozen}`.

    A dotted override writes a new part in the first form.
    """
    return _flat_parts(value) if isinstance(value, Mapping) else value


def _flat_parts(parts: Mapping[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, block in parts.items():
        if isinstance(block, Mapping) and block and not set(block) & set(PartOptions.model_fields):
            flat |= {f"{name}.{inner}": item for inner, item in _flat_parts(block).items()}
        else:
            flat[name] = block
    return flat


Own: TypeAlias = Annotated[T, Mark.OWN]
"""Type of an option of `train` that medm reads itself. The others become the `TrainingArguments` of
their name."""


class TrainOptions(Options):
    """Fields of `transformers.TrainingArguments`; those not listed here go into `arguments`."""

    num_train_epochs: float = Field(default=1.0, ge=0)
    """Passes over the data; 0 writes the untrained model."""
    max_steps: int = -1
    """Optimizer steps; replaces `num_train_epochs` when it is positive."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Samples per rank in one forward pass."""
    per_device_eval_batch_size: ResumeSafe[int] = Field(default=8, ge=1)
    """Samples per rank in one forward pass of the evaluation."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate of every part without its own."""
    lr_scheduler_type: str = "cosine"
    """Schedule, by its transformers name (`cosine`, `linear`, `constant_with_warmup` ...)."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Further arguments of the schedule."""
    warmup_steps: float = Field(default=0.0, ge=0)
    """Steps of warm-up; a number below 1 is a fraction of all steps."""
    optim: str = "adamw_torch_fused"
    """Optimizer, by its transformers name."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices in parts without their own."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's first decay rate."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Adam's second decay rate."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 for no limit."""

    bf16: bool = False
    """Compute in bfloat16; trained weights stay in float32."""
    fp16: bool = False
    """Compute in float16 with loss scaling, for GPUs without bfloat16."""
    tf32: bool | None = None
    """Allow TF32 matrix products (NVIDIA Ampere and later)."""
    gradient_checkpointing: Own[bool] = False
    """Recompute activations in the backward pass: about a third more time, much less memory."""
    torch_compile: Own[bool] = False
    """Compile the layers of encoders and language model with `torch.compile`; not with ZeRO-3. The
    number of shapes is kept small by `data.pad_to_multiple_of`."""
    liger: Own[bool] = False
    """Use liger's kernels in the language model (NVIDIA GPUs; `pip install 'medm[liger]'`)."""
    use_cpu: bool = False
    """Train on the CPU even when a GPU is available."""
    require_gpu: ResumeSafe[Own[bool]] = False
    """Stop at the start when no GPU is available, instead of training on the CPU."""

    deepspeed: Own[str | None] = None
    """`zero0`, `zero1`, `zero2`, `zero3`, `zero2_offload`, `zero3_offload`, or the path of a
    DeepSpeed JSON file."""
    ddp_find_unused_parameters: bool | None = None
    """Passed to torch's DDP, which runs several ranks without DeepSpeed."""
    ddp_timeout: ResumeSafe[int] = Field(default=1800, ge=1)
    """Seconds that a rank waits for the others."""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """Interval of the evaluation loss on `data.eval`."""
    eval_steps: float | None = Field(default=None, gt=0)
    """Steps between two evaluations; a number below 1 is a fraction of all steps."""
    save_strategy: ResumeSafe[Literal["no", "steps", "epoch", "best"]] = "steps"
    """Interval of checkpoints. SIGTERM and SIGINT write one in any case."""
    save_steps: ResumeSafe[float] = Field(default=500, gt=0)
    """Steps between two checkpoints; a number below 1 is a fraction of all steps."""
    save_total_limit: ResumeSafe[int | None] = Field(default=2, ge=1)
    """Checkpoints to keep besides the best one; older ones are removed when a newer one has been
    verified."""
    save_in_background: ResumeSafe[Own[bool]] = True
    """Continue training while a checkpoint is written, flushed to disk and hashed. It is written
    from copies of weights and optimizer state, if half of the free memory holds them (not with
    4-bit weights). With DeepSpeed each rank copies and writes its own shard, and the checkpoint is
    complete at the end of the step in which the last shard was written."""
    logging_steps: ResumeSafe[float] = Field(default=10, gt=0)
    """Steps between two log lines."""
    logging_first_step: ResumeSafe[bool] = True
    """Log the first step too."""
    load_best_model_at_end: bool = False
    """Finish with the weights of the best evaluation instead of the last ones."""
    metric_for_best_model: str | None = None
    """Metric of the best evaluation. Default: the evaluation loss."""
    greater_is_better: bool | None = None
    """True where a larger value is better. Default: by the metric's name."""
    early_stopping_patience: Own[int | None] = Field(default=None, ge=1)
    """Stop after this number of evaluations without improvement."""
    early_stopping_threshold: Own[float] = Field(default=0.0, ge=0)
    """Smallest improvement that counts."""

    seed: int = Field(default=42, ge=0)
    """Seed of new weights, dropout and the order of the data."""
    full_determinism: bool = False
    """Use deterministic GPU kernels, which are slower."""
    dataloader_num_workers: ResumeSafe[int] = Field(default=0, ge=0)
    """Worker processes that read and preprocess samples, at most one per CPU core; 0 reads in the
    training process."""
    dataloader_prefetch_factor: ResumeSafe[int | None] = Field(default=None, ge=1)
    """Batches that each worker prefetches."""
    dataloader_pin_memory: ResumeSafe[bool] = True
    """Page-locked batches, which are copied to a GPU faster."""
    dataloader_drop_last: bool = False
    """Drop the last, smaller batch of an epoch."""
    report_to: ResumeSafe[str | list[str]] = "none"
    """Trackers besides the loss curve, which is always written: `tensorboard`, `wandb`, `mlflow`
    ..."""
    run_name: ResumeSafe[str | None] = None
    """Name of the run for trackers."""

    arguments: Own[dict[str, Any]] = {}
    """Any other field of `transformers.TrainingArguments`; its names and values are checked when
    training starts."""

    @field_validator("arguments")
    @classmethod
    def _not_twice(cls, arguments: dict[str, object]) -> dict[str, object]:
        twice = sorted((set(cls.model_fields) | {"output_dir"}) & set(arguments))
        if twice:
            raise ValueError(
                f"{', '.join(twice)}: has a key of its own; write it there and not under arguments"
            )
        return arguments

    @model_validator(mode="after")
    def _consistent(self) -> TrainOptions:
        if self.bf16 and self.fp16:
            raise ValueError("bf16, fp16: choose one of the two")
        if self.use_cpu and self.require_gpu:
            raise ValueError("use_cpu, require_gpu: contradict each other")
        needs_eval = {
            "load_best_model_at_end": self.load_best_model_at_end,
            "early_stopping_patience": self.early_stopping_patience is not None,
            "save_strategy: best": self.save_strategy == "best",
        }
        for key, asked in needs_eval.items():
            if asked and self.eval_strategy == "no":
                raise ValueError(
                    f"{key}: needs evaluations to choose from; set eval_strategy to steps or epoch"
                )
        return self
