"""The room that batches share: nobody is overtaken, and what is too large for it goes alone."""

import asyncio
import json
from collections.abc import Callable

from app.json_limits import MAX_FIELDS
from app.services.batch.batch_runner import PendingLines, Room
from app.settings import Settings
from app.storage import store


def test_requests_get_room_in_turn_and_a_large_one_goes_alone() -> None:
    async def run() -> list[str]:
        room, began = Room(4), []

        async def ask(name: str, num_sequences: int) -> None:
            await room.take(num_sequences)
            began.append(name)

        async def settle() -> None:
            for _ in range(10):
                await asyncio.sleep(0)
            began.append("|")

        tasks = [
            asyncio.create_task(ask(name, num))
            for name, num in (("a", 2), ("b", 2), ("c", 100), ("d", 1))
        ]
        for given_back in (2, 2, 100):
            await settle()
            room.give_back(given_back)
        await asyncio.gather(*tasks)
        return began

    assert asyncio.run(run()) == ["a", "b", "|", "|", "c", "|", "d"]


def test_a_line_beyond_the_limits_of_today_that_was_accepted_before_is_run(
    settings_env: Callable[..., Settings],
) -> None:
    bias = {str(n): 1 for n in range(MAX_FIELDS + 1)}
    with store().writer("files/lines") as file:
        for name, body in (("a", {"model": "m", "logit_bias": bias}), ("b", {"model": "m"})):
            request = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(request).encode() + b"\n")

    async def take_all() -> list[tuple[int, str]]:
        lines, taken = PendingLines("files/lines", set(), settings_env()), []
        while (line := await lines.take()) is not None:
            taken.append((line[0], line[1].custom_id))
        return taken

    assert asyncio.run(take_all()) == [(1, "a"), (2, "b")]
