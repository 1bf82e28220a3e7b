"""Losses between teacher and student, computed from hidden states in chunks of rows."""
