"""The training loop and what one step consists of."""
