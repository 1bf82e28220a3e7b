"""Builds the C files of this folder into one library, once per processor, compiler and source.

`stillhouse kernels build` (worker/build_kernels.py) does this at install time. A process that
finds no library builds it when it needs it.
"""

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
MAX_KEPT = 8  # libraries in one folder, of other versions and other processors too
BUILD_SECONDS = 600  # the compiler needs 20 s on an idle core, and more on a busy machine


class KernelsUnavailable(Exception):
    """The library cannot be built on this machine; the message says why and what to do."""


class BuildFailed(KernelsUnavailable):
    """The compiler failed, although this machine has what it needs."""


class NoCacheFolder(KernelsUnavailable):
    """No folder can be written in which the library could be kept."""


def load_library() -> ctypes.CDLL | None:
    """Returns the library, or None if it cannot be built, which is logged."""
    try:
        return _load()
    except BuildFailed as failure:
        log.warning("kernels_failed", reason=str(failure))
    except KernelsUnavailable as reason:
        log.info("kernels_absent", reason=str(reason))
    except OSError as error:  # e.g. a full disk
        log.warning("kernels_failed", reason=str(error))
    return None


def _load() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(build_library()))
    except NoCacheFolder:  # build it for this process only
        command = compile_command()
        with tempfile.TemporaryDirectory(prefix="stillhouse-") as scratch:
            return ctypes.CDLL(str(_compile(command, Path(scratch) / library_name(command))))


def build_library() -> Path:
    """Returns the path of the library, and builds it first if it is missing.

    It is kept in the first of the `cache_folders` that can be written, under its `library_name`.

    Raises:
        KernelsUnavailable: This machine has no compiler, or is not supported.
        BuildFailed: The compiler failed.
        NoCacheFolder: The library cannot be kept.
    """
    if (found := find_library()) is not None:
        return found
    command = compile_command()
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                path = folder / library_name(command)
                os.replace(_compile(command, Path(scratch) / path.name), path)
                remove_old_libraries(folder)
                return path
        except OSError:  # e.g. the folder belongs to another user
            continue
    tried = " and ".join(map(str, cache_folders()))
    raise NoCacheFolder(f"{tried} cannot be written")


def find_library() -> Path | None:
    """Returns the path of a library that was built for this machine, or None.

    Raises KernelsUnavailable.
    """
    name = library_name(compile_command())
    return next((folder / name for folder in cache_folders() if (folder / name).is_file()), None)


def remove_old_libraries(folder: Path) -> None:
    """Removes all but the `MAX_KEPT` newest libraries. A process that has loaded one keeps it."""
    libraries = sorted(folder.glob("kernels-*.so"), key=lambda path: path.stat().st_mtime)
    for path in libraries[:-MAX_KEPT]:
        path.unlink(missing_ok=True)


def cache_folders() -> list[Path]:
    """Returns the folders that may hold the library: one in the package and one of the user."""
    user = Path(os.path.expanduser("~/.cache/stillhouse"))
    # Without a home directory the path is relative, and any folder could be meant.
    return [FOLDER / "__pycache__", *([user] if user.is_absolute() else [])]


def compile_command() -> list[str]:
    """Returns the compiler with its options and inputs, without the output.

    Raises KernelsUnavailable.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    openmp = sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))
    if platform.system() != "Linux":
        raise KernelsUnavailable(f"they need Linux, but this is {platform.system()}")
    if compiler is None:
        raise KernelsUnavailable("there is no C compiler; install gcc")
    if not openmp:
        raise KernelsUnavailable("this build of PyTorch does not include GNU OpenMP")
    return [compiler, *FLAGS, *map(str, SOURCES), str(openmp[0]), "-lm"]


def library_name(command: list[str]) -> str:
    """Returns a file name with a hash of the command, the processor and the sources."""
    cpu = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("flags", "Features"))
    ]
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.[ch]"))]
    made_of = [*command, cpu[0] if cpu else platform.machine(), *texts]
    return f"kernels-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"


def _compile(command: list[str], target: Path) -> Path:
    try:
        subprocess.run(
            [*command, "-o", str(target)], check=True, capture_output=True, timeout=BUILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"{command[0]} took longer than {BUILD_SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        errors = error.stderr.decode(errors="replace")[-500:]
        raise BuildFailed(f"{command[0]} failed: {errors}") from None
    return target
