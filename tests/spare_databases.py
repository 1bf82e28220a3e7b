"""Databases of the tests. One that a test has left is emptied for a later test, if that is possible.

A copy of the template takes ten times as long as emptying the few tables that a test has filled.
"""

import itertools
import os

import psycopg
from psycopg import sql

# All objects that a test could have changed: tables, columns, indexes, constraints, functions.
FINGERPRINT = """
SELECT (SELECT string_agg(c.relname || c.relkind::text || c.relnatts, ',' ORDER BY c.oid)
        FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace),
       (SELECT string_agg(conname, ',' ORDER BY oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace),
       (SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace),
       (SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal),
       (SELECT setconfig FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
        WHERE d.datname = current_database()),
       (SELECT string_agg(version_num, ',') FROM alembic_version)
"""
OTHERS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""
FILLED = """
SELECT relname FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relname <> 'alembic_version'
  AND (pg_relation_size(oid) > 0 OR relpages > 0)
"""
RESTARTED = """
SELECT setval(format('%I.%I', schemaname, sequencename)::regclass, start_value, false)
FROM pg_sequences WHERE last_value IS NOT NULL
"""
DROP = "DROP DATABASE IF EXISTS {} WITH (FORCE)"


class SpareDatabases:
    """Databases of one server that are equal to the template."""

    def __init__(self, server_url: str, template: str, *, prefix: str = "test") -> None:
        self._server_url = server_url
        self._template, self._prefix = template, prefix
        self._spare: list[str] = []
        self._all: list[str] = []
        self._numbers = itertools.count()
        with self._connect(template) as connection:
            self._fingerprint = connection.execute(FINGERPRINT).fetchone()

    def take(self) -> str:
        """Returns the URL of an empty, migrated database."""
        if not self._spare:
            name = f"{self._prefix}_{os.getpid()}_{next(self._numbers)}"
            self._all.append(name)
            self._run(DROP, name)  # a killed session with the same process id may have left it
            self._run("CREATE DATABASE {} TEMPLATE {}", name, self._template)
            self._spare.append(name)
        return database_url(self._server_url, self._spare.pop())

    def give_back(self, url: str) -> None:
        """Empties a database. Drops it if somebody is still connected, or if its schema changed."""
        name = url.partition("?")[0].rsplit("/", 1)[1]
        try:
            is_empty = self._empty(name)
        except psycopg.Error:  # for example, the test has dropped it
            is_empty = False
        if is_empty:
            self._spare.append(name)
        else:
            self._run(DROP, name)

    def drop_all(self) -> None:
        """Drops all databases that were created."""
        for name in self._all:
            self._run(DROP, name)
        self._all, self._spare = [], []

    def _empty(self, name: str) -> bool:
        with self._connect(name) as connection:
            others = connection.execute(OTHERS).fetchone()
            if others != (0,) or connection.execute(FINGERPRINT).fetchone() != self._fingerprint:
                return False
            tables = [sql.Identifier(str(row[0])) for row in connection.execute(FILLED)]
            if tables:
                connection.execute(
                    sql.SQL("TRUNCATE {} CASCADE").format(sql.SQL(", ").join(tables))
                )
            connection.execute(RESTARTED)
        return True

    def _connect(self, name: str) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(database_url(self._server_url, name), autocommit=True)

    def _run(self, command: str, *names: str) -> None:
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            connection.execute(sql.SQL(command).format(*map(sql.Identifier, names)))


def database_url(server_url: str, name: str) -> str:
    """The URL of another database of the same server."""
    address, question, query = server_url.partition("?")
    return f"{address.rsplit('/', 1)[0]}/{name}{question}{query}"
