import random

import prometheus_client
from prometheus_client import CollectorRegistry

from app.metrics.histogram import TOKEN_SECONDS, Histogram


def test_buckets_and_sum_are_those_of_prometheus_client() -> None:
    ours = Histogram(TOKEN_SECONDS)
    theirs = prometheus_client.Histogram(
        "seconds", "", buckets=TOKEN_SECONDS, registry=CollectorRegistry()
    )
    rng = random.Random(0)
    values = [*TOKEN_SECONDS, 0.0, *(rng.expovariate(1.0) * 10 for _ in range(300))]
    for value in values:
        times = rng.randint(1, 4)
        ours.observe(value, times)
        for _ in range(times):
            theirs.observe(value)
    (family,) = theirs.collect()
    buckets = [(s.labels["le"], s.value) for s in family.samples if s.name == "seconds_bucket"]
    assert ours.buckets() == buckets
    (total,) = [s.value for s in family.samples if s.name == "seconds_sum"]
    assert abs(ours.sum - total) < 1e-6
