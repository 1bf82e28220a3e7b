"""GPU memory of single parts of a run."""
