"""Names of patients that stand where they may: they are in no output that has no need of them.

Each place of a name has its own canary. After the commands have run, every file, every log and every
answer of the server is searched for each, names of files included.
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pydicom
import yaml
from PIL import Image

from campaign.canary_data import (
    CANARIES,
    PATIENT_AND_STUDY,
    write_data,
)
from campaign.canary_server import talk
from campaign.harness import Case, Limits, Part, WrongResultError, in_fork
from tests import tiny
from tests.cli.runner import medm
from tests.encoders.tiny import TINY_ENCODERS
from tests.inference.grounded import answering, save_grounded
from tests.models import plain_head

_SEG_AND_SR = ("masks/*.dcm", "server/result of series.dcm")
_QUESTIONS = "eval/custom/questions.jsonl"
ALLOWED: dict[str, tuple[str, ...]] = {
    # docs/hospital.md: SEG and SR hold the patient and the study of their images.
    "patient and study": _SEG_AND_SR,
    "birth date": _SEG_AND_SR,
    # docs/inference.md, docs/evaluation.md, docs/hospital.md: records, and replies to them.
    "record text": (
        "infer/lines.jsonl", "infer/all.json", _QUESTIONS, "eval/custom/predictions.jsonl",
        "eval/custom/report.md", "eval/custom/report.html", "convert/ct.jsonl", "csv/a.jsonl",
        "split/*.json",
    ),
    "extra field": ("infer/all.json", _QUESTIONS, "split/*.json"),
    # Records name their files. Errors and warnings of a file have to name it, too.
    "file name": (
        "infer/all.json", _QUESTIONS, "convert/ct.jsonl", "convert/ct.series.csv", "split/*.json",
        "log of check of damaged files", "log of masks", "log of more masks",
    ),
    # docs/serving.md: the message about an unknown field names it.
    "name of a field": ("server/unknown field*",),
}  # fmt: skip
"""By place of a name, the outputs in which it may stand: those that are made of it."""
STATUS = {"check of damaged files": 1, "leaks": 1}
"""Commands that have to end with another status than 0."""


def _commands(data: Path, out: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield names and arguments of the commands that need no model with masks."""
    root = ["--root", str(data)]
    here = ["--device", "cpu", "--workers", "0"]
    for name, file in (("", "train"), (" of volumes", "volumes"), (" of damaged files", "damaged")):
        yield f"check{name}", ["data", "check", str(data / f"{file}.json"), *root, "--decode"]
    yield "preview", ["data", "preview", str(data / "a.png"), str(out / "preview" / "a.png")]
    yield "leaks", ["data", "leaks", str(data / "train.json"), str(data / "other.json")]
    yield "split", [
        "data", "split", str(out / "split" / "all.json"), "--by", "id", "--val", "0.5", *root,
    ]  # fmt: skip
    yield "csv", [
        "data", "convert", "csv", str(data / "table.csv"), str(out / "csv" / "a.jsonl"), "--root",
        str(data), "--image-column", "file", "--text-column", "text", "--patient-column", "mrn",
        "--prompt", "Report?",
    ]  # fmt: skip
    yield "convert", [
        "data", "convert", "dicom", str(data / "studies"), str(out / "convert" / "ct.jsonl"),
        "--reports", str(data / "reports.csv"),
    ]  # fmt: skip
    yield "clean", ["data", "clean", str(data / "studies"), str(out / "clean" / "studies")]
    yield "volume cache", [
        "data", "cache", str(data / "volumes.yaml"), "--workers", "0",
    ]  # fmt: skip
    yield "train", ["train", str(data / "recipe.yaml")]
    yield "train on features", [
        "train", str(data / "recipe.yaml"), f"output_dir={out / 'train on features' / 'model'}",
        f"data.cache_features={out / 'feature cache'}",
    ]  # fmt: skip
    model = ["--model", str(out / "train" / "model")]
    yield "infer", [
        "infer", *model, "--data", str(data / "train.json"), *root, *here, "--output",
        str(out / "infer" / "lines.jsonl"), "--json", str(out / "infer" / "all.json"),
        "--max-new-tokens", "2",
    ]  # fmt: skip
    yield "eval", [
        "eval", *model, "--task", "custom", "--data", str(data), "--option", "path=train.json",
        "--option", "metrics=[exact-match]", "--output", str(out / "eval"), *here,
        "--max-new-tokens", "2",
    ]  # fmt: skip
    yield "export", ["export", *model, "--format", "merged", str(out / "export" / "merged")]


def _mask_commands(data: Path, out: Path, model: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield names and arguments of the commands whose replies have masks."""
    for name, records, further in (
        ("masks", "dicom", ["--mask-format", "dicom-seg", "--report-format", "dicom-sr"]),
        ("more masks", "dicom", ["--rle"]),
        ("plain masks", "plain", ["--overlays"]),
    ):
        yield name, [
            "infer", "--model", str(model), "--data", str(data / f"{records}.json"), "--root",
            str(data), "--output", str(out / name / "lines.jsonl"), "--device", "cpu",
            "--workers", "0", *further,
        ]  # fmt: skip


def prepare(folder: Path) -> None:
    """Write data with names, and run commands and a server over it.

    Outputs lie in `out`, in a folder for each command; logs in `logs`.
    """
    data, out, logs = (folder / name for name in ("data", "out", "logs"))
    for place in (data, out, logs):
        place.mkdir()
    write_data(data)
    _write_recipes(data, out)
    for name, arguments in _commands(data, out):
        (out / name).mkdir()
        if name == "split":
            (out / "split" / "all.json").write_bytes((data / "train.json").read_bytes())
        in_fork(partial(_logged, logs / name, arguments))
    with plain_head.registered():
        model, processor = save_grounded(data / "grounded")
        for name, arguments in _mask_commands(data, out, model):
            (out / name).mkdir()
            in_fork(partial(_with_masks, processor, logs / name, arguments))
    (out / "server").mkdir()
    in_fork(partial(talk, data, model, out / "server", logs / "server"))


def _write_recipes(data: Path, out: Path) -> None:
    model = tiny.lvlm_section(tiny.save_llm("qwen2.5", data / "llm"))
    recipe = {
        "model": model,
        "data": {"train": [{"path": str(data / "train.json"), "root": str(data)}]},
        "parts": {"image.connector": {"tune": "full", "lr": 1e-2}},
        "train": {
            "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1,
            "report_to": "tensorboard",
        },
        "output_dir": str(out / "train" / "model"),
    }  # fmt: skip
    (data / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    section = tiny.lvlm_section(data / "llm")
    section["branches"] = {
        "volume": {
            "encoder": TINY_ENCODERS["m3d-clip"].block,
            "connector": {"name": "spatial-pooling"},
        }
    }
    volumes = {
        "model": section,
        "data": {
            "train": [{"path": str(data / "volumes.json"), "root": str(data)}],
            "cache": {"dir": str(out / "volume cache"), "max_gb": 0.1},
        },
        "parts": {"volume.connector": "full"},
        "output_dir": str(data / "unused"),
    }
    (data / "volumes.yaml").write_text(yaml.safe_dump(volumes))


def _logged(log: Path, arguments: list[str]) -> None:
    logging.disable(logging.NOTSET)
    done = medm(*arguments)
    log.write_text(f"status {done.code}\n{done.out}\n{done.err}", encoding="utf-8")


def _with_masks(processor: object, log: Path, arguments: list[str]) -> None:
    """Run a command whose replies are a fixed one: a random model writes no `[SEG]`."""
    reply = "<p>left lung</p>[SEG] and <p>heart</p>[SEG]."
    answering(SimpleNamespace(setattr=setattr), processor, reply)
    _logged(log, arguments)


@cache
def _outputs(folder: Path) -> dict[str, bytes]:
    """Return the content of each output by its name, unpacked where it is packed."""
    found = {f"log of {log.name}": log.read_bytes() for log in (folder / "logs").iterdir()}
    for file in (folder / "out").rglob("*"):
        if file.is_file():
            found[str(file.relative_to(folder / "out"))] = _unpacked(file)
    return found


def _unpacked(file: Path) -> bytes:
    content = file.read_bytes()
    body = content.partition(b"\n")[2].partition(b"\n")[2] if file.parent.name == "server" else b""
    if file.suffix == ".gz":
        content += gzip.decompress(body or content)
    if file.suffix == ".png" and not body:
        with Image.open(file) as image:
            image.load()
            content += repr(image.info).encode()  # texts may be packed
    return content


def _search(folder: Path, source: str, name: str) -> None:
    if any(fnmatchcase(name, pattern) for pattern in ALLOWED.get(source, ())):
        return
    content = f"{name}\n".lower().encode() + _outputs(folder)[name].lower()
    at = content.find(CANARIES[source].lower().encode())
    if at >= 0:
        around = content[max(at - 60, 0) : at + 40].decode(errors="replace")
        raise WrongResultError(f"{name} holds the canary of {source}: {around!r}")


def _status(folder: Path, name: str) -> None:
    text = (folder / "logs" / name).read_text(encoding="utf-8")
    if not text.startswith(f"status {STATUS.get(name, 0)}\n"):
        raise WrongResultError(f"another status than expected: {text[:500]}")


def _elements(folder: Path, name: str) -> None:
    """A SEG or SR holds the elements of patient and study that are documented, and only those."""
    content = _outputs(folder)[name]
    file = pydicom.dcmread(pydicom.filebase.DicomBytesIO(content[content.index(b"DICM") - 128 :]))
    words = {CANARIES["patient and study"], CANARIES["birth date"]}
    holders = {
        element.keyword
        for element in file.iterall()
        if element.VR != "SQ" and any(word in str(element.value) for word in words)
    }
    if holders != PATIENT_AND_STUDY:
        raise WrongResultError(f"names are in {sorted(holders)}")


def _exists(folder: Path, pattern: str) -> None:
    """A search of nothing would show nothing."""
    if not any(fnmatchcase(name, pattern) for name in _outputs(folder)):
        raise WrongResultError(f"no output {pattern}")


EXPECTED = (
    "train/model/README.md", "train/model/run.json", "train/model/*tfevents*", "feature cache/*",
    "volume cache/arrays/*", "volume cache/index/*", "masks/lines_masks/*.dcm",
    "masks/lines_reports/*.dcm", "more masks/*.nii.gz", "more masks/*.png", "plain masks/*.png",
    "eval/custom/report.html", "eval/custom/cases/*.png", "clean/studies/cleaning.json",
    "clean/studies/*.dcm", "convert/ct.jsonl", "convert/ct.series.csv", "csv/a.jsonl",
    "server/result of series.dcm", "server/result of NIfTI.nii.gz", "server/GET  metrics",
)  # fmt: skip
"""Outputs that have to be there."""


def cases(folder: Path, count: int, seed: int) -> list[Case]:
    """Return a search of every output for every canary; count and seed change nothing."""
    made: list[tuple[str, Callable[[], None], str]] = [
        (f"command {log.name}", partial(_status, folder, log.name), "commands")
        for log in sorted((folder / "logs").iterdir())
    ]
    made += [
        (f"output {pattern}", partial(_exists, folder, pattern), "commands") for pattern in EXPECTED
    ]
    made += [
        (f"elements of {name}", partial(_elements, folder, name), "SEG and SR")
        for name in sorted(_outputs(folder))
        if any(fnmatchcase(name, pattern) for pattern in _SEG_AND_SR)
    ]
    made += [
        (f"{source} in {name}", partial(_search, folder, source, name), source)
        for source in CANARIES
        for name in sorted(_outputs(folder))
    ]
    return [Case(*one) for one in made]


PART = Part("canaries", "Names of patients in outputs and logs", prepare, cases, 1, Limits(cpu=60))
