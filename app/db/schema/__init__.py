"""Database schema: ORM classes, row ids, JSON values and migrations."""
