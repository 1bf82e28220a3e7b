"""Loads and unloads models, and runs one engine per serving key."""
