"""Turns files of conversations into batches of tokens, and caches the teacher's answers."""
