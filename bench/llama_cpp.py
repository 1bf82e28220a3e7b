"""llama.cpp's own server, built from the sources that the package llama-cpp-python carries."""

import os
import shutil
import sys
import tarfile
from pathlib import Path

from bench.children import ChildFailed, run
from worker.models.gguf_writer import Kind, export_gguf

SOURCES = "llama-cpp-python"  # its own server answers one request at a time; llama.cpp's, which it carries, batches
QUANTIZE = "llama-quantize"
# as many answers at once as the bench has callers; prompt and answer in each
NUM_SLOTS, SLOT_TOKENS = (
    64,
    512,
)
KIND_OF: dict[str, Kind] = {"float32": "f32", "float16": "f16", "q8_0": "q8_0"}
SETTINGS = (
    "BUILD_SHARED_LIBS",
    "LLAMA_OPENSSL",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_USE_PREBUILT_UI",
)


def build(folder: Path) -> Path:
    """The server's program, built for this machine the first time (ten minutes on two cores). Raises ChildFailed."""
    program = folder / "llama-server"
    if program.exists():
        return program
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise ChildFailed(f"there is no {tool} to build llama.cpp with")
    print("Building llama.cpp's server (once)", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "download", "--no-deps", "--no-binary", SOURCES, "--dest", str(folder), SOURCES])
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (sources,) = folder.glob("*/vendor/llama.cpp")
    made = folder / "build"
    off = [f"-D{setting}=OFF" for setting in SETTINGS]
    run(["cmake", "-S", str(sources), "-B", str(made), "-DCMAKE_BUILD_TYPE=Release", *off])
    cores = str(len(os.sched_getaffinity(0)))
    run(["cmake", "--build", str(made), "--target", "llama-server", QUANTIZE, "--parallel", cores])
    (made / "bin" / QUANTIZE).rename(folder / QUANTIZE)
    (made / "bin" / "llama-server").rename(program)
    shutil.rmtree(made)
    shutil.rmtree(sources)
    return program


def make_weights(program: Path, model_dir: Path, dtype: str) -> None:
    """Writes our own GGUF export of the model, the first time; llama.cpp's own tool quantises the kinds that we do not write."""
    weights = path_of_weights(model_dir, dtype)
    if weights.exists():
        return
    partial = weights.with_suffix(".partial")
    if dtype in KIND_OF:
        export_gguf(model_dir, partial, kind=KIND_OF[dtype])
    else:
        make_weights(program, model_dir, "float16")
        source = path_of_weights(model_dir, "float16")
        run([str(program.with_name(QUANTIZE)), str(source), str(partial), dtype.upper()])
    partial.rename(weights)


def path_of_weights(model_dir: Path, dtype: str) -> Path:
    return model_dir.with_name(f"{model_dir.name}-{KIND_OF.get(dtype, dtype)}.gguf")


def command(program: Path, model_dir: Path, dtype: str, port: int, num_threads: int) -> list[str]:
    """Serves the weights that `make_weights` has written."""
    weights = path_of_weights(model_dir, dtype)
    options = ["--parallel", str(NUM_SLOTS), "--ctx-size", str(NUM_SLOTS * SLOT_TOKENS), "--no-ui"]
    options += ["--threads", str(num_threads), "--threads-batch", str(num_threads)]
    return [
        str(program),
        "--model",
        str(weights),
        *options,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
