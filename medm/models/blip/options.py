"""The `model` section of a recipe for the kind `blip`. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from medm.config import Options
from medm.encoders import ENCODERS, EncoderOptions
from medm.knowledge import KNOWLEDGE, KnowledgeOptions
from medm.models.options import ModelOptions
from medm.registry import NamedBlock
from medm.types import ANSWER_BRANCHES, PredictionField

Head: TypeAlias = Literal["itc", "itm", "lm", "labels", "answers"]
Fusion: TypeAlias = Literal["tokens", "channels"]
LMHead: TypeAlias = Literal["tied", "own"]
LabelHead: TypeAlias = Literal["prototype", "linear"]
Negatives: TypeAlias = Literal["all", "local"]
SameReport: TypeAlias = Literal["positive", "negative"]
Gate: TypeAlias = Literal["cls", "projected", "none"]
Route: TypeAlias = Literal["predicted", "gold"]

_ITC = frozenset({"itc_logits_image", "itc_logits_text", "itc_targets_image", "itc_targets_text"})
OUTPUTS_OF_HEAD: dict[Head, frozenset[str]] = {
    "itc": _ITC,
    "itm": frozenset({"itm_logits", "itm_labels"}),
    "lm": frozenset({"loss_sum"}),
    "labels": frozenset({"label_logits"}),
    "answers": frozenset(f"answer_logits_{name}" for name in (*ANSWER_BRANCHES, "type")),
}
"""Fields of the model's output by head."""
GIVES: dict[Head, PredictionField] = {
    "itc": "embeddings",
    "itm": "matches",
    "lm": "text",
    "labels": "scores",
    "answers": "text",
}
"""Fields of predictions by head."""


class StudyImageOptions(Options):
    """From the images of a study to tokens and one vector."""

    encoder: Annotated[EncoderOptions, NamedBlock(ENCODERS)]
    """The vision encoder, by name, and its options."""
    preprocess: dict[str, Any] = {}
    """Fields of the preprocessing that replace what the encoder was published with (size, window,
    fit ...)."""
    views: int = Field(default=1, ge=1)
    """Images of a study that are looked at, at most; of more, others are drawn each epoch."""
    fusion: Fusion = "tokens"
    """Several views: `tokens` stand side by side, and the vector is the mean of the images' own;
    `channels` are laid beside each other and projected, as MOTOR does for two views of IU X-ray. A
    study with fewer images then repeats its last one."""

    @model_validator(mode="after")
    def _class_token_is_kept(self) -> StudyImageOptions:
        """The vector of an image is its class token, which encoders leave out unless asked."""
        encoder = self.encoder
        if "tokens" in type(encoder).model_fields and "tokens" not in encoder.model_fields_set:
            kept = encoder.model_copy(update={"tokens": "cls_patch"})
            return self.model_copy(update={"encoder": kept})
        return self


class StudyTextOptions(Options):
    """The text encoder, and the decoder that shares its weights except self-attention."""

    name: Literal["bert"] = "bert"
    """Architecture."""
    path: str | None = None
    """Published BERT, SciBERT or BiomedBERT: a Hugging Face id, a folder or a file. Its
    self-attention is also the start of the decoder's; cross-attention starts from new weights."""
    architecture: dict[str, Any] = {}
    """Sizes that replace those of the published config, or all of them when there is no `path`.
    `{num_hidden_layers: 2}` takes the first two layers of `path`."""
    tokenizer: str | None = None
    """Tokenizer folder or id, where it is not the one at `path`."""
    max_length: int = Field(default=90, ge=3)
    """Tokens of a text; longer ones are cut."""
    lm_head: LMHead = "tied"
    """Last layer of the decoder: `tied` is the word embeddings; `own` a matrix of its own, as the
    pretrained BLIP and MOTOR files have it."""
    prompt: str = ""
    """Words that are given before a generated report (BLIP: "a picture of"), and not learned."""


class AnswerOptions(Options):
    """Answers as classes: one list for closed questions and one for open ones (MOTOR)."""

    closed: list[str] = []
    """Answers of closed questions."""
    open: list[str] = []
    """Answers of open questions."""
    file: str | None = None
    """JSON of both lists, `{"closed": [...], "open": [...]}`, in place of them: `medm data answers`
    writes it from training records."""
    encoders: Literal["shared", "separate"] = "shared"
    """Text encoder of the two branches: one, or one each, as published. The second one starts as a
    copy of the first."""
    gate: Gate = "cls"
    """Gate of the vector by the question: on the state of the first token (`cls`, published as
    typeatt2), behind its projection (`projected`, typeatt1), or `none`."""
    route: Route = "predicted"
    """Choice of the branch that answers: by the `predicted` type of the question, or by the `gold`
    answer_type of the record, as published, which no user has."""
    dim: int = Field(default=1024, ge=1)
    """Width of the vector that answers are classified by."""
    dropout: float = Field(default=0.5, ge=0, lt=1)
    """Dropout of classifiers, gate and predictor of the type."""

    @model_validator(mode="after")
    def _lists_or_file(self) -> AnswerOptions:
        lists = {name: getattr(self, name) for name in ANSWER_BRANCHES}
        if self.file is not None and any(lists.values()):
            raise ValueError("file and lists: give either the file, or closed and open")
        for name, answers in lists.items():
            if self.file is None and not answers:
                raise ValueError(f"{name}: the list is empty; give closed and open, or file")
            if len(set(answers)) != len(answers) or not all(map(str.strip, answers)):
                raise ValueError(f"{name}: expected different answers, none of them blank")
        return self


class BlipOptions(ModelOptions):
    """Image encoder, text encoder with cross-attention and a tied decoder (arXiv 2201.12086)."""

    outputs: ClassVar[frozenset[str]] = frozenset().union(*OUTPUTS_OF_HEAD.values())

    kind: Literal["blip"] = "blip"
    """Kind of model."""
    path: str | None = None
    """Published BLIP whose weights are the start: a Hugging Face id, a folder of transformers, or
    a file of BLIP's or MOTOR's own code. Parts that it does not have start from new weights, which
    the log says. Without it, each encoder may name weights of its own."""
    pretrained: str | None = None
    """Folder of a trained model of this kind, such as the pretraining that a model is fine-tuned
    from: its towers, and every head and source of knowledge that both models have, in place of the
    weights at `image.encoder.path` and `text.path`. What it lacks starts from new weights, as the
    heads of labels do, which belong to a data set."""
    image: StudyImageOptions
    """The image tower."""
    text: StudyTextOptions = StudyTextOptions()
    """The text tower."""
    embed_dim: int = Field(default=256, ge=1)
    """Width of the common space of images and texts."""
    heads: list[Head] = Field(default=["itc", "itm", "lm"], min_length=1)
    """What the model computes: contrast, matching, texts, labels, answers as classes. List the
    heads that terms of the objective read; a head that no term reads would have weights without a
    gradient."""
    momentum: float = Field(default=0.995, ge=0, lt=1)
    """Share of the momentum copy that is kept each step. Copy and queue serve `itc`, and belong to
    checkpoints alone."""
    queue: int = Field(default=65536, ge=0)
    """Vectors of earlier batches that a batch is compared with. It starts empty, where BLIP starts
    from random vectors, and wraps where the batch of all ranks does not divide it."""
    alpha: float = Field(default=0.4, ge=0, le=1)
    """Share of the momentum model's similarities in the targets of `itc`."""
    alpha_steps: int = Field(default=0, ge=0)
    """Steps over which `alpha` rises from 0; BLIP takes the first two epochs, MOTOR the first."""
    temperature: float = Field(default=0.07, ge=0.001, le=0.5)
    """Divisor of the cosines at the start. It is trained and held within 0.001 and 0.5."""
    same_report: SameReport = "positive"
    """Other studies with the same text: `positive` shares the target of `itc` among them and never
    draws them as hard negatives; `negative` takes them for wrong, as BLIP and MOTOR do."""
    negatives: Negatives = "all"
    """Where hard negatives of `itm` are drawn: from the batch of `all` ranks, which does not depend
    on their number, or from the `local` one, as BLIP pretrains."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the target that is spread over all tokens in the loss of `lm`."""
    labels: list[str] = []
    """Names of the findings of the head `labels`."""
    label_head: LabelHead = "prototype"
    """`prototype`: 100 times the cosine of the image and the text encoder's vector of the name
    (MOTOR); `linear`: a layer on the image's vector."""
    answers: AnswerOptions | None = None
    """Lists of answers and their classifiers, of the head `answers`."""
    knowledge: list[Annotated[KnowledgeOptions, NamedBlock(KNOWLEDGE)]] = []
    """Knowledge that image tokens attend to, each at most once: a `graph` first, before labels are
    scored, then a `memory` of triplets (docs/knowledge.md). Empty is a plain model."""
    keep_memory: bool = False
    """Keep the texts of a memory in the final model folder, so that inference retrieves them. They
    are parts of training reports. Without it the folder has an empty memory."""
    dtype: Literal["float32"] = "float32"
    """Precision in which the weights are held. Mixed precision in training is `train.bf16`."""

    def part_names(self) -> frozenset[str]:
        """See `ModelOptions`."""
        names = {"image.encoder", "text.encoder"}
        if projects(self.heads, self.label_head):
            names |= {"image.projection", "text.projection"}
        names |= {"knowledge"} if self.knowledge else set()
        names |= {"temperature"} if "itc" in self.heads else set()
        names |= {"itm"} if "itm" in self.heads else set()
        names |= {"text.decoder"} if "lm" in self.heads else set()
        if "labels" in self.heads and self.label_head == "linear":
            names |= {"labels"}
        if self.answers is not None:
            names |= {"answers"}
            names |= {"answers.encoder"} if self.answers.encoders == "separate" else set()
        return frozenset(names)

    def output_fields(self) -> frozenset[str]:
        """See `ModelOptions`."""
        return frozenset().union(*(OUTPUTS_OF_HEAD[head] for head in self.heads))

    def predicted_fields(self) -> frozenset[PredictionField]:
        """See `ModelOptions`."""
        return frozenset(GIVES[head] for head in self.heads if head != "itm")

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> BlipOptions:
        if self.path is not None and self.pretrained is not None:
            raise ValueError("path and pretrained name the weights of one model twice; keep one")
        for key, path in (("image.encoder", self.image.encoder.path), ("text", self.text.path)):
            if self.path is not None and path is not None:
                raise ValueError(
                    f"path holds the weights of both towers, and {key}.path names others; keep one "
                    "of the two"
                )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> BlipOptions:
        if len(set(self.heads)) != len(self.heads):
            raise ValueError(f"heads: {', '.join(self.heads)}; expected each head once")
        if "itm" in self.heads and "itc" not in self.heads:
            raise ValueError(
                "heads: itm draws its negatives by the similarities of itc; list itc too"
            )
        if ("labels" in self.heads) != bool(self.labels):
            raise ValueError(
                "labels: the names of the findings and the head 'labels' belong together; give "
                "both or neither"
            )
        if ("answers" in self.heads) != (self.answers is not None):
            raise ValueError(
                "answers: the lists of answers and the head 'answers' belong together; give both "
                "or neither"
            )
        named = [one.name for one in self.knowledge]
        if len(set(named)) != len(named):
            raise ValueError(f"knowledge: {', '.join(named)}; expected each source once")
        if "memory" in named and "itc" not in self.heads:
            raise ValueError(
                "knowledge: a memory is searched by the vectors of itc; list itc in heads, or "
                "leave the memory out"
            )
        if len(set(self.labels)) != len(self.labels) or not all(map(str.strip, self.labels)):
            raise ValueError("labels: expected different names, none of them blank")
        return self


def projects(heads: list[Head], label_head: LabelHead) -> bool:
    """Return whether images and texts meet in the common space."""
    return "itc" in heads or ("labels" in heads and label_head == "prototype")
