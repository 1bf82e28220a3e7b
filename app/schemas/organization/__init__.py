"""Bodies of the routes about the whole service."""
