"""Batch inference: an annotation file in, one line a record out.

A run may be stopped at any moment and started again with the same command: each record is answered once. A record
that cannot be used becomes a line with its error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from medm.children import safe_path
from medm.data.options import SourceOptions
from medm.data.records import Records
from medm.errors import CheckpointError, DataError, MedmError, RecipeError
from medm.evaluation.engine import Engine, load_engine, pick_device
from medm.evaluation.options import InferOptions
from medm.evaluation.prompts import Prepared, Prompts, deal, work_order
from medm.evaluation.results import Results, model_fingerprint, write_aside
from medm.registry import load_plugin, loaded_plugins
from medm.stopping import ignore_stops

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]
"""Called with (records done by this run, records this run has to do, errors so far)."""

_LONGEST_WAIT = timedelta(days=7)
"""Ranks wait for each other at the end, however long the slowest takes."""

_BATCHES_AHEAD = 4
"""Batches that are decoded together; their lines are written when the last of them is answered."""


@dataclass(frozen=True, slots=True)
class InferSummary:
    """What became of a run."""

    records: int
    """Records asked for."""
    answered: int
    """Of them with a reply, from this run and earlier ones."""
    errors: int
    """Of them refused, with their reason in the output."""
    resumed: int
    """Of them done by earlier runs."""
    unfinished: int
    """Replies cut at the longest length."""
    tokens: int
    """Tokens of all replies."""
    seconds: float
    """Of this run, loading included."""

    @property
    def per_second(self) -> float:
        """Records of this run a second."""
        return (self.records - self.resumed) / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Counter:
    """How far the processes of a run are."""

    total: int
    report: Progress | None
    done: dict[int, int] = field(default_factory=dict)
    errors: dict[int, int] = field(default_factory=dict)

    def note(self, rank: int, done: int, errors: int) -> None:
        self.done[rank], self.errors[rank] = done, errors
        if self.report is not None:
            self.report(sum(self.done.values()), self.total, sum(self.errors.values()))


def infer(options: InferOptions, *, progress: Progress | None = None) -> InferSummary | None:
    """Answer every record of an annotation file.

    Args:
        options: see there.
        progress: told how far the run is.

    Returns:
        The summary; None on ranks of a launch other than rank 0.

    Raises:
        DeviceError: the device that was asked for is not there.
        CheckpointError: the model cannot be opened.
        RecipeError: the output holds lines of another run.
        DataError: the annotation file as a whole cannot be read.
        MedmError: a process ended before its work was done; the same command goes on.
    """
    started = time.monotonic()
    pick_device(options.device)
    results = Results(Path(options.output), run_settings(options))
    with _launched() as (rank, world):
        if rank == 0:
            results.begin(overwrite=options.overwrite)
        _wait_for_all(world)
        records = open_records(options)
        before = [index for index in results.done() if index < len(records)]
        counter = _Counter(len(records) - len(before), progress if rank == 0 else None)
        if world > 1:
            _answer_share(options, rank, world, lambda done, errors: counter.note(rank, done, errors))
        elif options.processes > 1 and counter.total > 0:
            _answer_in_processes(options, counter)
        elif counter.total > 0:
            _answer_share(options, 0, 1, lambda done, errors: counter.note(0, done, errors))
        _wait_for_all(world)
        if rank > 0:
            return None
        lines = results.finish()
    if options.json_output is not None:
        write_conversations(options, lines)
    kept = [line for index, line in lines.items() if index < len(records)]
    return InferSummary(
        records=len(records),
        answered=sum("reply" in line for line in kept),
        errors=sum("error" in line for line in kept),
        resumed=len(before),
        unfinished=sum(not line.get("finished", True) for line in kept),
        tokens=sum(line.get("tokens", 0) for line in kept),
        seconds=time.monotonic() - started,
    )


def run_settings(options: InferOptions) -> dict[str, Any]:
    """What the replies depend on; kept beside them."""
    folder = Path(options.model).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{options.model}: no such model folder")
    try:
        with Path(options.data).open("rb") as stream:
            data = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", file=options.data) from None
    return {
        "data_sha256": data,
        "root": str(Path(options.root or Path(options.data).parent).resolve()),
        "model_fingerprint": model_fingerprint(folder),
        "generation": options.generation.model_dump(),
        "dtype": options.dtype,
    }


def open_records(options: InferOptions) -> Records:
    """The records that are to be answered."""
    return Records([SourceOptions(path=options.data, root=options.root, limit=options.limit)], inference=True)


def _answer_share(options: InferOptions, rank: int, world: int, note: Callable[[int, int], None]) -> None:
    """Answer this process's share of the records that have no line yet."""
    device = _device_of(options.device, rank)
    engine, processor = load_engine(
        options.model, options.generation, device=device, dtype=options.dtype, slots=options.batch_size
    )
    records = open_records(options)
    tokens_per_item = {name: int(entry["num_tokens"]) for name, entry in processor.branches.items()}
    share = deal(work_order(records, tokens_per_item), rank=rank, world=world)
    results = Results(Path(options.output), {})
    with results.append(rank=rank, world=world) as appender:
        left = share[~np.isin(share, list(results.done()))]
        # A decoder that fills the places of finished prompts is given several batches at once.
        size = options.batch_size * (_BATCHES_AHEAD if engine.decoder is not None else 1)
        batches = [left[start : start + size].tolist() for start in range(0, len(left), size)]
        prompts = Prompts(records, processor, batches, context=_context(engine, options))
        done = errors = 0
        for prepared in _load(prompts, options, world):
            lines = answer_lines(engine, records, prepared)
            appender.add(lines)
            done, errors = done + len(lines), errors + len(prepared.problems)
            note(done, errors)
            _stop_with_parent()


def answer_lines(engine: Engine, records: Records, prepared: Prepared) -> list[dict[str, Any]]:
    """The output lines of one batch."""
    lines: list[dict[str, Any]] = [{"index": index, "error": reason} for index, reason in prepared.problems]
    for _, reason in prepared.problems:
        logger.debug("refused: %s", reason)
    replies = engine.answer(prepared.batch) if prepared.batch is not None else []
    for index, reply in zip(prepared.indexes, replies, strict=True):
        sample = records[index]
        named = {"id": sample.id, "task": sample.task, "answer": sample.answer}
        lines.append(
            {"index": index}
            | {key: value for key, value in named.items() if value is not None}
            | {"reply": reply.text, "tokens": reply.tokens, "finished": reply.finished}
        )
    return lines


def _load(prompts: Prompts, options: InferOptions, world: int) -> Iterator[Prepared]:
    """Batches in order, prepared in other processes while the model answers."""
    workers = options.workers
    if workers is None:
        # Starting workers costs more than it saves on a handful of batches.
        cores = len(os.sched_getaffinity(0)) // world
        workers = min(8, cores - 1, len(prompts) // 8)
    extra: dict[str, Any] = {"prefetch_factor": 4} if workers > 0 else {}
    yield from DataLoader(prompts, batch_size=None, num_workers=max(0, workers), worker_init_fn=ignore_stops, **extra)


def _context(engine: Engine, options: InferOptions) -> int | None:
    longest = getattr(engine.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return None
    left = int(longest) - options.generation.max_new_tokens
    if left < 1:
        raise RecipeError(
            f"max_new_tokens {options.generation.max_new_tokens}: the model's context of {longest} tokens leaves no "
            "room for a prompt; ask for shorter replies"
        )
    return left


def _device_of(name: str, rank: int) -> torch.device:
    """The device of one of several processes: GPUs are dealt in turn."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        local = int(os.environ.get("LOCAL_RANK", rank))
        return torch.device("cuda", local % torch.cuda.device_count())
    return device


@contextmanager
def _launched() -> Iterator[tuple[int, int]]:
    """Yield rank and number of the processes of a launch; (0, 1) without one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or torch.distributed.is_initialized():
        yield 0, 1
        return
    torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield torch.distributed.get_rank(), world
    finally:
        torch.distributed.destroy_process_group()


def _wait_for_all(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()


def _answer_in_processes(options: InferOptions, counter: _Counter) -> None:
    """Shares answered by processes of our own, on one machine."""
    context = multiprocessing.get_context("spawn")
    with safe_path():  # the queue starts a process too, which tracks semaphores
        news: Any = context.Queue()
    plugins = [str(path) for path in loaded_plugins()]
    children = [
        context.Process(target=_child, args=(options, rank, options.processes, plugins, news))
        for rank in range(options.processes)
    ]
    with safe_path():
        for child in children:
            child.start()
    try:
        _watch(children, news, counter)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.join()


def _watch(children: list[Any], news: Any, counter: _Counter) -> None:
    """Follow the children until all are done. Raises `MedmError` when one fails."""
    while True:
        try:
            rank, message = news.get(timeout=0.5)
        except queue.Empty:
            codes = [child.exitcode for child in children]
            for rank, code in enumerate(codes):
                if code:
                    raise MedmError(
                        f"process {rank} of {len(children)} ended with status {code}"
                        + (" (killed; perhaps for memory)" if code < 0 else "")
                        + "; what was answered is kept, and the same command goes on"
                    ) from None
            if all(code == 0 for code in codes):
                return
            continue
        if isinstance(message, str):
            raise MedmError(message)
        counter.note(rank, *message)


def _child(options: InferOptions, rank: int, world: int, plugins: list[str], news: Any) -> None:
    """One process of several. It ends with its parent, which SIGINT from a terminal reaches too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    try:
        for plugin in plugins:
            load_plugin(plugin)
        _answer_share(options, rank, world, lambda done, errors: news.put((rank, (done, errors))))
    except MedmError as error:
        news.put((rank, str(error)))


def _stop_with_parent() -> None:
    """A child whose parent was killed stops at the next batch, so that a new run finds its file free."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)


def write_conversations(options: InferOptions, lines: dict[int, dict[str, Any]]) -> None:
    """The records in MedM-VL's form: without their last reply, which is kept as `answer`, and with the new one."""
    assert options.json_output is not None
    records = open_records(options)
    items = []
    for index in range(len(records)):
        try:
            record = dict(records.files[0][index])
        except (DataError, TypeError, ValueError):
            record = {}  # not JSON, or no object: its error is all there is to say
        items.append(with_reply(record, lines[index]))
    text = ",\n".join(json.dumps(item, ensure_ascii=False, indent=2) for item in items)
    file = Path(options.json_output)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, f"[\n{text}\n]\n")


def with_reply(record: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    """One record with its reply appended in the record's own form, or with its `error`."""
    if "error" in line:
        return {**record, "error": line["error"]}
    name = "messages" if "messages" in record else "conversations"
    turns = list(record[name])
    by_role = "role" in turns[-1]
    role, text = ("role", "content") if by_role else ("from", "value")
    if turns[-1][role] in ("gpt", "assistant"):
        turns.pop()
    if "answer" in line:
        record = {**record, "answer": line["answer"]}
    return {**record, name: [*turns, {role: "assistant" if by_role else "gpt", text: line["reply"]}]}
