"""Migrations down and up again while others write: nothing that was accepted is lost, and nobody waits behind them for long."""

import threading

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from app.db.schema.migrate import downgrade, revisions, upgrade

FIRST = "0001"
INSERT = (
    "INSERT INTO files (id, project_id, filename, purpose, bytes, sha256, store_key) "
    "VALUES (%s, 'p', 'a', 'user_data', 1, '0', %s)"
)


class Writer(threading.Thread):
    """Inserts and reads back, one transaction a row, and keeps what it was told is committed."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__()
        self.url, self.number = url, number
        self.accepted: list[str] = []
        self.faults: list[Exception] = []
        self.is_stopping = threading.Event()

    def run(self) -> None:
        try:
            with psycopg.connect(
                self.url, autocommit=True, options="-c statement_timeout=10000"
            ) as connection:
                while not self.is_stopping.is_set():
                    name = f"file-{self.number}-{len(self.accepted)}"
                    connection.execute(INSERT, (name, name))
                    self.accepted.append(name)
                    connection.execute("SELECT count(*) FROM jobs").fetchone()
        except Exception as fault:  # noqa: BLE001  # shown by the test
            self.faults.append(fault)


def test_down_and_up_under_writers_loses_nothing(database: str) -> None:
    writers = [Writer(database, number) for number in range(4)]
    for writer in writers:
        writer.start()
    marks = []
    for _ in range(5):
        downgrade(database, FIRST)
        marks.append(sum(len(writer.accepted) for writer in writers))
        upgrade(database)
    for writer in writers:
        writer.is_stopping.set()
    for writer in writers:
        writer.join(20)
    assert [fault for writer in writers for fault in writer.faults] == []
    accepted = {name for writer in writers for name in writer.accepted}
    assert sorted(set(marks)) == marks, "the writers stood still"
    with psycopg.connect(database) as connection:
        assert {row[0] for row in connection.execute("SELECT id FROM files")} == accepted
    current, newest = revisions(database)
    assert current == newest is not None


def test_a_migration_behind_a_long_transaction_gives_up_before_it_stops_everybody(
    database: str,
) -> None:
    downgrade(database, FIRST)
    with psycopg.connect(database) as reader:
        reader.execute(
            "SELECT count(*) FROM models"
        ).fetchone()  # holds its lock until the block ends
        reader.execute("SELECT count(*) FROM jobs").fetchone()
        with pytest.raises(OperationalError, match="lock timeout"):
            upgrade(database)
    with psycopg.connect(database, autocommit=True) as writer:
        writer.execute(INSERT, ("file-1", "file-1"))
    upgrade(database)
