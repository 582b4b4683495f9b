"""Tasks: data, prompt and scoring of one benchmark each. They do not know which model answers.

The table at the end has one line per task: a `Task` (see `medm.tasks.base`) that reads the
benchmark's files as they are distributed. To add one, write a file with a `Task` and a line here.
Its options stand above the table and are torch-free, so that a recipe can be checked without
loading model code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from medm.config import Options
from medm.metrics import METRICS, MetricOptions, RadEvalScore
from medm.registry import NamedBlock, Registry

if TYPE_CHECKING:
    from medm.tasks.base import Task


class TaskOptions(Options):
    """Options of every task."""

    name: str
    """Registered name of the task."""
    rounds: int = Field(default=1000, ge=0)
    """Bootstrap samples behind each interval; 0 leaves the intervals out."""
    seed: int = 0
    """Seed of the bootstrap."""
    cluster_by: str | None = None
    """Record field whose equal values belong together ("patient", "volume"): intervals and paired
    tests draw such groups whole. `id` makes every item independent. Default: the task's own."""

    @property
    def label(self) -> str:
        """Name of the task's folder and of its row in a summary."""
        return self.name


class BoxTaskOptions(TaskOptions):
    """Tasks with a box of an image in the answer or the question."""

    codec: Literal["uni-med", "thousand"] = "uni-med"
    """Notation of boxes: Uni-Med's grid of 100, or one of 1000."""


class ReportTaskOptions(TaskOptions):
    """Tasks that are answered by a report or a caption."""

    bertscore: str | None = None
    """Folder of an encoder on this machine. Default: no BERTScore."""


class ChestReportOptions(ReportTaskOptions):
    """Reports of chest radiographs."""

    radeval: list[RadEvalScore] = []
    """Scores of RadEval besides, such as radgraph, where that package is installed (extra
    `report`)."""


class ChestStudyOptions(ChestReportOptions):
    """Reports of examinations with any number of images."""

    images: Literal["first", "all"] = "first"
    """Images of an examination. A model of studies reads the first `views` of them."""


class M3DSegOptions(TaskOptions):
    """M3D-Seg."""

    absent: bool = False
    """Also ask for classes that are not in a volume, which published scores leave out."""


class SetTaskOptions(TaskOptions):
    """Tasks on the sets of a folder."""

    only: list[str] = []
    """Names of the sets that are scored. Default: all of the folder."""


class SliceTaskOptions(SetTaskOptions):
    """Volumes that are kept as slices."""

    media: Literal["volume", "images"] = "volume"
    """Input of the model: the volume, which needs a folder of its own for its slices (or a file
    that the annotation names as `volume`), or the slices as images in order."""


class ReXGroundingOptions(TaskOptions):
    """ReXGroundingCT."""

    masks: Literal["stored", "turned"] = "stored"
    """Rows and columns of the masks: as they are stored, or both reversed. Users report masks that
    lie turned by half a turn on CT-RATE's volumes; look at one before a run."""


class VQARADOptions(TaskOptions):
    """VQA-RAD."""

    phrases: Literal["all", "freeform", "para"] = "all"
    """Wordings of questions that are scored: all, as published; free-form ones; or paraphrases of
    them."""


class CustomOptions(TaskOptions):
    """A user's own file."""

    path: str
    """JSON or JSONL of records in the training format, relative to the data folder, or else to the
    working directory; the last reply is the answer."""
    metrics: Annotated[list[Annotated[MetricOptions, NamedBlock(METRICS)]], Field(min_length=1)]
    """Metric names, or blocks with options; those that take texts, labels or boxes written in
    texts."""
    group_by: list[str] = []
    """Record fields whose values get a row each in the tables."""


class ClassTaskOptions(TaskOptions):
    """Tasks on class-labelled sets."""

    card: str
    """Name of a card or suite that comes with medm (docs/unimed-clip.md), or the path of one's
    own."""
    only: list[str] = []
    """Cards of a suite that are scored. Default: all."""

    @property
    def label(self) -> str:
        """The task and the card."""
        stem = self.card.replace("\\", "/").rpartition("/")[2]
        return f"{self.name}-{stem.removesuffix('.yaml').removesuffix('.yml')}"


class ZeroShotOptions(ClassTaskOptions):
    """Classification by the texts of classes."""

    probabilities: bool = False
    """The scores of predictions are probabilities. Default: they are logits, as models give
    them."""


class ProbeOptions(ClassTaskOptions):
    """Classifiers on vectors."""

    shots: list[Annotated[int, Field(ge=1)]] = []
    """Also classifiers that are trained on so many files of each class."""
    draws: int = Field(default=3, ge=1)
    """Random choices of these files; their mean is reported."""
    l2: float = Field(default=0.01, gt=0)
    """Weight of half the sum of the squared weights, beside the sum of the cross-entropy."""


class RetrievalOptions(TaskOptions):
    """Images or volumes and their captions."""

    path: str
    """Annotation file of pairs (JSON, JSONL, CSV, TSV), relative to the data folder."""


class StudyRetrievalOptions(TaskOptions):
    """Studies and their reports."""

    path: str = "annotation.json"
    """R2Gen's annotation.json, MOTOR's JSON, or a file of studies, relative to the data folder."""
    rerank: int = Field(default=0, ge=0)
    """Best candidates of each query by cosine that are ranked again by match + cosine (BLIP,
    MOTOR: 256); 0 ranks by cosine alone."""
    images: Literal["all", "first"] = "all"
    """Images of a study."""
    image_folder: str | None = None
    """Folder that `image_path` of the file is relative to. Default: `images` where there is one."""


class LabelTaskOptions(TaskOptions):
    """Labels of studies."""

    probabilities: bool = False
    """The scores of predictions are probabilities. Default: they are logits, as models give
    them."""
    thresholds: str | None = None
    """`results.json` of the same task on a validation split (`--split val`): decisions are also
    taken at the thresholds that were chosen there."""
    criterion: Literal["f1", "youden"] = "f1"
    """What thresholds are chosen by on a split other than the test split."""


class NIHOptions(LabelTaskOptions):
    """NIH ChestX-ray14."""

    validation: Literal["patient", "image"] = "patient"
    """How a tenth of the official train_val list is drawn for validation: whole patients, or single
    images, as published."""


class MimicLabelOptions(LabelTaskOptions):
    """MIMIC-CXR-JPG."""

    labeler: Literal["chexpert", "negbio"] = "chexpert"
    """Whose labels."""
    uncertain: Literal["u-zero", "u-one", "ignore"] = "u-zero"
    """Uncertain labels (-1) are absent, present or unknown."""
    images: Literal["all", "first"] = "all"
    """Images of a study."""


class OwnLabelOptions(LabelTaskOptions):
    """Labels of an annotation file."""

    path: str
    """A file of studies with `labels`, MOTOR's JSON with `label_index`, or R2Gen's annotation.json
    beside the labels of MIMIC-CXR-JPG; relative to the data folder."""
    label_names: list[str] = []
    """Labels that lists of numbers or names are of, in their order. Default: CheXpert's 14 in
    alphabetical order."""
    image_folder: str | None = None
    """Folder that `image_path` of the file is relative to. Default: `images` where there is one."""
    uncertain: Literal["u-zero", "u-one", "ignore"] = "u-zero"
    """Uncertain labels (-1) of MIMIC-CXR-JPG are absent, present or unknown."""
    images: Literal["all", "first"] = "all"
    """Images of a study."""


TASKS: Registry[type[Task]] = Registry("task", group="medm.tasks", options=TaskOptions)

# fmt: off
TASKS.add("slake-vqa", "medm.tasks.slake:SlakeVQA", "SLAKE English, Uni-Med's split files, open and closed questions")
TASKS.add("slake-rec", "medm.tasks.slake:SlakeREC", "SLAKE objects: name to box", options=BoxTaskOptions)
TASKS.add("slake-reg", "medm.tasks.slake:SlakeREG", "SLAKE objects: box to name", options=BoxTaskOptions)
TASKS.add("slake", "medm.tasks.slake:Slake", "SLAKE English, the distributed train, validate and test JSON")
TASKS.add("path-vqa", "medm.tasks.path_vqa:PathVQA", "PathVQA pathology questions")
TASKS.add("vqa-rad", "medm.tasks.vqa_rad:VQARAD", "VQA-RAD radiology questions", options=VQARADOptions)
TASKS.add("sa-med2d-rec", "medm.tasks.sa_med2d:SAMed2DREC", "SA-Med2D-20M subset of Uni-Med: name to box", options=BoxTaskOptions)
TASKS.add("sa-med2d-reg", "medm.tasks.sa_med2d:SAMed2DREG", "SA-Med2D-20M subset of Uni-Med: box to name", options=BoxTaskOptions)
TASKS.add("medpix", "medm.tasks.reports:MedPix", "MPx-Single captions (RadFM's CSV)", options=ReportTaskOptions)
TASKS.add("mimic-caption", "medm.tasks.reports:MimicCaption", "MIMIC-CXR, first image to report, Uni-Med's layout", options=ReportTaskOptions)
TASKS.add("mimic-cxr", "medm.tasks.reports:MimicCXR", "MIMIC-CXR reports, R2Gen's annotation.json", options=ChestStudyOptions)
TASKS.add("iu-xray", "medm.tasks.reports:IUXray", "IU X-Ray reports from two views, R2Gen's annotation.json", options=ChestReportOptions)
TASKS.add("medmnist-derma", "medm.tasks.medmnist:DermaMNIST", "DermaMNIST, 7 skin lesions")
TASKS.add("medmnist-organs", "medm.tasks.medmnist:OrganSMNIST", "OrganSMNIST, 11 organs in sagittal CT")
TASKS.add("m3d-cap", "medm.tasks.m3d:M3DCap", "M3D-Cap: volume to report", options=ReportTaskOptions)
TASKS.add("m3d-vqa-open", "medm.tasks.m3d:M3DOpenVQA", "M3D-VQA without choices", options=ReportTaskOptions)
TASKS.add("m3d-vqa-closed", "medm.tasks.m3d:M3DClosedVQA", "M3D-VQA with four choices")
TASKS.add("m3d-rec", "medm.tasks.m3d_regions:M3DREC", "M3D positioning: name to 3-D box")
TASKS.add("m3d-reg", "medm.tasks.m3d_regions:M3DREG", "M3D positioning: 3-D box to name")
TASKS.add("m3d-seg", "medm.tasks.m3d_regions:M3DSeg", "M3D-Seg: name to mask", options=M3DSegOptions)
TASKS.add("m3d-refseg", "medm.tasks.m3d_regions:M3DRefSeg", "M3D-RefSeg: description or question to mask")
TASKS.add("unibiomed-seg2d", "medm.tasks.unibiomed:Segment2D", "UniBiomed's sets of 2-D segmentation: phrase to mask", options=SetTaskOptions)
TASKS.add("unibiomed-seg3d", "medm.tasks.unibiomed_volumes:Segment3D", "UniBiomed's sets of 3-D segmentation: phrase to the mask of a volume", options=SliceTaskOptions)
TASKS.add("unibiomed-disease", "medm.tasks.unibiomed:Disease", "UniBiomed's grounded disease recognition: image to diagnosis and mask", options=SetTaskOptions)
TASKS.add("unibiomed-region", "medm.tasks.unibiomed:Region", "UniBiomed's region understanding: box on an image to its name", options=SetTaskOptions)
TASKS.add("medtrinity-report", "medm.tasks.unibiomed_reports:MedTrinityReport", "MedTrinity as UniBiomed lays it out: image to caption", options=ReportTaskOptions)
TASKS.add("radgenome-report", "medm.tasks.unibiomed_reports:RadGenomeReport", "RadGenome chest CT slices as UniBiomed lays them out: report and mask", options=ReportTaskOptions)
TASKS.add("radgenome-vqa", "medm.tasks.unibiomed_reports:RadGenomeVQA", "RadGenome chest CT slices as UniBiomed lays them out: abnormality of an anatomy and its mask")
TASKS.add("rexgroundingct", "medm.tasks.rexgroundingct:ReXGroundingCT", "ReXGroundingCT chest CT: free-text finding to the mask of its instances", options=ReXGroundingOptions)
TASKS.add("ct-rate-report", "medm.tasks.ct_rate:CTRateReport", "CT-RATE chest CT reports (findings and impression)", options=ReportTaskOptions)
TASKS.add("ct-rate-choice", "medm.tasks.ct_rate:CTRateChoice", "CT-RATE VQA, multiple choice")
TASKS.add("ct-rate-short", "medm.tasks.ct_rate:CTRateShort", "CT-RATE VQA, short answers", options=ReportTaskOptions)
TASKS.add("ct-rate-long", "medm.tasks.ct_rate:CTRateLong", "CT-RATE VQA, long answers", options=ReportTaskOptions)
TASKS.add("medqa", "medm.tasks.text_qa:MedQA", "MedQA (USMLE), text with options")
TASKS.add("pubmedqa", "medm.tasks.text_qa:PubMedQA", "PubMedQA, yes / no / maybe with the abstract")
TASKS.add("zero-shot", "medm.tasks.zero_shot:ZeroShot", "class-labelled sets by card: the class whose texts are nearest", options=ZeroShotOptions)
TASKS.add("probe", "medm.tasks.probe:Probe", "class-labelled sets by card: linear and few-shot classifiers on vectors", options=ProbeOptions)
TASKS.add("retrieval", "medm.tasks.retrieval:Retrieval", "image-text retrieval, both ways, on a file of pairs", options=RetrievalOptions)
TASKS.add("study-retrieval", "medm.tasks.study_retrieval:StudyRetrieval", "image-report retrieval on studies, both ways (IU X-Ray, MIMIC-CXR by R2Gen's annotation.json)", options=StudyRetrievalOptions)
TASKS.add("study-labels", "medm.tasks.study_labels:OwnLabels", "labels of a file of studies, or of MOTOR's JSON", options=OwnLabelOptions)
TASKS.add("nih-chest-xray14", "medm.tasks.study_labels:NIHChestXray14Labels", "NIH ChestX-ray14, 14 labels by the official lists", options=NIHOptions)
TASKS.add("mimic-cxr-labels", "medm.tasks.study_labels:MimicLabels", "MIMIC-CXR-JPG, 14 labels of CheXpert or NegBio by the official split", options=MimicLabelOptions)
TASKS.add("custom", "medm.tasks.custom:Custom", "your own JSON with a list of metrics", options=CustomOptions)
# fmt: on
