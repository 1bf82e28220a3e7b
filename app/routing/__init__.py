"""Sends requests to serve workers and returns the generated tokens to the waiting coroutines."""
