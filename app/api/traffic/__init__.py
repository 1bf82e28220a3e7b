"""Routes for stored completions and data sets."""
