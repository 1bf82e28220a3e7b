"""Routes of /v1/responses and of the tokenizers."""
