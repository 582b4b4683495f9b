"""Models of a few thousand weights, and data for them, that training is tested on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

from medm.config import Options
from medm.models.base import MedmModel
from medm.objectives.contrastive import Contrastive
from medm.objectives.language_modeling import LanguageModeling
from medm.objectives.terms import Term, Terms
from medm.training.arguments import training_arguments
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from medm.training.trainer import BatchSampler, MedmTrainer

VOCABULARY = 64

transformers_logging.disable_progress_bar()


@dataclass
class ToyOutput(ModelOutput):
    loss_sum: Tensor | None = None
    losses: dict[str, Tensor] | None = field(default=None)


class ToyConfig(PreTrainedConfig):
    model_type = "medm-toy"
    adapters: dict[str, Any] = field(default_factory=dict)
    new_rows: dict[str, Any] = field(default_factory=dict)
    tied: bool = False


NEW_TOKENS = [3, 60, 61]
"""Tokens that the toys know as new ones."""


class Toy(MedmModel):
    """A connector in front of a two-layer Llama, and a frozen batch norm: every kind of part there
    is."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        llama = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=0.1,
            max_position_embeddings=64,
            tie_word_embeddings=config.tied,
        )
        self.llm = AutoModelForCausalLM.from_config(llama)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.connector = nn.Sequential(
            nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 32)
        )
        self.inject_adapters()
        self.post_init()

    def check_same_parts(self, options: Any, *, source: str) -> None: ...

    def new_token_ids(self, part: str) -> list[int]:
        return NEW_TOKENS if part == "llm" else []

    def parts(self) -> dict[str, nn.Module]:
        return {"llm": self.llm, "image.encoder": self.encoder, "image.connector": self.connector}

    def forward(self, input_ids: Tensor, vision: Tensor, labels: Tensor) -> ToyOutput:
        tokens = self.connector(self.encoder(vision)).unsqueeze(1)  # (B, 1, D)
        embeds = torch.cat([tokens, self.llm.get_input_embeddings()(input_ids)[:, 1:]], dim=1)
        logits = self.llm(inputs_embeds=embeds).logits
        loss_sum = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return ToyOutput(loss_sum=loss_sum, losses={"balance": 0.01 * tokens.pow(2).mean()})


class Towers(nn.Module):
    """Two encoders and no language model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 8))
        self.second = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Flatten(), nn.Linear(64, 8))
        self.scale = nn.ParameterList([nn.Parameter(torch.tensor([2.0]))])

    def parts(self) -> dict[str, nn.Module]:
        return {"image.encoder": self.first, "text.encoder": self.second, "scale": self.scale}

    def forward(self, input_ids: Tensor, vision: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {
            "image_embeds": self.first(vision),
            "text_embeds": self.second(input_ids),
            "logit_scale": self.scale[0].exp(),
        }


class Both(nn.Module):
    """Two encoders, and a language model of one layer: fields for two objectives, and the calls
    that gave them."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = Towers()
        self.text = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY))
        self.asked: list[frozenset[str]] = []

    def parts(self) -> dict[str, nn.Module]:
        return {**self.towers.parts(), "llm": self.text}

    def forward(
        self,
        input_ids: Tensor,
        vision: Tensor,
        labels: Tensor,
        *,
        outputs: frozenset[str] = frozenset(),
    ) -> dict[str, Tensor]:
        self.asked.append(outputs)
        logits = self.text(input_ids)[:, :-1]
        loss_sum = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return {"loss_sum": loss_sum, **self.towers(input_ids, vision, labels)}


class ScaledConfig(PreTrainedConfig):
    model_type = "medm-scaled"
    adapters: dict[str, Any] = field(default_factory=dict)


class Scaled(MedmModel):
    """Two encoders whose scale is clamped after each step."""

    config_class = ScaledConfig
    smallest = 127 / 64
    """A little below the scale at the beginning, 2."""

    def __init__(self, config: ScaledConfig) -> None:
        super().__init__(config)
        self.towers = Towers()
        self.steps = 0
        self.post_init()

    def parts(self) -> dict[str, nn.Module]:
        return self.towers.parts()

    def check_same_parts(self, options: Options, *, source: str) -> None: ...

    def forward(self, input_ids: Tensor, vision: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.towers(input_ids, vision, labels)

    def after_step(self) -> list[nn.Parameter]:
        assert not torch.is_grad_enabled()
        self.steps += 1
        (scale,) = self.towers.scale
        scale.clamp_(min=self.smallest)
        return [scale]


class Momentum(Scaled):
    """Besides, a slow copy of an encoder and a queue of what it last gave, which training alone
    needs."""

    training_only = ("slow.*", "queue")
    zero3_refusal = "its momentum copy is a mean of whole weights"

    def __init__(self, config: ScaledConfig) -> None:
        super().__init__(config)
        self.slow = copy.deepcopy(self.towers.first).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4, 8))
        self.register_buffer("queue_count", torch.zeros((), dtype=torch.int64))

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "image.momentum": self.slow}

    def forward(self, input_ids: Tensor, vision: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = super().forward(input_ids, vision, labels)
        if self.training:
            with torch.no_grad():
                self.queue.copy_(torch.cat([self.slow(vision), self.queue])[:4])
                self.queue_count += len(vision)
        # The queue is among what is learned, so that losing it would change the run.
        pull = (output["image_embeds"].mean(dim=0) - self.queue.mean(dim=0)).pow(2).mean()
        return {**output, "image_embeds": output["image_embeds"] * (1 + pull)}

    def after_step(self) -> list[nn.Parameter]:
        for slow, fast in zip(self.slow.parameters(), self.towers.first.parameters(), strict=True):
            slow.lerp_(fast, 0.1)
        return super().after_step()

    def init_training_state(self) -> None:
        self.slow.load_state_dict(self.towers.first.state_dict())
        self.queue.zero_()


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A vector, and eight tokens that follow from it. `poisoned` makes one sample's vector no
    number."""

    def __init__(self, size: int = 48, poisoned: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.vision = torch.randn(size, 6, generator=generator)
        weights = torch.randn(6, 8, generator=generator)
        self.tokens = ((self.vision @ weights) * 8).long() % VOCABULARY
        if poisoned is not None:
            self.vision[poisoned] = float("nan")

    def __len__(self) -> int:
        return len(self.vision)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.tokens[index].clone()
        labels[: 1 + index % 4] = -100
        return {"input_ids": self.tokens[index], "vision": self.vision[index], "labels": labels}


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class Fixed:
    """The batches that are given, again in every epoch."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class Order:
    """Shuffled batches; the global batch of a step is the same for any number of processes."""

    def __init__(
        self, size: int, batch: int, *, rank: int = 0, world: int = 1, seed: int = 0
    ) -> None:
        self.size, self.batch, self.rank, self.world, self.seed, self.epoch = (
            size,
            batch,
            rank,
            world,
            seed,
            0,
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // (self.batch * self.world)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for step in range(len(self)):
            start = (step * self.world + self.rank) * self.batch
            yield order[start : start + self.batch]


LORA = {
    "llm": PartOptions(tune="lora", r=4, alpha=8, dropout=0.1, lr=3e-3),
    "image.connector": PartOptions(tune="full", lr=1e-2, weight_decay=0.1),
}
ROWS = {**LORA, "llm": PartOptions(**LORA["llm"].model_dump() | {"new_tokens": {"lr": 2e-2}})}
FULL = {name: PartOptions(tune="full", lr=3e-3) for name in ("llm", "image.connector")}
BOTH = {
    name: PartOptions(tune="full") for name in ("image.encoder", "text.encoder", "scale", "llm")
}
TOWERS = {name: PartOptions(tune="full") for name in ("image.encoder", "text.encoder", "scale")}


MODELS: dict[str, Callable[[], Any]] = {
    "toy": lambda: Toy(ToyConfig()),
    "tied": lambda: Toy(ToyConfig(tied=True)),
    "towers": Towers,
    "both": Both,
    "scaled": lambda: Scaled(ScaledConfig()),
    "momentum": lambda: Momentum(ScaledConfig()),
}


def terms(kind: str, *, balance: float = 1.0) -> Terms:
    """The objectives that a toy is trained on."""
    if kind in ("toy", "tied"):
        return Terms.of(LanguageModeling(auxiliary={"balance": balance}))
    if kind == "both":
        return Terms({"text": Term(LanguageModeling()), "pairs": Term(Contrastive(), weight=0.25)})
    return Terms.of(Contrastive())


def trainer(
    output_dir: Path,
    *,
    parts: Mapping[str, PartOptions] = LORA,
    kind: str = "toy",
    poisoned: int | None = None,
    held_out: int = 0,
    callbacks: list[Any] | None = None,
    seed: int = 0,
    recipe: Mapping[str, Any] | None = None,
    dropout: bool = True,
    balance: float = 1.0,
    batches: BatchSampler | None = None,
    **train: Any,
) -> MedmTrainer:
    """A trainer on a toy; the same call gives the same model, data and order."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "warmup_steps": 2,
    }
    options = TrainOptions(**(settings | train))
    model = MODELS[kind]()
    apply_parts(model, parts, options, keep_float32=options.deepspeed is None)
    if not dropout:
        for module in model.modules():
            module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    args = training_arguments(options, output_dir)  # after the model: see medm.training.run
    data = Pairs(poisoned=poisoned)
    world, rank = args.world_size, args.process_index
    return MedmTrainer(
        model,
        args,
        terms=terms(kind, balance=balance),
        parts=parts,
        train_options=options,
        train_dataset=data,
        sampler=batches
        or Order(len(data), options.per_device_train_batch_size, rank=rank, world=world),
        data_collator=collate,
        eval_dataset=Pairs(held_out) if held_out else None,
        callbacks=callbacks or [],
        recipe=recipe,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
