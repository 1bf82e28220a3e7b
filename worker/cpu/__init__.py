"""Fast paths for CPUs: packed weights, fused decoding and training operations, and their C kernels."""
