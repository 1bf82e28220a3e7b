from typing import Any

import httpx


def test_without_a_serve_worker_the_service_is_degraded_but_ready(http: httpx.Client) -> None:
    assert http.get("/health/live").json() == {"status": "alive"}
    answer = http.get("/health/ready")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "degraded",
        "database": True,
        "serve_workers": 0,
        "stalled_serve_workers": 0,
        "last_forward_seconds": None,
    }


def test_metrics_speak_prometheus_and_only_to_an_operator(
    service: Any, http: httpx.Client
) -> None:  # Any: conftest's
    http.get("/v1/files/file-unknown")
    text = http.get("/metrics").text
    assert 'stillhouse_jobs{status="queued"} 0.0' in text
    assert 'route="/v1/files/{file_id}",status="404"' in text
    assert "file-unknown" not in text
    with service.http(service.new_key(scopes=["jobs:read"])) as narrow:
        assert narrow.get("/metrics").status_code == 403
