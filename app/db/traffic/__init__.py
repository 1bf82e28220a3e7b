"""Queries and changes of stored completions, and of the data sets that are made from them."""
