"""Training: useful tokens per second against transformers' Trainer on stock Llava, and its limits."""

from __future__ import annotations

import copy
import tempfile
import time
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from benchmarks.harness import Cell, Figure, GateError, Ratio, seconds
from benchmarks.limits import measure_limits
from benchmarks.memory import peak_bytes
from benchmarks.workloads import (
    PAD,
    WORKLOADS,
    Sizes,
    copy_weights,
    make_examples,
    medm_model,
    stock_model,
    tokens,
)
from medm.data.collator import Collator
from medm.data.packing import PackedBatches, PackingCollator
from medm.data.sampling import Shuffle
from medm.imaging import load_pixels
from medm.imaging.options import ImagePreprocess
from medm.objectives.language_modeling import LanguageModeling
from medm.objectives.terms import Terms
from medm.training.arguments import training_arguments
from medm.training.kernels import compile_layers
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from medm.training.trainer import MedmTrainer
from medm.types import Batch, Example

BATCH = 16
"""Samples of a padded batch."""
CAPACITY = {"cpu": 1024, "h200": 4096}
"""Tokens that samples are packed into; a batch is some of these in one row, each sample attending
to itself."""
LARGE = {"3B": (4, 2048)}
"""Samples of a padded batch and tokens of a row where two models of that size and their optimizers
share the GPU."""
COMPARED = 4
"""Samples that a gate on a GPU compares, in float32 too."""


class _Examples(Dataset[Example]):
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def stock_batch(examples: list[Example]) -> dict[str, Any]:
    """Batches as users of stock Llava collate them: padded to the longest sample."""
    batch = Collator(PAD)(examples)
    pixels = batch.pop("pixels", {})
    batch.pop("task_ids", None)
    return batch | ({"pixel_values": pixels["image"]} if pixels else {})


class _Workload:
    """Both models with the same weights, and the data."""

    def __init__(self, profile: str, name: str, count: int) -> None:
        self.cuda = profile == "h200"
        self.sizes: Sizes = WORKLOADS[name]
        self.batch, self.capacity = LARGE.get(name, (BATCH, CAPACITY[profile]))
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.device = "cuda" if self.cuda else "cpu"
        self.workers = 4 if self.cuda else 0
        self.examples = make_examples(self.sizes, count)
        self.useful = tokens(self.examples)
        self.lengths = np.array([len(example.input_ids) for example in self.examples])
        self.ours = medm_model(self.sizes, device=self.device, dtype=self.dtype)
        if not self.ours.enable_padding_free():
            raise ValueError("this workload's attention cannot keep the samples of one row apart")
        self.folder = tempfile.TemporaryDirectory()

    @cached_property
    def stock(self) -> LlavaForConditionalGeneration:
        """The peer, with our weights of the moment it is made."""
        return stock_model(self.ours, self.sizes)

    @property
    def rows(self) -> int:
        """Packed rows that hold about as many samples as a padded batch."""
        return max(1, round(self.batch * self.useful / len(self.examples) / self.capacity))

    def train_stock(self) -> float:
        """One epoch of transformers' Trainer; returns the useful tokens."""
        arguments = TrainingArguments(
            output_dir=self.folder.name,
            per_device_train_batch_size=self.batch,
            num_train_epochs=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            bf16=self.cuda,
            use_cpu=not self.cuda,
            learning_rate=1e-5,
            dataloader_num_workers=self.workers,
        )
        Trainer(
            self.stock, arguments, train_dataset=_Examples(self.examples), data_collator=stock_batch
        ).train()
        return self.useful

    def train_ours(self) -> float:
        """One epoch of medm's trainer on packed rows; returns the useful tokens."""
        options = TrainOptions(
            per_device_train_batch_size=self.rows,
            save_strategy="no",
            bf16=self.cuda,
            use_cpu=not self.cuda,
            learning_rate=1e-5,
            logging_steps=10_000,
            lr_scheduler_type="linear",
            dataloader_num_workers=self.workers,
        )
        parts = {name: PartOptions(tune="full") for name in self.ours.parts()}
        apply_parts(self.ours, parts, options, keep_float32=False)
        trainer = MedmTrainer(
            self.ours,
            training_arguments(options, Path(self.folder.name)),
            terms=Terms.of(LanguageModeling()),
            parts=parts,
            train_options=options,
            train_dataset=_Examples(self.examples),
            data_collator=self.collator,
            sampler=PackedBatches(
                Shuffle(len(self.examples), seed=0),
                lengths=self.lengths,
                capacity=self.capacity,
                batch_size=self.rows,
            ),
        )
        trainer.fit()
        return self.useful

    @property
    def collator(self) -> PackingCollator:
        return PackingCollator(PAD, self.capacity, padding_free=True, with_label_positions=True)

    def step(self, model: Any, batch: Batch) -> None:
        """Forward and backward."""
        model.train()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.cuda):
            loss = model(**self.to_device(batch)).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    def to_device(self, batch: Batch) -> Batch:
        move = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        nested = {
            k: {n: t.to(self.device) for n, t in v.items()}
            for k, v in batch.items()
            if isinstance(v, dict)
        }
        return batch | move | nested

    def check_same(self) -> str:
        """Same loss and same gradients on the same samples, packed here and padded there.

        On a GPU the weights are compared in float32; what is measured, in bfloat16, may then be as
        far from that as the peer is, whose sums are rounded at other places.
        """
        copy_weights(self.ours, self.stock)
        if not self.cuda:
            return _compared(
                *self.both(self.ours, self.stock, self.examples[: self.batch]), tolerance=1e-5
            )
        sample = self.examples[:COMPARED]
        measured = self.both(self.ours, self.stock, sample)
        exact = self.both(
            copy.deepcopy(self.ours).float(), copy.deepcopy(self.stock).float(), sample, mixed=False
        )
        proof = _compared(*exact, tolerance=1e-5)
        (loss, gradient), (_, theirs) = measured
        off = abs(loss - exact[0][0]) / exact[0][0]
        cosine, peer = (_cosine(given, exact[0][1]) for given in (gradient, theirs))
        if off > 2e-3 or 1 - cosine > 2 * (1 - peer) + 1e-4:
            raise GateError(
                f"bfloat16: loss off by {off:.1e}, gradient cosine {cosine:.6f}, the peer's "
                f"{peer:.6f}"
            )
        return f"{proof}; in bfloat16 loss off by {off:.1e}, cosine {cosine:.6f} (peer {peer:.6f})"

    def both(
        self, ours: Any, stock: Any, sample: list[Example], *, mixed: bool = True
    ) -> tuple[tuple[float, Tensor], tuple[float, Tensor]]:
        """Loss and gradient of the embedding, of our model on a packed row and of the peer on
        padding.
        """
        found = []
        for model, batch in ((ours, self.collator(sample)), (stock, stock_batch(sample))):
            model.train()
            model.zero_grad()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.cuda and mixed):
                loss = model(**self.to_device(batch)).loss
            loss.backward()
            embedding = model.get_input_embeddings().weight.grad
            assert embedding is not None
            found.append((float(loss.detach()), embedding.double().flatten().cpu()))
            model.zero_grad(set_to_none=True)
        return found[0], found[1]


def _compared(ours: tuple[float, Tensor], stock: tuple[float, Tensor], *, tolerance: float) -> str:
    difference, cosine = abs(ours[0] - stock[0]) / stock[0], _cosine(ours[1], stock[1])
    if difference > tolerance or cosine < 0.9999:
        raise GateError(f"losses {ours[0]:.6f} and {stock[0]:.6f}, gradient cosine {cosine:.6f}")
    return f"loss differs by {difference:.1e}, gradient cosine {cosine:.6f}"


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@lru_cache(maxsize=1)
def workload(profile: str, name: str, count: int) -> _Workload:
    """The last one is kept, because building a large model takes long. Training changes its
    weights, not its sizes.
    """
    return _Workload(profile, name, count)


@cache
def measured_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best matrix product."""
    return measure_limits(device=device, dtype=dtype).matmul


class _TrainingCell(Cell):
    workloads: ClassVar[dict[str, str]] = {"cpu": "tiny", "h200": "0.5B"}
    count: ClassVar[dict[str, int]] = {"cpu": 64, "h200": 1024}

    @property
    def workload(self) -> _Workload:
        """Models and data."""
        return workload(self.profile, self.workloads[self.profile], self.count[self.profile])

    @property
    def setting(self) -> dict[str, Any]:
        load = self.workload
        return {
            "workload": self.workloads[self.profile],
            "samples": self.count[self.profile],
            "batch": load.batch,
            "row": load.capacity,
            "rows": load.rows,
            "dtype": str(load.dtype).removeprefix("torch."),
        }


class TrainingTokens(_TrainingCell, Ratio):
    """P1."""

    name, title, peer = "P1", "useful training tokens/s", "HF Trainer + Llava, batch 16"
    targets: ClassVar = {"cpu": 4.0, "h200": 3.0}
    count: ClassVar = {"cpu": 16, "h200": 1024}

    def gate(self) -> str:
        return self.workload.check_same()

    def run_peer(self) -> float:
        return self.workload.train_stock()

    def run_ours(self) -> float:
        return self.workload.train_ours()


class TrainingTokensLarge(TrainingTokens):
    """P1 with a language model of three billion weights."""

    name, peer = "P1-3B", "HF Trainer + Llava, batch 4"
    targets: ClassVar = {"h200": 2.0}
    workloads: ClassVar = {"h200": "3B"}
    count: ClassVar = {"h200": 96}


class Utilisation(_TrainingCell, Figure):
    """P2: required FLOPs, over those that the machine could do in the same time."""

    name, title, peer = "P2", "MFU against measured matmul peak", "limit"
    targets: ClassVar = {"cpu": 0.45, "h200": 0.45}

    def values(self, rounds: int) -> list[float]:
        load = self.workload
        peak = measured_peak(load.device, load.dtype)
        work = training_flops(load)
        load.train_ours()
        return [work / seconds(load.train_ours) / peak for _ in range(rounds)]


class UtilisationLarge(Utilisation):
    """P2 with a language model of three billion weights."""

    name = "P2-3B"
    targets: ClassVar = {"h200": 0.55}
    workloads: ClassVar = {"h200": "3B"}
    count: ClassVar = {"h200": 96}


class UtilisationCompiled(Utilisation):
    """P2 with compiled layers; rows of any length are one compiled shape."""

    name, title = "P2-compiled", "MFU with compiled layers"
    targets: ClassVar = {"h200": 0.45}

    @cached_property
    def workload(self) -> _Workload:  # type: ignore[override]
        """Not shared: a compiled model stays compiled."""
        load = _Workload(self.profile, self.workloads[self.profile], self.count[self.profile])
        compile_layers(load.ours)
        return load


def training_flops(load: _Workload) -> float:
    """6 FLOPs per trained weight and token, the LM head at labeled positions only, and attention."""
    text, model = load.sizes.text, load.ours
    head = text["vocab_size"] * text["hidden_size"]
    body = sum(p.numel() for p in model.language_model.base_model.parameters()) - head
    images = sum(len(example.pixels.get("image", [])) for example in load.examples)
    learned = sum(sum(label >= 0 for label in example.labels) for example in load.examples)
    encoder = sum(p.numel() for p in model.branch("image").encoder.parameters())
    connector = sum(p.numel() for p in model.branch("image").connector.parameters())
    patches = images * load.sizes.image_tokens
    # Scores and values: 2 * 2 * T^2 * D / 2 (causal) a layer forward, three times that with the
    # backward pass.
    attention = (
        6.0
        * text["num_hidden_layers"]
        * text["hidden_size"]
        * float((load.lengths.astype(float) ** 2).sum())
    )
    vision = load.sizes.vision
    seeing = (
        12.0
        * vision["num_hidden_layers"]
        * vision["hidden_size"]
        * images
        * load.sizes.image_tokens**2
    )
    return (
        6.0 * (body * load.useful + head * learned + (encoder + connector) * patches)
        + attention
        + seeing
    )


class Waste(_TrainingCell, Figure):
    """P3: fraction of the processed tokens that are padding, in rows of their own (a batch of one
    row has none).
    """

    name, title, peer, at_most = "P3", "processed tokens wasted", "-", True
    targets: ClassVar = {"cpu": 0.03, "h200": 0.03}
    count: ClassVar = {"cpu": 512, "h200": 4096}

    @cached_property
    def lengths(self) -> np.ndarray:
        """Lengths alone; an epoch of real size, without pixels or models."""
        sizes = WORKLOADS[self.workloads[self.profile]]
        return np.array(
            [len(e.input_ids) for e in make_examples(sizes, self.count[self.profile], drawn=False)]
        )

    @property
    def setting(self) -> dict[str, Any]:
        return {"samples": self.count[self.profile], "row": CAPACITY[self.profile]}

    def values(self, rounds: int) -> list[float]:
        wasted = []
        capacity = CAPACITY[self.profile]
        for seed in range(rounds):
            sampler = PackedBatches(
                Shuffle(len(self.lengths), seed=seed),
                lengths=self.lengths,
                capacity=capacity,
                batch_size=4,
                seed=seed,
            )
            used = processed = 0
            for batch in sampler:
                examples = [
                    Example([PAD] * int(self.lengths[i]), [PAD] * int(self.lengths[i]))
                    for i in batch
                ]
                used += tokens(examples)
                processed += PackingCollator(PAD, capacity)(examples)["input_ids"].numel()
            wasted.append(1 - used / processed)
        return wasted


class _Decoded(Dataset[Example]):
    """Examples with PNG images of 512 x 512, decoded and resized when they are read."""

    def __init__(self, examples: list[Example], folder: Path, side: int) -> None:
        self.examples, self.folder = examples, folder
        self.preprocess = ImagePreprocess(size=[side, side])
        rng = np.random.default_rng(0)
        for number in range(8):
            picture = (
                rng.integers(0, 255, (64, 64, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            )
            Image.fromarray(picture).save(folder / f"{number}.png")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        example = self.examples[index]
        count = len(example.pixels.get("image", []))
        pixels = [
            load_pixels(self.folder / f"{(index + i) % 8}.png", self.preprocess)
            for i in range(count)
        ]
        return Example(example.input_ids, example.labels, {"image": pixels} if pixels else {})


class DataStall(_TrainingCell, Figure):
    """P6: fraction of a step that is spent waiting for its batch; one worker reads and decodes."""

    name, title, peer, at_most = "P6", "waiting for data in a step", "-", True
    targets: ClassVar = {"cpu": 0.05, "h200": 0.02}

    def values(self, rounds: int) -> list[float]:
        load, shares = self.workload, []
        with tempfile.TemporaryDirectory() as folder:
            data = _Decoded(load.examples, Path(folder), load.sizes.image_size)
            loader: DataLoader[Any] = DataLoader(
                data,
                batch_sampler=PackedBatches(
                    Shuffle(len(data), seed=0),
                    lengths=load.lengths,
                    capacity=load.capacity,
                    batch_size=load.rows,
                ),
                collate_fn=load.collator,
                num_workers=1 if not load.cuda else 8,
                prefetch_factor=4,
                persistent_workers=True,
            )
            for _ in range(rounds + 1):
                waiting = working = 0.0
                batches = iter(loader)
                next(
                    batches
                )  # the first is never ready: nothing could be prepared before it was asked for
                for _ in range(len(loader) - 1):
                    start = time.perf_counter()
                    batch = next(batches)
                    waiting += time.perf_counter() - start
                    working += seconds(lambda batch=batch: load.step(load.ours, batch))  # type: ignore[misc]
                shares.append(waiting / (waiting + working))
        return shares[1:]


class PeakMemory(_TrainingCell, Figure):
    """P11: memory of a step above the weights, ours over the peer's."""

    name, title, peer, at_most = "P11", "peak memory above weights", "HF Trainer + Llava", True
    targets: ClassVar = {"cpu": 0.5, "h200": 0.35}

    def gate(self) -> str:
        return self.workload.check_same()

    def values(self, rounds: int) -> list[float]:
        load = self.workload
        sample = load.examples[: load.batch]
        ratios = []
        for _ in range(rounds):
            peer = peak_bytes(lambda: load.step(load.stock, stock_batch(sample)))
            ours = peak_bytes(lambda: load.step(load.ours, load.collator(sample)))
            ratios.append(ours / peer)
        return ratios


class PeakMemoryLarge(PeakMemory):
    """P11 with a language model of three billion weights."""

    name = "P11-3B"
    targets: ClassVar = {"h200": 0.35}
    workloads: ClassVar = {"h200": "3B"}
    count: ClassVar = {"h200": 96}
