"""Metrics: functions from predictions and references to values with intervals.

They depend on no model and no benchmark.

The table at the end has one line per metric: a function `metric(predictions, references, *,
resampling=..., **options) -> list[MetricResult]`. Adding one is a function and a line here. `takes`
of its options class is the kind of pair that a metric compares. Values that the literature writes
in percent are fractions here (BLEU 0.31, not 31). Names that begin with `uni-med-`, `m3d-bench-` or `unibiomed-`
repeat a benchmark's original scoring, its quirks included, and are reported beside the corrected
metrics.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from pydantic import Field

from medm.config import Options
from medm.registry import Registry

if TYPE_CHECKING:
    from medm.metrics.base import Metric


_SMALLER = re.compile(
    r"(malformed|repaired|unparsed|unreadable|hd95|false-positive-rate|median-rank|radcliq.*)$"
)


def smaller_is_better(result: str) -> bool:
    """Return whether smaller values of a result are better, by its name (`hd95`)."""
    return _SMALLER.search(result) is not None


class MetricOptions(Options):
    """Options of every metric."""

    name: str
    """Registered name of the metric."""
    takes: ClassVar[Literal["text", "label", "score", "box", "mask", "similarity"]] = "text"
    external: ClassVar[bool] = False
    """The metric loads a model or starts another program: it is left out when items are scored one
    by one."""

    def require_available(self) -> None:
        """Refuse an external metric that this machine cannot compute, without starting it.

        Raises:
            CheckpointError: there is no encoder.
            DeviceError: a package or a program is missing.
        """
        if self.external:
            METRICS.get(self.name)([], [])  # of no items: only what it needs is looked for


class ExternalMetricOptions(MetricOptions):
    """Metrics that start another program."""

    external = True


class LabelMetricOptions(MetricOptions):
    """Metrics that compare one label with one label (a class name, a number)."""

    takes: ClassVar[Literal["label"]] = "label"


class ScoreMetricOptions(MetricOptions):
    """Metrics that compare real-valued scores with 0/1 labels."""

    takes: ClassVar[Literal["score"]] = "score"


class BoxMetricOptions(MetricOptions):
    """Metrics that compare boxes, as tuples or written in a text."""

    takes: ClassVar[Literal["box"]] = "box"
    codec: Literal["uni-med", "thousand", "m3d"] = "uni-med"
    """Notation of boxes where predictions and references are texts (see `medm.metrics.boxes`)."""


class M3DBoxMetricOptions(BoxMetricOptions):
    """M3D-Bench's own scoring of boxes."""

    codec: Literal["uni-med", "thousand", "m3d"] = "m3d"
    """Notation of boxes where predictions and references are texts (see `medm.metrics.boxes`)."""


class BoxAccuracyOptions(BoxMetricOptions):
    """Fraction of boxes that overlap enough."""

    threshold: float = Field(default=0.5, gt=0, le=1)
    """Least IoU of a hit."""


class MaskMetricOptions(MetricOptions):
    """Metrics that compare binary masks of equal shape."""

    takes: ClassVar[Literal["mask"]] = "mask"


class HitRateOptions(MaskMetricOptions):
    """Fraction of masks that overlap enough."""

    threshold: float = Field(default=0.1, gt=0, le=1)
    """Least Dice of a hit."""


class InstanceMetricOptions(MaskMetricOptions):
    """Instances that are found, invented and missed."""

    threshold: float = Field(default=0.2, gt=0, le=1)
    """Least Dice of an instance that is found."""


class SimilarityMetricOptions(MetricOptions):
    """Metrics of a similarity matrix (queries, candidates)."""

    takes: ClassVar[Literal["similarity"]] = "similarity"


class BleuOptions(MetricOptions):
    """Corpus BLEU of sacrebleu."""

    tokenize: Literal["13a", "intl", "zh", "char"] = "13a"
    """sacrebleu's tokenizer: `13a` for English, `intl` for other languages with spaces, `zh` for
    Chinese, `char` for any script."""


class RougeOptions(MetricOptions):
    """ROUGE."""

    words: Literal["rouge-score", "unicode"] = "rouge-score"
    """`rouge-score`: runs of a to z and digits, as published. `unicode`: words of any language; in
    scripts without spaces each character."""

    stem: bool = False
    """Compare Porter stems."""


class NLTKBleuOptions(MetricOptions):
    """Mean sentence BLEU."""

    smoothing: Literal["none", "epsilon", "add-one"] = "epsilon"
    """Replacement of a count of zero: nothing (the score collapses), 0.1, or one added to counts
    and totals of orders above 1. NLTK's methods 0, 1 and 2."""


class BERTScoreOptions(ExternalMetricOptions):
    """BERTScore with an encoder from a local folder."""

    path: str
    """Folder of the encoder (and its tokenizer), or an id that is already in the local cache."""
    layer: int = -1
    """Hidden state that is compared: 0 is the embeddings, -1 the last. bert-score uses 17 for
    roberta-large and 9 for bert-base-uncased."""
    batch_size: int = Field(default=32, ge=1)
    """Texts encoded at once."""
    device: str = "cpu"
    """Torch device of the encoder."""

    def require_available(self) -> None:
        from medm.metrics.bertscore import require_encoder

        require_encoder(self.path)


class ChestLabelOptions(MetricOptions):
    """F1 over the 14 CheXpert labels."""

    uncertain: Literal["positive", "negative"] = "positive"
    """Value of an uncertain mention ("possible pneumonia")."""
    no_finding: Literal["stated", "unmentioned"] = "stated"
    """Condition for the label "No Finding": `stated`, where it says that something is normal or
    absent and affirms no finding; `unmentioned`, where it affirms no finding, whatever else it says
    (CheXpert's rule). A blank text never."""


RadEvalScore: TypeAlias = Literal[
    "bleu",
    "rouge",
    "bertscore",
    "radeval_bertscore",
    "f1chexbert",
    "f1radbert_ct",
    "radgraph",
    "ratescore",
    "radgraph_radcliq",
    "radcliq",
    "srrbert",
    "temporal",
    "green",
]
"""RadEval's names; those that need a service over the network are not offered."""


class RadEvalOptions(ExternalMetricOptions):
    """RadEval's scores of radiology reports."""

    scores: list[RadEvalScore] = Field(default=["radgraph"], min_length=1)
    """Scores that are computed."""


METRICS: Registry[Metric] = Registry("metric", group="medm.metrics", options=MetricOptions)

# fmt: off
METRICS.add("bleu", "medm.metrics.bleu:bleu", "corpus BLEU-1 to 4 of sacrebleu, with its signature", options=BleuOptions)
METRICS.add("bleu-coco", "medm.metrics.bleu:bleu_coco", "corpus BLEU-1 to 4 of the COCO caption toolkit on PTB-like tokens (report papers)")
METRICS.add("bleu-nltk", "medm.metrics.bleu:bleu_nltk", "mean sentence BLEU-1 to 4 as NLTK computes it, on normalized words (VQA papers)", options=NLTKBleuOptions)
METRICS.add("rouge", "medm.metrics.rouge:rouge", "ROUGE-1, 2 and L, F1, of rouge-score", options=RougeOptions)
METRICS.add("meteor", "medm.metrics.meteor:meteor", "METEOR of NLTK with WordNet; refuses where the WordNet files are missing")
METRICS.add("meteor-exact-stem", "medm.metrics.meteor:meteor_exact_stem", "METEOR of NLTK without synonyms; needs no data")
METRICS.add("meteor-java", "medm.metrics.meteor:meteor_java", "METEOR 1.5 of the COCO caption toolkit; needs pycocoevalcap and Java", options=ExternalMetricOptions)
METRICS.add("cider-d", "medm.metrics.cider:cider_d", "CIDEr-D (0 to 10) on PTB-like tokens, document frequencies from the references")
METRICS.add("bertscore", "medm.metrics.bertscore:bertscore", "BERTScore precision, recall and F1 with a local encoder", options=BERTScoreOptions)
METRICS.add("exact-match", "medm.metrics.match:exact_match", "equal after trimming and case folding")
METRICS.add("normalised-match", "medm.metrics.match:normalized_match", "equal after removing punctuation, articles and number words")
METRICS.add("token-f1", "medm.metrics.match:token_f1", "F1 over words, each counted as often as it occurs in both")
METRICS.add("closed-accuracy", "medm.metrics.choice:closed_accuracy", "yes/no and short closed answers, parsed, never found as a substring")
METRICS.add("choice-accuracy", "medm.metrics.choice:choice_accuracy", "multiple choice by the parsed letter")
METRICS.add("chest-label-f1", "medm.metrics.chest_labels:chest_label_f1", "F1 of 14 chest findings named by two reports, by an offline rule labeller", options=ChestLabelOptions)
METRICS.add("radeval", "medm.metrics.radeval:radeval", "RadEval's scores of reports (RadGraph, F1CheXbert, ...); needs the extra 'report'", options=RadEvalOptions)
METRICS.add("accuracy", "medm.metrics.classification:accuracy", "fraction of equal labels", options=LabelMetricOptions)
METRICS.add("balanced-accuracy", "medm.metrics.classification:balanced_accuracy", "mean recall over the classes of the references", options=LabelMetricOptions)
METRICS.add("macro-f1", "medm.metrics.classification:macro_f1", "mean F1 over the classes of the references", options=LabelMetricOptions)
METRICS.add("sensitivity-specificity", "medm.metrics.classification:sensitivity_specificity", "recall of 1 and recall of 0", options=LabelMetricOptions)
METRICS.add("auroc", "medm.metrics.classification:auroc", "area under the ROC curve, per class and their mean; ties count half", options=ScoreMetricOptions)
METRICS.add("box-iou", "medm.metrics.boxes:box_iou", "mean IoU of boxes, true union, 2-D or 3-D; an unreadable box counts 0", options=BoxMetricOptions)
METRICS.add("box-accuracy", "medm.metrics.boxes:box_accuracy", "fraction of boxes with IoU of at least a threshold", options=BoxAccuracyOptions)
METRICS.add("dice", "medm.metrics.masks:dice", "mean Dice of binary masks", options=MaskMetricOptions)
METRICS.add("mask-iou", "medm.metrics.masks:mask_iou", "mean IoU of binary masks", options=MaskMetricOptions)
METRICS.add("hd95", "medm.metrics.masks:hd95", "95th percentile of the Hausdorff distance in mm (MONAI)", options=MaskMetricOptions)
METRICS.add("nsd", "medm.metrics.masks:nsd", "normalized surface Dice at a tolerance in mm (MONAI)", options=MaskMetricOptions)
METRICS.add("false-positive-rate", "medm.metrics.grounded:false_positive_rate", "absent targets with a mask, and present ones without", options=MaskMetricOptions)
METRICS.add("hit-rate", "medm.metrics.grounded:hit_rate", "fraction of present targets with Dice of at least a threshold", options=HitRateOptions)
METRICS.add("instance-f1", "medm.metrics.grounded:instance_f1", "precision, recall and F1 of instances paired one to one by Dice", options=InstanceMetricOptions)
METRICS.add("phrase-match", "medm.metrics.grounded:phrase_match", "phrases 'target in site modality': equal as a whole, and by target and place")
METRICS.add("recall-at-k", "medm.metrics.retrieval:recall_at_k", "R@1, 5, 10 and median rank, both directions", options=SimilarityMetricOptions)
METRICS.add("uni-med-match", "medm.metrics.uni_med:match", "exact match after Uni-Med's normalizer")
METRICS.add("uni-med-bleu", "medm.metrics.uni_med:bleu", "unsmoothed mean sentence BLEU after Uni-Med's normalizer")
METRICS.add("uni-med-token-f1", "medm.metrics.uni_med:token_f1", "token F1 that counts every repeat of a shared word")
METRICS.add("uni-med-closed-accuracy", "medm.metrics.uni_med:closed_accuracy", "closed accuracy by containment: 'no' is found in 'abnormal'")
METRICS.add("uni-med-box-iou", "medm.metrics.uni_med:box_iou", "mean IoU with inclusive pixels (+1), and accuracy above 0.5", options=BoxMetricOptions)
METRICS.add("m3d-bench-bleu", "medm.metrics.m3d_bench:bleu", "mean unsmoothed sentence BLEU-1 of M3D-Bench")
METRICS.add("m3d-bench-rouge", "medm.metrics.m3d_bench:rouge", "mean ROUGE-1 of M3D-Bench")
METRICS.add("m3d-bench-choice-accuracy", "medm.metrics.m3d_bench:choice_accuracy", "letter and full stop found anywhere in the text")
METRICS.add("m3d-bench-box-iou", "medm.metrics.m3d_bench:box_iou", "intersection over the enclosing box, -1 for an unreadable one", options=M3DBoxMetricOptions)
METRICS.add("m3d-bench-dice", "medm.metrics.m3d_bench:dice", "soft Dice on probabilities with 1 added to the denominator", options=MaskMetricOptions)
METRICS.add("unibiomed-phrase", "medm.metrics.unibiomed:phrase", "UniBiomed's diagnosis: the phrase and a full stop anywhere in the reply")
METRICS.add("unibiomed-region", "medm.metrics.unibiomed:region", "UniBiomed's regions: target equal, sides removed, modality contained")
# fmt: on
