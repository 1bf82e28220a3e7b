"""Snapshot of an engine's KV cache and prefix cache, for metrics."""

from typing import NamedTuple


class CacheStatus(NamedTuple):
    """Use of the caches of one engine.

    usage: Used fraction of the KV cache, from 0 to 1.
    num_prefix_queries, num_prefix_hits: Prompt tokens that were looked up in the prefix cache, and
        those that were found there, since the engine was created.
    """

    usage: float
    num_prefix_queries: int
    num_prefix_hits: int
