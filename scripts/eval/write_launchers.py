"""Write one launcher beside this file for each benchmark that `medm list tasks` prints.

Run it again when a task is added: `python scripts/eval/write_launchers.py`.
"""

from __future__ import annotations

from pathlib import Path

from medm.registry import Entry
from medm.tasks import TASKS, ClassTaskOptions

TEMPLATE = """#!/usr/bin/env bash
# {summary}. Further arguments go to `medm eval`.
MODEL=${{MODEL:-work_dirs/{model}}}
DATA=${{DATA:-data/{folder}}}  # the benchmark's folder as it is distributed
OUTPUT=${{OUTPUT:-work_dirs/eval}}
GPUS=${{GPUS:-}}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${{NODES:-1}}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval --model "$MODEL" --task {name} --data "$DATA" --output "$OUTPUT" "$@"
"""

OF_MASKS = """#!/usr/bin/env bash
# {summary}. Further arguments go to `medm eval`.
MODEL=${{MODEL:-work_dirs/{model}}}
PREDICTIONS=${{PREDICTIONS:-}}  # masks of another program in place of a model: a JSONL, see docs/evaluation.md
DATA=${{DATA:-data/{folder}}}  # the benchmark's folder as it is distributed
OUTPUT=${{OUTPUT:-work_dirs/eval}}
GPUS=${{GPUS:-${{PREDICTIONS:+1}}}}  # processes on this machine; empty: one for each GPU, or one on the CPU
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval "--${{PREDICTIONS:+predictions=}}${{PREDICTIONS:-model=$MODEL}}" --task {name} --data "$DATA" --output "$OUTPUT" "$@"
"""

OF_CARD = """#!/usr/bin/env bash
# {summary}. Further arguments go to `medm eval`.
MODEL=${{MODEL:-work_dirs/unimed-clip/small}}
CARD=${{CARD:-{card}}}  # a card or a suite, see docs/unimed-clip.md
DATA=${{DATA:-data/zero-shot}}  # files of the set, or a folder for each set of a suite
OUTPUT=${{OUTPUT:-work_dirs/eval}}
GPUS=${{GPUS:-}}     # processes on this machine; empty: one for each GPU, or one on the CPU
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval --model "$MODEL" --task {name} --option card="$CARD" --data "$DATA" --output "$OUTPUT" "$@"
"""

SUITE = """#!/usr/bin/env bash
# {summary} in one run. Further arguments go to `medm eval`: --against OTHER_OUTPUT, tasks.0.data=FOLDER ...
MODEL=${{MODEL:-work_dirs/{model}}}
OUTPUT=${{OUTPUT:-work_dirs/eval}}
GPUS=${{GPUS:-}}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${{NODES:-1}}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval "$(dirname "$0")/{name}.yaml" --model "$MODEL" --output "$OUTPUT" "$@"
"""

SUITES = {
    "uni-med": (
        "The ten tasks that Uni-Med is scored on",
        "uni-med/small",
        (
            "slake-vqa",
            "path-vqa",
            "slake-rec",
            "sa-med2d-rec",
            "slake-reg",
            "sa-med2d-reg",
            "medpix",
            "mimic-caption",
            "medmnist-derma",
            "medmnist-organs",
        ),
    ),
    "m3d-bench": (
        "M3D-Bench: reports, questions and boxes",
        "medm-vl-ct/finetune",
        ("m3d-cap", "m3d-vqa-open", "m3d-vqa-closed", "m3d-rec", "m3d-reg"),
    ),
    "unimed-clip": (
        "Zero-shot classification on the 21 sets of UniMed-CLIP, a folder for each",
        "unimed-clip/small",
        ("zero-shot card=unimed-clip-21",),
    ),
    "unibiomed": (
        "UniBiomed's tasks on its published folders",
        "unibiomed/small",
        (
            "unibiomed-seg2d",
            "unibiomed-seg3d",
            "unibiomed-disease",
            "medtrinity-report",
            "radgenome-report",
            "radgenome-vqa",
        ),
    ),
    "motor-pretraining": (
        "What a pretraining of MOTOR gives before it is fine-tuned: retrieval, labels, reports",
        "motor/pretrain",
        ("study-retrieval rerank=256", "mimic-cxr-labels", "mimic-cxr"),
    ),
}
"""Name to summary, model and tasks, with their options. A suite has one model: M3D's masks need one
with a mask head, UniBiomed's regions have weights of their own, and both have launchers. So has each of
MOTOR's fine-tuned models; motor.sh, which no table writes, scores them all."""

_OWN = ("custom", "retrieval", "study-labels")
"""Tasks that need a file of one's own."""

CARDS = {"zero-shot": "unimed-clip-21", "probe": "breast-us"}
"""Card or suite of the launchers of tasks on cards."""

MODELS = {
    "nih-chest-xray14": "motor/diagnosis-nih",
    "mimic-cxr-labels": "motor/diagnosis-mimic",
    "study-retrieval": "motor/retrieval-mimic",
    "unibiomed-region": "unibiomed/region",
    "unibiomed-": "unibiomed/small",
    "medtrinity-": "unibiomed/small",
    "radgenome-": "unibiomed/small",
    "m3d-": "m3d-lamed/seg",
    "rexgroundingct": "m3d-lamed/seg",
}
"""Beginnings of the names of benchmarks, and the recipe whose model answers them where that is not
a vision-language model of the first stages."""

OF_VOLUMES = ("m3d-", "ct-rate-")
"""Beginnings of the names of benchmarks over volumes."""

FOLDERS = {
    "slake-": "slake",
    "sa-med2d-": "sa-med2d",
    "medmnist-": "medmnist",
    "mimic-caption": "mimic-cxr",
    "mimic-cxr-labels": "mimic-cxr-jpg",
    "study-retrieval": "mimic-cxr",
    "m3d-": "M3D",
    "ct-rate-": "CT-RATE",
    "unibiomed-seg2d": "Biomed",
    "unibiomed-seg3d": "Biomed",
    "unibiomed-": "Biomed/Disease",
    "medtrinity-": "Biomed/MedTrinity",
    "radgenome-": "Biomed/RadGenome",
    "zero-shot": "zero-shot",
}
"""Beginnings of the names of benchmarks that share a folder, which the converters and recipes name
as well."""


def folder_of(name: str) -> str:
    """The folder of a benchmark below `data/`."""
    return next(
        (folder for beginning, folder in FOLDERS.items() if name.startswith(beginning)), name
    )


def launcher(entry: Entry) -> str:
    """The text of one launcher."""
    if issubclass(entry.options, ClassTaskOptions):
        return OF_CARD.format(name=entry.name, summary=entry.summary, card=CARDS[entry.name])
    branch = "ct" if entry.name.startswith(OF_VOLUMES) else "2d"
    model = next(
        (model for beginning, model in MODELS.items() if entry.name.startswith(beginning)), None
    )
    if "masks" in TASKS.get(entry.name).needs:
        return OF_MASKS.format(
            name=entry.name, summary=entry.summary, model=model, folder=folder_of(entry.name)
        )
    if model is None or entry.name.startswith(OF_VOLUMES):
        model = f"medm-vl-{branch}/finetune"
    return TEMPLATE.format(
        name=entry.name, summary=entry.summary, model=model, folder=folder_of(entry.name)
    )


def launchers() -> dict[str, str]:
    """File name to text; those of files of one's own have none."""
    return {
        f"{entry.name}.sh": launcher(entry) for entry in TASKS.entries() if entry.name not in _OWN
    }


def block(task: str) -> str:
    """A task with its options, as a recipe writes it: a name, or `{name: ..., key: value}`."""
    name, *options = task.split()
    fields = [f"name: {name}", *(option.replace("=", ": ") for option in options)]
    return f"{{{', '.join(fields)}}}" if options else name


def suites() -> dict[str, str]:
    """File name to text of the launchers of several benchmarks, and of the recipes that they
    run.
    """
    files = {}
    for name, (summary, model, tasks) in SUITES.items():
        blocks = "".join(
            f"  - {{task: {block(task)}, data: data/{folder_of(task)}}}\n" for task in tasks
        )
        files[f"{name}.yaml"] = (
            f"# {summary}. Run by {name}.sh.\noutput_dir: work_dirs/eval\ntasks:\n{blocks}"
        )
        files[f"{name}.sh"] = SUITE.format(name=name, summary=summary, model=model)
    return files


if __name__ == "__main__":
    for name, text in {**launchers(), **suites()}.items():
        file = Path(__file__).with_name(name)
        file.write_text(text, encoding="utf-8")
        file.chmod(0o755 if name.endswith(".sh") else 0o644)
