"""Batches of generation requests: input files, runs and output files."""
