"""Builds the C kernels for the processor of this machine: `stillhouse kernels build`.

`python -m worker.build_kernels` builds the library if it is missing and prints where it is.
`--status` only prints it.
"""

import ctypes
import sys

from worker.cpu.kernels.build import (
    BuildFailed,
    KernelsUnavailable,
    build_library,
    find_library,
)

FEATURES = {
    "bfloat16 weights": "has_tiles",
    "int8 weights": "has_int8",
    "float32 matmuls of three bfloat16 parts": "has_splits",
}


def main() -> int:
    """Prints which kernels this machine uses. The exit status is 1 if the compiler failed."""
    is_status = sys.argv[1:] == ["--status"]
    try:
        path = find_library() if is_status else build_library()
    except KernelsUnavailable as reason:
        print(f"PyTorch operations are used, because the C kernels cannot be built: {reason}")
        return int(isinstance(reason, BuildFailed))
    if path is None:
        print(
            "the C kernels are not built yet; they are built with the first run or model, or by "
            "`stillhouse kernels build`"
        )
        return 0
    library = ctypes.CDLL(str(path))
    features = [name for name, has in FEATURES.items() if getattr(library, has)()]
    print(f"C kernels in {path}; fast on this processor: {', '.join(features) or 'float32 only'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
