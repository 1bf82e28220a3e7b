"""Parsed scrapes of Prometheus metrics."""

from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families


def samples_of(text: str) -> dict[str, float]:
    """The value of each sample, by its name with its labels in alphabetical order."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in found, f"{name} is exported twice"
            found[name] = sample.value
    return found


def scrape(http: httpx.Client, url: str = "") -> dict[str, float]:
    answer = http.get(f"{url}/metrics")
    assert answer.status_code == 200, answer.text
    return samples_of(answer.text)


def total(samples: Mapping[str, float], name: str, **labels: str) -> float:
    """The sum of the samples with this name and these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        value
        for key, value in samples.items()
        if key.partition("{")[0] == name and all(each in key for each in wanted)
    )


def missing_ends(samples: Mapping[str, float]) -> float:
    """The number of requests that have started but neither completed, aborted nor failed."""
    started = total(samples, "stillhouse_requests_started_total")
    ended = total(samples, "stillhouse_requests_ended_total")
    return started - ended
