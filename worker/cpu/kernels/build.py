"""Builds the C files of this folder into one library, once per processor, compiler and source."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import structlog
import torch

log = structlog.get_logger(__name__)

FOLDER = Path(__file__).parent
SOURCES = [
    FOLDER / name
    for name in (
        "decoder_layers.c",
        "tiled_matmul.c",
        "int8_matmul.c",
        "bf16x3_matmul.c",
        "decode_ops.c",
        "norm_swiglu.c",
        "causal_attention.c",
        "distill_loss.c",
    )
]
# sums may be reordered, so that they can be vectorised; infinities and NaN must keep their meaning
FLAGS = [
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
]
FLAGS += ["-fopenmp", "-shared", "-fPIC"]
BUILD_SECONDS = 120


def load_library() -> ctypes.CDLL | None:
    """Returns the library, or None if it cannot be built, which is logged.

    It needs Linux, a C compiler, and a PyTorch that brings GNU OpenMP.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    openmp = sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))
    if platform.system() != "Linux" or compiler is None or not openmp:
        log.info("kernels_absent", compiler=compiler, has_openmp=bool(openmp))
        return None
    try:
        return _load([compiler, *FLAGS, *map(str, SOURCES), str(openmp[0]), "-lm"])
    except (OSError, subprocess.SubprocessError) as error:
        errors = getattr(error, "stderr", None) or b""
        log.warning(
            "kernels_failed", reason=str(error), errors=errors.decode(errors="replace")[-500:]
        )
        return None


def _load(command: list[str]) -> ctypes.CDLL:
    """Loads the library, and builds it first if it is missing.

    It is kept in `__pycache__`, under a hash of command, processor and sources. If that folder
    cannot be written, the library is built for this process only.
    """
    cpu = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("flags", "Features"))
    ]
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.[ch]"))]
    made_of = [*command, cpu[0] if cpu else platform.machine(), *texts]
    name = f"kernels-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    kept = FOLDER / "__pycache__" / name
    try:
        kept.parent.mkdir(exist_ok=True)
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
                os.replace(_compile(command, Path(scratch) / name), kept)
        return ctypes.CDLL(str(kept))
    except OSError:
        with tempfile.TemporaryDirectory(prefix="stillhouse-") as scratch:
            return ctypes.CDLL(str(_compile(command, Path(scratch) / name)))


def _compile(command: list[str], target: Path) -> Path:
    subprocess.run(
        [*command, "-o", str(target)], check=True, capture_output=True, timeout=BUILD_SECONDS
    )
    return target
