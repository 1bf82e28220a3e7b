"""Loads, keeps and unloads models, and runs one engine per model."""
