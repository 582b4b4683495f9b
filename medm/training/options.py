"""The `parts` and `train` sections of a recipe: what is trained, and how. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from medm.config import Mark, Options, ResumeSafe

T = TypeVar("T")


class DiagnosticsOptions(Options):
    """How far tasks pull shared weights apart (`medm.training.diagnostics`); changes nothing of what is learned."""

    every: int = Field(ge=1)
    """Steps between two measurements."""
    batches: int = Field(default=4, ge=1)
    """Batches a measurement is averaged over: the last ones that were trained on. Each costs one forward and backward
    pass, and memory for one gradient, for every task that it holds."""


class NewTokenOptions(Options):
    """How the rows of new tokens are trained; they have no weight decay. `train` is short for `{}`."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the rows; that of their part without it."""


def _train(value: Any) -> Any:
    return {} if value == "train" else value


_LORA_FIELDS = ("r", "alpha", "dropout", "targets", "rslora", "dora", "quantize")


class PartOptions(Options):
    """How one part of the model is trained. `image.encoder: frozen` is short for `{tune: frozen}`."""

    tune: Literal["frozen", "full", "lora"]
    """`frozen`: not at all; `full`: every weight; `lora`: low-rank adapters beside the frozen weights."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of this part; `train.learning_rate` without it."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of this part's matrices; `train.weight_decay` without it. Norms and biases never decay."""
    gradient_checkpointing: bool | None = None
    """Recompute this part's activations in the backward pass; `train.gradient_checkpointing` without it."""
    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / r (alpha / sqrt(r) with `rslora`). Default: 2 r."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout in front of the adapters."""
    targets: str | list[str] | None = None
    """Which layers get an adapter: a regular expression for their whole name inside the part, or a list of name
    endings (`[q_proj, v_proj]`). Default: every linear layer but the output head."""
    rslora: bool = False
    """Scale by 1 / sqrt(r) (arXiv 2312.03732), which keeps large ranks from fading."""
    dora: bool = False
    """Train magnitude and direction apart (arXiv 2402.09353)."""
    quantize: Literal["none", "4bit"] = "none"
    """Hold the frozen weights under the adapters in 4 bits (NF4, arXiv 2305.14314); needs bitsandbytes and a GPU."""
    adapter: Literal["keep", "merge"] = "keep"
    """What happens to an adapter that `init_from` brings: go on with it, or fold it into the weights first."""
    new_tokens: Annotated[NewTokenOptions, BeforeValidator(_train)] | None = None
    """Of the token embeddings and the LM head train the rows of the model's control tokens and no others,
    whatever `tune` says: `train`, or `{lr: ...}`. Without it `full` trains every row, `frozen` and `lora` none."""

    @model_validator(mode="after")
    def _no_idle_option(self) -> PartOptions:
        if self.tune != "lora":
            idle = self._changed(_LORA_FIELDS)
            if idle:
                raise ValueError(f"{', '.join(idle)}: has an effect with tune: lora alone, found tune: {self.tune}")
        if self.tune == "frozen":
            idle = self._changed(("lr", "weight_decay"))
            if idle:
                raise ValueError(
                    f"{', '.join(idle)}: has no effect on a frozen part; leave it out or choose another tune"
                )
        return self

    def _changed(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    def lora(self) -> dict[str, Any]:
        """The adapter as fields of `peft.LoraConfig`; JSON-able. `target_modules` None stands for the default."""
        return {
            "r": self.r,
            "lora_alpha": 2 * self.r if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
        }


def _short_form(value: Any) -> Any:
    return {"tune": value} if isinstance(value, str) else value


Part = Annotated[PartOptions, BeforeValidator(_short_form)]
"""A part's block, or just the word that says how it is tuned."""


def flatten_parts(value: Any) -> Any:
    """`{image: {encoder: frozen}}` as `{image.encoder: frozen}`: what a dotted override makes of a new part name."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[str, Any] = {}
    for name, block in value.items():
        if isinstance(block, Mapping) and block and not set(block) & set(PartOptions.model_fields):
            flat |= {f"{name}.{inner}": item for inner, item in flatten_parts(block).items()}
        else:
            flat[name] = block
    return flat


Own: TypeAlias = Annotated[T, Mark.OWN]
"""Type of an option of `train` that medm reads itself. The others become the `TrainingArguments` of their name."""


class TrainOptions(Options):
    """`transformers.TrainingArguments` by their own names; those not listed here go into `arguments`."""

    num_train_epochs: float = Field(default=1.0, ge=0)
    """Passes over the data; 0 writes the model as it was put together, untrained."""
    max_steps: int = -1
    """Optimiser steps; replaces `num_train_epochs` when it is positive."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Samples of one process in one forward pass."""
    per_device_eval_batch_size: ResumeSafe[int] = Field(default=8, ge=1)
    """The same in evaluation."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimiser step."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate of every part that has none of its own."""
    lr_scheduler_type: str = "cosine"
    """Schedule, by its transformers name (`cosine`, `linear`, `constant_with_warmup` ...)."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Further arguments of the schedule."""
    warmup_steps: float = Field(default=0.0, ge=0)
    """Steps of warm-up; a number below 1 is a share of all steps."""
    optim: str = "adamw_torch_fused"
    """Optimiser, by its transformers name."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices in parts that have none of their own."""
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
    """Compile the layers of encoders and language model with `torch.compile`; not with ZeRO-3. The number of shapes is
    kept small by `data.pad_to_multiple_of`."""
    liger: Own[bool] = False
    """Use liger's kernels in the language model (NVIDIA GPUs; `pip install 'medm[liger]'`)."""
    use_cpu: bool = False
    """Train on the CPU even where there is a GPU."""
    require_gpu: ResumeSafe[Own[bool]] = False
    """Stop at the start when there is no GPU, instead of training on the CPU."""

    deepspeed: Own[str | None] = None
    """`zero0`, `zero1`, `zero2`, `zero3`, `zero2_offload`, `zero3_offload`, or the path of a DeepSpeed JSON file."""
    ddp_find_unused_parameters: bool | None = None
    """Passed to torch's DDP, which serves several processes without DeepSpeed."""
    ddp_timeout: ResumeSafe[int] = Field(default=1800, ge=1)
    """Seconds after which a process that waits for the others gives up."""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When the loss on `data.eval` is measured."""
    eval_steps: float | None = Field(default=None, gt=0)
    """Steps between two measurements; a number below 1 is a share of all steps."""
    save_strategy: ResumeSafe[Literal["no", "steps", "epoch", "best"]] = "steps"
    """When a checkpoint is written. SIGTERM and SIGINT write one in any case."""
    save_steps: ResumeSafe[float] = Field(default=500, gt=0)
    """Steps between two checkpoints; a number below 1 is a share of all steps."""
    save_total_limit: ResumeSafe[int | None] = Field(default=2, ge=1)
    """Checkpoints that are kept, the best one aside; older ones go when a newer one has been verified."""
    save_in_background: ResumeSafe[Own[bool]] = True
    """Go on training while a checkpoint is written from copies of weights and optimiser state, if half of the free
    memory holds them (not with 4-bit weights), reaches the disk and is hashed. With DeepSpeed each process copies and
    writes its own share, and the checkpoint counts from the end of the step in which the last one was written."""
    logging_steps: ResumeSafe[float] = Field(default=10, gt=0)
    """Steps between two lines of the log."""
    logging_first_step: ResumeSafe[bool] = True
    """Log the first step too."""
    load_best_model_at_end: bool = False
    """End with the weights of the best evaluation instead of the last ones."""
    metric_for_best_model: str | None = None
    """What "best" means; the evaluation loss without it."""
    greater_is_better: bool | None = None
    """Whether a larger value is better; decided by the metric's name without it."""
    early_stopping_patience: Own[int | None] = Field(default=None, ge=1)
    """Stop after so many evaluations without improvement."""
    early_stopping_threshold: Own[float] = Field(default=0.0, ge=0)
    """What counts as an improvement."""

    seed: int = Field(default=42, ge=0)
    """Seed of new weights, dropout and the order of the data."""
    full_determinism: bool = False
    """Use deterministic GPU kernels, which are slower."""
    dataloader_num_workers: ResumeSafe[int] = Field(default=0, ge=0)
    """Processes that read and preprocess samples, at most one for each processor; 0 does it in the training process."""
    dataloader_prefetch_factor: ResumeSafe[int | None] = Field(default=None, ge=1)
    """Batches that each worker holds ready."""
    dataloader_pin_memory: ResumeSafe[bool] = True
    """Page-locked batches, which reach a GPU faster."""
    dataloader_drop_last: bool = False
    """Leave out the last, smaller batch of an epoch."""
    report_to: ResumeSafe[str | list[str]] = "none"
    """Trackers beside the loss curve that is always written: `tensorboard`, `wandb`, `mlflow` ..."""
    run_name: ResumeSafe[str | None] = None
    """Name of the run for trackers."""

    arguments: Own[dict[str, Any]] = {}
    """Any other field of `transformers.TrainingArguments`; its names and values are checked when training starts."""

    @field_validator("arguments")
    @classmethod
    def _not_twice(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        twice = sorted((set(cls.model_fields) | {"output_dir"}) & set(arguments))
        if twice:
            raise ValueError(f"{', '.join(twice)}: has a key of its own; write it there and not under arguments")
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
                raise ValueError(f"{key}: needs evaluations to choose from; set eval_strategy to steps or epoch")
        return self
