"""Lanes: every promise is in one of them, none takes much longer than the others, and a broken one is told of."""

from pathlib import Path

from tests.faults import disk
from tests.faults.__main__ import NUM_LANES, ORDER, PROMISES, table
from tests.faults.lanes import pack, run_lanes

MINUTES = {promise.name: promise.minutes for promise in PROMISES} | disk.MINUTES


def test_lanes_share_all_promises_out() -> None:
    lanes = pack(MINUTES, NUM_LANES)
    assert sorted(name for lane in lanes for name in lane) == sorted(ORDER)
    # `make faults` takes about an hour
    assert max(sum(MINUTES[name] for name in lane) for lane in lanes) <= 65
    assert pack({"kills": 1.0}, 4) == [["kills"]]


def test_a_lane_that_breaks_keeps_no_promise(tmp_path: Path) -> None:
    rows = run_lanes([["no such promise"]], tmp_path, seed=1, minutes=1)
    assert [(row["promise"], row["faults"], row["is_kept"]) for row in rows] == [
        ("no such promise", 0, False)
    ]
    assert "**no**" in table([{**rows[0], "promise": "kills"}])
