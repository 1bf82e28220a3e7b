"""Converts prompts to tokens, and tokens to text and replies."""
