"""Spools: files that keep records, read as the database takes them."""

import os
from pathlib import Path

import pytest

from app.services.traffic import spool as spool_module
from app.services.traffic.spool import LOCK, Segment, Spool, SpoolFull


def read_all(segment: Segment) -> list[bytes]:
    records = []
    while not segment.is_read:
        lines = segment.peek(2, 10**6)
        segment.advance(lines)
        records += lines
    return records


def test_records_are_read_in_order_while_more_are_appended(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 10**6)
    spool.append([b"one", b"two", b"three"])
    segment = spool.oldest()
    assert segment is not None
    assert read_all(segment) == [b"one", b"two", b"three"]
    assert spool.oldest() is None
    spool.append([b"four"])
    assert spool.oldest() is segment
    assert segment.number == 3
    assert read_all(segment) == [b"four"]
    assert spool.num_waiting_bytes == 0


def test_a_full_segment_is_closed_and_the_next_one_is_read_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 4)
    spool = Spool(tmp_path, 10**6)
    for line in (b"first", b"second"):
        spool.append([line])
    segment = spool.oldest()
    assert segment is not None
    assert read_all(segment) == [b"first"]
    assert segment.is_closed
    segment.delete()
    spool.forget(segment)
    following = spool.oldest()
    assert following is not None
    assert read_all(following) == [b"second"]


def test_a_segment_that_was_read_is_closed_once_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, 10**6)
    spool.append([b"record"])
    segment = spool.oldest()
    assert segment is not None
    read_all(segment)
    assert spool.oldest() is None
    monkeypatch.setattr(spool_module, "SEGMENT_SECONDS", 0.0)
    assert spool.oldest() is segment
    assert segment.is_closed


def test_a_full_spool_refuses_records_and_keeps_those_it_has(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 10)
    spool.append([b"a record"])
    spool.append([b"another"])
    with pytest.raises(SpoolFull):
        spool.append([b"too many"])
    segment = spool.oldest()
    assert segment is not None
    assert read_all(segment) == [b"a record", b"another"]


def test_a_write_that_fails_leaves_no_part_of_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, 10**6)
    spool.append([b"whole"])
    write = os.write

    def write_half(descriptor: int, content: bytes) -> int:
        if len(content) < 4:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[: len(content) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_half)
        with pytest.raises(OSError, match="No space"):
            spool.append([b"a longer record"])
    spool.append([b"next"])
    segment = spool.oldest()
    assert segment is not None
    assert read_all(segment) == [b"whole", b"next"]


def test_only_spools_without_a_process_are_adopted_and_without_a_torn_record(
    tmp_path: Path,
) -> None:
    alive = Spool(tmp_path, 10**6)
    alive.append([b"of the living"])
    folder = tmp_path / "ended"
    folder.mkdir()
    (folder / LOCK).touch()
    (folder / "1.jsonl").write_bytes(b"zero\none\ntwo\nto")
    adopter = Spool(tmp_path, 10**6)
    (abandoned,) = adopter.abandoned()
    (segment,) = abandoned.segments()
    segment.skip(1)
    assert segment.number == 1
    assert read_all(segment) == [b"one", b"two"]
    segment.delete()
    abandoned.close()
    assert not folder.exists()


def test_a_released_spool_leaves_nothing_once_its_segments_are_deleted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 10**6)
    spool.append([b"record"])
    spool.close()
    segment = spool.oldest()
    assert segment is not None
    segment.delete()
    spool.release()
    assert list(tmp_path.iterdir()) == []
