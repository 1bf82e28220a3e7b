from collections.abc import Callable
from pathlib import Path

import pytest

from app.commands.up import UpOptions, _processes, cuda_share
from app.settings import Settings


@pytest.mark.parametrize(
    ("devices", "count", "shares"),
    [
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("0,1,2", 2, ["0", "1,2"]),
        ("0,1", 3, ["0", "1", "0"]),
        ("GPU-5f,GPU-e0", 2, ["GPU-5f", "GPU-e0"]),
        ("", 2, ["", ""]),
    ],
)
def test_workers_share_their_devices_evenly(devices: str, count: int, shares: list[str]) -> None:
    assert [cuda_share(devices, i, count) for i in range(count)] == shares


def test_every_worker_is_started_with_devices_of_its_own(
    settings_env: Callable[..., Settings], tmp_path: Path
) -> None:
    settings_env(train_cuda_devices="0,1", serve_cuda_devices="2,3")
    api, *workers = _processes(
        UpOptions(tmp_path, "127.0.0.1", 0, train_workers=2, serve_workers=2)
    )
    assert not api.environment
    assert [dict(worker.environment) for worker in workers] == [
        {"STILLHOUSE_TRAIN_CUDA_DEVICES": "0"},
        {"STILLHOUSE_TRAIN_CUDA_DEVICES": "1"},
        {"STILLHOUSE_SERVE_CUDA_DEVICES": "2"},
        {"STILLHOUSE_SERVE_CUDA_DEVICES": "3"},
    ]
