"""Processes that `stillhouse up` starts and owns: Postgres, Valkey, the API and the workers."""
