"""A few seconds of the soak on a real service: every kind of load works, and every figure is measured."""

from pathlib import Path

from tests.e2e.service import TEACHER, start_service
from tests.soak.__main__ import SETTINGS, soak, table


def test_a_short_soak_measures_every_process_and_finds_no_fault(
    service_dir: Path, tiny_llama_dir: Path
) -> None:
    service = start_service(service_dir / "soak", **SETTINGS)
    try:
        service.cli("models", "import", str(tiny_llama_dir), "--name", TEACHER)
        report = soak(service, tiny_llama_dir, seconds=8, seed=1, sample_seconds=0.5)
    finally:
        assert service.stop() == 0
    assert report["faults"] == []
    done = " ".join(report["counts"])
    assert all(kind in done for kind in ("job", "prompt", "upload", "batch", "read"))
    owners = {row["owner"] for row in report["figures"]}
    assert {"up", "api", "train worker", "serve worker", "valkey", "postgres", "disk"} <= owners
    assert table(report["figures"]).count("\n") == len(report["figures"]) + 1
