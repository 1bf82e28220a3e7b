"""Batched decoding: scheduling, KV cache, model families and sampling."""
