"""Jobs: reports and segmentations of studies, which run longer than a request should wait.

Jobs run one after another beside chat requests, whose replies go on between the slices of a volume.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

from medm.errors import MedmError
from medm.inference.mask_writing import MaskWriter, series_choice
from medm.inference.options import GenerationOptions
from medm.inference.segmenter import Grounded
from medm.serving.errors import ServingError, as_serving_error
from medm.serving.files import FileStore, StoredFile
from medm.serving.metrics import Metrics
from medm.serving.worker import ReplyStream, Worker
from medm.types import JsonObject, Media, Turn, TurnPart

logger = logging.getLogger(__name__)

Status: TypeAlias = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Task: TypeAlias = Literal["report", "segmentation"]
FINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})

MAX_QUEUED = 16
"""Jobs that wait; further ones are refused."""
MAX_KEPT = 1000
"""Jobs that are remembered; of more, the oldest finished ones are deleted before they expire."""
_PAUSE = 0.1
"""Seconds between two tries while the queue of requests is full."""
_MASKS, _SEG = "masks", "seg"
"""Folders of a job."""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job does."""

    task: Task
    files: Sequence[str]
    """Ids of uploaded files, in the order in which the model is shown them."""
    prompt: str
    generation: GenerationOptions
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()


@dataclass(slots=True)
class Job:
    """One job."""

    id: str
    request: JobRequest
    created: float
    expires: float
    status: Status = "queued"
    stage: Literal["generating", "segmenting"] | None = None
    done: int = 0
    """Tokens or slices of the stage."""
    total: int = 0
    started: float | None = None
    ended: float | None = None
    error: ServingError | None = None
    result: JsonObject | None = None
    masks: list[Path] = field(default_factory=list)
    """File of each mask: NIfTI of a volume, PNG of an image."""
    dicom_seg: Path | None = None
    """All masks as one DICOM SEG, where the file is a DICOM series."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def as_json(self) -> JsonObject:
        """Return the job as clients are told."""
        return {
            "id": self.id,
            "object": "job",
            "task": self.request.task,
            "status": self.status,
            "progress": {"stage": self.stage, "done": self.done, "total": self.total},
            "created_at": int(self.created),
            "started_at": None if self.started is None else int(self.started),
            "ended_at": None if self.ended is None else int(self.ended),
            "expires_at": int(self.expires),
            "error": None if self.error is None else self.error.body()["error"],
            "formats": self.formats(),
        }

    def formats(self) -> list[str]:
        """Return the formats that the result can be had in."""
        if self.result is None:
            return []
        kinds = {"png" if path.suffix == ".png" else "nifti" for path in self.masks}
        return ["json", *sorted(kinds), *(["dicom-seg"] if self.dicom_seg else [])]


class _JobCancelledError(Exception):
    """The client cancelled the job."""


class JobRunner:
    """The jobs of a server and the thread that runs them.

    Args:
        worker: owns the model.
        files: that jobs are about; its folder also takes the results.
        metrics: counts the jobs.
    """

    def __init__(self, worker: Worker, files: FileStore, metrics: Metrics) -> None:
        self.worker, self.files, self.metrics = worker, files, metrics
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="medm-jobs", daemon=True)

    @property
    def open(self) -> int:
        """Jobs that wait or run."""
        with self._lock:
            return sum(job.status not in FINAL for job in self._jobs.values())

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: JobRequest) -> Job:
        """Queue a job.

        Raises:
            ServingError: the queue is full, a file does not exist, or the model cannot do it.
        """
        self.worker.require_ready("lvlm")
        if request.task == "segmentation" and not self.worker.has_masks:
            raise ServingError(
                "unsupported",
                "the model has no mask head; expected the task report",
                param="task",
            )
        for name in request.files:
            self.files.get(name, param="files")
        now = time.time()
        job = Job(f"job-{secrets.token_urlsafe(18)}", request, now, now + self.files.keep_seconds)
        self.sweep()
        with self._lock:
            waiting = sum(other.status == "queued" for other in self._jobs.values())
            if waiting >= MAX_QUEUED:
                raise ServingError("queue_full", f"{waiting} jobs wait, which is the limit")
            self._jobs[job.id] = job
            self._changed.notify()
        return job

    def get(self, name: str) -> Job:
        """Return a job by its id. Raises `ServingError`."""
        self.sweep()
        with self._lock:
            if name not in self._jobs:
                raise ServingError("job_not_found", "no such job; it was deleted or is expired")
            return self._jobs[name]

    def cancel(self, name: str) -> Job:
        """Cancel a job; one that is finished stays as it is. Raises `ServingError`."""
        job = self.get(name)
        job.cancelled.set()
        with self._lock:
            if job.status == "queued":
                self._end(job, "cancelled")
        return job

    def delete(self, name: str) -> None:
        """Cancel a job and delete its result. Raises `ServingError`."""
        job = self.cancel(name)
        with self._lock:
            self._jobs.pop(name, None)
        if job.status in FINAL:
            self._remove(job)

    def drain(self) -> None:
        """Cancel the jobs that wait; the one that runs goes on."""
        with self._lock:
            for job in self._jobs.values():
                if job.status == "queued":
                    self._end(job, "cancelled")

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        self.drain()
        with self._lock:
            for job in self._jobs.values():
                job.cancelled.set()
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def sweep(self) -> None:
        """Delete finished jobs that are expired or too many, with their results."""
        now = time.time()
        with self._lock:
            finished = [job for job in self._jobs.values() if job.status in FINAL]
            surplus = max(len(self._jobs) - MAX_KEPT, 0)
            gone = [
                job for place, job in enumerate(finished) if place < surplus or job.expires <= now
            ]
            for job in gone:
                del self._jobs[job.id]
        for job in gone:
            self._remove(job)

    def _remove(self, job: Job) -> None:
        shutil.rmtree(self.files.folder / job.id, ignore_errors=True)

    def _end(self, job: Job, status: Status) -> None:
        job.status, job.ended = status, time.time()
        job.request = replace(job.request, prompt="")  # may be long, and is not needed again
        self.metrics.jobs.labels(job.request.task, status).inc()

    # What follows runs in the thread of the runner.

    def _run(self) -> None:
        while (job := self._next()) is not None:
            status: Status = "succeeded"
            try:
                self._do(job)
            except _JobCancelledError:
                status = "cancelled"
            except Exception as error:  # noqa: BLE001 (the job gets the error, the next one runs)
                status, job.error = "failed", as_serving_error(error)
                if not isinstance(error, MedmError):
                    logger.error("%s failed: %s", job.id, type(error).__name__)
            with self._lock:
                self._end(job, status)
                deleted = job.id not in self._jobs
            if deleted or status != "succeeded":
                self._remove(job)
            logger.info("%s %s %s", job.id, job.request.task, status)

    def _next(self) -> Job | None:
        """Wait for a job and mark it as running; None at the end."""
        with self._changed:
            while not self._closed:
                for job in self._jobs.values():
                    if job.status == "queued":
                        job.status, job.started = "running", time.time()
                        return job
                self._changed.wait()
        return None

    def _do(self, job: Job) -> None:
        request = job.request
        with self.files.using(request.files, param="files") as files:
            stream = self._generate(job, files)
            assert stream.end is not None
            result: JsonObject = {
                "task": request.task,
                "text": stream.end.text,
                "finish_reason": stream.end.finish,
                "usage": {
                    "prompt_tokens": stream.prompt_tokens,
                    "completion_tokens": len(stream.end.ids),
                },
                "files": [
                    {"id": file.id, "kind": file.kind, "geometry": file.form.as_json()}
                    for file in files
                ],
                "notice": "Not for clinical use",
            }
            if request.task == "segmentation":
                job.stage, job.done, job.total = "segmenting", 0, 0

                def on_slice(done: int, total: int) -> None:
                    job.done, job.total = done, total
                    if job.cancelled.is_set():
                        raise _JobCancelledError

                grounded = self.worker.segment(stream, on_slice=on_slice).result()
                job.done = job.total = max(job.total, 1)
                result |= self._masks(job, stream, grounded, files)
            job.result = result

    def _generate(self, job: Job, files: Sequence[StoredFile]) -> ReplyStream:
        content: list[TurnPart] = []
        for file in files:
            content += [Media(file.kind), "\n"]
        turn = Turn("user", (*content, job.request.prompt))
        job.stage = "generating"
        stream = self._submitted(job, turn, [file.path for file in files])
        most = job.request.max_new_tokens or self.worker.limits.max_new_tokens
        job.total = most
        for count, _ in enumerate(stream, start=1):
            job.done = min(count, most)
            if job.cancelled.is_set():
                stream.cancel()
        if job.cancelled.is_set():
            raise _JobCancelledError
        assert stream.end is not None
        if stream.end.finish == "cancelled":
            raise ServingError("draining", "the server ended before the job")
        return stream

    def _submitted(self, job: Job, turn: Turn, paths: Sequence[Path]) -> ReplyStream:
        """Submit the prompt as soon as the queue of requests has room: the job was taken before."""
        request = job.request
        while True:
            try:
                return self.worker.submit(
                    [turn],
                    paths,
                    generation=request.generation,
                    max_new_tokens=request.max_new_tokens,
                    stop=request.stop,
                )
            except ServingError as error:
                if error.code != "queue_full":
                    raise
            if job.cancelled.wait(_PAUSE):
                raise _JobCancelledError

    def _masks(
        self, job: Job, stream: ReplyStream, grounded: Grounded, files: Sequence[StoredFile]
    ) -> JsonObject:
        """Write the masks, and return what the result says of them."""
        folder = self.files.folder / job.id
        folder.mkdir(mode=0o700)
        writer = MaskWriter(folder / _MASKS, beside=folder)
        spans = writer.spans_of("mask", grounded, stream.media)
        for span in spans:
            if span["mask"] is not None:
                job.masks.append(folder / span["mask"])
                span["mask"] = len(job.masks) - 1
        series = [file for file in files if file.is_series]
        if job.masks and series and find_spec("highdicom") is not None:
            processor = self.worker.processor
            several = series_choice(processor.preprocess[str(processor.mask_view)])
            seg = MaskWriter(folder / _SEG, beside=folder, format="dicom-seg", several=several)
            named = seg.spans_of("seg", grounded, stream.media)
            job.dicom_seg = folder / named[0]["mask"]
        return {"text": grounded.text.text, "raw": grounded.text.raw, "masks": spans}
