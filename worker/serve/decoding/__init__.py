"""Batched decode steps: scheduling, KV cache, model families and sampling."""
