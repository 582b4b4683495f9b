"""Contrastive training of a dual encoder: pairs a second and memory against a plain loop."""

from __future__ import annotations

import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel

from benchmarks.harness import Cell, Figure, GateError, Ratio
from benchmarks.memory import peak_bytes
from medm.data.pairs import PairCollator, PairExample
from medm.data.sampling import DistributedBatchSampler, Sequential
from medm.models.dual_encoder.configuration import DualEncoderConfig
from medm.models.dual_encoder.modeling import MAX_LOG_SCALE, DualEncoder
from medm.objectives.contrastive import Contrastive
from medm.objectives.terms import Terms
from medm.training.arguments import training_arguments
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from medm.training.trainer import MedmTrainer
from medm.types import Batch

WIDTH, LAYERS, HEADS, EMBED = 192, 4, 3, 128
SIDE, PATCH, VOCABULARY = 224, 16, 8_000
"""197 tokens an image. The towers are of one width and depth, as B/16 and BERT base are."""
CONTEXT = 256
"""Tokens that UniMed-CLIP and BiomedCLIP pad each text to."""
SHORTEST, LONGEST = 10, 60
"""Tokens of a caption: sentences of reports and class templates."""
RATE, DECAY, BETAS, EPS = 5e-4, 0.2, (0.9, 0.98), 1e-6
"""AdamW as published."""
VISION = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


class _Pairs(Dataset[PairExample]):
    """Random pixels, and captions of realistic lengths, as the pipeline of pairs gives them."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        lengths = rng.integers(SHORTEST, LONGEST + 1, count)
        self.pairs = [
            PairExample(
                input_ids=rng.integers(1, VOCABULARY, length).tolist(),
                attention_mask=[1] * int(length),
                pair_label=number,
                pixels={"image": [rng.normal(size=(3, SIDE, SIDE)).astype(np.float32)]},
            )
            for number, length in enumerate(lengths)
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> PairExample:
        return self.pairs[index]


collate = PairCollator(pad_id=0)
"""As medm pads: to the longest caption of the batch."""


def plain_collate(pairs: list[PairExample]) -> tuple[Tensor, Tensor]:
    """Pixels and ids, padded to the context."""
    ids = torch.zeros(len(pairs), CONTEXT, dtype=torch.long)
    for row, pair in zip(ids, pairs, strict=True):
        row[: len(pair.input_ids)] = torch.tensor(pair.input_ids)
    return torch.stack([torch.from_numpy(pair.pixels["image"][0]) for pair in pairs]), ids


def our_model() -> DualEncoder:
    """A CLIP tower and a BERT, with UniMed-CLIP's projections."""
    torch.manual_seed(0)
    encoder = {"name": "clip", "architecture": VISION | {"hidden_act": "quick_gelu"}}
    return DualEncoder(
        DualEncoderConfig(
            image={
                "encoder": encoder | {"tokens": "cls_patch"},
                "pool": "cls",
                "norm": True,
                "projection": "linear",
                "channels": 3,
                "spatial": [SIDE, SIDE],
            },
            text={"encoder": {"name": "bert", "architecture": TEXT}, "projection": "mlp"},
            embed_dim=EMBED,
        )
    )


class PlainModel(nn.Module):
    """The same towers, as one writes them around transformers' modules."""

    def __init__(self, ours: DualEncoder) -> None:
        super().__init__()
        self.image = CLIPVisionModel(CLIPVisionConfig(**VISION, hidden_act="quick_gelu"))
        self.text = BertModel(BertConfig(**TEXT), add_pooling_layer=False)
        hidden = (WIDTH + EMBED) // 2
        self.image_proj = nn.Linear(WIDTH, EMBED, bias=False)
        self.text_proj = nn.Sequential(
            nn.Linear(WIDTH, hidden, bias=False), nn.GELU(), nn.Linear(hidden, EMBED, bias=False)
        )
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        self.copy(ours)

    @torch.no_grad()
    def copy(self, ours: DualEncoder) -> None:
        """Take the weights of our model."""
        readout = ours.image.readout
        tower: Any = ours.image.encoder
        text: Any = ours.text.encoder
        norm = {f"post_layernorm.{k}": v for k, v in readout.pooling.norm.state_dict().items()}
        self.image.load_state_dict(tower.tower.state_dict() | norm)
        self.text.load_state_dict(text.tower.state_dict())
        self.image_proj.load_state_dict(readout.projection.state_dict())
        self.text_proj.load_state_dict(ours.text.projection.state_dict())
        self.logit_scale.copy_(ours.scale.logit_scale[0])

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized vectors, and the factor of the scores."""
        image = self.image_proj(self.image(pixels).pooler_output)
        hidden = self.text(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        text = self.text_proj(hidden[:, 0])
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1), self.logit_scale.exp()


def plain_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Mean of the two cross-entropies."""
    logits = scale * image @ text.T
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class _Workload:
    """Both models, and the pairs."""

    batch = 32

    def __init__(self, count: int = 64) -> None:
        self.count, self.data = count, _Pairs(count)
        self.ours = our_model()
        self.plain = PlainModel(self.ours)
        self.folder = tempfile.TemporaryDirectory()

    def train_plain(self) -> float:
        """One epoch of a plain loop; returns the pairs."""
        model = self.plain.train()
        matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
        others = [weight for weight in model.parameters() if weight.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=RATE,
            betas=BETAS,
            eps=EPS,
        )
        loader = DataLoader(self.data, batch_size=self.batch, collate_fn=plain_collate)
        for pixels, ids in loader:
            optimizer.zero_grad()
            plain_loss(*model(pixels, ids)).backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOG_SCALE)
        return self.count

    def train_ours(self) -> float:
        """One epoch of medm's trainer; returns the pairs."""
        options = TrainOptions(
            per_device_train_batch_size=self.batch,
            num_train_epochs=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            max_grad_norm=0.0,
            logging_steps=10_000,
            dataloader_num_workers=0,
        )
        parts = {name: PartOptions(tune="full") for name in self.ours.parts()}
        apply_parts(self.ours, parts, options, keep_float32=False)
        MedmTrainer(
            self.ours,
            training_arguments(options, Path(self.folder.name)),
            terms=Terms.of(Contrastive()),
            parts=parts,
            train_options=options,
            train_dataset=self.data,
            data_collator=collate,
            sampler=DistributedBatchSampler(Sequential(self.count), batch_size=self.batch),
        ).fit()
        return self.count

    def our_loss(self, pairs: list[PairExample], **settings: Any) -> Tensor:
        """Mean loss of a batch."""
        batch = collate(pairs)
        terms = Terms.of(Contrastive())
        output = self.ours.train()(**batch, **settings)
        return terms.terms["contrast"].objective.loss(output, batch) / len(pairs)

    def their_loss(self, pairs: list[PairExample]) -> Tensor:
        """The same in the plain loop."""
        return plain_loss(*self.plain.train()(*plain_collate(pairs)))

    def check_same(self) -> str:
        """Same loss and gradients of a batch; same loss and weights after an epoch of each."""
        self.plain.copy(self.ours)
        sample = self.data.pairs[: self.batch]
        found = []
        for model, loss in (
            (self.ours, self.our_loss(sample)),
            (self.plain, self.their_loss(sample)),
        ):
            model.zero_grad()
            loss.backward()
            text: Any = self.ours.text.encoder.tower if model is self.ours else self.plain.text
            gradient = text.embeddings.word_embeddings.weight.grad
            found.append((loss.item(), gradient.double().flatten()))
            model.zero_grad()
        (ours, own), (plain, theirs) = found
        cosine = float(F.cosine_similarity(own, theirs, dim=0))
        self.train_ours()
        self.train_plain()
        with torch.no_grad():
            after = self.our_loss(sample).item(), self.their_loss(sample).item()
        off = abs(ours - plain) / plain, abs(after[0] - after[1]) / after[1]
        text = self.ours.text.encoder.tower.state_dict()
        weights = max(
            float((w - text[k]).abs().max()) for k, w in self.plain.text.state_dict().items()
        )
        if max(off) > 1e-5 or weights > 1e-4 or cosine < 0.9999 or not after[1] < plain:
            raise GateError(
                f"losses {ours:.6f} and {plain:.6f}, after an epoch {after[0]:.6f} and "
                f"{after[1]:.6f}, gradient cosine {cosine:.6f}, weights differ by {weights:.1e}"
            )
        return (
            f"loss differs by {off[0]:.1e}, gradient cosine {cosine:.6f}; after an epoch loss by "
            f"{off[1]:.1e}, weights of the text tower by {weights:.1e}"
        )


@cache
def workload() -> _Workload:
    """Shared by the cells."""
    return _Workload()


class _ContrastCell(Cell):
    @property
    def setting(self) -> dict[str, Any]:
        load = workload()
        return {
            "towers": f"{LAYERS} layers of {WIDTH}",
            "image": f"{SIDE} px, patch {PATCH}",
            "captions": f"{SHORTEST} to {LONGEST} tokens",
            "peer's context": CONTEXT,
            "pairs": load.count,
            "batch": load.batch,
            "dtype": "float32",
        }


class PairsASecond(_ContrastCell, Ratio):
    """P14: one epoch of medm's trainer and of a plain loop."""

    name, title, peer = "P14", "contrastive training pairs/s", "plain loop, texts padded to 256"
    targets: ClassVar = {"cpu": 1.2}

    def gate(self) -> str:
        return workload().check_same()

    def run_peer(self) -> float:
        return workload().train_plain()

    def run_ours(self) -> float:
        return workload().train_ours()


class PairsMemory(_ContrastCell, Figure):
    """Memory of a forward and backward pass above the weights, ours over the plain loop's."""

    name, title, at_most = "P14-memory", "peak memory above weights, contrast", True
    peer = "plain loop, texts padded to 256"
    targets: ClassVar = {"cpu": 0.8}

    def gate(self) -> str:
        return workload().check_same()

    def values(self, rounds: int) -> list[float]:
        load = workload()
        sample = load.data.pairs[: load.batch]
        ratios = []
        for _ in range(min(rounds, 3)):  # an allocation is counted, not timed
            load.plain.zero_grad()
            peer = peak_bytes(lambda: load.their_loss(sample).backward())
            load.ours.zero_grad()
            ratios.append(peak_bytes(lambda: load.our_loss(sample).backward()) / peer)
        return ratios


class ChunkedMemory(_ContrastCell, Figure):
    """Peak memory above weights and pixels of 1,024 pairs in one contrast, over that of 64, each
    encoded 32 at a time.
    """

    name, title, at_most = "P14-chunk", "peak memory of 1,024 pairs in chunks of 32", True
    peer = "64 pairs in chunks of 32"
    targets: ClassVar = {"cpu": 1.25}
    chunk: ClassVar[int] = 32
    sizes: ClassVar[tuple[int, ...]] = (64, 256, 1024)

    @property
    def setting(self) -> dict[str, Any]:
        setting = super().setting
        same = {key: setting[key] for key in ("towers", "image", "captions", "dtype")}
        peaks = ", ".join(f"{size}: {peak / 2**20:.0f} MiB" for size, peak in self.peaks.items())
        return same | {"peak by pairs": peaks or "-"}

    def __init__(self, profile: str) -> None:
        super().__init__(profile)
        self.peaks: dict[int, int] = {}

    def gate(self) -> str:
        """Chunks give the gradient of the whole batch."""
        load = workload()
        sample, found = load.data.pairs, []
        for chunk in (None, self.chunk):
            load.ours.zero_grad()
            loss = load.our_loss(sample, chunk=chunk)
            loss.backward()
            gradients = [
                w.grad.flatten().double() for w in load.ours.parameters() if w.grad is not None
            ]
            found.append((loss.item(), torch.cat(gradients)))
        cosine = float(F.cosine_similarity(found[0][1], found[1][1], dim=0))
        off = abs(found[0][0] - found[1][0]) / found[0][0]
        if off > 1e-5 or cosine < 0.99999 or not math.isfinite(cosine):
            raise GateError(f"loss off by {off:.1e}, gradient cosine {cosine:.6f}")
        return f"loss of {len(sample)} pairs differs by {off:.1e}, gradient cosine {cosine:.6f}"

    def values(self, rounds: int) -> list[float]:
        load = workload()
        for size in self.sizes:
            sample = [load.data.pairs[index % load.count] for index in range(size)]
            batch = collate(sample)
            loss = Contrastive()
            load.ours.train().zero_grad()

            def step(batch: Batch = batch, loss: Contrastive = loss, size: int = size) -> None:
                output = load.ours(**batch, chunk=self.chunk)
                (loss.loss(output, batch) / size).backward()

            self.peaks[size] = peak_bytes(step)
        load.ours.zero_grad()
        return [self.peaks[self.sizes[-1]] / self.peaks[self.sizes[0]]]
