"""What a teacher gives: hidden states or top-k rows, cached on disk or computed per batch."""
