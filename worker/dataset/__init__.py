"""Makes a data set from stored completions: rows, masking, duplicates, and the three sides."""
