"""Data sets from stored completions: rows, masking, duplicates, and the three sides."""
