"""Held-out metrics with confidence intervals, the report, and the selection of a student."""
