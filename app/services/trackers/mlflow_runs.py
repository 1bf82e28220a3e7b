"""Sends the metrics of jobs to an MLflow server, over its REST API.

A batch that is sent again uses the same run, which is found by the tag with the job's id. Its metrics
have the same step, time and value. A server with a database stores such metrics once.
"""

from typing import Any, Final

import httpx

from app.contracts.trackers import Delivery, Json, MlflowOptions, TrackerDown

TIMEOUT_SECONDS: Final = 10.0
JOB_TAG: Final = "stillhouse.job_id"
STATUSES: Final = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


class MlflowRuns:
    """Client of one MLflow server."""

    def __init__(self, tracking_uri: str) -> None:
        self._http = httpx.Client(base_url=tracking_uri, timeout=TIMEOUT_SECONDS)

    def deliver(self, batch: Delivery) -> Json:
        """Sends a batch and returns the state for the next one. Raises TrackerDown."""
        state = dict(batch.state)
        if "run_id" not in state:
            state["run_id"] = self._start(batch)
        run_id = state["run_id"]
        if state.pop("is_closed", False) and batch.end is None:
            self._call("POST", "runs/update", {"run_id": run_id, "status": "RUNNING"})
        if batch.points:
            metrics = [_metric(p.name, p.value, p.created_at, p.step) for p in batch.points]
            self._call("POST", "runs/log-batch", {"run_id": run_id, "metrics": metrics})
        if batch.end is not None:
            self._finish(batch, run_id)
            state["is_closed"] = True
        return state

    def _start(self, batch: Delivery) -> str:
        """Returns the id of the job's run, which is created if it does not exist."""
        options = MlflowOptions.model_validate(batch.options)
        experiment_id = self._experiment(options.experiment)
        query = {
            "experiment_ids": [experiment_id],
            "filter": f"tags.`{JOB_TAG}` = '{batch.job_id}'",
            "max_results": 1,
        }
        runs = self._call("POST", "runs/search", query).get("runs") or []
        if not runs:
            body = {
                "experiment_id": experiment_id,
                "run_name": options.run_name or batch.job_id,
                "start_time": int(batch.created_at * 1000),
                "tags": _pairs({**options.tags, JOB_TAG: batch.job_id}),
            }
            runs = [self._call("POST", "runs/create", body)["run"]]
        run_id = str(runs[0]["info"]["run_id"])
        params = {"run_id": run_id, "params": _pairs(batch.config)}
        self._call("POST", "runs/log-batch", params)
        return run_id

    def _experiment(self, name: str) -> str:
        query = {"experiment_name": name}
        found = self._call("GET", "experiments/get-by-name", query, "RESOURCE_DOES_NOT_EXIST")
        if not found:
            body = {"name": name}
            created = self._call("POST", "experiments/create", body, "RESOURCE_ALREADY_EXISTS")
            if created:
                return str(created["experiment_id"])
            found = self._call("GET", "experiments/get-by-name", query)
        return str(found["experiment"]["experiment_id"])

    def _finish(self, batch: Delivery, run_id: str) -> None:
        end = batch.end
        assert end is not None
        tags = {"stillhouse.status": end.status, "stillhouse.model": end.fine_tuned_model or ""}
        metrics = [
            _metric(name, value, end.finished_at, end.last_step)
            for name, value in end.figures.items()
        ]
        body = {"run_id": run_id, "metrics": metrics, "tags": _pairs(tags)}
        self._call("POST", "runs/log-batch", body)
        update = {
            "run_id": run_id,
            "status": STATUSES[end.status],
            "end_time": int(end.finished_at * 1000),
        }
        self._call("POST", "runs/update", update)

    def _call(self, method: str, route: str, body: Json, accepted_error: str = "") -> Json:
        """Returns the response, or an empty one for `accepted_error`. Raises TrackerDown."""
        content = {"params": body} if method == "GET" else {"json": body}
        try:
            answer = self._http.request(method, f"api/2.0/mlflow/{route}", **content)  # type: ignore[arg-type]  # one of two keywords
        except httpx.HTTPError as fault:
            raise TrackerDown(f"{type(fault).__name__}: {fault}") from fault
        try:
            read: Any = answer.json()
        except ValueError:
            read = None
        if not isinstance(read, dict):
            raise TrackerDown(f"HTTP {answer.status_code} without a JSON object from {route}")
        if answer.is_success:
            return read
        if accepted_error and read.get("error_code") == accepted_error:
            return {}
        reason = str(read.get("message", ""))[:300]
        raise TrackerDown(f"HTTP {answer.status_code} from {route}: {reason}")


def _metric(name: str, value: float, at: float, step: int) -> Json:
    return {"key": name, "value": value, "timestamp": int(at * 1000), "step": step}


def _pairs(values: Json) -> list[Json]:
    return [{"key": key, "value": str(value)} for key, value in values.items()]
