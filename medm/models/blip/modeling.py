"""BLIP on studies: vectors, matches, reports and labels of images with their texts.

Knows nothing of losses beyond that of tokens: objectives compare what the forward gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig
from transformers.utils.generic import ModelOutput

from medm.config import flatten
from medm.distributed import all_gather, rank, row_counts
from medm.encoders import ENCODERS
from medm.encoders.base import VisionEncoder
from medm.errors import RecipeError
from medm.knowledge.base import NO_OWNER, KnowledgeQuery
from medm.knowledge.memory import Memory
from medm.models.base import MedmModel
from medm.models.blip.answers import (
    AnswerHead,
    AnswerLogits,
    Answers,
    Question,
    choose,
    resolved_answers,
)
from medm.models.blip.beam import beam_search
from medm.models.blip.configuration import ImageEntry, MedmBlipConfig
from medm.models.blip.momentum import FeatureQueue, draws, hard_negatives, soft_targets
from medm.models.blip.options import OUTPUTS_OF_HEAD, AnswerOptions, BlipOptions, Head, projects
from medm.models.blip.text import Decoder, KeyValues, StudyTextEncoder
from medm.models.knowledge import KnowledgeBranch
from medm.models.knowledge_files import knowledge_differences
from medm.models.options import ModelOptions
from medm.types import IGNORE_INDEX, Config, VisionFeatures

PROTOTYPE_SCALE = 100.0
"""Factor of the cosine of an image and the name of a finding (MOTOR)."""
LOWEST, HIGHEST = 0.001, 0.5
"""Bounds of the temperature (ALBEF, BLIP)."""
BEAMS = 3


@dataclass
class MedmBlipOutput(ModelOutput):
    """What the heads of the model give for a batch of B studies."""

    itc_logits_image: Tensor | None = None
    """(B, C) scores of each image with the texts of the batch of all ranks and of the queue."""
    itc_logits_text: Tensor | None = None
    """(B, C) scores of each text with such images."""
    itc_targets_image: Tensor | None = None
    """(B, C) probabilities that the scores of an image learn."""
    itc_targets_text: Tensor | None = None
    """(B, C)."""
    itm_logits: Tensor | None = None
    """(3B, 2) scores of no match and match: true pairs, texts with a wrong image, images with a
    wrong text."""
    itm_labels: Tensor | None = None
    """(3B,) int64, 1 match, 0 no match, `IGNORE_INDEX` where there is no other study."""
    loss_sum: Tensor | None = None
    """Sum of the loss over the labeled tokens."""
    label_logits: Tensor | None = None
    """(B, L)."""
    answer_logits_closed: Tensor | None = None
    """(B, closed answers), of every question, whatever its type."""
    answer_logits_open: Tensor | None = None
    """(B, open answers), of every question."""
    answer_logits_type: Tensor | None = None
    """(B, 2), in the order of `medm.types.ANSWER_BRANCHES`."""


class StudyImages(NamedTuple):
    """Images of B studies."""

    tokens: Tensor
    """(B, N, D)."""
    mask: Tensor
    """(B, N) bool, False where a study has fewer images."""
    vector: Tensor
    """(B, D)."""
    label_vector: Tensor
    """(B, D), what findings are scored by: it has seen the graph, and no memory."""

    def rows(self, rows: Sequence[int]) -> StudyImages:
        """Return some of the studies, in this order; one may come several times."""
        taken = torch.tensor(rows, device=self.tokens.device)
        return StudyImages(*(one[taken] for one in self))


class StudyImageTower(nn.Module):
    """Images of studies to tokens and one vector; a `medm.types.VisionBranch`.

    Args:
        entry: of the config.
    """

    def __init__(self, entry: ImageEntry) -> None:
        super().__init__()
        self.encoder_bypassed = False
        self.encoder: VisionEncoder = ENCODERS.constructor(entry.encoder)()
        self.spatial, self.channels = tuple(entry.spatial), entry.channels
        self.views, self.fusion = entry.views, entry.fusion
        self.dim = self.encoder.dim
        self.norm = nn.LayerNorm(self.dim, eps=entry.norm_eps)
        joined = entry.views > 1 and entry.fusion == "channels"
        self.join = nn.Linear(entry.views * self.dim, self.dim) if joined else None

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return self.encoder.prefix + prod(self.encoder.grid(self.spatial))

    @property
    def connector(self) -> nn.Module:
        """What stands behind the encoder: the norm."""
        return self.norm

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Return the vision features of (images, C, height, width)."""
        return self.encoder(pixels)

    def from_cached(self, features: VisionFeatures | Tensor) -> VisionFeatures:
        """Return features that were encoded before, of the tower's input size."""
        if isinstance(features, VisionFeatures):
            return features
        tokens = features.to(**self.encoder.device_and_dtype)
        return VisionFeatures(tokens, self.encoder.grid(self.spatial), self.encoder.prefix)

    def blank(self, device: torch.device, dtype: torch.dtype) -> Tensor | VisionFeatures:
        """Return one blank image, as features where the encoder is bypassed."""
        if self.encoder_bypassed:
            tokens = torch.zeros(1, self.num_tokens, self.dim, device=device, dtype=dtype)
            return self.from_cached(tokens)
        return torch.zeros(1, self.channels, *self.spatial, device=device, dtype=dtype)

    def forward(self, pixels: Tensor | VisionFeatures, counts: Tensor) -> StudyImages:
        """Encode the images of studies.

        Args:
            pixels: (images, C, height, width), the studies in order; or their features.
            counts: (B,) int64, images of each study, 1 to `views`.

        Raises:
            ValueError: counts that do not fit.
        """
        given = len(pixels.tokens) if isinstance(pixels, VisionFeatures) else len(pixels)
        total, most = int(counts.sum()), int(counts.max())
        if total != given or most > self.views or int(counts.min()) < 1:
            raise ValueError(
                f"image_counts {counts.tolist()}: expected 1 to {self.views} images a study, and "
                f"{given} in all"
            )
        features = pixels if isinstance(pixels, VisionFeatures) else self.encode(pixels)
        tokens = self.norm(features.tokens)  # (images, n, D)
        starts = counts.cumsum(0) - counts  # (B,)
        place = torch.arange(self.views, device=counts.device)  # (V,)
        present = place < counts.unsqueeze(1)  # (B, V)
        taken = starts.unsqueeze(1) + torch.minimum(place, counts.unsqueeze(1) - 1)  # (B, V)
        if self.join is not None:
            joined = self.join(tokens[taken].transpose(1, 2).flatten(2))  # (B, n, D)
            mask = torch.ones(joined.shape[:2], dtype=torch.bool, device=joined.device)
            return self.with_vector(joined, mask)
        mask = present.repeat_interleave(tokens.shape[1], dim=1)  # (B, V * n)
        return self.with_vector(tokens[taken].flatten(1, 2), mask)

    def with_vector(
        self, tokens: Tensor, mask: Tensor, label_vector: Tensor | None = None
    ) -> StudyImages:
        """Return images with their vector: the mean of class tokens, or of all tokens without.

        Args:
            tokens: (B, N, D).
            mask: (B, N) bool.
            label_vector: (B, D); default the vector.
        """
        cells = tokens.shape[1] // (1 if self.join is not None else self.views)
        step = cells if self.encoder.prefix else 1
        seen = mask[:, ::step].to(tokens.dtype).unsqueeze(2)
        vector = (tokens[:, ::step] * seen).sum(dim=1) / seen.sum(dim=1)
        return StudyImages(tokens, mask, vector, vector if label_vector is None else label_vector)


class Temperature(nn.Module):
    """Divisor of cosines.

    Args:
        start: at the start.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), start))

    def forward(self) -> Tensor:
        """(1,)."""
        return self.value


class MedmBlip(MedmModel):
    """Image tower, text encoder with cross-attention, decoder on its weights, heads.

    `forward` takes what the collator of studies makes (`medm.data.studies`). For contrast there is
    a momentum copy of towers and projections, and a queue (`training_only`).
    """

    batches: Tensor
    """Batches of this run that negatives were drawn for, a scalar."""
    steps: Tensor
    """Optimizer steps of this run, a scalar."""

    config_class = MedmBlipConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    accepts_loss_kwargs = True
    training_only = ("momentum.*", "queue.*", "batches", "steps")
    zero3_refusal = (
        "its momentum copy is a mean of whole weights, and ZeRO-3 keeps a shard of each; use ZeRO "
        "0, 1 or 2, or leave the heads itc and itm out"
    )

    def __init__(self, config: MedmBlipConfig) -> None:
        super().__init__(config)
        bert, text = BertConfig(**cast(Any, config.text["architecture"])), config.text_entry()
        heads = config.heads
        self.image = StudyImageTower(config.image_entry())
        crossed = {"itm", "lm", "answers"} & {*heads}
        self.text = StudyTextEncoder(bert, self.image.dim if crossed else None)
        own_words = text.lm_head == "own"
        self.decoder = Decoder(bert, own_words=own_words) if "lm" in heads else None
        projected = projects(heads, config.label_head)
        self.image_projection = nn.Linear(self.image.dim, config.embed_dim) if projected else None
        self.text_projection = nn.Linear(bert.hidden_size, config.embed_dim) if projected else None
        self.itm = nn.Linear(bert.hidden_size, 2) if "itm" in heads else None
        linear = "labels" in heads and config.label_head == "linear"
        self.labels = nn.Linear(self.image.dim, len(config.labels)) if linear else None
        answers = config.answers_entry()
        self.answers = None if answers is None else AnswerHead(answers, bert.hidden_size)
        self.answer_encoder: StudyTextEncoder | None = None
        if answers is not None and answers.encoders == "separate":
            self.answer_encoder = StudyTextEncoder(bert, self.image.dim)
        self.knowledge: nn.ModuleDict | None = None
        if config.knowledge:
            self.knowledge = nn.ModuleDict(
                {str(one["name"]): self._branch(one, bert) for one in config.knowledge}
            )
        self.temperature: Temperature | None = None
        self.momentum: nn.ModuleDict | None = None
        self.queue: FeatureQueue | None = None
        self.ids = text
        if "itc" in heads:
            self.temperature = Temperature(config.temperature)
            self.momentum = nn.ModuleDict(
                {
                    "image": StudyImageTower(config.image_entry()),
                    "text": StudyTextEncoder(bert, None),
                    "image_projection": nn.Linear(self.image.dim, config.embed_dim),
                    "text_projection": nn.Linear(bert.hidden_size, config.embed_dim),
                }
            ).requires_grad_(False)
            for one in config.knowledge:
                if one["name"] == "graph":
                    self.momentum["graph"] = self._branch(one, bert).requires_grad_(False)
            self.queue = FeatureQueue(config.queue, config.embed_dim)
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            # Equal on every rank without DDP, which would send the queue around before each batch.
            self._ddp_params_and_buffers_to_ignore = [
                name for name in self.state_dict() if self.is_training_only(name)
            ]
            self.init_training_state()
        self._added: list[tuple[Tensor, Tensor, Tensor]] = []
        self._known: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.inject_adapters()
        self.post_init()

    def _branch(self, entry: Config, bert: BertConfig) -> KnowledgeBranch:
        """Return a source of knowledge and its fusion into image tokens."""
        sizes: dict[str, object] = {"word_dim": bert.hidden_size}
        if entry["name"] == "memory":
            sizes |= {"key_dim": self.config.embed_dim, "length": self.config.memory_length}
        return KnowledgeBranch(entry, dim=self.image.dim, **sizes)

    def _memory(self) -> Memory | None:
        """Return the memory of triplets, where there is one."""
        branch = self._knowledge("memory")
        return None if branch is None else cast(Memory, branch.source)

    def _knowledge(self, name: str) -> KnowledgeBranch | None:
        known = self.knowledge
        return cast(KnowledgeBranch, known[name]) if known is not None and name in known else None

    def is_training_only(self, name: str) -> bool:
        """Besides `training_only`: the texts of a memory that the final folder is not to have."""
        stored = name.startswith("knowledge.memory.source.") and not self.config.keep_memory
        return stored or super().is_training_only(name)

    def parts(self) -> dict[str, nn.Module]:
        """The units that a recipe freezes, trains or adapts. The decoder is its self-attention and
        LM head; all else in it is the text encoder's.
        """
        tower = self.image
        image = [tower.encoder, tower.norm, *([] if tower.join is None else [tower.join])]
        parts: dict[str, nn.Module | None] = {
            "image.encoder": nn.ModuleList(image),
            "image.projection": self.image_projection,
            "text.encoder": self.text,
            "text.projection": self.text_projection,
            "text.decoder": self.decoder,
            "itm": self.itm,
            "labels": self.labels,
            "answers": self.answers,
            "answers.encoder": self.answer_encoder,
            "temperature": self.temperature,
            "knowledge": self.knowledge,
            "momentum": self.momentum,  # no recipe names it, so it stays frozen
        }
        return {name: part for name, part in parts.items() if part is not None}

    def encoders(self) -> dict[str, StudyImageTower]:
        return {"image": self.image}

    def check_same_parts(self, options: ModelOptions, *, source: str) -> None:
        if not isinstance(options, BlipOptions):
            raise RecipeError(
                f"init_from {source}: holds a model of kind 'blip', not {options.kind!r}. Change "
                "the recipe or init_from"
            )
        config = cast(MedmBlipConfig, self.config)
        held: dict[str, object] = {
            name: getattr(config, name)
            for name in ("embed_dim", "heads", "momentum", "queue", "labels", "label_head")
        } | flatten({"image": config.image})
        if "lm" in config.heads:
            held["text.lm_head"] = config.text_entry().lm_head
        named = {
            **options.model_dump(include={*held}),
            "text.lm_head": options.text.lm_head,
            **flatten({"image": options.image.model_dump()}),
        }
        differences = [
            f"{key} {held[key]!r}, not {value!r}"
            for key, value in named.items()
            if key in held and held[key] != value and "architecture" not in key.split(".")
        ]
        entries = {str(one["name"]): one for one in config.knowledge}
        wanted = {one.name: one for one in options.knowledge}
        differences += [f"no knowledge {name!r}" for name in wanted if name not in entries]
        for name, entry in entries.items():
            differences += knowledge_differences(entry, wanted.get(name))
        if not _same_answers(config.answers_entry(), options.answers):
            differences.append("other lists of answers, or another head of answers")
        if differences:
            raise RecipeError(
                f"init_from {source}: holds {'; '.join(differences)}. Change the recipe or "
                "init_from"
            )

    def add_adapter_to_part(self, part: str, spec: Mapping[str, object]) -> None:
        if self.momentum is not None and part in _COPIED:
            raise RecipeError(
                f"parts.{part}: LoRA beside a momentum copy, which is a mean of whole weights; set "
                "tune: full or frozen, or leave the heads itc and itm out"
            )
        super().add_adapter_to_part(part, cast(Config, spec))

    # -- state that training alone needs -----------------------------------------------------------

    @torch.no_grad()
    def init_training_state(self) -> None:
        """Copy the weights into the momentum copy, and empty the queue."""
        if self.queue is None:
            return
        for slow, fast in self._pairs(buffers=True):
            slow.copy_(fast)
        self.queue.clear()
        memory = self._memory()
        if memory is not None and not self.config.keep_memory:
            memory.keys.zero_()
            memory.ids.zero_()
            memory.clear()
        self.batches.zero_()
        self.steps.zero_()

    @torch.no_grad()
    def after_step(self) -> Sequence[nn.Parameter]:
        """Move the momentum copy, fill the queue, and hold the temperature in its bounds."""
        if self.queue is None or self.temperature is None:
            return ()
        for slow, fast in self._pairs():
            slow.lerp_(fast.to(slow.dtype), 1 - self.config.momentum)
        for image, text, owners in self._added:
            self.queue.add(image, text, owners)
        self._added.clear()
        memory = self._memory()
        for keys, ids, mask, owners in self._known:
            if memory is not None:
                memory.enqueue(keys, ids, mask, owners)
        self._known.clear()
        self.steps += 1
        value = self.temperature.value
        held = value.clamp(LOWEST, HIGHEST)
        if not value.requires_grad or torch.equal(held, value):
            return ()
        value.copy_(held)
        return (value,)

    def _pairs(self, *, buffers: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Return each weight of the momentum copy, and that of the model.

        Args:
            buffers: their buffers as well.
        """
        assert self.momentum is not None
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, copy in self.momentum.items():
            part: nn.Module = self if name != "graph" else cast(nn.Module, self.knowledge)
            part = cast(nn.Module, getattr(part, name))
            own = dict(part.named_parameters()) | dict(part.named_buffers())
            pairs += [(slow, own[key]) for key, slow in copy.named_parameters()]
            if buffers:
                pairs += [(slow, own[key]) for key, slow in copy.named_buffers()]
        return pairs

    # -- parts of the forward ----------------------------------------------------------------------

    def encode_images(
        self,
        pixels: Mapping[str, Tensor] | Tensor | VisionFeatures,
        image_counts: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> StudyImages:
        """Return tokens and vectors of studies, with the knowledge of the model.

        Args:
            pixels: (images, C, height, width), or a mapping of "image" to them; or features of the
                encoder.
            image_counts: (B,) images of each study; without it one each.
            owners: (B,) numbers of the studies' own texts, which a memory does not give them.
        """
        images = pixels if isinstance(pixels, (Tensor, VisionFeatures)) else pixels["image"]
        counts = _one_each(images) if image_counts is None else image_counts
        seen: StudyImages = self.image(images, counts)
        graph = self._knowledge("graph")
        if graph is not None:
            seen = self._after_graph(seen, graph, self.text)
        return self._after_memory(seen, owners, self._projected)

    def _after_graph(
        self, images: StudyImages, graph: KnowledgeBranch, text: StudyTextEncoder
    ) -> StudyImages:
        """Return images whose tokens attended to the graph, whose names are words of `text`."""
        words = text.embeddings.word_embeddings
        tokens = graph(images.tokens, lambda ids, mask: words(ids))
        return self.image.with_vector(tokens, images.mask)

    def _after_memory(
        self, images: StudyImages, owners: Tensor | None, project: Project
    ) -> StudyImages:
        """Return images whose tokens attended to what the memory has for their vectors."""
        memory = self._knowledge("memory")
        if memory is None:
            return images
        rows = len(images.tokens)
        if owners is None:
            owners = torch.full((rows,), NO_OWNER, device=images.tokens.device)
        query = F.normalize(project("image", images.vector).float(), dim=-1)
        tokens = memory(images.tokens, self.text, KnowledgeQuery(query, owners))
        return self.image.with_vector(tokens, images.mask, images.label_vector)

    def get_image_features(
        self, pixels: Mapping[str, Tensor] | Tensor, image_counts: Tensor | None = None
    ) -> Tensor:
        """Return the vectors of studies in the common space, not normalized, (B, embed_dim).

        Arguments as those of `encode_images`.
        """
        return self.image_vectors(self.encode_images(pixels, image_counts))

    def image_vectors(self, images: StudyImages) -> Tensor:
        """Return the vectors of encoded studies in the common space, not normalized."""
        return self._projected("image", images.vector)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the vectors of texts in the common space, not normalized, (B, embed_dim)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self._projected("text", self.text(input_ids, mask)[:, 0])

    def match(self, images: StudyImages, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the scores of no match and match of images with texts, (B, 2), one text each."""
        if self.itm is None:
            raise RecipeError("this model matches nothing: model.heads has no 'itm'")
        ids = _begun(input_ids, self.ids.encoder_id)
        states = self.text(ids, attention_mask, images.tokens, images.mask)
        return self.itm(states[:, 0])

    def label_scores(self, vector: Tensor) -> Tensor:
        """Return the logit of each finding for vectors (B, D) of studies, (B, L)."""
        if "labels" not in self.config.heads:
            raise RecipeError("this model knows no labels: model.heads has no 'labels'")
        if self.labels is not None:
            return self.labels(vector)
        rows = self.ids.label_ids
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=vector.device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=vector.device
        )
        names = F.normalize(self.get_text_features(ids, mask).float(), dim=-1)  # (L, E)
        images = F.normalize(self._projected("image", vector).float(), dim=-1)
        return PROTOTYPE_SCALE * images @ names.T

    def answer_scores(
        self, images: StudyImages, question_ids: Tensor, question_mask: Tensor
    ) -> AnswerLogits:
        """Score the answers of both branches for questions (B, T), one a study."""
        if self.answers is None:
            raise RecipeError("this model chooses no answers: model.heads has no 'answers'")
        begun = _begun(question_ids, self.ids.encoder_id)
        questions = [
            Question(
                encoder.embed(question_ids),
                encoder(question_ids, question_mask),
                encoder(begun, question_mask, images.tokens, images.mask)[:, 0],
            )
            for encoder in (self.text, self.answer_encoder)
            if encoder is not None
        ]
        return self.answers([questions[0], questions[-1]], question_mask)

    @torch.no_grad()
    def answer(
        self,
        pixels: Mapping[str, Tensor] | Tensor,
        image_counts: Tensor | None,
        question_ids: Tensor,
        question_mask: Tensor | None = None,
        answer_branches: Tensor | None = None,
    ) -> Answers:
        """Choose an answer for each study's question; `decode_answers` of the processor reads it.

        Args:
            pixels: as those of `encode_images`.
            image_counts: (B,) images of each study; None for one each.
            question_ids: (B, T) as `encode_text` of the processor gives them.
            question_mask: (B, T), 0 at padding; None where there is none.
            answer_branches: (B,) types of the questions; read with `route: gold` alone.

        Raises:
            RecipeError: the model chooses no answers, or `route: gold` has no type of a question.
        """
        images = self.encode_images(pixels, image_counts)
        return self.choose_answers(images, question_ids, question_mask, answer_branches)

    @torch.no_grad()
    def choose_answers(
        self,
        images: StudyImages,
        question_ids: Tensor,
        question_mask: Tensor | None = None,
        answer_branches: Tensor | None = None,
    ) -> Answers:
        """Choose an answer for each of some encoded studies; see `answer`."""
        mask = torch.ones_like(question_ids) if question_mask is None else question_mask
        logits = self.answer_scores(images, question_ids, mask)
        gold = None
        if self.config.answers["route"] == "gold":
            unknown = torch.full_like(question_ids[:, 0], IGNORE_INDEX)
            gold = unknown if answer_branches is None else answer_branches
        return choose(logits, gold)

    def _projected(self, side: str, vector: Tensor) -> Tensor:
        projection = self.image_projection if side == "image" else self.text_projection
        if projection is None:
            raise RecipeError(
                "this model has no common space: model.heads has neither 'itc' nor prototypes of "
                "labels"
            )
        return projection(vector)

    # -- forward -----------------------------------------------------------------------------------

    def forward(
        self,
        pixels: Mapping[str, Tensor] | None = None,
        image_counts: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        owners: Tensor | None = None,
        knowledge_ids: Tensor | None = None,
        knowledge_mask: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        outputs: frozenset[str] | None = None,
        **kwargs: Any,
    ) -> MedmBlipOutput:
        """Run the heads on a batch. A batch without studies gives no rows, through every weight.

        Args:
            pixels: "image" to (images, C, height, width), the studies in order.
            image_counts: (B,) images of each study; without it one each.
            input_ids: (B, T), padded on the right.
            attention_mask: (B, T), 0 at padding.
            labels: (B, T), `IGNORE_INDEX` where no token is learned.
            owners: (B,) int64, equal where two studies have the same text.
            knowledge_ids: (B, K) tokens of the studies' triplets, for a memory.
            knowledge_mask: (B, K), 0 at padding.
            features: "image" to what the encoder gave before, (images, tokens, D), in place of
                `pixels`.
            question_ids: (B, T) tokens of the questions, for classes of answers.
            question_mask: (B, T), 0 at padding.
            outputs: fields that are read. In training every head runs, so that each weight has a
                gradient.
            kwargs: fields of the batch that objectives read.

        Raises:
            RecipeError: a head needs texts, and the batch has none.
        """
        device = self.device
        rows = len(image_counts) if image_counts is not None else len((pixels or {})["image"])
        empty = rows == 0
        given: Tensor | VisionFeatures
        if empty:  # one blank study runs through every weight; its rows are cut off
            given = self.image.blank(device, self.dtype)
            image_counts = torch.ones(1, dtype=torch.int64, device=device)
        elif features:
            given = self.image.from_cached(features["image"])
        else:
            given = (pixels or {})["image"]
        wanted = [head for head in self.config.heads if self._asked(head, outputs)]
        images = self.encode_images(given, image_counts, None if empty else owners)
        output = MedmBlipOutput()
        if "labels" in wanted:
            output.label_logits = self.label_scores(images.label_vector)[:rows]
        if "answers" in wanted:
            if empty:
                question_ids = torch.full((1, 2), self.ids.end_id, device=device)
                question_mask = None
            if question_ids is None:
                raise RecipeError(
                    "the head answers learns from questions, and the batch has no question_ids; "
                    "give records with question, answer and answer_type"
                )
            asked = torch.ones_like(question_ids) if question_mask is None else question_mask
            scores = self.answer_scores(images, question_ids, asked)
            output.answer_logits_closed = scores.closed[:rows]
            output.answer_logits_open = scores.open[:rows]
            output.answer_logits_type = scores.type[:rows]
        if set(wanted) <= {"labels", "answers"}:
            return output
        if empty:
            input_ids = torch.full((1, 2), self.ids.end_id, device=device)
            attention_mask, labels = torch.ones_like(input_ids), input_ids
            owners = torch.zeros(1, dtype=torch.int64, device=device)
        if input_ids is None:
            raise RecipeError(
                f"the heads {', '.join(wanted)} learn from texts, and the batch has no input_ids; "
                "give records with reports, or leave these heads out"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if "lm" in wanted:
            output.loss_sum = self._token_loss(images, input_ids, mask, labels) * (not empty)
        if "itc" in wanted:
            if owners is None:
                owners = -1 - torch.arange(len(input_ids), device=device)  # all differ
            texts = _Texts(input_ids, mask, owners)
            similar = self._contrast(output, images, given, image_counts, texts, rows)
            if "itm" in wanted:
                self._matches(output, images, texts, similar, rows)
            if self.training and torch.is_grad_enabled():
                self.batches += 1
                self._learn(texts, similar, knowledge_ids, knowledge_mask)
        return output

    @torch.no_grad()
    def _learn(
        self, texts: _Texts, similar: _Similar, ids: Tensor | None, mask: Tensor | None
    ) -> None:
        """Note the triplets of all ranks, which the memory takes behind the step.

        Its keys are the vectors of the studies' texts.
        """
        memory = self._memory()
        if memory is None:
            return
        device = texts.ids.device
        if ids is None or mask is None:
            ids = mask = torch.zeros(len(texts.ids), 1, dtype=torch.int64, device=device)
        sizes, rows = similar.sizes, len(similar.keys)
        pad = (0, memory.length - ids.shape[1])
        every_ids, every_mask = (all_gather(F.pad(one, pad)[:rows], sizes) for one in (ids, mask))
        keys = all_gather(similar.keys, sizes)
        owners = all_gather(texts.owners[:rows].unsqueeze(1), sizes).squeeze(1)
        some = every_mask.bool().any(dim=1)
        self._known.append((keys[some], every_ids[some], every_mask[some].bool(), owners[some]))

    def _asked(self, head: Head, outputs: frozenset[str] | None) -> bool:
        """Return whether a head runs: in training all do; matching draws by the scores of `itc`."""
        if self.training or outputs is None:
            return True
        asked = bool(OUTPUTS_OF_HEAD[head] & outputs)
        return asked or (head == "itc" and self._asked("itm", outputs))

    def _token_loss(
        self, images: StudyImages, ids: Tensor, mask: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the sum of the smoothed cross-entropy over the labeled tokens."""
        assert self.decoder is not None
        if labels is None:
            raise RecipeError("the head lm learns the batch field 'labels', and there is none")
        begun = _begun(ids, self.ids.decoder_id)
        states = self.decoder(self.text, begun, mask, images.tokens, images.mask)
        targets = labels[:, 1:]
        learned = targets != IGNORE_INDEX
        logits = self.decoder.logits(self.text, states[:, :-1][learned]).float()  # (labels, V)
        return F.cross_entropy(
            logits,
            targets[learned],
            label_smoothing=self.config.label_smoothing,
            reduction="sum",
        )

    def _contrast(
        self,
        output: MedmBlipOutput,
        images: StudyImages,
        pixels: Tensor | VisionFeatures,
        counts: Tensor | None,
        texts: _Texts,
        rows: int,
    ) -> _Similar:
        """Score the pairs against those of all ranks and of the queue, as the momentum copy sees
        them; return what hard negatives are drawn by.

        ALBEF (arXiv 2107.07651) and BLIP compare with the momentum vectors of one rank and with
        the queue; the vectors of all ranks make the loss independent of their number.
        """
        assert self.temperature is not None
        assert self.queue is not None
        temperature = self.temperature()
        own_image = F.normalize(self._projected("image", images.vector).float(), dim=-1)
        own_text = F.normalize(
            self.get_text_features(texts.ids, texts.mask).float(), dim=-1
        )  # (B, E)
        with torch.no_grad():
            slow_image, slow_text = self._slow(pixels, counts, texts)
            sizes = row_counts(slow_image[:rows])
            batch = (
                all_gather(slow_image[:rows], sizes),
                all_gather(slow_text[:rows], sizes),
                all_gather(texts.owners[:rows].unsqueeze(1), sizes).squeeze(1),
            )
            queue = self.queue.held()
            every_image, every_text, owners = (
                torch.cat([now, before.to(now.dtype)])
                for now, before in zip(batch, queue, strict=True)
            )
            place = torch.arange(rows, device=owners.device) + sum(sizes[: rank()])  # (B,)
            partners = place.unsqueeze(1) == torch.arange(len(owners), device=owners.device)
            same = partners | (texts.owners[:rows].unsqueeze(1) == owners)
            positives = same if self.config.same_report == "positive" else partners
            alpha = self.config.alpha * min(
                1.0, int(self.steps) / self.config.alpha_steps if self.config.alpha_steps else 1.0
            )
            output.itc_targets_image = soft_targets(
                slow_image[:rows] @ every_text.T / temperature, positives, alpha
            )
            output.itc_targets_text = soft_targets(
                slow_text[:rows] @ every_image.T / temperature, positives, alpha
            )
        output.itc_logits_image = own_image[:rows] @ every_text.T / temperature
        output.itc_logits_text = own_text[:rows] @ every_image.T / temperature
        if self.training and torch.is_grad_enabled():
            self._added.append(batch)
        total = sum(sizes)
        allowed = ~positives[:, :total]
        if self.config.negatives == "local":
            first = sum(sizes[: rank()])
            allowed[:, :first] = False
            allowed[:, first + rows :] = False
        return _Similar(
            image=output.itc_logits_image[:, :total].detach(),
            text=output.itc_logits_text[:, :total].detach(),
            allowed=allowed,
            keys=own_text[:rows].detach(),
            sizes=sizes,
        )

    def _slow(
        self, pixels: Tensor | VisionFeatures, counts: Tensor | None, texts: _Texts
    ) -> tuple[Tensor, Tensor]:
        """Return the momentum copy's vectors of images and texts, of length 1.

        Features are those of a frozen encoder, of which the copy is equal.
        """
        assert self.momentum is not None
        copy = self.momentum
        counts = _one_each(pixels) if counts is None else counts
        seen: StudyImages = copy["image"](pixels, counts)
        if "graph" in copy:
            slow_text = cast(StudyTextEncoder, copy["text"])
            seen = self._after_graph(seen, cast(KnowledgeBranch, copy["graph"]), slow_text)
        # The memory's fusion has no copy, as in MOTOR; this batch is not in the memory yet.
        seen = self._after_memory(
            seen, texts.owners, lambda side, vector: copy[f"{side}_projection"](vector)
        )
        image = copy["image_projection"](seen.vector)
        text = copy["text_projection"](copy["text"](texts.ids, texts.mask)[:, 0])
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def _matches(
        self,
        output: MedmBlipOutput,
        images: StudyImages,
        texts: _Texts,
        similar: _Similar,
        rows: int,
    ) -> None:
        """Match true pairs, and each text and image with a hard negative of the other side."""
        sizes, device = similar.sizes, texts.ids.device
        tokens = all_gather(images.tokens[:rows].flatten(1), sizes)  # (all, N * D)
        seen = all_gather(images.mask[:rows].long(), sizes)
        width = max(row_counts(texts.ids.T))
        ids, mask = (
            all_gather(F.pad(rows_of, (0, width - rows_of.shape[1]))[:rows], sizes)
            for rows_of in (texts.ids, texts.mask)
        )
        shape = images.tokens.shape[1:]
        if not rows:  # a blank pair, so that every weight has a gradient
            logits = self.match(images, texts.ids, texts.mask)
            output.itm_logits = logits[:0] + 0.0 * tokens.sum()
            output.itm_labels = torch.zeros(0, dtype=torch.int64, device=device)
            return
        first = sum(sizes[: rank()])
        # A wrong image for each text, and a wrong text for each image.
        places = draws(int(self.batches) if self.training else 0, sum(sizes), device)
        places = places[:, first : first + rows]
        wrong_image, found_image = hard_negatives(similar.text, similar.allowed, places[0])
        wrong_text, found_text = hard_negatives(similar.image, similar.allowed, places[1])
        own = torch.arange(rows, device=device) + first
        image_of, text_of = torch.cat([own, wrong_image, own]), torch.cat([own, own, wrong_text])
        chosen = StudyImages(
            tokens[image_of].unflatten(1, shape),
            seen[image_of].bool(),
            images.vector,
            images.label_vector,
        )
        output.itm_logits = self.match(chosen, ids[text_of], mask[text_of])
        found = torch.cat([found_image, found_text])
        output.itm_labels = torch.cat([torch.ones_like(own), torch.where(found, 0, IGNORE_INDEX)])

    # -- texts from images -------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        pixels: Mapping[str, Tensor] | Tensor,
        image_counts: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        num_beams: int = BEAMS,
        max_length: int | None = None,
        min_length: int = 5,
    ) -> Tensor:
        """Return a text for each study by beam search, (B, T) with the prompt, padded on the right.

        Args:
            pixels: as those of `encode_images`.
            image_counts: (B,) images of each study; without it one each.
            input_ids: (B, P) prompts without an end token; without it texts begin at once.
            attention_mask: (B, P), 0 at padding on the right of shorter prompts. Rows with prompts
                of one length are searched together, so that a text is the one it is alone.
            num_beams: texts that are kept open.
            max_length: tokens of a text, prompt and end included; default the positions of the
                model.
            min_length: tokens of a text below which it does not end.

        Raises:
            RecipeError: the model has no decoder.
        """
        return self.write(
            self.encode_images(pixels, image_counts),
            input_ids,
            attention_mask,
            num_beams=num_beams,
            max_length=max_length,
            min_length=min_length,
        )

    @torch.no_grad()
    def write(
        self,
        images: StudyImages,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        num_beams: int = BEAMS,
        max_length: int | None = None,
        min_length: int = 5,
    ) -> Tensor:
        """Return a text for each of some encoded studies; arguments as those of `generate`.

        Raises:
            RecipeError: the model has no decoder.
        """
        if self.decoder is None:
            raise RecipeError("this model writes no texts: model.heads has no 'lm'")
        rows, device = len(images.tokens), images.tokens.device
        start = torch.full((rows, 1), self.ids.decoder_id, device=device)
        prompt = start if input_ids is None else _begun(input_ids, self.ids.decoder_id)
        lengths = torch.full((rows,), prompt.shape[1], device=device)
        if attention_mask is not None:
            lengths = attention_mask.sum(dim=1)
        texts: dict[int, Tensor] = {}
        for length in lengths.unique().tolist():
            places = (lengths == length).nonzero().squeeze(1)
            found = self._search(
                images.rows(places.tolist()),
                prompt[places, :length],
                num_beams=num_beams,
                max_length=max_length,
                min_length=min_length,
            )
            texts |= dict(zip(places.tolist(), found, strict=True))
        padding = float(self.text.config.pad_token_id or 0)
        return pad_sequence([texts[row] for row in range(rows)], True, padding)

    def _search(
        self,
        images: StudyImages,
        prompt: Tensor,
        *,
        num_beams: int,
        max_length: int | None,
        min_length: int,
    ) -> Tensor:
        """Return the texts behind prompts (B, P) of one length; see `generate`."""
        assert self.decoder is not None
        memory = [
            KeyValues(*(one.repeat_interleave(num_beams, dim=0) for one in layer))
            for layer in self.decoder.image_memory(self.text, images.tokens)
        ]
        mask = images.mask.repeat_interleave(num_beams, dim=0)
        past: list[KeyValues] = []

        def step(texts: Tensor, origin: Tensor | None) -> Tensor:
            nonlocal past
            assert self.decoder is not None
            if origin is not None:
                past = [KeyValues(*(one[origin] for one in layer)) for layer in past]
            known = past[0].keys.shape[2] if past else 0
            logits, past = self.decoder.step(self.text, texts[:, known:], known, past, memory, mask)
            return logits

        return beam_search(
            step,
            prompt,
            beams=num_beams,
            max_length=max_length or int(self.text.config.max_position_embeddings),
            min_length=min_length,
            end_id=self.ids.end_id,
            pad_id=int(self.text.config.pad_token_id or 0),
        )


Project: TypeAlias = Callable[[str, Tensor], Tensor]
"""From a side, "image" or "text", and vectors of it to the common space."""


class _Texts(NamedTuple):
    """Texts of a batch."""

    ids: Tensor
    mask: Tensor
    owners: Tensor


class _Similar(NamedTuple):
    """What hard negatives are drawn by."""

    image: Tensor
    """(B, pairs of all ranks) scores of each image with the texts."""
    text: Tensor
    """(B, pairs of all ranks) scores of each text with the images."""
    allowed: Tensor
    """(B, pairs of all ranks) bool, which pairs are wrong for a row."""
    keys: Tensor
    """(B, embed_dim) vectors of the texts, of length 1."""
    sizes: list[int]
    """Pairs of each rank."""


_COPIED = frozenset(
    {"image.encoder", "image.projection", "text.encoder", "text.projection", "knowledge"}
)
"""Parts that the momentum copy follows."""


def _one_each(images: Tensor | VisionFeatures) -> Tensor:
    """Return counts (B,) of studies of one image each."""
    items = images.tokens if isinstance(images, VisionFeatures) else images
    return torch.ones(len(items), dtype=torch.int64, device=items.device)


def _same_answers(held: AnswerOptions | None, named: AnswerOptions | None) -> bool:
    """Return whether two heads of answers have the same weights and lists."""
    if held is None or named is None:
        return held is named
    free = {"route", "dropout"}
    return held.model_dump(exclude=free) == resolved_answers(named).model_dump(exclude=free)


def _begun(ids: Tensor, first: int) -> Tensor:
    """Return texts (B, T) whose first token is another one."""
    return torch.cat([torch.full_like(ids[:, :1], first), ids[:, 1:]], dim=1)
