"""Sends the metrics of jobs to experiment trackers."""
