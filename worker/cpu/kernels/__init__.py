"""C kernels, how they are built, and their Python bindings."""
