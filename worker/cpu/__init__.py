"""CPU fast paths: packed weights, fused decoding, training operations, and their C kernels."""
