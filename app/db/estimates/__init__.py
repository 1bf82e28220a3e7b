"""Queries for estimates of jobs."""
