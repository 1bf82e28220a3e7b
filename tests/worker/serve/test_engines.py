"""Making engines: how far a load has come is known while it goes on."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from app.contracts import ArtifactRef
from app.control import Served
from worker.serve.engines import READ_PERCENT, EngineLimits, LoadProgress, make_ready, watch_loads

LIMITS = EngineLimits(max_running=4, max_context_tokens=64, device="cpu", clock=time.time)


class Watched(LoadProgress):
    """Notes the progress at each of transformers' steps."""

    def counted(self, things: Iterable[Any], total: int) -> Iterator[Any]:
        self.seen: list[float] = []
        for thing in super().counted(things, total):
            self.seen.append(self.percent)
            yield thing


def test_progress_follows_the_reading_of_the_weights(tiny_llama_dir: Path) -> None:
    served = Served(model="tiny", weights=ArtifactRef(key="models/tiny", bytes=1000))
    progress = Watched(served.stored_bytes)
    watch_loads()
    ready = make_ready(served, lambda ref: tiny_llama_dir, LIMITS, progress)
    assert len(progress.seen) > 10
    assert progress.seen == sorted(set(progress.seen))
    assert progress.seen[-1] < progress.percent == READ_PERCENT
    assert ready.first_token_seconds is not None
    assert not ready.engine.has_work()
