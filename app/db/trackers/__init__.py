"""Positions of experiment trackers in the metrics of jobs."""
