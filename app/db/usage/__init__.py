"""Limits of keys and projects, and the tokens that they have used."""
