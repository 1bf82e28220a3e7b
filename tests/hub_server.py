"""A small Hugging Face hub on the loopback: creates, fills and serves model repositories.

It has the routes that huggingface_hub uses for `create_repo`, `upload_folder` (with LFS), and for
downloads. Uploads are verified: a commit with a file that did not arrive is refused.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Json = dict[str, Any]  # Any: JSON bodies of the hub


class HubServer(ThreadingHTTPServer):
    """All repositories of the hub, in memory. `token` is required for writes."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.is_private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.num_failures = 0  # of the next uploads of objects

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit_of(self, name: str) -> str:
        files = self.repositories[name]
        state = "".join(
            f"{path}{hashlib.sha256(files[path]).hexdigest()}" for path in sorted(files)
        )
        return hashlib.sha1(state.encode()).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.read()

    def do_GET(self) -> None:
        self.read()

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path.rpartition("/")[2]
        if self.server.num_failures:
            self.server.num_failures -= 1
            return self.send(400, {"error": "the storage fails"})
        if hashlib.sha256(content).hexdigest() != oid:
            return self.send(400, {"error": "the content does not have its SHA-256"})
        self.server.objects[oid] = content
        return self.send(200, {})

    def do_POST(self) -> None:
        content = self.body()
        if self.headers.get("authorization") != f"Bearer {self.server.token}":
            return self.send(401, {"error": "Invalid credentials"})
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        match parts:
            case ["api", "repos", "create"]:
                return self.create(json.loads(content))
            case ["api", "validate-yaml"]:
                return self.send(200, {"errors": [], "warnings": []})
            case ["api", "models", org, name, "preupload", _]:
                return self.preupload(f"{org}/{name}", json.loads(content))
            case [org, name, "info", "lfs", "objects", "batch"]:
                return self.batch(json.loads(content))
            case ["api", "models", org, name, "commit", _]:
                return self.commit(f"{org}/{name}", content)
        return self.send(404, {"error": "unknown route"})

    def create(self, body: Json) -> None:
        name = f"{body['organization']}/{body['name']}"
        if name in self.server.repositories:
            return self.send(409, {"url": f"{self.server.url}/{name}"})
        self.server.repositories[name] = {}
        self.server.is_private[name] = body.get("visibility") == "private" or bool(
            body.get("private")
        )
        return self.send(200, {"url": f"{self.server.url}/{name}", "id": name, "name": name})

    def preupload(self, name: str, body: Json) -> None:
        if name not in self.server.repositories:
            return self.send(404, {"error": "no such repository"})
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in body["files"]
        ]
        return self.send(200, {"files": files})

    def batch(self, body: Json) -> None:
        objects = []
        for entry in body["objects"]:
            answer = dict(entry)
            if entry["oid"] not in self.server.objects:
                href = f"{self.server.url}/objects/{entry['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        return self.send(200, {"objects": objects, "transfer": "basic"})

    def commit(self, name: str, content: bytes) -> None:
        added = {}
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self.send(400, {"error": f"{value['path']} was not uploaded"})
                added[value["path"]] = self.server.objects[value["oid"]]
        self.server.repositories[name].update(added)
        oid = self.server.commit_of(name)
        url = f"{self.server.url}/{name}/commit/{oid}"
        return self.send(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def read(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        match parts:
            case ["api", "models", org, name, *_] if f"{org}/{name}" in self.server.repositories:
                return self.send_info(f"{org}/{name}")
            case [org, name, "resolve", _, *rest] if f"{org}/{name}" in self.server.repositories:
                return self.send_file(f"{org}/{name}", "/".join(rest))
        return self.send(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

    def send_info(self, name: str) -> None:
        files = self.server.repositories[name]
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": "0" * 40}
            for path, content in files.items()
        ]
        self.send(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": self.server.commit_of(name),
                "private": self.server.is_private[name],
                "siblings": siblings,
            },
        )

    def send_file(self, name: str, path: str) -> None:
        content = self.server.repositories[name].get(path)
        if content is None:
            return self.send(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.server.commit_of(name),
            "Accept-Ranges": "bytes",
        }
        return self.send_bytes(200, content, headers)

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, status: int, document: Json, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(
            status,
            json.dumps(document).encode(),
            {"Content-Type": "application/json"} | (headers or {}),
        )

    def send_bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running_hub(token: str = "hf_write") -> Iterator[HubServer]:
    server = HubServer(token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
