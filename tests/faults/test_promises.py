"""The short form of `python -m tests.faults`: a seeded handful of every fault, and nothing is lost or done twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import disk
from tests.faults.__main__ import PROMISES, Promise, run_promises
from tests.faults.system import System

pytestmark = pytest.mark.e2e
SEED = 7


@pytest.fixture(scope="module")
def system(service_dir: Path) -> Iterator[System]:
    with System(service_dir / "promises") as running:
        yield running


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.name)
def test_a_promise_is_kept_under_its_faults(system: System, promise: Promise) -> None:
    (figures,) = run_promises(system, [promise], seed=SEED, seconds=60, is_short=True)
    assert figures.wrongs == []
    assert figures.faults > 0
    assert (figures.lost, figures.duplicated) == (0, 0)


@pytest.mark.parametrize("name", disk.SAYS)
def test_a_checkpoint_survives_its_disk(service_dir: Path, name: str) -> None:
    figures = disk.run(name, service_dir, seed=SEED, is_short=True)
    if name == "disk_full" and any("unshare:" in w or "mount:" in w for w in figures.wrongs):
        pytest.skip("a small disk needs a mount namespace, which this machine does not allow")
    assert figures.wrongs == []
    assert figures.faults > 0
