"""Teacher outputs: hidden states or top-k logits, cached on disk or computed per batch."""
