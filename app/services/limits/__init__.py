"""Limits of requests and tokens per minute, and budgets of tokens per day and month."""
