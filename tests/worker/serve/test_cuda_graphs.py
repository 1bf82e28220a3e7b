"""The cache of recordings, without a GPU."""

from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from worker.serve.cuda_graphs import DRIVER_BYTES, RESERVED_BYTES, GraphCache, Region


class Calls:
    """A recorder that counts. A recording runs nothing, as on a GPU."""

    num_bytes = 100

    def __init__(self, error: RuntimeError | None = None) -> None:
        self.error = error
        self.calls: list[str] = []

    def warm_up(self, region: Region) -> None:
        self.calls.append("warm_up")
        region()

    def record(self, region: Region) -> Region:
        self.calls.append("record")
        if self.error is not None:
            raise self.error
        return region

    def reset(self) -> None:
        self.calls.append("reset")


@pytest.fixture
def runs() -> list[str]:
    return []


@pytest.fixture
def region(runs: list[str]) -> Callable[[str], Region]:
    return lambda name: lambda: runs.append(name)


def test_a_region_is_warmed_up_then_recorded_and_runs_once_each_time(
    runs: list[str], region: Callable[[str], Region]
) -> None:
    recorder = Calls()
    graphs = GraphCache(recorder)
    for number in range(1, 5):
        graphs.run("a", region("a"))
        assert runs == ["a"] * number
    assert recorder.calls == ["warm_up", "record"]
    assert (graphs.num_recorded, graphs.num_replayed) == (1, 3)


def test_the_least_recently_used_graph_is_dropped(
    runs: list[str], region: Callable[[str], Region]
) -> None:
    recorder = Calls()
    graphs = GraphCache(recorder, max_graphs=2)
    for key in "aabbaccb":
        graphs.run(key, region(key))
    assert "".join(runs) == "aabbaccb"
    assert recorder.calls == ["warm_up", "record"] * 3 + ["warm_up"]
    assert len(graphs) == 2


def test_cleared_graphs_are_recorded_again(region: Callable[[str], Region]) -> None:
    recorder = Calls()
    graphs = GraphCache(recorder)
    for _ in range(2):
        for _ in range(2):
            graphs.run("a", region("a"))
        assert graphs.num_bytes == recorder.num_bytes + DRIVER_BYTES
        assert graphs.reserved_bytes == RESERVED_BYTES
        graphs.clear()
        assert graphs.num_bytes == 0
    assert recorder.calls == ["warm_up", "record", "reset"] * 2


def test_a_failure_is_logged_once_and_the_regions_still_run(
    runs: list[str], region: Callable[[str], Region]
) -> None:
    recorder = Calls(RuntimeError("operation not permitted when stream is capturing"))
    graphs = GraphCache(recorder)
    with capture_logs() as logs:
        for key in "aaabb":
            graphs.run(key, region(key))
    assert "".join(runs) == "aaabb"
    assert graphs.is_off
    assert recorder.calls == ["warm_up", "record"]
    assert [entry["event"] for entry in logs] == ["cuda_graphs_off"]


def test_other_errors_of_a_region_are_raised() -> None:
    def broken() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        GraphCache(Calls()).run("a", broken)
