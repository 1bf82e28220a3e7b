"""Databases of the tests: none is left at the end of a session."""

import psycopg

from tests.spare_databases import SpareDatabases


def names(server_url: str) -> set[str]:
    with psycopg.connect(server_url) as connection:
        return {str(row[0]) for row in connection.execute("SELECT datname FROM pg_database")}


def test_all_databases_are_dropped_also_one_that_was_given_back(
    postgres_url: str, template_database: str
) -> None:
    before = names(postgres_url)
    databases = SpareDatabases(postgres_url, template_database, prefix="spare")
    first, second = databases.take(), databases.take()
    assert len(names(postgres_url)) == len(before) + 2
    databases.give_back(first)
    assert databases.take() == first
    with psycopg.connect(second):
        databases.drop_all()
    assert names(postgres_url) == before


def test_a_database_that_a_killed_session_has_left_is_replaced(
    postgres_url: str, template_database: str
) -> None:
    left = SpareDatabases(postgres_url, template_database, prefix="spare").take()
    databases = SpareDatabases(postgres_url, template_database, prefix="spare")
    assert databases.take() == left
    databases.drop_all()
