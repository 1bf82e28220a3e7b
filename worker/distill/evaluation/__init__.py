"""Held-out metrics with their intervals, the report, and the choice among several students."""
