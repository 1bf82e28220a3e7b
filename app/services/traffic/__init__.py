"""Stores chat completions after they have been answered, and makes data sets of them."""
