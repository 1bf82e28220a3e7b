"""Divergences between teacher and student, computed in chunks from hidden states."""
