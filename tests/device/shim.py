"""Compiles and loads the stand-in for CUDA. Does not import torch: the hooks must come first."""

import ctypes
import hashlib
import os
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")
BUILD_DIR = Path(__file__).resolve().parents[2] / ".stillhouse" / "device"


def compile_shim(compiler: str) -> Path:
    """Returns the shared library for the installed version of PyTorch. Compiles it only once."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_dir = Path(spec.origin).parent
    key = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = BUILD_DIR / f"shim-{version('torch')}-{key}.so"
    if library.exists():
        return library
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_dir / 'include'}"]
    # the libraries follow the source: the linker drops those that nothing before them needs
    command += [str(SOURCE), "-o", str(partial), f"-L{torch_dir / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, f"-Wl,-rpath,{torch_dir / 'lib'}"], check=True, capture_output=True)
    partial.rename(library)  # several test processes may compile at once
    return library


def load_shim(library: Path) -> None:
    """Registers the hooks and the device guard. Call it before the first import of torch."""
    ctypes.CDLL(str(library)).register_fake_cuda()
