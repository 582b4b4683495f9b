"""Requests drawn from the OpenAPI description, right and wrong ones: none of them is a defect."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase

from tests.serving.live import Live


def run(live: Live, path: str, *, examples: int) -> set[int]:
    """Statuses of requests to the routes of a description."""
    headers = {"authorization": f"Bearer {live.key}"} if live.key else {}
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json", headers=headers)
    statuses: set[int] = set()
    for result in schema.include(path_regex=path).get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.seed(0)
        @hypothesis.given(case=operation.as_strategy())
        def answer(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "model"  # beyond the first check
            response = case.call(headers=headers, timeout=30)
            statuses.add(response.status_code)
            assert response.status_code < 500, (case.method, case.path, response.text)
            if response.status_code >= 400 and case.method.upper() != "HEAD":
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}

        answer()
    return statuses


@pytest.mark.timeout(120)
def test_no_request_is_a_defect(live: Live, dual: Live) -> None:
    statuses = run(live, "^/(v1|metrics|health)", examples=15)
    assert {200, 400, 404} <= statuses
    assert run(dual, "^/v1/(embeddings|zero-shot)", examples=20) >= {400}
    assert live.idle() and dual.idle()
    assert live.chat().status_code == 200
