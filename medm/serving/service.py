"""What the routes of a server share: worker, uploads, jobs, figures and sources of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from medm.inference.options import GenerationOptions
from medm.serving import images
from medm.serving.errors import ServingError
from medm.serving.fetching import Fetcher
from medm.serving.files import FileStore
from medm.serving.images import FILE_ID, Source
from medm.serving.jobs import JobRunner
from medm.serving.metrics import Metrics
from medm.serving.options import ServeOptions
from medm.serving.schemas import FilePart, ImagePart, Part, Replying
from medm.serving.worker import Worker, random_seed

T = TypeVar("T")

_MAX_SEED = 2**63 - 1


@dataclass(slots=True)
class Service:
    """One server without its HTTP."""

    options: ServeOptions
    worker: Worker
    files: FileStore
    jobs: JobRunner
    metrics: Metrics
    fetcher: Fetcher
    name: str
    """Of the model, in requests."""
    threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(16))
    """Threads that decode images and make prompts."""

    @classmethod
    def of(cls, options: ServeOptions) -> Service:
        """Return the service of some options. Nothing is started. Raises `CheckpointError`."""
        worker, metrics = Worker(options), Metrics()
        files = FileStore(
            worker.decoders,
            limits=options.limits,
            keep_seconds=60.0 * options.keep_minutes,
            max_bytes=options.storage_mb * 2**20,
        )
        service = cls(
            options=options,
            worker=worker,
            files=files,
            jobs=JobRunner(worker, files, metrics),
            metrics=metrics,
            fetcher=Fetcher(options.hosts, max_bytes=options.limits.max_body_bytes),
            name=options.name or Path(options.model).resolve().name,
        )
        metrics.watch("medm_open_requests", "Requests that run or wait.", lambda: worker.open)
        metrics.watch("medm_open_jobs", "Jobs that run or wait.", lambda: service.jobs.open)
        metrics.watch("medm_file_bytes", "Bytes of uploaded files.", lambda: files.stored)
        metrics.watch("medm_ready", "1 if requests are taken.", lambda: worker.state == "ready")
        return service

    def start(self) -> None:
        """Load the model and start the threads."""
        self.worker.start()
        self.jobs.start()

    def drain(self) -> None:
        """Refuse new requests and jobs; those that run go on."""
        self.worker.drain()
        self.jobs.drain()

    def sweep(self) -> None:
        """Delete uploads and results that are expired."""
        self.files.sweep()
        self.jobs.sweep()

    def close(self) -> None:
        """End the threads and delete all files."""
        self.jobs.close()
        self.worker.close()
        self.files.close()

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run a function that may take long in a thread of requests."""
        return await to_thread.run_sync(function, limiter=self.threads)

    def require_model(self, name: str) -> None:
        """Refuse the name of another model. Raises `ServingError`."""
        if name != self.name:
            raise ServingError(
                "model_not_found", f"this server has the model {self.name!r}", param="model"
            )

    @contextmanager
    def sources(self, parts: Mapping[str, Part]) -> Iterator[list[Source]]:
        """Give the images and volumes of parts; uploaded files stay on the disk inside the block.

        Args:
            parts: those that are no text, by their place in the request.

        Raises:
            ServingError: too many, an unknown id, or a source that is refused.
        """
        if len(parts) > self.options.limits.max_images:
            raise ServingError(
                "too_many_images",
                f"{len(parts)} images; at most {self.options.limits.max_images} are taken",
                param=next(iter(parts)),
            )
        ids = {place: name for place, part in parts.items() if (name := _file_id(part))}
        first = next(iter(ids), None)
        with self.files.using(ids.values(), param=first) as files:
            stored = dict(zip(ids, files, strict=True))
            found: list[Source] = []
            for place, part in parts.items():
                if place in stored:
                    found.append(images.of_file(stored[place]))
                elif isinstance(part, ImagePart):
                    found.append(images.of_url(part.image_url.url, self.fetcher, param=place))
            yield found


def generation_of(body: Replying) -> tuple[GenerationOptions, list[str]]:
    """Return the settings of generation of a body, and the fields that are ignored."""
    temperature = body.temperature or 0.0
    if temperature == 0:
        given = {"top_p": body.top_p not in (None, 1), "top_k": bool(body.top_k)}
        return GenerationOptions(), [name for name, is_given in given.items() if is_given]
    seed = random_seed() if body.seed is None else body.seed & _MAX_SEED
    return (
        GenerationOptions(
            temperature=temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            seed=seed,
        ),
        [],
    )


def not_text(parts: Iterable[tuple[str, object]]) -> dict[str, Part]:
    """Return the parts that are images or files, by their places."""
    return {place: part for place, part in parts if isinstance(part, (ImagePart, FilePart))}


def _file_id(part: Part) -> str | None:
    """Return the id of an uploaded file that a part names. An `image_url` may be one, too."""
    if isinstance(part, FilePart):
        return part.file.file_id
    if isinstance(part, ImagePart) and part.image_url.url.startswith(FILE_ID):
        return part.image_url.url
    return None
