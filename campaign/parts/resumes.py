"""Runs that are killed or stopped at a step and resumed: the weights are those of a run in one
piece, bit for bit, for every kind of model and objective.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from campaign.harness import Case, Limits, Part, WrongResultError, in_fork
from medm.training import run
from medm.training.recipe import Recipe, load_recipe
from tests import tiny
from tests.models.blip import test_answers, test_training
from tests.models.dual_encoder import test_training as dual
from tests.training import test_grounded_run, test_run


def _grounded(folder: Path) -> Path:
    tiny.save_llm("qwen2.5", folder / "llm")
    (folder / "train.json").write_text(json.dumps(test_grounded_run.records(folder)))
    return folder


def _lvlm(folder: Path, out: Path, *, packing: bool = False, workers: int = 0) -> Recipe:
    given = test_run.recipe(folder, out)
    if packing:
        data = given.data.model_copy(update={"packing": True, "max_length": 256})
        given = given.model_copy(update={"data": data})
    return _with_workers(given, workers)


def _with_workers(given: Recipe, workers: int) -> Recipe:
    train = given.train.model_copy(update={"dataloader_num_workers": workers})
    return given.model_copy(update={"train": train})


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of model with an objective."""

    name: str
    world: Callable[[Path], Path]
    recipe: Callable[[Path, Path], Recipe]
    steps: int


KINDS = [
    Kind("lvlm", test_run.write_world, _lvlm, 6),
    Kind("lvlm, worker", test_run.write_world, partial(_lvlm, workers=1), 6),
    Kind(
        "lvlm, packing and worker",
        test_run.write_world,
        partial(_lvlm, packing=True, workers=1),
        6,
    ),
    Kind("dual-encoder, contrastive", dual.write_world, dual.recipe, 4),
    Kind(
        "dual-encoder, worker",
        dual.write_world,
        lambda world, out: _with_workers(dual.recipe(world, out), 1),
        4,
    ),
    Kind("blip, itc + itm + text + labels", test_training.write_world, test_training.recipe, 4),
    Kind("blip, answers", test_answers.write_world, test_answers.recipe, 4),
    Kind(
        "grounded, language + masks, packing",
        _grounded,
        lambda folder, out: load_recipe(test_grounded_run.recipe_file(folder, out)),
        6,
    ),
]


def prepare(folder: Path) -> None:
    """Write the data of each kind, and train it in one piece."""
    for kind in KINDS:
        place = folder / kind.name
        place.mkdir()
        kind.world(place)
        in_fork(partial(_train, kind, place, place / "whole"))


def _train(kind: Kind, place: Path, out: Path, *, resume: bool = False) -> None:
    outcome = run.train(kind.recipe(place, out), resume=resume)
    if not outcome.finished:
        raise WrongResultError("the run did not finish")


class _Stop(TrainerCallback):
    """Sends this process a signal at the beginning of a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def cases(folder: Path, count: int, seed: int) -> list[Case]:
    """Return `count` stops of each kind, at drawn steps, by SIGKILL and by SIGTERM in turn."""
    made = []
    for kind in KINDS:
        rng = random.Random(f"{seed} {kind.name}")
        trials = [
            (step, number)
            for number in (signal.SIGKILL, signal.SIGTERM)
            for step in range(kind.steps)
        ]
        for step, number in rng.sample(trials, min(count, len(trials))):
            name = f"{kind.name}: {number.name} at step {step}"
            made.append(Case(name, partial(_resume, kind, folder, step, number), kind.name))
    return made


def _resume(kind: Kind, folder: Path, step: int, number: signal.Signals) -> None:
    place = folder / kind.name
    out = place / f"cut-{number.name}-{step}"

    def cut() -> None:
        known = run._callbacks
        run._callbacks = lambda recipe: [*known(recipe), _Stop(step, number)]
        if run.train(kind.recipe(place, out)).finished:
            raise WrongResultError("the signal did not stop the run")

    status = in_fork(cut)
    if status != (-signal.SIGKILL if number == signal.SIGKILL else 0):
        raise WrongResultError(f"the first run ended with {status}")

    def resume() -> None:
        torch.rand(7)  # numbers that a new process drew before
        _train(kind, place, out, resume=True)

    in_fork(resume)
    before = load_file(place / "whole" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    if other := [
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    ]:
        raise WrongResultError(f"{len(other)} of {len(before)} tensors differ: {sorted(other)[:3]}")
    shutil.rmtree(out)


PART = Part(
    "resumes",
    "Stops at a step, resumed: weights bit for bit",
    prepare,
    cases,
    3,
    Limits(cpu=200, gib=4, wall=1200),
    "cases",
)
