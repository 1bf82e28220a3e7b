"""The room that batches share: nobody is overtaken, and what is too large for it goes alone."""

import asyncio

from app.services.batch_runner import Room


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
            asyncio.create_task(ask(name, num)) for name, num in (("a", 2), ("b", 2), ("c", 100), ("d", 1))
        ]
        for given_back in (2, 2, 100):
            await settle()
            room.give_back(given_back)
        await asyncio.gather(*tasks)
        return began

    assert asyncio.run(run()) == ["a", "b", "|", "|", "c", "|", "d"]
