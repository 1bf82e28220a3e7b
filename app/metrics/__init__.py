"""Prometheus metrics of an API process, its serve workers and the database."""
