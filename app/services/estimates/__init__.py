"""Estimates of a job before it runs: tokens, steps, memory, disk and time."""
