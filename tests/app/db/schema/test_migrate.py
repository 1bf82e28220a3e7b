from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import CheckConstraint, text

from app.db.schema import registry_tables, tracker_tables  # noqa: F401 (they add tables)
from app.db.schema.migrate import downgrade, upgrade
from app.db.schema.table import Table
from app.db.session import engine


def test_the_migrated_schema_is_the_one_the_tables_describe(database: str) -> None:
    with engine().connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []


def test_check_constraints_are_those_of_the_tables(database: str) -> None:
    described = {
        str(constraint.name)
        for table in Table.metadata.tables.values()
        for constraint in table.constraints
        if isinstance(constraint, CheckConstraint)
    }
    with engine().connect() as connection:
        rows = connection.execute(text("SELECT conname FROM pg_constraint WHERE contype = 'c'"))
        migrated = {row.conname for row in rows if row.conname.startswith("ck_")}
    assert migrated == described


def test_a_migration_can_be_taken_back_and_made_again(database: str) -> None:
    downgrade(database, "base")
    with engine().connect() as connection:
        left = connection.execute(
            text(
                "SELECT relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = 'public'"
            )
        )
        assert {row.relname for row in left} == {"alembic_version", "alembic_version_pkc"}
        connection.rollback()
    upgrade(database)
    test_the_migrated_schema_is_the_one_the_tables_describe(database)


def test_older_checkpoints_lose_metrics_that_are_not_of_their_step(database: str) -> None:
    downgrade(database, "0004")
    with engine().begin() as connection:
        connection.execute(
            text(
                "INSERT INTO jobs (id, kind, spec, model_id) VALUES ('j', 'distillation', '{}', 'm');"
                "INSERT INTO job_metrics (job_id, name, step, value) VALUES ('j', 'valid_kl', 4, 1), ('j', 'lr', 5, 1);"
                "INSERT INTO checkpoints (id, job_id, lease_token, step, store_key, bytes, manifest_sha256, metrics) "
                "SELECT step::text, 'j', 1, step, 'k', 1, '', '{\"valid_kl\": 1}' FROM generate_series(4, 5) step"
            )
        )
    upgrade(database)
    with engine().connect() as connection:
        rows = connection.execute(text("SELECT step, metrics FROM checkpoints ORDER BY step")).all()
    assert [tuple(row) for row in rows] == [(4, {"valid_kl": 1}), (5, {})]


def test_migrating_twice_changes_nothing(database: str) -> None:
    upgrade(database)
    test_the_migrated_schema_is_the_one_the_tables_describe(database)
