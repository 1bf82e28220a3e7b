"""HTTP server with the routes of MLflow's tracking API that the service uses, and their rules.

A metric with the same name, time, step and value is stored once, as in MLflow's database.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]  # Any: JSON bodies of MLflow's API


class MlflowServer:
    """A server whose runs are in memory. `is_down` makes it answer with status 503."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, Json] = {}
        self.num_batches = 0
        self.is_down = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
                self._answer(query)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _answer(self, body: Json) -> None:
                route = urlsplit(self.path).path.removeprefix("/api/2.0/mlflow/")
                status, read = outer.handle(route, body)
                content = json.dumps(read).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handle(self, route: str, body: Json) -> tuple[int, Json]:
        if self.is_down:
            return 503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "maintenance"}
        match route:
            case "experiments/get-by-name":
                found = self.experiments.get(body["experiment_name"])
                if found is None:
                    return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}
                return 200, {"experiment": {"experiment_id": found}}
            case "experiments/create":
                number = self.experiments.setdefault(body["name"], str(len(self.experiments) + 1))
                return 200, {"experiment_id": number}
            case "runs/search":
                runs = [run for run in self.runs.values() if self._matches(run, body)]
                return 200, {"runs": runs} if runs else {}
            case "runs/create":
                return 200, {"run": self._create(body)}
            case "runs/log-batch":
                self._log(self.runs[body["run_id"]], body)
                return 200, {}
            case "runs/update":
                self.runs[body["run_id"]]["info"] |= body
                return 200, {}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": route}

    def _matches(self, run: Json, body: Json) -> bool:
        tag, _, value = body["filter"].removeprefix("tags.").partition(" = ")
        return bool(run["tags"].get(tag.strip("`")) == value.strip("'"))

    def _create(self, body: Json) -> Json:
        run_id = f"run{len(self.runs)}"
        tags = {tag["key"]: tag["value"] for tag in body["tags"]}
        info = {"run_id": run_id, "run_name": body["run_name"], "status": "RUNNING"}
        self.runs[run_id] = {"info": info, "tags": tags, "params": {}, "metrics": []}
        return self.runs[run_id]

    def _log(self, run: Json, body: Json) -> None:
        self.num_batches += bool(body.get("metrics"))
        run["tags"] |= {tag["key"]: tag["value"] for tag in body.get("tags", [])}
        run["params"] |= {param["key"]: param["value"] for param in body.get("params", [])}
        run["metrics"] += [m for m in body.get("metrics", []) if m not in run["metrics"]]
