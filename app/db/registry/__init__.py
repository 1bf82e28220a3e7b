"""Queries and changes of the model registry beyond single models: alias history, users."""
