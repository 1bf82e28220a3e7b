"""Batches of requests: input files, answering their lines, output files."""
