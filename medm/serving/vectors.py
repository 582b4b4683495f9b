"""`/v1/embeddings` and `/v1/zero-shot`: vectors and scores of dual encoders."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

import numpy as np
import torch
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from medm.errors import RecipeError
from medm.inference.zero_shot import class_vectors
from medm.models.dual_encoder.embedder import Embedder
from medm.serving.errors import ServingError
from medm.serving.schemas import (
    IGNORED_HEADER,
    EmbeddingsBody,
    Part,
    TextPart,
    ZeroShotBody,
    ignored_fields,
)
from medm.serving.service import Service, not_text

_MAX_TEXT = 2**16
"""Most bytes of a text; text encoders read far fewer."""


def router(service: Service) -> APIRouter:
    """Return the routes of dual encoders."""
    routes = APIRouter()

    @routes.post("/v1/embeddings", summary="Vectors of texts and images, of length 1")
    async def embeddings(body: EmbeddingsBody) -> Response:
        service.require_model(body.model)
        service.worker.require_ready("dual-encoder")
        ignored = ignored_fields(body.model_extra)
        items = [body.input] if isinstance(body.input, str) else body.input
        texts = {place: item for place, item in enumerate(map(_text_of, items)) if item is not None}
        _check_texts(list(texts.values()), "input")
        arrays = await service.in_thread(lambda: _pixels(service, items))

        def vectors() -> np.ndarray:
            embedder = _embedder(service)
            rows: dict[int, torch.Tensor] = {}
            if texts:
                rows |= dict(zip(texts, embedder.texts(list(texts.values())), strict=True))
            if arrays:
                images = embedder.pixels(torch.from_numpy(np.stack(arrays)))
                rows |= dict(zip(sorted({*range(len(items))} - {*texts}), images, strict=True))
            return torch.stack([rows[place] for place in range(len(items))]).numpy()

        found = await asyncio.wrap_future(service.worker.call(vectors))
        data = [
            {"object": "embedding", "index": place, "embedding": _listed(row, body.encoding_format)}
            for place, row in enumerate(found)
        ]
        # A dual encoder cuts its texts to a fixed length: there is no count of tokens to bill.
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        headers = {IGNORED_HEADER: ", ".join(ignored)} if ignored else None
        content = {"object": "list", "data": data, "model": service.name, "usage": usage}
        return JSONResponse(content, headers=headers)

    @routes.post("/v1/zero-shot", summary="Probabilities of labels for images or volumes")
    async def zero_shot(body: ZeroShotBody) -> Response:
        service.require_model(body.model)
        service.worker.require_ready("dual-encoder")
        templates = body.templates or ["{}"]
        _check_texts(body.labels, "labels")
        _check_texts(templates, "templates")
        if len(set(body.labels)) != len(body.labels):
            raise ServingError("invalid_value", "expected different labels", param="labels")
        if any(isinstance(item, TextPart) for item in body.input):
            raise ServingError("invalid_value", "expected images or files", param="input")
        arrays = await service.in_thread(lambda: _pixels(service, body.input))

        def probabilities() -> list[list[float]]:
            embedder = _embedder(service)
            texts = class_vectors(embedder, body.labels, templates)
            vectors = embedder.pixels(torch.from_numpy(np.stack(arrays)))
            return embedder.probabilities(embedder.logits(vectors, texts)).tolist()

        try:
            rows = await asyncio.wrap_future(service.worker.call(probabilities))
        except RecipeError:
            raise ServingError(
                "invalid_value",
                "expected templates with one {} each, where the label stands",
                param="templates",
            ) from None
        data = [
            {"index": place, "probabilities": dict(zip(body.labels, row, strict=True))}
            for place, row in enumerate(rows)
        ]
        notice = "Not for clinical use: probabilities are over these labels alone, not calibrated."
        return JSONResponse(
            {"object": "list", "data": data, "model": service.name, "notice": notice}
        )

    return routes


def _embedder(service: Service) -> Embedder:
    assert service.worker.embedder is not None
    return service.worker.embedder


def _text_of(item: str | Part) -> str | None:
    if isinstance(item, str):
        return item
    return item.text if isinstance(item, TextPart) else None


def _check_texts(texts: Sequence[str], param: str) -> None:
    if any(not text.strip() for text in texts):
        raise ServingError("invalid_value", "expected texts that are not empty", param=param)
    if any(len(text.encode()) > _MAX_TEXT for text in texts):
        raise ServingError(
            "context_length_exceeded", f"a text of more than {_MAX_TEXT} bytes", param=param
        )


def _pixels(service: Service, items: Sequence[str | Part]) -> list[np.ndarray]:
    """Return the prepared images of some items. Raises `ServingError`."""
    parts = not_text((f"input.{place}", item) for place, item in enumerate(items))
    with service.sources(parts) as sources:
        return [service.worker.pixels(source.kind, source.content) for source in sources]


def _listed(row: np.ndarray, encoding: str | None) -> list[float] | str:
    """Return a vector as numbers, or as OpenAI's base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    return [float(value) for value in row]
