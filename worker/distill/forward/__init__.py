"""Forward passes up to the hidden states that a loss needs."""
