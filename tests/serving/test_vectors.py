"""Vectors and zero-shot scores are those of the embedder."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import openai

from medm.inference.zero_shot import class_vectors
from tests.serving.live import Live, code, data_uri, png, question, upload


def image(content: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": content}}


def test_embeddings_of_texts_and_images(dual: Live, tmp_path: Path) -> None:
    embedder = dual.service.worker.embedder
    assert embedder is not None
    (tmp_path / "a.png").write_bytes(png(1))
    with dual.client() as client:
        name = upload(client, tmp_path / "a.png")["id"]
        items = ["a lung", image(data_uri(png())), {"type": "file", "file": {"file_id": name}}]
        body = {"model": "model", "input": items}
        found = client.post("/v1/embeddings", json=body).json()
        packed = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    rows = np.array([entry["embedding"] for entry in found["data"]], np.float32)
    texts = embedder.texts(["a lung"]).numpy()
    images = embedder.images([png(), png(1)]).numpy()
    np.testing.assert_allclose(rows, np.concatenate([texts, images]), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    decoded = [np.frombuffer(base64.b64decode(e["embedding"]), "<f4") for e in packed["data"]]
    np.testing.assert_array_equal(np.stack(decoded), rows)


def test_the_client_of_openai(dual: Live) -> None:
    client = openai.OpenAI(base_url=f"{dual.url}/v1", api_key="none needed", max_retries=0)
    found = client.embeddings.create(model="model", input=["a lung", "a liver"])
    embedder = dual.service.worker.embedder
    assert embedder is not None
    expected = embedder.texts(["a lung", "a liver"]).numpy()
    np.testing.assert_allclose([row.embedding for row in found.data], expected, atol=1e-6)


def test_zero_shot(dual: Live) -> None:
    embedder = dual.service.worker.embedder
    assert embedder is not None
    labels, templates = ["lung", "liver"], ["an image of {}", "a scan of {}"]
    body = {
        "model": "model", "input": [image(data_uri(png())), image(data_uri(png(1)))],
        "labels": labels, "templates": templates,
    }  # fmt: skip
    with dual.client() as client:
        found = client.post("/v1/zero-shot", json=body).json()
        logits = embedder.logits(
            embedder.images([png(), png(1)]), class_vectors(embedder, labels, templates)
        )
        for row, expected in zip(found["data"], embedder.probabilities(logits), strict=True):
            np.testing.assert_allclose(
                [row["probabilities"][label] for label in labels], expected.numpy(), atol=1e-6
            )
        assert "not calibrated" in found["notice"]
        for change, expected_code in (
            ({"templates": ["no place"]}, (400, "invalid_value")),
            ({"labels": ["lung", "lung"]}, (400, "invalid_value")),
            ({"labels": ["lung"]}, (400, "invalid_value")),
            ({"input": [{"type": "text", "text": "x"}]}, (400, "invalid_value")),
            ({"input": [image("/etc/passwd")]}, (400, "source_refused")),
        ):
            assert code(client.post("/v1/zero-shot", json=body | change)) == expected_code


def test_routes_of_the_other_kind_of_model(dual: Live, live: Live) -> None:
    with dual.client() as client:
        assert code(client.post("/v1/chat/completions", json=question())) == (400, "unsupported")
        assert client.get("/v1/models").json()["data"][0]["kind"] == "dual-encoder"
        body = {"model": "model", "input": "x" * 70_000}
        assert code(client.post("/v1/embeddings", json=body))[0] == 413
        assert code(client.post("/v1/embeddings", json=body | {"input": " "}))[0] == 400
        assert code(client.post("/v1/embeddings", json=body | {"dimensions": 4}))[0] == 400
    with live.client() as client:
        body = {"model": "model", "input": "a lung"}
        assert code(client.post("/v1/embeddings", json=body)) == (400, "unsupported")
