"""The HTTP application: routes of models, files, jobs, health and figures; errors in one shape."""

from __future__ import annotations

import html
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files as resource_files
from typing import Annotated, Literal

from fastapi import APIRouter, FastAPI, File, Form, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from medm import __version__
from medm.serving import chat, vectors
from medm.serving.errors import ERRORS, ServingError, as_serving_error
from medm.serving.jobs import JobRequest
from medm.serving.limits import ApiKey, Gate
from medm.serving.schemas import IGNORED_HEADER, JobBody, ignored_fields, stops_of
from medm.serving.service import Service, generation_of
from medm.types import JsonObject

_FORMATS = {"nifti": "application/gzip", "png": "image/png", "dicom-seg": "application/dicom"}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string", "enum": sorted(ERRORS)},
            },
        }
    },
}


def build_app(service: Service, *, key: ApiKey | None) -> Gate:
    """Return the application of a service. Its lifespan starts and closes the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="medm",
        version=__version__,
        description="A medical vision-language model. Not for clinical use.",
        docs_url=None,  # their pages load scripts of other hosts
        redoc_url=None,
        lifespan=lifespan,
        responses={
            "4XX": {"description": "Refused", "content": {"application/json": {"schema": _ERROR}}},
            "5XX": {"description": "Failed", "content": {"application/json": {"schema": _ERROR}}},
        },
    )
    app.add_exception_handler(ServingError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_defect)
    app.include_router(_pages(service))
    app.include_router(_files(service))
    app.include_router(_jobs(service))
    app.include_router(chat.router(service))
    app.include_router(vectors.router(service))
    return Gate(app, service, key=key, routes=_route_names(app))


def _pages(service: Service) -> APIRouter:
    routes, started = APIRouter(), int(time.time())
    worker = service.worker

    @routes.get("/", include_in_schema=False)
    async def landing() -> Response:
        page = resource_files("medm.serving").joinpath("landing.html").read_text("utf-8")
        kinds = {"lvlm": "replies in text", "dual-encoder": "vectors and scores of labels"}
        for name, value in {
            "MODEL": service.name,
            "GIVES": kinds[worker.kind] + (", masks" if worker.has_masks else ""),
            "STATE": worker.state,
            "VERSION": __version__,
        }.items():
            page = page.replace(f"{{{name}}}", html.escape(value))
        return HTMLResponse(page)

    @routes.get("/health/live", summary="The process answers")
    async def live() -> Response:
        return JSONResponse({"status": "live"})

    @routes.get("/health/ready", summary="The model is loaded and requests are taken")
    async def ready() -> Response:
        worker.require_ready()
        return JSONResponse({"status": "ready"})

    @routes.get("/metrics", summary="Figures in Prometheus' format")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @routes.get("/v1/models", summary="The model of this server")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, started)]})

    @routes.get("/v1/models/{name}", summary="The model by its name")
    async def model(name: str) -> Response:
        service.require_model(name)
        return JSONResponse(_model(service, started))

    return routes


def _model(service: Service, started: int) -> JsonObject:
    worker = service.worker
    return {
        "id": service.name,
        "object": "model",
        "created": started,
        "owned_by": "medm",
        "kind": worker.kind,
        "inputs": worker.branches(),
        "masks": worker.has_masks,
        "max_tokens": worker.max_tokens,
        "notice": "Not for clinical use",
    }


def _files(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/files", summary="Upload an image, a volume, or a zip of a DICOM series")
    async def upload(
        file: Annotated[UploadFile, File()], purpose: Annotated[str | None, Form()] = None
    ) -> Response:
        size = file.size or 0
        stored = await service.in_thread(lambda: service.files.add(file.file, size))
        return JSONResponse(stored.as_json())

    @routes.get("/v1/files/{name}", summary="Checksum, geometry and expiry of a file")
    async def describe(name: str) -> Response:
        return JSONResponse(service.files.get(name).as_json())

    @routes.delete("/v1/files/{name}", summary="Delete a file")
    async def delete(name: str) -> Response:
        service.files.delete(name)
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    return routes


def _jobs(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/jobs", status_code=202, summary="Report or segmentation of uploaded files")
    async def submit(body: JobBody) -> Response:
        service.require_model(body.model)
        ignored = ignored_fields(body.model_extra)
        if len(body.files) > service.options.limits.max_images:
            raise ServingError(
                "too_many_images",
                f"{len(body.files)} files; at most {service.options.limits.max_images} are taken",
                param="files",
            )
        generation, without_effect = generation_of(body)
        ignored += without_effect
        job = service.jobs.submit(
            JobRequest(
                task=body.task,
                files=body.files,
                prompt=body.prompt,
                generation=generation,
                max_new_tokens=body.max_tokens,
                stop=stops_of(body.stop),
            )
        )
        headers = {IGNORED_HEADER: ", ".join(ignored)} if ignored else None
        return JSONResponse(job.as_json(), status_code=202, headers=headers)

    @routes.get("/v1/jobs/{name}", summary="Status and progress of a job")
    async def describe(name: str) -> Response:
        return JSONResponse(service.jobs.get(name).as_json())

    @routes.post("/v1/jobs/{name}/cancel", summary="Cancel a job")
    async def cancel(name: str) -> Response:
        return JSONResponse(service.jobs.cancel(name).as_json())

    @routes.delete("/v1/jobs/{name}", summary="Cancel a job and delete its result")
    async def delete(name: str) -> Response:
        service.jobs.delete(name)
        return JSONResponse({"id": name, "object": "job", "deleted": True})

    @routes.get("/v1/jobs/{name}/result", summary="Result of a job")
    async def result(
        name: str,
        format: Annotated[Literal["json", "nifti", "png", "dicom-seg"], Query()] = "json",
        mask: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    ) -> Response:
        job = service.jobs.get(name)
        if job.result is None:
            raise ServingError(
                "job_not_done", f"the job is {job.status}; a result needs the status succeeded"
            )
        if format not in job.formats():
            raise ServingError(
                "unsupported",
                f"this result can be had as {', '.join(job.formats())}",
                param="format",
            )
        if format == "json":
            return JSONResponse(job.result)
        path = job.dicom_seg
        if format != "dicom-seg":
            if mask >= len(job.masks):
                raise ServingError(
                    "not_found", f"the result has {len(job.masks)} masks", param="mask"
                )
            path = job.masks[mask]
        assert path is not None
        return FileResponse(path, media_type=_FORMATS[format], filename=path.name)

    return routes


def _route_names(app: FastAPI) -> Callable[[Scope], str]:
    """Return a function that gives the route of a request, without ids and unknown paths."""
    plain = {"/", *app.openapi()["paths"]}

    def name(scope: Scope) -> str:
        path = getattr(scope.get("route"), "path", scope["path"])
        return str(path) if path in plain else "other"

    return name


def _response(error: ServingError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return _response(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """Answer a body or query of another form. What was found is not repeated."""
    assert isinstance(error, RequestValidationError)
    # Of a value that may be of several types, the error that is farthest inside says most.
    found = max(
        error.errors(), key=lambda one: (len(one["loc"]), one["type"] == "union_tag_invalid")
    )
    if found["type"] == "json_invalid":
        return _response(ServingError("invalid_json", "the body is not valid JSON"))
    place = [str(part) for part in found["loc"] if part not in ("body", "query", "path")]
    # pydantic's own names of types hold brackets, and are no fields
    param = ascii(".".join(part for part in place if "[" not in part))[1:-1][:128] or None
    reason = found["msg"]
    if found["type"] == "extra_forbidden":
        reason = "unknown field"
    elif found["type"] == "union_tag_invalid":  # its text repeats what was found
        reason = f"expected the type {found['ctx']['expected_tags']}"
    return _response(ServingError("invalid_value", f"{param or 'body'}: {reason}", param=param))


async def _on_defect(request: Request, error: Exception) -> Response:
    """Answer a defect. The gate logs its type."""
    return _response(as_serving_error(error))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ServingError):
        return _response(error.__cause__)
    if error.status_code == 400:
        return _response(ServingError("invalid_json", "the body cannot be read: expected UTF-8"))
    code = _HTTP_CODES.get(error.status_code, "invalid_value")
    found = _response(ServingError(code, str(error.detail)))
    found.headers.update(error.headers or {})
    return found
