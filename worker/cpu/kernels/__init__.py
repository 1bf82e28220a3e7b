"""C kernels, their build, and their Python bindings."""
