"""Distils a teacher into a student, without access to the queue or the database."""
