"""Kills at file operations: the same command again gives what it gives without a kill.

`WORKS` are commands that write. Each is run whole once, then killed at drawn operations and run
again.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from campaign.harness import Case, Limits, Part, WrongResultError, in_fork
from campaign.parts import caches
from medm.data.options import SourceOptions
from medm.data.shard_writing import write_shards
from medm.errors import MedmError
from medm.inference.batch import infer
from medm.inference.options import GenerationOptions, InferOptions
from medm.models.export.export import export
from medm.training.recipe import load_recipe
from medm.training.run import train
from tests.data.test_features import fill
from tests.data.tiny import write_image, write_lines
from tests.inference.tiny import questions, save_tiny, write_records
from tests.operations import How, watch
from tests.training.kill_loop import CASE
from tests.training.test_launcher import recipe as launcher_recipe
from tests.training.toys import trainer, weights


@dataclass(frozen=True, slots=True)
class Work:
    """A command that writes into the folder `out`."""

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Path], None]
    """Does all of it, or continues what is there."""
    result: Callable[[Path], str]
    """Returns what must be equal to the result of a run in one piece. Raises `MedmError` or
    `WrongResultError` if it is not whole."""


def _nothing(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def _digest(*files: Path) -> str:
    if missing := [file.name for file in files if not file.exists()]:
        raise WrongResultError(f"missing at the end: {missing}")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _train_toy(folder: Path) -> None:
    run = trainer(folder / "out", **CASE)
    run.fit(resume=True)
    save_file(weights(run.model), folder / "weights.safetensors")


def _train(folder: Path) -> None:
    given = load_recipe(folder / "recipe.yaml", [f"output_dir={folder / 'out'}"])
    if not train(given, resume=True).finished:
        raise WrongResultError("the run did not finish")


def _model(folder: Path) -> str:
    left = [path.name for path in (folder / "out").iterdir() if path.name.startswith(".tmp")]
    if left:
        raise WrongResultError(f"left behind: {left}")
    out = folder / "out"
    return _digest(out / "model.safetensors", out / "config.json", out / "tokenizer.json")


def _recipe(folder: Path) -> None:
    launcher_recipe(folder, max_steps=4, save_steps=2, logging_steps=1)


def _features(folder: Path) -> None:
    store = caches.open_store(folder / "out" / "cache", "encoder")
    fill(store, [folder / name for name in caches.FILES])


def _features_result(folder: Path) -> str:
    store = caches.open_store(folder / "out" / "cache", "encoder")
    found = [store.get(folder / name) for name in caches.FILES]
    if any(one is None for one in found):
        raise WrongResultError("features are missing")
    return json.dumps([np.asarray(one).tolist() for one in found])


def _volume(folder: Path) -> None:
    _nothing(folder)
    caches.sitk.WriteImage(caches.phantom(), str(folder / "a.nii.gz"))


def _cache_volume(folder: Path) -> None:
    caches.MediaCache(folder / "out", max_bytes=10**7).load(folder / "a.nii.gz", caches.PREPROCESS)


def _volume_result(folder: Path) -> str:
    cache = caches.MediaCache(folder / "out", max_bytes=10**7)
    return hashlib.sha256(cache.load(folder / "a.nii.gz", caches.PREPROCESS).tobytes()).hexdigest()


def _questions(folder: Path) -> None:
    save_tiny(folder)
    write_records(folder, questions(folder, 9))


def _infer(folder: Path) -> None:
    (folder / "out").mkdir(exist_ok=True)
    infer(
        InferOptions(
            model=str(folder / "model"), data=str(folder / "in.json"), device="cpu", workers=0,
            output=str(folder / "out" / "out.jsonl"), batch_size=2,
            json_output=str(folder / "out" / "all.json"),
            generation=GenerationOptions(max_new_tokens=2),
        )
    )  # fmt: skip


def _infer_result(folder: Path) -> str:
    lines = (folder / "out" / "out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(json.dumps(json.loads(line), sort_keys=True) for line in lines)
    return "\n".join([*rows, _digest(folder / "out" / "all.json")])


def _export(folder: Path) -> None:
    place = folder / "out" / "merged"
    if place.exists() and any(place.iterdir()):
        return  # whole, or `_export_result` will tell
    export(str(folder / "model"), str(place), form="merged", max_new_tokens=2)


def _export_result(folder: Path) -> str:
    place = folder / "out" / "merged"
    return _digest(*sorted(one for one in place.iterdir() if one.suffix == ".safetensors"))


def _pairs(folder: Path) -> None:
    _nothing(folder)
    for number in range(5):
        write_image(folder / f"{number}.png", shade=number)
    lines = [{"image": f"{n}.png", "captions": [f"caption {n}"], "id": f"p{n}"} for n in range(5)]
    write_lines(folder / "in.jsonl", *lines)


def _shards(folder: Path) -> None:
    (folder / "out").mkdir(exist_ok=True)
    source = SourceOptions(path=str(folder / "in.jsonl"), root=str(folder))
    write_shards(folder / "out" / "a.shards.json", [source], samples=2)


def _shards_result(folder: Path) -> str:
    return _digest(*(path for path in sorted((folder / "out").iterdir()) if path.is_file()))


WORKS = [
    Work("training of a toy", _nothing, _train_toy, lambda f: _digest(f / "weights.safetensors")),
    Work("training and final model", _recipe, _train, _model),
    Work(
        "feature cache",
        lambda folder: caches.write_files(folder, **caches.FILES) and None,
        _features,
        _features_result,
    ),
    Work("volume cache", _volume, _cache_volume, _volume_result),
    Work("inference", _questions, _infer, _infer_result),
    Work("export merged", _questions, _export, _export_result),
    Work("tar shards", _pairs, _shards, _shards_result),
]


def prepare(folder: Path) -> None:
    """Run each work whole, and count its operations."""
    for work in WORKS:
        place = folder / work.name
        place.mkdir()
        in_fork(partial(work.prepare, place))
        shutil.copytree(place, folder / f"{work.name} whole")

        def counted(whole: Path, work: Work = work) -> None:
            operations = watch(whole / "out")
            work.run(whole)
            (whole / "operations").write_text(str(operations()))

        whole = folder / f"{work.name} whole"
        in_fork(partial(counted, whole))
        (whole / "result").write_text(work.result(whole))


def cases_of(hows: Sequence[How], folder: Path, count: int, seed: int) -> list[Case]:
    """Return `count` kills of each work."""
    cases = []
    for work in WORKS:
        rng = random.Random(f"{seed} {work.name} {hows}")
        total = int((folder / f"{work.name} whole" / "operations").read_text())
        numbers = list(range(1, total + 1))
        trials = [(number, how) for number in numbers for how in hows]
        for number, how in sorted(rng.sample(trials, min(count, len(trials)))):
            name = f"{work.name}: {how}, operation {number} of {total}"
            cases.append(Case(name, partial(_kill, work, folder, number, how), work.name))
    return cases


def _kill(work: Work, folder: Path, number: int, how: How) -> None:
    place = folder / f"{work.name} {how} {number}"
    shutil.copytree(folder / work.name, place, dirs_exist_ok=True)

    def cut() -> None:
        watch(place / "out", die_at=number, how=how)
        work.run(place)

    if (status := in_fork(cut)) not in (-signal.SIGKILL, 0):
        raise WrongResultError(f"the first run ended with {status}")
    try:
        in_fork(partial(work.run, place))
        found = work.result(place)
    except MedmError as error:
        raise WrongResultError(f"the second run is refused: {error}") from None
    if found != (folder / f"{work.name} whole" / "result").read_text():
        raise WrongResultError("another result than that of a run in one piece")
    shutil.rmtree(place)


PART = Part(
    "kills",
    "Kills at file operations, and the same command again",
    prepare,
    partial(cases_of, ("before", "half")),
    24,
    Limits(cpu=120, gib=4, wall=900),
    "cases",
)
