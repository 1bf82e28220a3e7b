"""Sends the metrics of jobs to Weights & Biases, with its library in a child process per batch.

The library starts threads and processes and may block, so it must not run in the API process. When
the child process has exited with status 0, the server has the batch.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from app.contracts.trackers import Delivery, Json, TrackerDown
from app.local.process_manager import environment_without_secrets
from app.parent_death import tethered
from app.settings import Settings

TIMEOUT_SECONDS: Final = 90.0
COMMAND: Final = [sys.executable, "-m", "app.services.trackers.wandb_child"]
DELIVERY: Final = TypeAdapter(Delivery)


class WandbRuns:
    """Runs at Weights & Biases, or in the data folder if the mode is offline."""

    def __init__(self, settings: Settings) -> None:
        self._api_key = settings.wandb_api_key
        self._base_url = settings.wandb_base_url
        self._mode = settings.wandb_mode
        self._offline_dir = settings.data_dir.resolve()

    def deliver(self, batch: Delivery) -> Json:
        """Sends a batch and returns the state for the next one. Raises TrackerDown."""
        try:
            # A folder that cannot be deleted does not concern the batch, which has arrived.
            with tempfile.TemporaryDirectory(
                prefix="stillhouse-wandb-", ignore_cleanup_errors=True
            ) as scratch:
                folder = self._offline_dir if self._mode == "offline" else Path(scratch)
                folder.mkdir(parents=True, exist_ok=True)
                self._run(batch, folder)
        except OSError as fault:
            raise TrackerDown(
                f"the files of the run cannot be written: {fault.strerror or fault}"
            ) from fault
        num_rows = len({point.step for point in batch.points})
        return {"num_rows": int(batch.state.get("num_rows", 0)) + num_rows}

    def _run(self, batch: Delivery, folder: Path) -> None:
        environment = {
            **environment_without_secrets(),
            "WANDB_API_KEY": self._api_key,
            "WANDB_DIR": str(folder),
            "WANDB_MODE": self._mode,
        }
        if self._base_url:
            environment["WANDB_BASE_URL"] = self._base_url
        try:
            done = subprocess.run(
                tethered(COMMAND),
                input=DELIVERY.dump_json(batch),
                capture_output=True,
                env=environment,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as fault:
            raise TrackerDown(f"no answer within {TIMEOUT_SECONDS:.0f} seconds") from fault
        except OSError as fault:
            raise TrackerDown(f"cannot start the child process: {fault.strerror}") from fault
        if done.returncode != 0:
            raise TrackerDown(self._reason(done.stdout, done.returncode))

    def _reason(self, output: bytes, status: int) -> str:
        """Returns the error that the child process has written as JSON, without the API key."""
        lines = output.decode(errors="replace").splitlines()
        try:
            text = str(json.loads(lines[-1])["error"])
        except (IndexError, ValueError, KeyError, TypeError):
            text = f"the child process ended with status {status}"
        return text.replace(self._api_key, "***")[:300]
